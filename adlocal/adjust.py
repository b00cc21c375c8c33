"""The antidistillation adjustment of one row of logits, in numpy. The oracle for every faster path.

    adjusted = z_T + λ (Δ − mean_C Δ)   on C,      z_T   elsewhere
    C        = { i : p_T(i) ≥ guard · max p_T },   Δ = (z₊ − z₋) / (2ε)

arXiv 2504.13146, equation 7, in logit space: the paper's `log p_T / τ + λ_paper Δ` with λ = τ · λ_paper · ‖g‖, because
the paper's form loses the term as τ goes to 0 and leaves greedy decoding unprotected.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, ProxyError

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Adjusted:
    """One adjusted row.

    Attributes:
        logits: (n_vocab,) float32, the row to sample from.
        kl: KL(adjusted ‖ teacher) at temperature 1, in nats.
        n_candidates: how many tokens passed the guard.
    """

    logits: npt.NDArray[np.float32]
    kl: float
    n_candidates: int


def delta(z_plus: Floats, z_minus: Floats, epsilon: float) -> npt.NDArray[np.float32]:
    """Δ = (z₊ − z₋) / (2ε), the antidistillation term. Shapes (..., n_vocab); a constant in a row cancels."""
    return np.asarray((z_plus - z_minus) / np.float32(2 * epsilon), dtype=np.float32)


def expectation(z_plus: Floats, z_minus: Floats, delta_row: Floats) -> float:
    """E[Δ] under the proxy, softmax((z₊ + z₋) / 2): Δ(x) − E[Δ] is the derivative of log p(x) along ĝ.

    Summed over a text it is the text's dose: ⟨ĝ, ∇ log p(text)⟩, the rise of the loss from a small training step on it.
    A token at −inf in a half has no weight. NaN if a logit is NaN or +inf, which means that nothing may be sampled.
    """
    middle = (z_plus + z_minus) * np.float32(0.5)
    with np.errstate(invalid="ignore"):
        p = np.exp(middle - np.max(middle))
        weighted = np.where(middle == -np.inf, 0, p * delta_row)
    return float(np.sum(weighted) / np.sum(p))


def candidates(z_teacher: Floats, guard: float, n_shared: int | None = None) -> npt.NDArray[np.intp]:
    """Ids of the plausible tokens: p_T(i) ≥ guard · max p_T, among the first `n_shared` (all, if None).

    `guard = 0` (the paper) keeps every token but those at −inf.
    """
    shared = z_teacher[:n_shared]
    floor = np.max(z_teacher) + np.log(guard) if guard > 0 else -np.inf
    return np.flatnonzero((shared >= floor) & (shared > -np.inf))


def adjust(z_teacher: Floats, delta_row: Floats, *, lam: float, guard: float) -> Adjusted:
    """Adjusts one row of the teacher's logits.

    Args:
        z_teacher: (n_vocab,) the teacher's logits. Not changed.
        delta_row: (n_shared,) Δ; a teacher padded to more tokens than the proxy gets no lift beyond n_shared.
        lam: λ, in logits a unit of Δ. 0 returns the teacher's logits unchanged.
        guard: candidates are the tokens with at least this share of the top token's probability, 0 to 1.

    Raises:
        ProxyError: Δ of a candidate, or the teacher's own row, is not a number. Nothing may be sampled then.
    """
    top = np.max(z_teacher)
    if not np.isfinite(top):
        raise ProxyError(f"the teacher's largest logit is {top}; the model or its quantization is broken")
    ids = candidates(z_teacher, guard, len(delta_row))
    at = np.asarray(delta_row[ids], dtype=np.float64)
    if not np.all(np.isfinite(at)):
        raise ProxyError(
            f"Δ of token {ids[~np.isfinite(at)][0]} is not finite: a proxy gave NaN or inf; nothing emitted"
        )
    logits = np.array(z_teacher, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        shift = lam * (at - at.mean()) if len(at) else at
        logits[ids] += shift.astype(np.float32)
    if not np.all(np.isfinite(logits[ids])):
        raise ProxyError(f"λ = {lam:g} shifts a logit beyond float32; nothing emitted, ask for a smaller strength")
    return Adjusted(logits, _kl(z_teacher, top, ids, shift), len(ids))


def _kl(z: Floats, top: np.floating[Any], ids: npt.NDArray[np.intp], shift: npt.NDArray[np.float64]) -> float:
    """KL(adjusted ‖ teacher). Only the candidates moved, so both partition functions share the other tokens' mass."""
    before = z[ids].astype(np.float64) - float(top)
    after = before + shift
    peak = float(np.max(after, initial=0.0))  # λ may be strong enough to overflow an exponential
    inside = float(np.exp(before).sum())
    outside = max(float(np.sum(np.exp(z - top), dtype=np.float64)) - inside, 0.0)
    p, rest = np.exp(after - peak), outside * float(np.exp(-peak))
    total = float(p.sum()) + rest
    return max(0.0, (float(p @ (shift - peak)) - rest * peak) / total - float(np.log(total / (inside + outside))))


def check_strength(strength: float) -> float:
    """Returns `strength` as a float, or raises InputError: any finite number of nats from 0 up."""
    if not (isinstance(strength, Real) and 0 <= strength <= sys.float_info.max):
        raise InputError(f"strength={strength!r}: give nats from 0 (the plain teacher) up, for example 1.0")
    return float(strength)


def check_guard(guard: float) -> float:
    """Returns `guard` as a float, or raises InputError: a share of the top token's probability, 0 to 1."""
    if not (isinstance(guard, Real) and 0 <= guard <= 1):
        raise InputError(
            f"guard={guard!r}: give a share of the top token's probability, 0 (off) to 1, for example 0.05"
        )
    return float(guard)
