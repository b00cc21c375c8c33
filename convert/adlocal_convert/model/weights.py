"""Weights of a GGUF, read and dequantized one tensor at a time by ggml itself, so that none has to stay in memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from adlocal.errors import ModelError
from adlocal.llamacpp.ggml import ggml

Array = npt.NDArray[np.float32]
F32 = gguf.GGMLQuantizationType.F32
_BYTES_AT_A_TIME = 1 << 20  # that one call of ggml dequantizes
_LARGEST_BAND = 1 << 22  # weights


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF.

    Attributes:
        name: its name in the GGUF.
        shape: rows first, as in PyTorch.
        ggml_type: as the file stores it.
        n_bytes, offset: where its data lie in the file.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: gguf.GGMLQuantizationType
    n_bytes: int
    offset: int

    @property
    def is_linear(self) -> bool:
        """A matrix: a linear layer's, or the embedding table, which a tied model multiplies with too."""
        return len(self.shape) > 1

    @property
    def n_weights(self) -> int:
        return int(np.prod(self.shape))


class _Traits(ctypes.Structure):
    """struct ggml_type_traits"""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
ggml.ggml_get_type_traits.argtypes = [ctypes.c_int]


class WeightFile:
    """The tensors of one GGUF as float32, in the file's order.

    Files are read with `pread`, not mapped: mapped pages would count as this process's memory.

    Args:
        path: the GGUF.
        tensors: all of it.
        n_threads: that share the dequantizing of one tensor.
    """

    def __init__(self, path: Path, tensors: Sequence[Tensor], n_threads: int = 1) -> None:
        self._tensors = {t.name: t for t in tensors}
        self._file = open(path, "rb")  # noqa: SIM115  # closed with this object
        self._pool = ThreadPoolExecutor(n_threads) if n_threads > 1 else None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        if self._pool:
            self._pool.shutdown()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first, as in PyTorch."""
        return self._tensors[name].shape

    def get(self, name: str) -> Array:
        """A whole tensor."""
        shape = self.shape(name)
        return self._read(name, 0, int(np.prod(shape[:-1]))).reshape(shape)

    def bands(self, name: str) -> Iterator[tuple[slice, Array]]:
        """A tensor in bands of rows, so that no large table is ever held whole."""
        *rows, n = self.shape(name)
        n_rows, step = int(np.prod(rows)), max(1, _LARGEST_BAND // n)
        for first in range(0, n_rows, step):
            end = min(first + step, n_rows)
            yield slice(first, end), self._read(name, first, end - first)

    def rows(self, name: str, ids: Sequence[int]) -> Array:
        """Some rows of a matrix, (len(ids), row length), in the order of `ids`."""
        return np.concatenate([self._read(name, i, 1) for i in ids])

    def _read(self, name: str, first: int, n_rows: int) -> Array:
        tensor = self._tensors[name]
        out = np.empty((n_rows, tensor.shape[-1]), dtype=np.float32)
        row_bytes = tensor.n_bytes * tensor.shape[-1] // tensor.n_weights
        step = max(1, _BYTES_AT_A_TIME // row_bytes)

        def read(i: int) -> None:
            rows = out[i : i + step]
            raw = os.pread(self._file.fileno(), len(rows) * row_bytes, tensor.offset + (first + i) * row_bytes)
            _to_float(raw, tensor.ggml_type, rows)

        steps = range(0, n_rows, step)
        for _ in self._pool.map(read, steps) if self._pool and len(steps) > 1 else map(read, steps):
            pass
        return out


def _to_float(raw: bytes, ggml_type: Any, out: Array) -> None:
    if ggml_type == F32:
        out[...] = np.frombuffer(raw, dtype=np.float32).reshape(out.shape)
        return
    to_float = ggml.ggml_get_type_traits(int(ggml_type)).contents.to_float
    if not to_float:
        raise ModelError(f"weights of type {ggml_type.name} cannot be dequantized; convert the proxy to another type")
    to_float(raw, out.ctypes.data, out.size)
