"""When the pair was evaluated along a text, and what that predicts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: What `LockstepContext.stats` tells.
Stats = Mapping[str, int]


@dataclass(frozen=True)
class Gaps:
    """How a text drove the pair.

    Attributes:
        sizes: of the pair's batches for the last tokens, in tokens.
        rows_before_choice: how many rows came before the first one that had a choice, the prompt's among them.
        decodes_before_choice: batches of the pair until then: 0, unless something evaluates it for nothing.
    """

    sizes: list[int]
    rows_before_choice: int
    decodes_before_choice: int

    @classmethod
    def of(cls, stats: Sequence[Stats], n_last: int) -> Gaps:
        """From the stats before the prompt, and after each token.

        Args:
            stats: each counts from the same start.
            n_last: of how many tokens, the last ones, the sizes are kept.
        """
        idle = [each for each in stats if each["n_choices"] == stats[0]["n_choices"]][-1]
        sizes = [
            size
            for step in itertools.starmap(difference, itertools.pairwise(stats[-n_last - 1 :]))
            for size in _batches(step["n_pair_decodes"], step["n_pair_tokens"])
        ]
        before = difference(stats[0], idle)
        return cls(sizes, before["n_rows"], before["n_pair_decodes"])

    @property
    def counts(self) -> dict[int, int]:
        """How many batches there were of each size, smallest first."""
        return dict(sorted(Counter(self.sizes).items()))


def difference(before: Stats, after: Stats) -> dict[str, int]:
    """What was counted in between."""
    return {name: after[name] - before[name] for name in after}


def shares(counted: Stats, n_tokens: int) -> dict[str, float]:
    """What was counted while `n_tokens` were sampled, as shares of rows and of tokens."""
    return {
        "share_of_choices": counted["n_choices"] / counted["n_rows"],
        "passes_per_token": counted["n_pair_decodes"] / n_tokens,
        "proxy_tokens_per_token": counted["n_pair_tokens"] / n_tokens,
    }


def predicted(teacher: float, counts: Mapping[int, int], costs: Mapping[int, float], n_tokens: int) -> float:
    """Seconds a token that bare decodes take: the teacher's, and its share of the pair's batches.

    Args:
        teacher: seconds of one token.
        counts: number of the pair's batches by their size.
        costs: seconds of one in both proxies, by size.
        n_tokens: that were sampled meanwhile.
    """
    return teacher + sum(n * costs[size] for size, n in counts.items()) / n_tokens


def _batches(n: int, n_tokens: int) -> list[int]:
    """Sizes of the batches that a step took: one, but for tokens on both sides of a multiple of the largest."""
    return [n_tokens // n + (i < n_tokens % n) for i in range(n)]
