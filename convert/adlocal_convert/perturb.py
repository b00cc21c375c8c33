"""Carriers and the pair's files: which tensors carry the perturbation, and how both halves are written.

Bulk tensors are copied from the base byte for byte, so that their rounding is the same in both halves and cancels in Δ.
Carriers are stored wide enough to hold θ ± εĝ.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from adlocal._gguf import GGUFHeader
from adlocal.bundle import Bundle
from adlocal.errors import ConversionError

from .gradient import Gradient
from .proxy import Array, Proxy, Tensor

_WIDE = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16)


@dataclass(frozen=True)
class Carrier:
    """A tensor that carries the perturbation.

    Attributes:
        name: GGUF tensor name.
        ggml_type: F32, or F16 for the linear tensors of a base that is itself narrower than F32.
        weights: (...) float32 in the file's order, as dequantized from the base.
        direction: ĝ in the file's order, of the same shape.
    """

    name: str
    ggml_type: gguf.GGMLQuantizationType
    weights: Array
    direction: Array

    def at(self, step: float) -> Any:
        """θ + step · ĝ in the type that the file stores."""
        moved = self.weights + np.float32(step) * self.direction
        return moved if self.ggml_type == gguf.GGMLQuantizationType.F32 else moved.astype(np.float16)


@dataclass(frozen=True)
class Selection:
    """The carriers of one bundle, in file order, and their shares of the linear weights and of ‖g‖²."""

    carriers: list[Carrier]
    fraction: float
    energy: float

    @classmethod
    def of(cls, proxy: Proxy, gradient: Gradient, fraction: float) -> Selection:
        """Every 1-D tensor, and the linear tensors with the most gradient energy per byte up to a share of all of them.

        Args:
            proxy: the base.
            gradient: over all its parameters.
            fraction: largest share of the linear weights that may become carriers, 0 to 1.
        """
        energy = {t.name: float(gradient.values[t.parameter].double().square().sum()) for t in proxy.tensors}
        chosen = _by_energy_per_byte(proxy.tensors, energy, fraction)
        chosen += [t.name for t in proxy.tensors if len(t.stored.shape) == 1]
        carriers = [_carrier(t, gradient) for t in proxy.tensors if t.name in chosen]
        linear = {t.name: t.n_weights for t in proxy.tensors if t.is_linear}
        return cls(
            carriers,
            fraction=sum(linear.get(c.name, 0) for c in carriers) / sum(linear.values()),
            energy=sum(energy[c.name] for c in carriers) / gradient.norm**2,
        )

    def sha256(self, step: float) -> str:
        """Hash of the carriers' bytes at θ + step · ĝ."""
        digest = hashlib.sha256()
        for carrier in self.carriers:
            digest.update(carrier.at(step).tobytes())
        return digest.hexdigest()


def _by_energy_per_byte(tensors: Iterable[Tensor], energy: Mapping[str, float], fraction: float) -> list[str]:
    linear = [t for t in tensors if t.is_linear]
    budget = fraction * sum(t.n_weights for t in linear)
    chosen = []
    for tensor in sorted(linear, key=lambda t: energy[t.name] / _bytes_per_weight(t) / t.n_weights, reverse=True):
        if tensor.n_weights <= budget:
            chosen.append(tensor.name)
            budget -= tensor.n_weights
    return chosen


def _carrier_type(tensor: Tensor) -> gguf.GGMLQuantizationType:
    one_dimensional = len(tensor.stored.shape) == 1
    wide = one_dimensional or tensor.stored.tensor_type in _WIDE
    return gguf.GGMLQuantizationType.F32 if wide else gguf.GGMLQuantizationType.F16


def _bytes_per_weight(tensor: Tensor) -> int:
    return 4 if _carrier_type(tensor) == gguf.GGMLQuantizationType.F32 else 2


def _carrier(tensor: Tensor, gradient: Gradient) -> Carrier:
    ggml_type, weights = _carrier_type(tensor), tensor.weights()
    if ggml_type == gguf.GGMLQuantizationType.F16 and np.max(np.abs(weights)) > np.finfo(np.float16).max / 2:
        raise ConversionError(f"tensor {tensor.name} has weights too large for F16 carriers; convert from an F32 file")
    return Carrier(tensor.name, ggml_type, weights, tensor.to_gguf(gradient.values[tensor.parameter] / gradient.norm))


class _AsStored(bytes):
    """Type and value of a key as the base's bytes hold them."""

    def __new__(cls, field: Any) -> _AsStored:
        return super().__new__(cls, b"".join(part.tobytes() for part in field.parts[2:]))


class _Writer(gguf.GGUFWriter):
    """Also takes keys as they are stored; some of them gguf-py could not write: empty arrays, strings not in UTF-8."""

    def _pack_val(self, val: Any, *args: Any, **kwargs: Any) -> Any:
        return val if isinstance(val, _AsStored) else super()._pack_val(val, *args, **kwargs)


def write_half(
    path: Path, reader: Any, carriers: Sequence[Carrier], step: float, metadata: Iterable[tuple[str, Any, str]]
) -> None:
    """Writes one half: all keys of the base, `metadata` after them, the base's tensors with carriers at θ + step · ĝ.

    The file is readable by its owner alone: whoever holds both halves can undo the protection.
    """
    writer = _Writer(path, _architecture(reader), endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            writer.add_key_value(field.name, _AsStored(field), field.types[0])
    for key, value, kind in metadata:
        _add_key(writer, key, value, gguf.GGUFValueType[kind])
    moved = {carrier.name: carrier.at(step) for carrier in carriers}
    for tensor in reader.tensors:
        if tensor.name in moved:
            writer.add_tensor(tensor.name, moved[tensor.name])
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    path.touch(mode=0o600)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def move_carriers(path: Path, carriers: Sequence[Carrier], step: float) -> None:
    """Overwrites a half's carriers in place with θ + step · ĝ, for the sweep."""
    offsets = {tensor.name: tensor.offset for tensor in GGUFHeader(path).tensors}
    with open(path, "r+b") as file:
        for carrier in carriers:
            file.seek(offsets[carrier.name])
            file.write(carrier.at(step).tobytes())
        file.flush()
        os.fsync(file.fileno())


def bundle_id(bundle: Bundle) -> str:
    """Follows from everything that makes the halves what they are: the same inputs give the same bundle."""
    parts = (bundle.base_sha256, bundle.traces_sha256, repr(bundle.epsilon), bundle.plus_sha256, bundle.minus_sha256)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _architecture(reader: Any) -> str:
    return str(reader.get_field("general.architecture").contents())


def _add_key(writer: Any, key: str, value: Any, kind: gguf.GGUFValueType) -> None:
    if isinstance(value, list):
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=kind)
    else:
        writer.add_key_value(key, value, kind)
