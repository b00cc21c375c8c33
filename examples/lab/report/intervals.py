"""95% intervals: of an accuracy, of a mean over seeds, and of the difference of two students."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adlocal.statistics import mean_error

_Z = 1.959964
# Student's t for 95%, two-sided, by degrees of freedom from 1 on; beyond, the normal distribution is 4% too narrow.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(right: Sequence[bool]) -> Interval:
    """Of the accuracy that `right` is a sample of: covers the draw of the test problems, nothing else."""
    n, p = len(right), sum(right) / len(right)
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))  # rounding aside


def over_seeds(values: Sequence[float]) -> Interval:
    """Of the mean over worlds, by Student's t: covers all that a seed redraws, models, data and training.

    Not what all seeds share: the task, the sizes of the models, the test problems.
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        raise ValueError("one seed has no spread")
    half = _half(values)
    return Interval(mean, mean - half, mean + half)


def paired(ours: Sequence[bool], theirs: Sequence[bool]) -> Interval:
    """Of the difference of two students' accuracies on the same problems: covers the draw of the problems alone.

    Another training of the same two students would move it as well.
    """
    return paired_with_mean(ours, [theirs])


def paired_with_mean(ours: Sequence[bool], theirs: Sequence[Sequence[bool]]) -> Interval:
    """Of a student's accuracy less the mean of several that differ by a random draw, on the same problems.

    Covers the draw of the problems and, of two or more, the draw that tells them apart: their mean is a sample's, too.
    Not the draw of models and data, nor our student's training.
    """
    difference = np.asarray(ours, dtype=float) - np.mean(np.asarray(theirs, dtype=float), axis=0)
    half = _Z * mean_error(difference)
    if len(theirs) > 1:
        half = math.hypot(half, _half([float(np.mean(right)) for right in theirs]))
    mean = float(difference.mean())
    return Interval(mean, mean - half, mean + half)


def _half(values: Sequence[float]) -> float:
    """Half the width of the t interval of the mean."""
    n = len(values)
    t = _T[n - 2] if n - 2 < len(_T) else _Z
    return t * mean_error(values)
