"""Header of a GGUF file, read and written by llama.cpp's own `gguf_*` functions (ggml/include/gguf.h).

Numbers keep their type and precision here; `llama_model_meta_val_str` would print floats with six decimals.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library
from llama_cpp.llama_cpp import _lib as libllama

from ..errors import ModelError
from .log import captured_log, last_line

# The library that llama-cpp-python has already loaded, reached through libllama, which depends on it: a wheel holds
# copies where a build has symbolic links, and opening another name would load a second ggml, whose log is not ours.
# Windows looks up no dependencies, but opens one file a name.
ggml = (
    libllama
    if hasattr(libllama, "gguf_init_from_file")
    else load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
)


class InitParams(ctypes.Structure):
    """struct gguf_init_params"""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(ggml, name)
    function.restype, function.argtypes = restype, argtypes
    return function


_p, _i64, _str = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
_init_from_file = _function("gguf_init_from_file", _p, _str, InitParams)
_free = _function("gguf_free", None, _p)
_get_n_kv = _function("gguf_get_n_kv", _i64, _p)
_get_key = _function("gguf_get_key", _str, _p, _i64)
_get_kv_type = _function("gguf_get_kv_type", ctypes.c_int, _p, _i64)
_get_arr_type = _function("gguf_get_arr_type", ctypes.c_int, _p, _i64)
_get_arr_n = _function("gguf_get_arr_n", ctypes.c_size_t, _p, _i64)
_get_arr_data = _function("gguf_get_arr_data", _p, _p, _i64)
_get_arr_str = _function("gguf_get_arr_str", _str, _p, _i64, ctypes.c_size_t)
_get_n_tensors = _function("gguf_get_n_tensors", _i64, _p)
_get_tensor_name = _function("gguf_get_tensor_name", _str, _p, _i64)
_get_tensor_type = _function("gguf_get_tensor_type", ctypes.c_int, _p, _i64)
_get_tensor_offset = _function("gguf_get_tensor_offset", ctypes.c_size_t, _p, _i64)
_get_tensor_size = _function("gguf_get_tensor_size", ctypes.c_size_t, _p, _i64)
_get_data_offset = _function("gguf_get_data_offset", ctypes.c_size_t, _p)

_init_empty = _function("gguf_init_empty", _p)
_write_to_file = _function("gguf_write_to_file", ctypes.c_bool, _p, _str, ctypes.c_bool)
_set_val_str = _function("gguf_set_val_str", None, _p, _str, _str)
_set_arr_data = _function("gguf_set_arr_data", None, _p, _str, ctypes.c_int, _p, ctypes.c_size_t)
_set_arr_str = _function("gguf_set_arr_str", None, _p, _str, ctypes.POINTER(_str), ctypes.c_size_t)

_STRING, _ARRAY = 8, 9
# enum gguf_type, by gguf's names
_TYPES = (
    *("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY"),
    *("UINT64", "INT64", "FLOAT64"),
)
# enum gguf_type -> (suffix of gguf_get_val_*, C type)
_SCALARS: dict[int, tuple[str, Any]] = {
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    6: ("f32", ctypes.c_float),
    7: ("bool", ctypes.c_bool),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
    12: ("f64", ctypes.c_double),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file: `offset` counts from the start of the file, both figures in bytes."""

    name: str
    ggml_type: int
    offset: int
    n_bytes: int


class GGUFHeader:
    """Metadata keys and tensor table of one GGUF file. The tensors' data is not read.

    Raises:
        ModelError: the file is missing, is no GGUF, or ends before its last tensor does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelError(f"{self.path}: no such file; give the path of a GGUF file")
        with captured_log() as log:
            context = _init_from_file(os.fsencode(self.path), InitParams(no_alloc=True, ctx=None))
        if not context:
            raise ModelError(f"{self.path}: not a readable GGUF file ({last_line(log)}); download or convert it again")
        try:
            keys = {_text(_get_key(context, i)): i for i in range(_get_n_kv(context))}
            self._types = {key: _type(context, i) for key, i in keys.items()}
            self._values = {key: _value(context, i) for key, i in keys.items() if not key.startswith("tokenizer.")}
            self.tensors = list(_tensors(context))
        finally:
            _free(context)
        size = self.path.stat().st_size
        end = max((t.offset + t.n_bytes for t in self.tensors), default=0)
        if size < end:
            raise ModelError(f"{self.path}: truncated at {size:,} bytes of {end:,}; download or convert it again")

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained for; 0 if the file does not say."""
        return int(self.get(f"{self.get('general.architecture')}.context_length", 0))

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a metadata key as a Python scalar, string or list. Tokenizer arrays are left out."""
        return self._values.get(key, default)

    def type_of(self, key: str) -> str | None:
        """GGUF type of a key's value by gguf's name, "FLOAT64" or "ARRAY of STRING"; None if there is no such key."""
        return self._types.get(key)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _type(context: int, i: int) -> str:
    gguf_type = _get_kv_type(context, i)
    return f"ARRAY of {_TYPES[_get_arr_type(context, i)]}" if gguf_type == _ARRAY else _TYPES[gguf_type]


def _value(context: int, i: int) -> Any:
    gguf_type = _get_kv_type(context, i)
    if gguf_type == _STRING:
        return _text(_function("gguf_get_val_str", _str, _p, _i64)(context, i))
    if gguf_type == _ARRAY:
        return _array(context, i)
    suffix, c_type = _SCALARS[gguf_type]
    return _function(f"gguf_get_val_{suffix}", c_type, _p, _i64)(context, i)


def _array(context: int, i: int) -> list[Any]:
    n, gguf_type = _get_arr_n(context, i), _get_arr_type(context, i)
    if gguf_type == _STRING:
        return [_text(_get_arr_str(context, i, j)) for j in range(n)]
    if gguf_type not in _SCALARS or n == 0:
        return []
    data = ctypes.cast(_get_arr_data(context, i), ctypes.POINTER(_SCALARS[gguf_type][1]))
    return list(data[:n])


def _tensors(context: int) -> Iterator[TensorInfo]:
    data = _get_data_offset(context)
    for i in range(_get_n_tensors(context)):
        yield TensorInfo(
            name=_text(_get_tensor_name(context, i)),
            ggml_type=_get_tensor_type(context, i),
            offset=data + _get_tensor_offset(context, i),
            n_bytes=_get_tensor_size(context, i),
        )


def write_metadata(path: str | os.PathLike[str], values: Iterable[tuple[str, Any, str]]) -> None:
    """Writes a GGUF file that holds keys and no tensors.

    Args:
        path: overwritten if it exists.
        values: (key, value, GGUF type by gguf's name) of each key; a list is stored as an array of that type.

    Raises:
        OSError: llama.cpp could not write the file.
    """
    context = _init_empty()
    try:
        for key, value, gguf_type in values:
            _set(context, key.encode(), value, _TYPES.index(gguf_type))
        with captured_log() as log:
            written = _write_to_file(context, os.fsencode(path), True)
    finally:
        _free(context)
    if not written:
        raise OSError(f"{path}: cannot be written ({last_line(log)})")


def _set(context: int, key: bytes, value: Any, gguf_type: int) -> None:
    if isinstance(value, list) and gguf_type == _STRING:
        _set_arr_str(context, key, (_str * len(value))(*[text.encode() for text in value]), len(value))
    elif isinstance(value, list):
        _set_arr_data(context, key, gguf_type, (_SCALARS[gguf_type][1] * len(value))(*value), len(value))
    elif gguf_type == _STRING:
        _set_val_str(context, key, value.encode())
    else:
        suffix, c_type = _SCALARS[gguf_type]
        _function(f"gguf_set_val_{suffix}", None, _p, _str, c_type)(context, key, value)
