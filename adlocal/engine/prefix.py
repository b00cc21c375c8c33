"""What a context holds of a prompt, and how much of it may be used so that the answer is that of a fresh one.

On CPU kernels a token's keys and values depend on the batch that it was evaluated in: alone, in a block of rows, or
among what is left over at a batch's end. So prompts are evaluated in batches that begin at multiples of `BLOCK`
positions, their last token by itself, and what is used of one that is cached ends at such a multiple too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Tokens. The blocks in which kernels take rows are powers of two up to 16.
BLOCK = 32


def whole_blocks(n_batch: int) -> int:
    """The largest batch of no more than `n_batch` tokens after which another one may begin."""
    return n_batch // BLOCK * BLOCK or n_batch


def cuts(start: int, n: int, n_batch: int) -> list[int]:
    """Sizes of the batches in which `n` tokens of a prompt are evaluated from `start` on, the last by itself."""
    sizes = []
    end = start + n - 1
    while start < end:
        size = min(end, (start // n_batch + 1) * n_batch) - start
        sizes.append(size)
        start += size
    return [*sizes, 1]


@dataclass
class Prefix:
    """How the tokens in a context's memory were evaluated.

    Attributes:
        n_batch: most tokens that are evaluated in one go, see `whole_blocks`.
        canonical: how many leading tokens are as a fresh context would have them.
        usable: how many a prompt may go on from at all.
    """

    n_batch: int
    canonical: int = 0
    usable: int = 0

    def decoded(self, start: int, n: int, *, protects: bool) -> None:
        """Notes that `n` tokens were decoded from position `start` on.

        Unprotected text is evaluated in batches of llama-cpp-python's. Of those, only what a fresh context would have
        evaluated alike may be used.
        """
        self.truncated(start)
        if n > 1 and start == self.canonical == self._aligned(start):
            self.canonical = start + n
        if protects and self.usable == start:
            self.usable = start + n
        self.usable = max(self.usable, self.canonical)

    def truncated(self, n: int) -> None:
        """Notes that no more than the first `n` tokens are left."""
        if n < self.canonical:
            self.canonical = self._aligned(n)
        self.usable = min(self.usable, n)

    def reusable(self, held: Sequence[int], prompt: Sequence[int]) -> int:
        """How many of the tokens that are held a prompt may begin with.

        Some tens of tokens are given up so that the others are as a fresh context would have them. A prompt that goes
        on from a block and more of what was sampled a token at a time, as the next turn of a conversation does, would
        have to give up all of that, and keeps it.

        Args:
            held: tokens in memory.
            prompt: tokens to be evaluated, of which the last is always evaluated again.
        """
        end = len(prompt) - 1
        n = min(_common(held, prompt), end, self.usable)
        if n == end == self.canonical:
            return n
        if n - self.canonical >= BLOCK:
            return n
        aligned = self._aligned(min(n, self.canonical))
        if end - aligned == 1 and aligned % self.n_batch:  # which a fresh context would not evaluate alone
            aligned -= BLOCK
        return aligned

    def _aligned(self, n: int) -> int:
        """The last place before `n` at which a batch may begin."""
        return n // self.n_batch * self.n_batch + n % self.n_batch // BLOCK * BLOCK


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
