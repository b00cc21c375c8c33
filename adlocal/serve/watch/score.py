"""The score of a subject: how far it is from the operator's benign traffic, in how many ways at once.

For each window, S = Σ wᵢ · clip(e · (xᵢ − μᵢ) / σᵢ, 0, 4) / 4, where μ and σ are the median and 1.4826 · MAD (with a
floor) of benign traffic, the weights w sum to 1, and e = n / (n + 8) for n requests, since few requests are weak
evidence. A subject's score is the greatest of its windows'. A group of features signals when its own weighted mean of
the clipped terms is a half or more: two σ throughout, or four in half of it. It is present from 0.15 on: 0.6 σ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .benign import Benign
from .features import FEATURES, GROUPS, Figures

_MOST_SIGMAS = 4.0
_LITTLE = 8.0
_SIGNALS, _PRESENT = 0.5, 0.15


def _shares(group: str) -> list[tuple[str, float]]:
    """The features of a group, with their shares of it."""
    weights = {name: each.weight for name, each in FEATURES.items() if each.group == group}
    return [(name, weight / sum(weights.values())) for name, weight in weights.items()]


_SHARES = {group: _shares(group) for group in GROUPS}


@dataclass(frozen=True)
class Scored:
    """A subject's score.

    Attributes:
        score: 0 to 1.
        signals: groups that signal, in the order of `GROUPS`.
        window: seconds, that it comes from.
        terms: each feature's clipped distance over 4, 0 to 1.
    """

    score: float = 0.0
    signals: tuple[str, ...] = ()
    window: int = 0
    terms: Mapping[str, float] = field(default_factory=dict)

    def present(self, group: str) -> bool:
        """Whether a group is above the usual at all."""
        return group_mean(group, self.terms) >= _PRESENT


def scored(window: int, figures: Figures, n: float, benign: Mapping[str, Benign]) -> Scored:
    """The score of one window.

    Args:
        window: seconds.
        figures: its features.
        n: requests in it.
        benign: what they are in benign traffic, all of them.
    """
    evidence = n / (n + _LITTLE)
    terms = {}
    for name, value in figures.items():
        known = benign[name]
        distance = evidence * (value - known.median) / max(known.sigma, FEATURES[name].floor)
        terms[name] = min(max(distance, 0.0), _MOST_SIGMAS) / _MOST_SIGMAS
    score = sum(FEATURES[name].weight * term for name, term in terms.items())
    signals = tuple(group for group in GROUPS if group_mean(group, terms) >= _SIGNALS)
    return Scored(score, signals, window, terms)


def group_mean(group: str, terms: Mapping[str, float]) -> float:
    """A group's weighted mean of terms, 0 to 1; what is not known counts as 0."""
    return sum(weight * terms.get(name, 0.0) for name, weight in _SHARES[group])
