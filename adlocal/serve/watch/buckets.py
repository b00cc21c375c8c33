"""Sums over the last hour by minute and over the last day by hour: all that is kept of a subject's numbers."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

#: What is summed. `gap` and `gap2` are seconds between requests, at most an hour each, and their squares.
FIELDS = (
    "requests",
    "prompt_tokens",
    "reasoning",
    "cool",
    "gaps",
    "gap",
    "gap2",
    "finished",
    "completion_tokens",
    "long",
    "rows",
    "choices",
    "dose",
)
Sums = dict[str, float]
HOUR, DAY = 3600, 86_400


class _Ring:
    """Sums in `size` consecutive spans of `width` seconds."""

    def __init__(self, size: int, width: int) -> None:
        self.width = width
        self.sums = np.zeros((size, len(FIELDS)))
        self.spans = np.full(size, -1, np.int64)

    def add(self, time: float, values: npt.NDArray[np.float64]) -> None:
        span = int(time // self.width)
        slot = span % len(self.spans)
        if self.spans[slot] < span:
            self.sums[slot], self.spans[slot] = 0.0, span
        if self.spans[slot] == span:  # else it comes too late to count
            self.sums[slot] += values

    def total(self, now: float, window: int) -> npt.NDArray[np.float64]:
        last = int(now // self.width)
        chosen = (self.spans > last - math.ceil(window / self.width)) & (self.spans <= last)
        total: npt.NDArray[np.float64] = self.sums[chosen].sum(axis=0)
        return total


class Buckets:
    """One subject's sums, in 9 KB whatever its traffic."""

    def __init__(self) -> None:
        self._minutes = _Ring(60, 60)
        self._hours = _Ring(24, HOUR)

    def add(self, time: float, **values: float) -> None:
        """Adds to the sums of `FIELDS` that are named."""
        row = np.array([values.get(name, 0.0) for name in FIELDS])
        self._minutes.add(time, row)
        self._hours.add(time, row)

    def total(self, now: float, window: int) -> Sums:
        """Sums over the last `window` seconds, a day at most: by whole minutes up to an hour, by whole hours beyond.

        The span that `now` lies in has only begun, so the window is up to one span shorter than its name.
        """
        ring = self._minutes if window <= HOUR else self._hours
        return dict(zip(FIELDS, ring.total(now, window).tolist(), strict=True))
