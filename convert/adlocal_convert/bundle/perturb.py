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

from adlocal.bundle import Bundle
from adlocal.errors import ConversionError
from adlocal.llamacpp.gguf import GGUFHeader

from ..gguf_copy import AsStored, Writer
from ..model.proxy import Proxy
from ..model.streamed import Direction
from ..model.weights import Array


@dataclass(frozen=True)
class Carrier:
    """A tensor that carries the perturbation.

    Attributes:
        name: GGUF tensor name.
        ggml_type: F32 or F16.
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


def load_carriers(proxy: Proxy, direction: Direction, types: Mapping[str, gguf.GGMLQuantizationType]) -> list[Carrier]:
    """The tensors that `types` names, with their weights and their part of ĝ, in file order.

    Raises:
        ConversionError: weights are beyond what F16 holds.
    """
    return [
        _carrier(t.name, types[t.name], proxy.weights.get(t.name), direction.get(t.name).numpy())
        for t in proxy.tensors
        if t.name in types
    ]


def _carrier(name: str, ggml_type: gguf.GGMLQuantizationType, weights: Array, direction: Array) -> Carrier:
    if ggml_type == gguf.GGMLQuantizationType.F16 and np.max(np.abs(weights)) > np.finfo(np.float16).max / 2:
        raise ConversionError(f"tensor {name} has weights too large for F16 carriers; convert from an F32 file")
    return Carrier(name, ggml_type, weights, direction)


def carriers_sha256(carriers: Sequence[Carrier], step: float) -> str:
    """Hash of the carriers' bytes at θ + step · ĝ."""
    digest = hashlib.sha256()
    for carrier in carriers:
        digest.update(carrier.at(step).tobytes())
    return digest.hexdigest()


def write_half(
    path: Path, reader: Any, carriers: Sequence[Carrier], step: float, metadata: Iterable[tuple[str, Any, str]]
) -> None:
    """Writes one half: all keys of the base, `metadata` after them, the base's tensors with carriers at θ + step · ĝ.

    The file is readable by its owner alone: whoever holds both halves can undo the protection.
    """
    writer = Writer(path, _architecture(reader), endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            writer.add_key_value(field.name, AsStored(field), field.types[0])
    for key, value, gguf_type in metadata:
        writer.add_metadata(key, value, gguf.GGUFValueType[gguf_type])
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
    """Follows from everything that makes the bundle what it is: the same inputs give the same bundle."""
    sources = (*bundle.capability_sha256, *map(repr, bundle.capability_weights))
    parts = (bundle.format, bundle.base_sha256, *sources, repr(bundle.epsilon), *bundle.carriers_sha256)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _architecture(reader: Any) -> str:
    return str(reader.get_field("general.architecture").contents())
