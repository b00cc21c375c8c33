"""What is measured of a subject in a window, and how much each of it counts.

Four groups of signals, since figures of one group rise together for one reason, a busy user's volume, say:

- volume: how much is asked, answered and dosed.
- content: few templates, many fillings, one subject.
- thought: reasoning asked for, long answers, answers that have a choice of words.
- manner: even gaps between requests, low temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .buckets import Sums
from .recent import Forms


@dataclass(frozen=True)
class Feature:
    """A figure that can speak for an extraction.

    Attributes:
        group: its group of signals.
        weight: its share of the score; all sum to 1.
        floor: the least σ, in its unit, so that a feature that never varies in benign traffic is no hair trigger.
    """

    group: str
    weight: float
    floor: float


FEATURES = {
    "rate": Feature("volume", 0.10, 0.35),
    "tokens": Feature("volume", 0.12, 0.50),
    "dose": Feature("volume", 0.08, 0.50),
    "repetition": Feature("content", 0.08, 0.10),
    "spread": Feature("content", 0.14, 0.08),
    "narrowness": Feature("content", 0.10, 0.02),
    "reasoning": Feature("thought", 0.10, 0.15),
    "long": Feature("thought", 0.10, 0.15),
    "choices": Feature("thought", 0.03, 0.05),
    "regularity": Feature("manner", 0.10, 0.25),
    "cool": Feature("manner", 0.05, 0.15),
}
GROUPS = tuple(dict.fromkeys(feature.group for feature in FEATURES.values()))
#: No group's weights sum to more: what a group alone can score.
HEAVIEST_GROUP = max(sum(each.weight for each in FEATURES.values() if each.group == group) for group in GROUPS)

Figures = dict[str, float]


def figures(sums: Sums, forms: Forms) -> Figures:
    """The features of one window. What nothing is known of is left out.

    - rate = ln(1 + requests); tokens = ln(1 + prompt and completion tokens); dose = ln(1 + max(0, Σ dose)).
    - repetition, spread, narrowness: see `Forms`.
    - reasoning, cool: shares of requests that ask for reasoning, or for a temperature of 0.3 or less.
    - long: share of answers of `long_answer` tokens or more; choices = Σ n_choices / Σ n_rows.
    - regularity = −ln(CV of the gaps between requests): 0 for random arrivals, above for a clockwork, below for bursts.
    """
    requests, finished = sums["requests"], sums["finished"]
    found = {
        "rate": math.log1p(requests),
        "tokens": math.log1p(sums["prompt_tokens"] + sums["completion_tokens"]),
        "dose": math.log1p(max(0.0, sums["dose"])),
    }
    if forms.n >= 2:
        found |= {"repetition": forms.repetition, "spread": forms.spread, "narrowness": forms.narrowness}
    if requests:
        found |= {"reasoning": sums["reasoning"] / requests, "cool": sums["cool"] / requests}
    if finished:
        found["long"] = sums["long"] / finished
    if sums["rows"] > 0:
        found["choices"] = sums["choices"] / sums["rows"]
    if sums["gaps"] >= 4:
        found["regularity"] = -math.log(coefficient_of_variation(sums["gaps"], sums["gap"], sums["gap2"]))
    return found


def coefficient_of_variation(n: float, total: float, squares: float) -> float:
    """Standard deviation over mean of n values, from their sum and their squares'; within 0.05 and 20."""
    mean = total / n
    variance = max(0.0, squares / n - mean**2)
    return min(20.0, max(0.05, math.sqrt(variance) / mean)) if mean > 0 else 1.0
