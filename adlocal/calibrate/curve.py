"""KL and dose of any strength and guard along one text, from the teacher's and the pair's rows, without a model.

    shift = λΔ + c on C,    KL = p(C) E_q[shift | C],    dose = E_q[Δ − E[Δ]]

with C, Δ, E[Δ] and the c that keeps the mass p(C) as in `adjust`, and as there one candidate is led above an end that
would take over under greedy decoding. KL is at temperature 1, as `Dose` reports it, and only grows with λ. The dose is
expected at the sampling temperature, over the tokens that are kept, ends too.
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

_LEAST = -1e300  # stands for −inf where it would be subtracted from itself

Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Point:
    """What one strength does: KL in nats a token, dose a token."""

    strength: float
    kl: float
    dose: float


@dataclass(frozen=True)
class _Flat:
    """All rows' kept tokens in one.

    Attributes:
        z, delta, steerable, row: of each token: logit below the row's top, Δ − E[Δ], whether it is no end, its row.
        log_mass, end: of each row: log Σ exp(logit below the top) of all tokens; `adjust.end_to_exceed`, below the top.
    """

    z: Doubles
    delta: Doubles
    steerable: Flags
    row: npt.NDArray[np.intp]
    log_mass: Doubles
    end: Doubles


class Curve:
    """Rows of a text, cut down to the tokens that some guard might let through.

    Args:
        delta_scale: of the bundle.
        temperature: at which text is sampled; 0 is greedy.
        guard: the smallest that will be asked for.
        n_vocab: tokens a row.
        n_rows: how many rows may come; guard 0 keeps as many of them, evenly spread, as memory allows.
        ends: ids of the teacher's that end generation.
    """

    def __init__(
        self,
        delta_scale: float,
        temperature: float,
        guard: float,
        n_vocab: int,
        n_rows: int,
        ends: adjust.Ids = adjust.NO_ENDS,
    ) -> None:
        self._scale = delta_scale
        self._temperature = max(temperature, _COLDEST)
        self._floor = min(guard, _FLOOR)
        self._every = 1 if guard > 0 else 1 + n_rows * n_vocab // _MOST_KEPT
        self._ends = ends
        self._n_seen = 0
        self._rows: list[tuple[float, float]] = []
        self._parts: list[tuple[Any, Any, Any]] = []
        self._flat: _Flat | None = None

    def add(self, z: adjust.Floats, plus: adjust.Floats, minus: adjust.Floats, epsilon: float) -> None:
        """Takes one row: the teacher's unadjusted logits, (n_vocab,), and the pair's, (n_shared,) each."""
        self._n_seen += 1
        if (self._n_seen - 1) % self._every:
            return
        delta = adjust.delta(plus, minus, epsilon)
        ids = adjust.candidates(z, self._floor, len(delta))
        top = float(np.max(z))
        log_mass = float(np.log(np.sum(np.exp(z - np.float32(top)), dtype=np.float64)))
        self._rows.append((log_mass, adjust.end_to_exceed(z, len(delta), self._ends) - top))
        dose = delta[ids] - adjust.expectation(plus, minus, delta)
        self._parts.append((z[ids] - np.float32(top), dose, np.isin(ids, self._ends)))
        self._flat = None

    def at(self, strength: float, guard: float) -> Point:
        """KL and dose a token, mean over the rows."""
        flat = self._arrays()
        inside = flat.steerable & (flat.z >= (np.log(guard) if guard > 0 else -np.inf))
        after = flat.z.copy()
        after[inside] = self._shifted(strength / self._scale * flat.delta, inside)[inside]
        p = np.exp(after - flat.log_mass[flat.row])
        kl = np.maximum(self._sums(p * inside * (after - flat.z)), 0)
        dose = self._expected(flat.delta, after / self._temperature)
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

    def _shifted(self, shift: Doubles, inside: Flags) -> Doubles:
        """The logits of the tokens inside, after `shift` and the constant that keeps their mass in each row."""
        flat = self._arrays()
        exponents = np.where(inside, flat.z + shift, -np.inf)
        peak = np.maximum(self._peaks(exponents), _LEAST)  # a row may have none inside
        weight = np.exp(exponents - peak[flat.row])
        with np.errstate(divide="ignore", invalid="ignore"):  # of a row with none inside
            mass = np.log(self._sums(np.exp(flat.z) * inside))
            largest = mass - np.log(self._sums(weight))
            after = exponents + (largest - peak)[flat.row]
            return self._above_the_end(after, mass, largest)

    def _above_the_end(self, after: Doubles, mass: Doubles, largest: Doubles) -> Doubles:
        """As in `adjust`: where an end would take over, the first of the largest exceeds it, and the others pay."""
        flat = self._arrays()
        taken = largest <= flat.end
        left = np.maximum(-np.expm1(flat.end - mass), np.finfo(float).tiny)
        pay = np.where(taken, np.log(left) - np.log(-np.expm1(largest - mass)), 0.0)
        at = np.flatnonzero(taken[flat.row] & (after >= self._peaks(after)[flat.row]))
        rows, first = np.unique(flat.row[at], return_index=True)
        after = after + pay[flat.row]
        after[at[first]] = flat.end[rows]
        return np.asarray(after)

    def _expected(self, values: Doubles, exponents: Doubles) -> Doubles:
        """Mean of `values` under softmax(exponents), of each row."""
        weight = np.exp(exponents - self._peaks(exponents)[self._arrays().row])
        return np.asarray(self._sums(weight * values) / self._sums(weight))

    def _arrays(self) -> _Flat:
        if self._flat is None:
            z, delta = (np.concatenate([part[i] for part in self._parts]).astype(np.float64) for i in (0, 1))
            steerable = ~np.concatenate([part[2] for part in self._parts])
            row = np.repeat(np.arange(len(self._parts)), [len(part[0]) for part in self._parts])
            self._flat = _Flat(z, delta, steerable, row, *np.array(self._rows).T)
        return self._flat

    def _sums(self, values: npt.NDArray[Any]) -> Doubles:
        weights = values.astype(np.float64)
        return np.bincount(self._arrays().row, weights=weights, minlength=len(self._rows)).astype(np.float64)

    def _peaks(self, values: Doubles) -> Doubles:
        peaks = np.full(len(self._rows), -np.inf)
        np.maximum.at(peaks, self._arrays().row, values)
        return peaks
