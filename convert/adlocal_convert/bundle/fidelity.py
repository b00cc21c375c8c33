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
from adlocal.errors import ConversionError
from adlocal.pair import ProxyPair
from adlocal.traces import EncodedTrace

from ..model.loss import directional_derivative
from ..model.proxy import Proxy
from ..model.streamed import Direction, Observer
from ..model.weights import Array

TOP_K = 64
_MOST_STEPS = 12
# PyTorch and llama.cpp run the same weights: their logits differ by rounding (0.999 and more was measured even where
# llama.cpp rounds activations to 8 bits), while a wrong mapping of a family gives another model.
_LEAST_AGREEMENT = 0.95
Ids = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Reference:
    """The exact derivative along ĝ at the targets of one held-out trace.

    Attributes:
        trace: the trace.
        top: (n_targets, k) ids of the proxy's own most likely tokens.
        logits: (n_targets, k) float32, PyTorch's, centred over k.
        derivative: (n_targets, k) float32, centred over k.
    """

    trace: EncodedTrace
    top: Ids
    logits: Array
    derivative: Array

    @classmethod
    def of(cls, proxy: Proxy, direction: Direction, trace: EncodedTrace, observer: Observer | None = None) -> Reference:
        """Differentiates the PyTorch proxy along the whole direction, carriers or not."""
        logits, derivative = (t.numpy() for t in directional_derivative(proxy, direction, trace, observer))
        k = min(TOP_K, logits.shape[1])
        top = np.argpartition(logits, -k, axis=1)[:, -k:]
        at = (_centred(np.take_along_axis(values, top, axis=1)) for values in (logits, derivative))
        return cls(trace, top, *at)


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
        cosine = _cosines(found, exact)
        return cls(
            epsilon=pair.epsilon,
            median=float(np.median(cosine)),
            p10=float(np.quantile(cosine, 0.1)),
            slope=float(np.sum(found * exact) / np.sum(exact * exact)),
            n_positions=len(cosine),
        )


def check_agreement(pair: ProxyPair, references: Sequence[Reference]) -> None:
    """Refuses to go on unless PyTorch and llama.cpp compute the same logits; z of the base is (z₊ + z₋) / 2.

    Raises:
        ConversionError: the model that was differentiated is not the one that llama.cpp runs.
    """
    found = np.concatenate(
        [
            [(p[ids] + m[ids]) / 2 for (p, m), ids in zip(_target_rows(pair, r.trace), r.top, strict=True)]
            for r in references
        ]
    )
    exact = np.concatenate([reference.logits for reference in references]).astype(np.float64)
    agreement = float(np.median(_cosines(_centred(found.astype(np.float64)), exact)))
    if not agreement >= _LEAST_AGREEMENT:
        raise ConversionError(
            f"PyTorch's logits and llama.cpp's agree only to a cosine of {agreement:.3f}: this proxy has something "
            "that is not mapped between the two; give another proxy, and please report this one"
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


def first_epsilon(references: Sequence[Reference]) -> float:
    """The ε that moves a top token's logit by about one nat, where the linear range begins to end."""
    rms = float(np.sqrt(np.mean([np.mean(np.square(reference.derivative)) for reference in references])))
    if not rms > 0:
        raise ConversionError("the exact derivative is zero on every held-out trace; give other traces")
    return 1.0 / rms


def delta_scale(pair: ProxyPair, references: Sequence[Reference], guard: float) -> float:
    """RMS of the centred Δ over the proxy's plausible tokens at the references' targets, where it has at least two."""
    squares = [
        (at - at.mean()) ** 2
        for reference in references
        for plus, minus in _target_rows(pair, reference.trace)
        if len(ids := adjust.candidates((plus + minus) / 2, guard)) > 1
        for at in [adjust.delta(plus[ids], minus[ids], pair.epsilon).astype(np.float64)]
    ]
    return float(np.sqrt(np.mean(np.concatenate(squares)))) if squares else 0.0


def _delta_at(pair: ProxyPair, reference: Reference) -> npt.NDArray[np.float64]:
    """Δ of the reference's top tokens, (n_targets, k)."""
    rows = zip(_target_rows(pair, reference.trace), reference.top, strict=True)
    return np.stack([adjust.delta(p[ids], m[ids], pair.epsilon).astype(np.float64) for (p, m), ids in rows])


def _target_rows(pair: ProxyPair, trace: EncodedTrace) -> Iterator[tuple[Array, Array]]:
    """(z₊, z₋) of the positions from which the trace's targets are predicted."""
    position = 0
    for plus, minus in pair.logits(trace.tokens[:-1]):
        for p, m in zip(plus, minus, strict=True):
            position += 1
            if trace.targets[position]:
                yield p, m


def _cosines(found: npt.NDArray[np.float64], exact: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cosine of each row pair; 0 where one is zero."""
    dot, norms = np.sum(found * exact, axis=1), np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
    return np.asarray(np.divide(dot, norms, out=np.zeros_like(dot), where=norms > 0))


def _centred(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(values - values.mean(axis=1, keepdims=True))
