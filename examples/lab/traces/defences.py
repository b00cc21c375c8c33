"""Defences: what is done to the teacher's logits before a token is sampled.

All run in the product's runtime. Where a bundle is followed, be it of the gradient or of another direction, the native
core adjusts the logits; baselines that are no product change them at the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adlocal import ProxyPair, adjust
from adlocal.engine.parallel import ParallelLlama
from adlocal.engine.runner import Evaluated
from adlocal.engine.sequences import Sampling
from adlocal.llamacpp.tokens import end_tokens
from adlocal.settings import Settings

from ..models.pretrained import N_CTX

Rows = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Kind = Literal["plain", "guarded", "bundle", "permuted", "experts", "mixed", "capped", "entropy", "sparse"]
CLOSED = -1e9  # of a token that must not be sampled
PARALLEL = 64
_SPARSE = 0.25  # share of tokens with the whole dose
_CAPPED_FROM = 16.0  # nats of strength before the cap
_HALVINGS = 20


@dataclass(frozen=True)
class Setting:
    """A defence at one operating point.

    Attributes:
        kind: what is done; see below.
        strength: nats, or what the kind makes of it.
        guard: share of the top token's probability.
        temperature: of sampling.

    Kinds:
        plain: the temperature alone.
        guarded: the guard alone, no token under it is sampled.
        bundle: the product's adjustment.
        permuted: Δ permuted among the candidates anew for each token, with a random sign.
        experts: (1 − γ) z_T + γ z_P with the strength as γ.
        mixed: the mean of several bundles' Δ, each in its own scale.
        capped: the adjustment at a large strength, shrunk token by token to a KL of `strength` nats.
        entropy: the strength times the entropy of the teacher's row, in nats.
        sparse: the adjustment on a quarter of the tokens, picked at random.

    All that shift candidates keep the candidates' mass and leave the ends alone, as the product does. What the product
    does where an end would take over under greedy decoding, they do not.
    """

    kind: Kind = "plain"
    strength: float = 0.0
    guard: float = 0.0
    temperature: float = 0.5


class Defended(ParallelLlama):
    """A teacher under a defence, for many sequences; `setting` may be changed between two calls of `generate`.

    Args:
        teacher: its GGUF.
        bundle: the bundle that the defence follows, or None.
        others: more of them, for the kind "mixed".
        best_of: completions of a problem to choose among by their dose.
        answer: by what those have to agree, or None; see `ParallelLlama`.
    """

    def __init__(
        self,
        teacher: Path,
        bundle: Path | None,
        others: Sequence[Path] = (),
        best_of: int = 1,
        answer: Callable[[str], Hashable] | None = None,
    ) -> None:
        how: dict[str, Any] = {"n_ctx": N_CTX, "n_parallel": PARALLEL, "n_threads": 1, "flash_attn": True}
        super().__init__(teacher, **how, bundle=bundle, beside=others, best_of=best_of, answer=answer)
        self._ends = end_tokens(self.model.vocab)
        self.set(Setting())

    def set(self, setting: Setting) -> Sampling:
        """Takes a setting; returns how to sample with it. The same requests are then answered alike, draws and all."""
        self.setting = setting
        self.scheduler.clear()  # draws follow the order of the sequences
        self._rng = np.random.default_rng(0)
        self.adjuster = None if setting.kind in ("plain", "bundle") else self._adjust_rows
        # A strength above 0 has the proxies evaluated.
        self.settings = Settings(setting.strength if self.pair else 0.0, setting.guard)
        return Sampling(setting.temperature, top_k=0, top_p=1.0, min_p=0.0)

    def _adjust_rows(self, rows: Evaluated) -> None:
        rows.teacher[:] = self._adjusted(rows)

    def _adjusted(self, rows: Evaluated) -> Rows:
        setting, teacher = self.setting, rows.teacher
        inside = plausible(teacher, setting.guard)
        if setting.kind == "guarded":
            return np.where(inside, teacher, CLOSED)
        if not rows.proxies:
            return teacher
        if setting.kind == "experts":
            plus, minus = rows.proxies[0]
            return (1 - setting.strength) * teacher + setting.strength * (plus + minus) / 2
        inside[:, self._ends] = False
        delta = np.mean([_delta(*each) for each in zip(rows.proxies, rows.pairs, strict=True)], axis=0)
        return teacher + shift(setting, teacher, centred(delta, inside), inside, self._rng)


def _delta(proxies: tuple[Rows, Rows], pair: ProxyPair) -> Rows:
    """Δ in units of its scale: one nat of strength shifts a typical candidate by one."""
    return adjust.delta(*proxies, pair.epsilon) / pair.bundle.delta_scale


def plausible(teacher: Rows, guard: float) -> Mask:
    """Which tokens of each row have at least `guard` of the top token's probability."""
    floor = np.log(guard) if guard > 0 else -np.inf
    return np.asarray(teacher >= teacher.max(axis=1, keepdims=True) + floor)


def centred(delta: Rows, inside: Mask) -> Rows:
    """Δ less its mean over the candidates of each row; 0 elsewhere."""
    n = np.maximum(inside.sum(axis=1, keepdims=True), 1)
    mean = np.sum(delta, axis=1, where=inside, keepdims=True) / n
    return np.where(inside, delta - mean, 0.0)


def shift(setting: Setting, teacher: Rows, delta: Rows, inside: Mask, rng: np.random.Generator) -> Rows:
    """What a kind adds to the teacher's rows, given Δ in units of its scale."""
    if setting.kind == "permuted":
        delta = permuted(delta, inside, rng)
    if setting.kind == "entropy":
        delta = entropy(teacher) * delta
    if setting.kind == "sparse":
        delta = delta * (rng.random((len(teacher), 1)) < _SPARSE)
    if setting.kind == "capped":
        return capped(teacher, _CAPPED_FROM * delta, inside, setting.strength)
    return kept(teacher, setting.strength * delta, inside)


def kept(teacher: Rows, added: Rows, inside: Mask) -> Rows:
    """`added` on the candidates, and the constant of each row with which they keep their mass; 0 elsewhere."""
    before, after = (_log_sum(np.where(inside, rows, -np.inf)) for rows in (teacher, teacher + added))
    return np.where(inside, added + before - after, 0.0)


def _log_sum(rows: Rows) -> Rows:
    """log Σ exp of each row, (rows, 1); NaN of one without a number."""
    top = np.maximum(rows.max(axis=1, keepdims=True), -1e30)
    with np.errstate(divide="ignore"):
        return np.asarray(top + np.log(np.sum(np.exp(rows - top), axis=1, keepdims=True)))


def permuted(delta: Rows, inside: Mask, rng: np.random.Generator) -> Rows:
    """The same values on other candidates of the row, all with the row's random sign: no direction is left in them."""
    result = np.zeros_like(delta)
    for row, mask in enumerate(inside):
        result[row, mask] = rng.permutation(delta[row, mask]) * rng.choice((-1, 1))
    return result


def entropy(teacher: Rows) -> Rows:
    """Entropy of each row at temperature 1, in nats, (rows, 1)."""
    log_p = log_softmax(teacher)
    return np.asarray(-np.sum(np.exp(log_p) * log_p, axis=1, keepdims=True))


def capped(teacher: Rows, added: Rows, inside: Mask, cap: float) -> Rows:
    """`kept`, of `added` times the largest number up to 1 for each row with which KL(adjusted ‖ teacher) is ≤ `cap`.

    Args:
        teacher, added, inside: (rows, n_vocab).
        cap: in nats.
    """

    def spent(factor: Rows) -> Rows:
        return kl(teacher + kept(teacher, factor * added, inside), teacher)

    low, high = np.zeros((len(teacher), 1)), np.ones((len(teacher), 1))
    for _ in range(_HALVINGS):
        middle = np.where(spent(high) <= cap, high, (low + high) / 2)
        fits = spent(middle) <= cap
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return kept(teacher, low * added, inside)


def kl(ours: Rows, theirs: Rows) -> Rows:
    """KL(ours ‖ theirs) of each row, in nats, (rows, 1)."""
    log_p, log_q = log_softmax(ours), log_softmax(theirs)
    return np.asarray(np.sum(np.exp(log_p) * (log_p - log_q), axis=1, keepdims=True))


def log_softmax(logits: Rows) -> Rows:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True)))
