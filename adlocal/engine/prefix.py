"""What a context remembers of a prompt, and how much of it may be used so that the answer is that of a fresh one.

On CPU kernels that round activations, a token's keys and values depend on the batch that it was evaluated in: alone,
in a block of rows, or among what is left over at a batch's end (`adlocal bench` says by how much). So prompts are
evaluated in batches that begin at multiples of `BLOCK` positions, their last token by itself, and what is used of one
that is cached ends at such a multiple too.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Tokens. The blocks in which kernels take rows are powers of two up to 16.
BLOCK = 32


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def canonical(before: int, start: int, n: int) -> int:
    """How many leading tokens are as a fresh context would have them, once `n` more were decoded from `start` on.

    Args:
        before: how many were.
    """
    continues = n > 1 and start <= before and start % BLOCK == 0
    return start + n if continues else min(before, start)


def reusable(held: Sequence[int], canonical: int, prompt: Sequence[int]) -> int:
    """How many of the tokens that are held a prompt may begin with.

    A prompt that a fresh context would evaluate alike gives up less than a block for that. One that goes on from what
    was sampled a token at a time, as the next turn of a conversation does, cannot have it, and uses all.

    Args:
        held: tokens in memory.
        canonical: how many of them are as a fresh context would have them.
        prompt: tokens to be evaluated, of which the last is always evaluated again.
    """
    n = min(common(held, prompt), len(prompt) - 1)
    if n == canonical == len(prompt) - 1:
        return n
    aligned = min(n, canonical) // BLOCK * BLOCK
    return aligned if n - aligned < BLOCK else n


def cuts(start: int, n: int, n_batch: int) -> list[int]:
    """Sizes of the batches in which a prompt's `n` tokens from position `start` on are evaluated, the last by itself."""
    sizes = []
    end = start + n - 1
    while start < end:
        size = min(end, (start // n_batch + 1) * n_batch) - start
        sizes.append(size)
        start += size
    return [*sizes, 1]
