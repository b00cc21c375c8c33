"""KL and dose of any strength and guard along one text, from the teacher's and the pair's rows, without a model.

    shift = λ (Δ − mean_C Δ) on C,    KL = E_q[shift] − log Σ p exp(shift),    dose = E_q[Δ − E[Δ]]

with C, Δ and E[Δ] as in `adjust`. KL is at temperature 1, as `Dose` reports it, and only grows with λ. The dose is
expected at the sampling temperature, over the tokens that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import adjust

#: Beyond it a guard above 0 leaves next to nothing to gain: every position takes the candidate with the largest Δ.
MOST_STRENGTH = 64.0
_FLOOR = 1e-3  # share of the top probability under which samplers take no token
_COLDEST = 1e-3  # stands for greedy: a logit's lead of 0.01 is then e^10 to 1
_MOST_KEPT = 2**22  # of guard 0, which keeps every token of a row

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """What one strength does: KL in nats a token, dose a token."""

    strength: float
    kl: float
    dose: float


class Curve:
    """Rows of a text, cut down to the tokens that some guard might let through.

    Args:
        delta_scale: of the bundle.
        temperature: at which text is sampled; 0 is greedy.
        guard: the smallest that will be asked for.
        n_vocab: tokens a row.
        n_rows: how many rows may come; guard 0 keeps as many of them, evenly spread, as memory allows.
    """

    def __init__(self, delta_scale: float, temperature: float, guard: float, n_vocab: int, n_rows: int) -> None:
        self._scale = delta_scale
        self._temperature = max(temperature, _COLDEST)
        self._floor = min(guard, _FLOOR)
        self._every = 1 if guard > 0 else 1 + n_rows * n_vocab // _MOST_KEPT
        self._n_seen = 0
        self._log_mass: list[float] = []
        self._parts: list[tuple[Any, Any]] = []
        self._flat: tuple[Doubles, Doubles, npt.NDArray[np.intp], Doubles] | None = None

    def add(self, z: adjust.Floats, plus: adjust.Floats, minus: adjust.Floats, epsilon: float) -> None:
        """Takes one row: the teacher's unadjusted logits, (n_vocab,), and the pair's, (n_shared,) each."""
        self._n_seen += 1
        if (self._n_seen - 1) % self._every:
            return
        delta = adjust.delta(plus, minus, epsilon)
        ids = adjust.candidates(z, self._floor, len(delta))
        top = float(np.max(z))
        self._log_mass.append(float(np.log(np.sum(np.exp(z - np.float32(top)), dtype=np.float64))))
        self._parts.append((z[ids] - np.float32(top), delta[ids] - adjust.expectation(plus, minus, delta)))
        self._flat = None

    def at(self, strength: float, guard: float) -> Point:
        """KL and dose a token, mean over the rows."""
        z, delta, row, log_mass = self._arrays()
        inside = z >= (np.log(guard) if guard > 0 else -np.inf)
        mean = self._sums(delta * inside) / np.maximum(self._sums(inside), 1)
        shift = np.where(inside, strength / self._scale * (delta - mean[row]), 0.0)
        kl = self._kl(np.exp(z - log_mass[row]) * inside, shift)
        dose = self._expected(delta, (z + shift) / self._temperature)
        return Point(strength, float(kl.mean()), float(dose.mean()))

    def solve(self, kl: float, guard: float) -> float | None:
        """The strength that spends `kl` nats a token, to 1 in 10^6; None if not even the greatest does."""
        if self.at(MOST_STRENGTH, guard).kl < kl:
            return None
        low, high = 1e-6, MOST_STRENGTH
        while high > low * (1 + 1e-6):
            middle = float(np.sqrt(low * high))
            low, high = (middle, high) if self.at(middle, guard).kl < kl else (low, middle)
        return high

    def _kl(self, p: Doubles, shift: Doubles) -> Doubles:
        """Of each row; `p` is the teacher's probability of a candidate and 0 of any other token."""
        peak = self._peaks(shift)  # at least 0: candidates are centred
        weight = p * np.exp(shift - peak[self._arrays()[2]])
        total = self._sums(weight) + np.maximum(1 - self._sums(p), 0) * np.exp(-peak)
        return np.asarray(np.maximum(self._sums(weight * shift) / total - np.log(total) - peak, 0))

    def _expected(self, values: Doubles, exponents: Doubles) -> Doubles:
        """Mean of `values` under softmax(exponents), of each row."""
        weight = np.exp(exponents - self._peaks(exponents)[self._arrays()[2]])
        return np.asarray(self._sums(weight * values) / self._sums(weight))

    def _arrays(self) -> tuple[Doubles, Doubles, npt.NDArray[np.intp], Doubles]:
        """(logit below the top, Δ − E[Δ], row) of each kept token, and log Σ exp(logit below the top) of each row."""
        if self._flat is None:
            z, delta = (np.concatenate(part).astype(np.float64) for part in zip(*self._parts, strict=True))
            row = np.repeat(np.arange(len(self._parts)), [len(ids) for ids, _ in self._parts])
            self._flat = z, delta, row, np.array(self._log_mass)
        return self._flat

    def _sums(self, values: npt.NDArray[Any]) -> Doubles:
        weights = values.astype(np.float64)
        return np.bincount(self._arrays()[2], weights=weights, minlength=len(self._log_mass)).astype(np.float64)

    def _peaks(self, values: Doubles) -> Doubles:
        peaks = np.full(len(self._log_mass), -np.inf)
        np.maximum.at(peaks, self._arrays()[2], values)
        return peaks
