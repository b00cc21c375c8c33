"""Standard errors, estimated from the sample itself: how far a figure would move with another draw of the same size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Values = Sequence[float] | Sequence[bool] | npt.NDArray[np.float64]


def mean_error(values: Values) -> float:
    """Of the mean of n independent values, in their unit; 0 for a single one, which shows no spread."""
    if len(values) < 2:
        return 0.0
    return float(np.std(np.asarray(values, dtype=float), ddof=1)) / math.sqrt(len(values))


def paired_error(first: Values, second: Values) -> float:
    """Of the difference between two means over the same n items, such as two accuracies on the same prompts.

    What both have in common, easy prompts and hard ones, cancels: n items of which few differ say more than two
    independent samples of n. Values of the same item stand at the same place.

    Raises:
        ValueError: there are not as many values of one as of the other.
    """
    ours, theirs = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} and {len(theirs)} values: pairs need as many of each")
    return mean_error(ours - theirs)


def ratio_error(sums: Values, counts: Values) -> float:
    """Of Σ sums / Σ counts over n items, such as nats a token over prompts of different lengths; 0 for a single one."""
    total, n = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    residuals = total - n * (total.sum() / n.sum())
    return mean_error(residuals) * len(n) / float(n.sum())
