"""What a prompt may begin with: evaluated in the blocks of rows in which a fresh context would have evaluated it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from adlocal.engine.prefix import BLOCK, Prefix, cuts, whole_blocks

#: Where a token was in its batch, for every size of block that a kernel may have.
Place = tuple[tuple[int, int], ...]


@pytest.mark.parametrize(
    ("start", "n", "n_batch", "sizes"),
    [
        (0, 1, 512, [1]),
        (0, 2, 512, [1, 1]),
        (0, 100, 512, [99, 1]),
        (64, 36, 512, [35, 1]),
        (0, 512, 512, [511, 1]),
        (0, 513, 512, [512, 1]),
        (0, 514, 512, [512, 1, 1]),
        (480, 600, 512, [32, 512, 55, 1]),
        (0, 10, 3, [3, 3, 3, 1]),
        (5, 3, 1, [1, 1, 1]),
    ],
)
def test_the_last_token_of_a_prompt_is_by_itself(start: int, n: int, n_batch: int, sizes: list[int]) -> None:
    """The others are cut at multiples of the batch's size."""
    assert cuts(start, n, n_batch) == sizes
    assert sum(sizes) == n


@pytest.mark.parametrize(("n", "whole"), [(1, 1), (31, 31), (32, 32), (33, 32), (100, 96), (512, 512), (700, 672)])
def test_batches_end_where_blocks_do(n: int, whole: int) -> None:
    assert whole_blocks(n) == whole


HELD = list(range(200))


@pytest.mark.parametrize(
    ("canonical", "usable", "n_shared", "n_prompt", "n"),
    [
        (99, 100, 100, 100, 99),  # the same prompt: all but the last
        (99, 150, 100, 100, 99),  # with text sampled after it
        (0, 0, 0, 10, 0),
        (99, 100, 0, 100, 0),
        (99, 100, 5, 50, 0),
        (99, 100, 40, 100, 32),  # a block's end
        (99, 100, 64, 100, 64),
        (99, 100, 98, 300, 96),
        (99, 100, 99, 99, 96),  # its last was among others
        (99, 100, 66, 66, 32),  # one that a fresh context would not evaluate alone: a block less
        (99, 100, 65, 65, 64),
        (99, 100, 33, 34, 0),
        (199, 200, 130, 130, 128),  # at a batch's end it would
        (100, 100, 100, 101, 100),  # whole prompts of strength 0
        (100, 100, 100, 100, 96),
        (49, 120, 120, 300, 120),  # goes on from what was sampled
        (49, 120, 80, 300, 32),  # from less than a block of it
        (49, 120, 81, 300, 81),
        (0, 50, 50, 60, 50),  # of which nothing is known
        (0, 20, 20, 60, 0),
        (49, 60, 120, 300, 32),  # what was not protected is no place to go on from
        (0, 0, 120, 300, 0),
        (0, 1, 1, 1, 0),
    ],
)
def test_how_much_of_a_prompt_is_kept(canonical: int, usable: int, n_shared: int, n_prompt: int, n: int) -> None:
    prompt = [*HELD[:n_shared], *[-1] * (n_prompt - n_shared)]
    assert Prefix(128, canonical, usable).reusable(HELD, prompt) == n


def test_what_is_noted_of_a_decode() -> None:
    prefix = Prefix(128)
    for start, n, protects, canonical, usable in [
        (0, 128, True, 128, 128),
        (128, 50, True, 178, 178),
        (178, 1, True, 178, 179),  # the last of a prompt, sampled text
        (179, 1, True, 178, 180),
        (180, 4, True, 178, 184),  # a draft
        (182, 1, False, 178, 182),  # which was wrong, and goes on unprotected
        (183, 1, True, 178, 182),
        (160, 40, True, 200, 200),  # another prompt
        (200, 1, True, 200, 201),
        (100, 40, True, 96, 140),  # not from a block's begin on
        (0, 50, False, 50, 50),  # a whole prompt of strength 0
        (50, 1, False, 50, 50),
        (32, 40, False, 72, 72),
        (40, 30, False, 32, 40),
    ]:
        prefix.decoded(start, n, protects=protects)
        assert (prefix.canonical, prefix.usable) == (canonical, usable), (start, n)
    prefix.truncated(31)
    assert (prefix.canonical, prefix.usable) == (0, 31)


@dataclass
class Context:
    """Tokens in memory, each with its place in the batch that it was evaluated in, and whether it was sampled."""

    n_batch: int
    tokens: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prefix = Prefix(whole_blocks(self.n_batch))

    def decode(self, tokens: Sequence[int], *, protects: bool = True, sampled: bool = False) -> None:
        start, n = len(self.tokens), len(tokens)
        self.tokens += tokens
        self.sampled += [sampled] * n
        self.plain += [not protects] * n
        for i in range(n):
            blocks = [(i % b, min(b, n - i // b * b)) for b in (2, 4, 8, 16)]
            self.places.append((*blocks, (min(n, 2), 0)))  # and whether it was alone
        self.prefix.decoded(start, n, protects=protects)

    def keep(self, n: int) -> None:
        del self.tokens[n:], self.places[n:], self.sampled[n:], self.plain[n:]
        self.prefix.truncated(n)

    def protected(self, prompt: list[int]) -> bool:
        """Evaluates a prompt; whether it went on from text that was sampled under protection."""
        n = self.prefix.reusable(self.tokens, prompt)
        self.keep(n)
        goes_on = any(s and not p for s, p in zip(self.sampled, self.plain, strict=True))
        assert not goes_on or not any(self.plain[self.prefix.canonical :])
        for size in cuts(n, len(prompt) - n, self.prefix.n_batch):
            self.decode(prompt[len(self.tokens) :][:size])
        return goes_on

    def unprotected(self, prompt: list[int]) -> None:
        """The same as llama-cpp-python does it: all that is new, in batches from there on."""
        same = [a == b for a, b in zip(self.tokens, prompt[:-1], strict=False)]
        self.keep([*same, False].index(False))
        while new := prompt[len(self.tokens) :][: self.n_batch]:
            self.decode(new, protects=False)

    def sample(self, tokens: Sequence[int], *, protects: bool) -> None:
        for token in tokens:
            self.decode([token], protects=protects, sampled=True)


@pytest.mark.parametrize("n_batch", [1, 7, 32, 48, 64, 100, 512])
def test_a_prompt_is_evaluated_as_in_a_fresh_context(n_batch: int) -> None:
    """After any prompts, of strength 0 too: every token but one that follows sampled text that is kept."""
    rng = random.Random(n_batch)
    n_kept = 0
    for _ in range(20):
        context, prompts = Context(n_batch), [[rng.randrange(3) for _ in range(rng.randrange(1, 250))]]
        for _ in range(40):
            old = rng.choice([*prompts, context.tokens])
            prompt = old[: rng.randrange(len(old) + 1)] if rng.random() < 0.7 else list(old)
            prompt = [*prompt, *(rng.randrange(3) for _ in range(rng.choice([0, 0, 1, 2, 30, 100])))][:300] or [0]
            prompts.append(prompt)
            protects = rng.random() < 0.7
            if not protects:
                context.unprotected(prompt)
            else:
                keeps = context.prefix.reusable(context.tokens, prompt) > 0
                fresh = Context(n_batch)
                fresh.protected(prompt)
                if not context.protected(prompt):
                    assert context.places == fresh.places
                    n_kept += keeps
                assert context.tokens == prompt
            context.sample([rng.randrange(3) for _ in range(rng.randrange(60))], protects=protects)
    assert n_kept > 20 or n_batch == 1


def test_a_block_is_a_multiple_of_every_kernels() -> None:
    assert BLOCK % 16 == 0
