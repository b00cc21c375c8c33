"""Δ through llama.cpp against the exact directional derivative, and the choice of ε.

A small ε drowns in the rounding of llama.cpp's kernels (activations to 8 bits on CPU), a large one leaves the linear
range. The best lies between and depends on the model, the types and the backend, so it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adlocal import adjust
from adlocal.pair import ProxyPair
from adlocal.traces import EncodedTrace

from .gradient import Gradient, directional_derivative
from .proxy import Array, Proxy

TOP_K = 64
_MOST_STEPS = 12
Ids = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Reference:
    """The exact derivative along ĝ at the targets of one held-out trace.

    Attributes:
        trace: the trace.
        top: (n_targets, k) ids of the proxy's own most likely tokens.
        derivative: (n_targets, k) float32, centred over k.
    """

    trace: EncodedTrace
    top: Ids
    derivative: Array

    @classmethod
    def of(cls, proxy: Proxy, gradient: Gradient, trace: EncodedTrace) -> Reference:
        """Differentiates the PyTorch proxy along the whole gradient, carriers or not."""
        direction = {name: value / gradient.norm for name, value in gradient.values.items()}
        logits, derivative = (t.numpy() for t in directional_derivative(proxy.model, direction, trace))
        k = min(TOP_K, logits.shape[1])
        top = np.argpartition(logits, -k, axis=1)[:, -k:]
        return cls(trace, top, _centred(np.take_along_axis(derivative, top, axis=1)))


@dataclass(frozen=True)
class Fidelity:
    """How well Δ follows the exact derivative at one ε.

    Attributes:
        epsilon: the step along ĝ.
        median, p10: of the cosine a position.
        slope: of the regression of Δ on the derivative over all positions: 1 where the carriers hold the whole gradient
            and ε is within the linear range.
        n_positions: how many positions.
    """

    epsilon: float
    median: float
    p10: float
    slope: float
    n_positions: int

    @classmethod
    def measure(cls, pair: ProxyPair, references: Sequence[Reference]) -> Fidelity:
        """Evaluates the pair on the references' traces."""
        found = np.concatenate([_centred(_delta_at(pair, reference)) for reference in references])
        exact = np.concatenate([reference.derivative for reference in references]).astype(np.float64)
        dot, norms = np.sum(found * exact, axis=1), np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
        cosine = np.divide(dot, norms, out=np.zeros_like(dot), where=norms > 0)
        return cls(
            epsilon=pair.bundle.epsilon,
            median=float(np.median(cosine)),
            p10=float(np.quantile(cosine, 0.1)),
            slope=float(dot.sum() / np.sum(exact * exact)),
            n_positions=len(cosine),
        )


def sweep(start: float, measure: Callable[[float], Fidelity]) -> Iterator[Fidelity]:
    """Climbs a grid of two ε an octave from `start`: octaves until the best lies between two, then halves."""
    measured: dict[int, Fidelity] = {}
    while len(measured) < _MOST_STEPS:
        best = max(measured, key=lambda i: measured[i].median, default=0)
        wanted = (best, best + 2, best - 2, best + 1, best - 1)
        following = next((i for i in wanted if i not in measured), None)
        if following is None:
            return
        measured[following] = measure(start * 2.0 ** (following / 2))
        yield measured[following]


def delta_scale(pair: ProxyPair, references: Sequence[Reference], guard: float) -> float:
    """RMS of the centred Δ over the proxy's plausible tokens at the references' targets, where it has at least two."""
    squares = [
        (at - at.mean()) ** 2
        for reference in references
        for plus, minus in _target_rows(pair, reference.trace)
        if len(ids := adjust.candidates((plus + minus) / 2, guard)) > 1
        for at in [adjust.delta(plus[ids], minus[ids], pair.bundle.epsilon).astype(np.float64)]
    ]
    return float(np.sqrt(np.mean(np.concatenate(squares)))) if squares else 0.0


def _delta_at(pair: ProxyPair, reference: Reference) -> npt.NDArray[np.float64]:
    """Δ of the reference's top tokens, (n_targets, k)."""
    rows = _target_rows(pair, reference.trace)
    epsilon = pair.bundle.epsilon
    return np.stack(
        [
            adjust.delta(p[ids], m[ids], epsilon).astype(np.float64)
            for (p, m), ids in zip(rows, reference.top, strict=True)
        ]
    )


def _target_rows(pair: ProxyPair, trace: EncodedTrace) -> Iterator[tuple[Array, Array]]:
    """(z₊, z₋) of the positions from which the trace's targets are predicted."""
    position = 0
    for plus, minus in pair.logits(trace.tokens[:-1]):
        for p, m in zip(plus, minus, strict=True):
            position += 1
            if trace.targets[position]:
                yield p, m


def _centred(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(values - values.mean(axis=1, keepdims=True))
