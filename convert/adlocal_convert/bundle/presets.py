"""Which tensors carry the perturbation, and in which type: the best predicted fidelity for the bytes of a token.

Every token reads every weight of both proxies, so a byte in the file is a byte of every token's cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gguf
import numpy as np

from adlocal.bundle import HALVES
from adlocal.bundle.choices import BALANCED, EXACT, NORMS, SMALL

from ..model.weights import Tensor
from .gain import Gain

F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
UNROUNDED = (F32, F16, gguf.GGMLQuantizationType.BF16)


@dataclass(frozen=True)
class Preset:
    """What `--quality` names.

    Attributes:
        largest: size of a file that is written, as a multiple of the base's.
        energy: share of ‖ĝ‖² that an adapter captures.
        is_wide: every matrix in F16, or F32 where the base has it.
        least_fidelity: median cosine under which no bundle is written.
    """

    largest: float
    energy: float
    is_wide: bool = False
    least_fidelity: float = 0.90


QUALITIES = {
    SMALL: Preset(largest=1.10, energy=0.98),
    BALANCED: Preset(largest=1.25, energy=0.995),
    EXACT: Preset(largest=np.inf, energy=0.9995, is_wide=True, least_fidelity=0.99),
}
Types = dict[str, gguf.GGMLQuantizationType]


def wide_type(tensor: Tensor) -> gguf.GGMLQuantizationType:
    """The type that holds a tensor's perturbation: F32 for vectors and what is F32 or BF16 already, else F16."""
    wide = not tensor.is_linear or tensor.ggml_type in (F32, gguf.GGMLQuantizationType.BF16)
    return F32 if wide else F16


def extra_bytes(tensor: Tensor) -> int:
    """Bytes that the wide type takes beyond the base's."""
    return tensor.n_weights * (4 if wide_type(tensor) == F32 else 2) - tensor.n_bytes


def carrier_types(
    tensors: Sequence[Tensor], gain: Gain, preset: Preset, fraction: float | None, base_bytes: int
) -> Types:
    """The carriers among the tensors of a selection, and their types.

    Args:
        tensors: of the selection. Those that cost nothing always carry.
        gain: signal and noise of each.
        preset: how large a file may get.
        fraction: a share of the selection's matrices to carry, in place of the preset's size.
        base_bytes: size of the base's file.
    """
    if preset.is_wide and fraction is None:
        return {t.name: wide_type(t) for t in tensors}
    if fraction is None:
        return _greedy(tensors, gain, extra_bytes, int((preset.largest - 1) * base_bytes))
    matrices = sum(t.n_weights for t in tensors if t.is_linear)
    return _greedy(tensors, gain, lambda t: t.n_weights if t.is_linear else 0, int(fraction * matrices))


def wide_base(tensors: Sequence[Tensor], preset: Preset) -> Types:
    """Tensors that an adapter's base holds wider than the proxy's file: all matrices, for the exact preset."""
    return {t.name: wide_type(t) for t in tensors if preset.is_wide and extra_bytes(t) > 0}


def is_mostly_wide(preset: Preset, fraction: float | None, params: str, format: str) -> bool:
    """Whether most matrices of a bundle are stored in the wide types, rather than in the base's.

    Args:
        preset: of the bundle.
        fraction: a share of the selection's matrices that carries, in place of the preset's choice.
        params: the selection.
        format: of the bundle.
    """
    if format == HALVES and params == NORMS:
        return False
    return preset.is_wide if fraction is None else fraction > 0.5


def _greedy(tensors: Sequence[Tensor], gain: Gain, cost: Callable[[Tensor], int], budget: int) -> Types:
    """Adds the tensor with the highest predicted gain a unit of cost, as long as one fits.

    The gain is that of log cos², where cos² = slope² / (slope² + noise) is what signal and noise say of Δ.
    """
    chosen = {t.name: wide_type(t) for t in tensors if cost(t) <= 0}
    left = [t for t in tensors if t.name not in chosen]
    slope = sum(gain.slope.get(name, 0.0) for name in chosen)
    noises = {t.name: gain.noise.get(t.name, 0.0) for t in tensors if t.ggml_type not in UNROUNDED}
    noise = sum(noises.values())
    while left := [t for t in left if cost(t) <= budget]:
        after = [(slope + gain.slope.get(t.name, 0.0), noise - noises.get(t.name, 0.0)) for t in left]
        gains = [
            (_log_cosine(s, n) - _log_cosine(slope, noise)) / cost(t) for (s, n), t in zip(after, left, strict=True)
        ]
        i = int(np.argmax(gains))
        best = left.pop(i)
        slope, noise = after[i]
        chosen[best.name] = wide_type(best)
        budget -= cost(best)
    return chosen


def _log_cosine(slope: float, noise: float) -> float:
    """log cos²; the share of a tensor may be negative, and nothing at all is no direction."""
    signal = max(slope, 1e-9) ** 2
    return math.log(signal / (signal + max(noise, 0.0)))
