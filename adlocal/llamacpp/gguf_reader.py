"""Reads the parts of a GGUF file in the order in which they lie there.

What is refused is what llama.cpp refuses (ggml/src/gguf.cpp), in its words where it has some.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .ggml_types import GGML_TYPES

MAGIC, VERSION = b"GGUF", 3
_READABLE = (2, 3)
_N_DIMS_MAX, _NAME_MAX = 4, 63

STRING, ARRAY = 8, 9
#: enum gguf_type, by gguf's names
TYPES = (
    *("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY"),
    *("UINT64", "INT64", "FLOAT64"),
)
#: enum gguf_type -> struct's format
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Malformed(Exception):
    """Why a file is no GGUF."""


class _Ended(Malformed):
    """It ends before the part that is read does."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file: `offset` counts from the start of the file, both figures in bytes."""

    name: str
    ggml_type: int
    offset: int
    n_bytes: int


class Reader:
    """What comes next in a file.

    Raises:
        Malformed: the file is empty; and from every method, that it ends too early or makes no sense.
    """

    def __init__(self, descriptor: int) -> None:
        try:
            self._data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise Malformed("the file is empty") from None
        self._at = 0

    def start(self) -> tuple[int, int]:
        """Numbers of tensors and of keys, after the magic and the version."""
        if self._data[: len(MAGIC)] != MAGIC:
            raise Malformed(f"invalid magic characters: {self._data[: len(MAGIC)]!r}, expected {MAGIC!r}")
        self._at = len(MAGIC)
        with within("failed to read header"):
            version, n_tensors, n_keys = self._unpack("<Iqq")
        if version not in _READABLE:
            raise Malformed(f"this GGUF file is version {version}, expected one of {_READABLE}")
        if n_tensors < 0 or n_keys < 0:
            raise Malformed(f"{n_tensors} tensors and {n_keys} keys")
        return n_tensors, n_keys

    def string(self) -> str:
        """A text behind its length."""
        (n,) = self._unpack("<Q")
        return self._take(n).decode("utf-8", errors="replace")

    def value(self, *, skip: bool) -> tuple[str, Any]:
        """The type of a key, "FLOAT64" or "ARRAY of STRING", and its value; None for one to skip."""
        (gguf_type,) = self._unpack("<I")
        if gguf_type != ARRAY:
            name, value = _type_name(gguf_type), self._items(gguf_type, 1)[0]
            return name, None if skip else value
        gguf_type, n = self._unpack("<IQ")
        if gguf_type == ARRAY:
            raise Malformed("an array of arrays")
        name = f"ARRAY of {_type_name(gguf_type)}"
        if skip:
            self._skip(gguf_type, n)
            return name, None
        return name, self._items(gguf_type, n)

    def tensors(self, n: int, alignment: int) -> list[TensorInfo]:
        """The tensor table, which ends where its padding before the data begins."""
        found = [self._tensor() for _ in range(n)]
        data, expected, names = _padded(self._at, alignment), 0, set()
        for tensor in found:
            if tensor.name in names:
                raise Malformed(f"duplicate tensor name {tensor.name}")
            if tensor.offset != expected:
                raise Malformed(f"tensor {tensor.name} has offset {tensor.offset}, expected {expected}")
            names.add(tensor.name)
            expected += _padded(tensor.n_bytes, alignment)
        return [TensorInfo(t.name, t.ggml_type, data + t.offset, t.n_bytes) for t in found]

    def _tensor(self) -> TensorInfo:
        """Its offset counts from the first tensor's data here."""
        name = self.string()
        (n_dims,) = self._unpack("<I")
        if len(name.encode()) > _NAME_MAX or n_dims > _N_DIMS_MAX:
            raise Malformed(f"tensor {name[:_NAME_MAX]} has a name of {len(name)} characters and {n_dims} dimensions")
        *shape, ggml_type, offset = self._unpack(f"<{n_dims}qIQ")
        if ggml_type not in GGML_TYPES:
            raise Malformed(f"tensor {name} has invalid ggml type {ggml_type}")
        _, block, n_bytes = GGML_TYPES[ggml_type]
        if any(n < 0 for n in shape) or (shape[:1] or [1])[0] % block:
            raise Malformed(f"tensor {name} has shape {shape}, rows being of blocks of {block}")
        return TensorInfo(name, ggml_type, offset, math.prod(shape) // block * n_bytes)

    def _items(self, gguf_type: int, n: int) -> list[Any]:
        if gguf_type == STRING:
            return [self.string() for _ in range(n)]
        code = _code(gguf_type)
        data = self._take(n * struct.calcsize(f"<{code}"))  # whose length is checked before a list is made
        return list(struct.unpack(f"<{n}{code}", data))

    def _skip(self, gguf_type: int, n: int) -> None:
        """A vocabulary has hundreds of thousands of texts."""
        if gguf_type != STRING:
            self._take(n * struct.calcsize(f"<{_code(gguf_type)}"))
            return
        at, unpack, data = self._at, struct.Struct("<Q").unpack_from, self._data
        try:
            for _ in range(n):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError):
            raise _Ended from None
        self._at = at

    def _unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(code, self._take(struct.calcsize(code)))

    def _take(self, n: int) -> bytes:
        if n > len(self._data) - self._at:
            raise _Ended
        self._at += n
        return self._data[self._at - n : self._at]


@contextmanager
def within(what: str) -> Iterator[None]:
    """Where a part is read; says so of a file that ends there."""
    try:
        yield
    except _Ended:
        raise Malformed(what) from None


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _type_name(gguf_type: int) -> str:
    if gguf_type >= len(TYPES):
        raise Malformed(f"invalid GGUF type {gguf_type}")
    return TYPES[gguf_type]


def _code(gguf_type: int) -> str:
    try:
        return SCALARS[gguf_type]
    except KeyError:
        raise Malformed(f"invalid GGUF type {gguf_type}") from None
