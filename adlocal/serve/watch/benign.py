"""What is usual: median and σ of each feature in benign traffic, by window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Benign:
    """Median and σ of one feature in one window."""

    median: float
    sigma: float


#: By window in seconds, then by feature.
Baseline = Mapping[int, Mapping[str, Benign]]

#: Until the operator calibrates: people's chat and one app's users, the made-up days of docs/evidence/watch.md.
DEFAULTS: Baseline = {
    600: {
        "rate": Benign(1.39, 0.6),
        "tokens": Benign(7.17, 1.38),
        "dose": Benign(3.65, 1.3),
        "repetition": Benign(0.0, 0.1),
        "spread": Benign(0.0, 0.08),
        "narrowness": Benign(0.047, 0.023),
        "reasoning": Benign(0.33, 0.49),
        "long": Benign(0.0, 0.15),
        "choices": Benign(0.35, 0.055),
        "regularity": Benign(0.16, 0.56),
        "cool": Benign(0.0, 0.15),
    },
    3600: {
        "rate": Benign(1.79, 1.03),
        "tokens": Benign(7.9, 1.45),
        "dose": Benign(4.42, 1.52),
        "repetition": Benign(0.0, 0.1),
        "spread": Benign(0.0, 0.08),
        "narrowness": Benign(0.047, 0.021),
        "reasoning": Benign(0.33, 0.49),
        "long": Benign(0.14, 0.21),
        "choices": Benign(0.35, 0.05),
        "regularity": Benign(-0.43, 0.44),
        "cool": Benign(0.0, 0.15),
    },
    86400: {
        "rate": Benign(2.4, 1.03),
        "tokens": Benign(8.59, 1.32),
        "dose": Benign(5.17, 1.35),
        "repetition": Benign(0.0, 0.1),
        "spread": Benign(0.0, 0.08),
        "narrowness": Benign(0.044, 0.02),
        "reasoning": Benign(0.33, 0.49),
        "long": Benign(0.15, 0.22),
        "choices": Benign(0.35, 0.05),
        "regularity": Benign(-0.59, 0.37),
        "cool": Benign(0.0, 0.15),
    },
}


def usual(window: int, baseline: Baseline) -> Mapping[str, Benign]:
    """Of a window: what the operator calibrated, and else the default of the window that is nearest in ratio."""
    nearest = min(DEFAULTS, key=lambda each: abs(math.log(each / window)))
    return {**DEFAULTS[nearest], **baseline.get(window, {})}
