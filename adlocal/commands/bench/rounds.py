"""Contestants that take turns."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

#: Runs once, and tells what it measured, by name.
Contestant = Callable[[], Mapping[str, float]]


def medians(contestants: Sequence[Contestant], rounds: int, what: str) -> dict[str, float]:
    """Median over rounds of each figure. Contestants take turns, so that a drift of the machine hits all alike.

    Args:
        contestants: their figures have names of their own.
        rounds: that count; one more goes before, to warm up.
        what: is measured, for the progress bar.
    """
    found: list[dict[str, float]] = []
    with tqdm(total=(rounds + 1) * len(contestants), desc=what, unit="turn", file=sys.stderr) as bar:
        for _ in range(rounds + 1):
            figures: dict[str, float] = {}
            for contestant in contestants:
                figures |= contestant()
                bar.update()
            found.append(figures)
    return {name: statistics.median(figures[name] for figures in found[1:]) for name in found[0]}
