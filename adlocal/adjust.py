"""The antidistillation adjustment of one row of logits, in numpy. The oracle for every faster path.

    adjusted = z_T + λΔ + c   on C,      z_T   elsewhere
    C        = { i no end : p_T(i) ≥ guard · max p_T },   Δ = (z₊ − z₋) / (2ε)
    c        = log Σ_C exp z_T − log Σ_C exp(z_T + λΔ)

The end is the teacher's: a token that ends generation is no candidate. The constant c keeps the candidates' total mass,
so at temperature 1 every end, and every token that the guard leaves out, keeps its probability exactly.

Greedy decoding ends only where the teacher's own would. Where some other token is above every end, and none is any more
after the shift, the largest candidate is set to the next float32 above the largest end, and the others are lowered by
one constant to pay for it. The mass is still kept, and no distribution that keeps it and does this is closer. It takes
an end that is plausible itself, and a shift that evens out a row. The other way round nothing is done: where an end is
the teacher's top, a candidate that gathers the others' mass may pass it, and greedy decoding goes on.

arXiv 2504.13146, equation 7, in logit space: the paper's `log p_T / τ + λ_paper Δ` with λ = τ · λ_paper · ‖g‖, because
the paper's form loses the term as τ goes to 0 and leaves greedy decoding unprotected.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, ProxyError

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.integer[Any]]

#: The ends of a row that has none, or whose ends are not known.
NO_ENDS: Ids = np.empty(0, dtype=np.intp)


@dataclass(frozen=True)
class Adjusted:
    """One adjusted row.

    Attributes:
        logits: (n_vocab,) float32, the row to sample from.
        kl: KL(adjusted ‖ teacher) at temperature 1, in nats.
        n_candidates: how many tokens passed the guard, without ends.
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


def candidates(
    z_teacher: Floats, guard: float, n_shared: int | None = None, ends: Ids = NO_ENDS
) -> npt.NDArray[np.intp]:
    """Ids of the plausible tokens: p_T(i) ≥ guard · max p_T, among the first `n_shared` (all, if None), no `ends`.

    The top is that of all tokens, ends too. `guard = 0` (the paper) keeps every token but those at −inf.
    """
    floor = np.max(z_teacher) + np.log(guard) if guard > 0 else -np.inf
    inside = (z_teacher >= floor) & (z_teacher > -np.inf)
    inside[ends] = False
    return np.flatnonzero(inside[:n_shared])


def adjust(z_teacher: Floats, delta_row: Floats, *, lam: float, guard: float, ends: Ids = NO_ENDS) -> Adjusted:
    """Adjusts one row of the teacher's logits.

    Args:
        z_teacher: (n_vocab,) the teacher's logits. Not changed.
        delta_row: (n_shared,) Δ; a teacher padded to more tokens than the proxy gets no lift beyond n_shared.
        lam: λ, in logits a unit of Δ. 0 returns the teacher's logits unchanged, to the bit.
        guard: candidates are the tokens with at least this share of the top token's probability, 0 to 1.
        ends: ids below n_vocab that end generation. They keep their logits.

    Raises:
        ProxyError: Δ of a candidate, or the teacher's own row, is not a number. Nothing may be sampled then.
    """
    top = np.max(z_teacher)
    if not np.isfinite(top):
        raise ProxyError(f"the teacher's largest logit is {top}; the model or its quantization is broken")
    ids = candidates(z_teacher, guard, len(delta_row), ends)
    at = np.asarray(delta_row[ids], dtype=np.float64)
    if not np.all(np.isfinite(at)):
        raise ProxyError(
            f"Δ of token {ids[~np.isfinite(at)][0]} is not finite: a proxy gave NaN or inf; nothing emitted"
        )
    logits = np.array(z_teacher, dtype=np.float32)
    if lam == 0 or len(ids) < 2:
        return Adjusted(logits, 0.0, len(ids))
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        shifted, kl = _shifted(z_teacher[ids], lam * at, end_to_exceed(z_teacher, len(delta_row), ends))
        logits[ids] = shifted
    if not np.all(np.isfinite(logits[ids])):
        raise ProxyError(f"λ = {lam:g} shifts a logit beyond float32; nothing emitted, ask for a smaller strength")
    p = np.exp(z_teacher.astype(np.float64) - float(top))
    return Adjusted(logits, max(0.0, kl * float(p[ids].sum() / p.sum())), len(ids))


def end_to_exceed(z_teacher: Floats, n_shared: int, ends: Ids) -> float:
    """The largest logit of an end, which some candidate has to exceed for greedy decoding to go on.

    −inf where none has to: an end is the teacher's own top, or a token beyond `n_shared` is above every end and stays.
    """
    others = np.array(z_teacher)
    others[ends] = -np.inf
    largest = float(np.max(z_teacher[ends], initial=-np.inf))
    needed = np.max(others) > largest >= np.max(others[n_shared:], initial=-np.inf)
    return largest if needed else -np.inf


def _shifted(z: Floats, shift: npt.NDArray[np.float64], end: float) -> tuple[npt.NDArray[np.float64], float]:
    """The candidates' logits with `shift` and their mass kept, one of them above `end`; and the KL among candidates.

    That KL times the candidates' mass is the row's: both partition functions are the same.
    """
    before = z.astype(np.float64)
    mass = before.max() + np.log(np.sum(np.exp(before - before.max())))
    after = before + shift
    after -= after.max()
    after += mass - np.log(np.sum(np.exp(after)))
    first = int(np.argmax(after))
    if np.float32(after[first]) <= end:
        target = float(np.nextafter(np.float32(end), np.float32(np.inf)))
        left = max(-math.expm1(target - mass), sys.float_info.min)  # the others' share
        after += math.log(left) - math.log(-math.expm1(after[first] - mass))
        after[first] = target
    return after, float(np.exp(after - mass) @ (after - before))


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
