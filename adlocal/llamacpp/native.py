"""ctypes binding to the native core, native/include/adlocal.h: one thin layer, errors turned into exceptions.

The core is given llama.cpp's functions from the library that llama-cpp-python has already loaded, so that there never
is a second libllama in the process.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import llama_cpp
from llama_cpp.llama_cpp import _lib as libllama

from ..errors import AdlocalError, BundleError, InputError, ModelError, NativeError, ProxyError, VocabularyError
from .ggml import InitParams, ggml
from .installed import REMEDY, find

FILE_NAME = {"win32": "adlocal.dll", "darwin": "libadlocal.dylib"}.get(sys.platform, "libadlocal.so")

# enum adl_mode
MODE_OFF, MODE_OBSERVE, MODE_PROTECT = 0, 1, 2
# enum adl_sign
MINUS, PLUS = -1, 1
#: llama_decode of the teacher failed.
ERROR_DECODE = -8

# enum adl_status
_ERRORS: dict[int, type[AdlocalError]] = {
    -1: InputError,
    -2: NativeError,
    -3: BundleError,
    -4: ModelError,
    -5: VocabularyError,
    -6: ProxyError,
    -7: NativeError,
}

_p, _i32, _u32, _f64, _bool, _str = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_uint32,
    ctypes.c_double,
    ctypes.c_bool,
    ctypes.c_char_p,
)
_floats = ctypes.POINTER(ctypes.c_float)

_replaced: dict[str, int | None] = {}


class BundleStruct(ctypes.Structure):
    """struct adl_bundle"""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("format_version", _u32),
        ("is_adapter", _bool),
        ("id", ctypes.c_char * 65),
        ("epsilon", _f64),
        ("delta_scale", _f64),
        ("gradient_norm", _f64),
        ("guard", _f64),
    )


class PairParams(ctypes.Structure):
    """struct adl_pair_params"""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("model", llama_cpp.llama_model_params),
        ("context", llama_cpp.llama_context_params),
        ("concurrency", ctypes.c_int),
        ("epsilon", _f64),
    )


class RowStruct(ctypes.Structure):
    """struct adl_row"""

    _fields_ = (("mean", _f64), ("kl", _f64), ("n_candidates", _i32))


class RowParams(ctypes.Structure):
    """struct adl_row_params"""

    _fields_ = (("strength", _f64), ("guard", _f64), ("mode", _i32), ("full", _bool))


class RowResult(ctypes.Structure):
    """struct adl_row_result"""

    _fields_ = (("kl", _f64), ("n_candidates", _i32), ("evaluated", _bool), ("closed", _bool))


class LockstepParams(ctypes.Structure):
    """struct adl_lockstep_params"""

    _fields_ = (("size", ctypes.c_size_t), ("full", _bool))


class LockstepStats(ctypes.Structure):
    """struct adl_lockstep_stats"""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("n_rows", "n_choices", "n_evaluated", "n_pair_decodes", "n_pair_tokens")
    )


class DoseStruct(ctypes.Structure):
    """struct adl_dose"""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_tokens", "n_steerable", "n_dosed")),
        *((name, _f64) for name in ("total", "kl")),
    )


_Struct = TypeVar("_Struct", bound=ctypes.Structure)


def sized(struct: type[_Struct], *values: Any) -> _Struct:
    """One of the core's structures whose first field is its size, with the values of the others."""
    return struct(ctypes.sizeof(struct), *values)


_batch = llama_cpp.llama_batch

# name -> (result, arguments)
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "adl_last_error": (_str, ()),
    "adl_last_status": (_i32, ()),
    "adl_version": (_str, ()),
    "adl_llama_struct_name": (_str, (ctypes.c_size_t,)),
    "adl_llama_function_name": (_str, (ctypes.c_size_t,)),
    "adl_llama_check": (_i32, (_p,)),
    "adl_bundle_read": (_i32, (_p, _str, ctypes.POINTER(BundleStruct))),
    "adl_vocab_shared": (_i32, (_p, _p, _p)),
    "adl_pair_init": (_p, (_p, _str, _p, PairParams)),
    "adl_pair_init_from_files": (_p, (_p, _str, _str, _f64, _f64, _p, PairParams)),
    "adl_pair_init_from_adapter": (_p, (_p, _str, _str, _f64, _f64, _p, PairParams)),
    "adl_pair_free": (None, (_p,)),
    "adl_pair_epsilon": (_f64, (_p,)),
    "adl_pair_set_epsilon": (_i32, (_p, _f64)),
    "adl_pair_n_ctx": (_u32, (_p,)),
    "adl_pair_n_vocab": (_i32, (_p,)),
    "adl_pair_get_context": (_p, (_p, ctypes.c_int)),
    "adl_pair_decode": (_i32, (_p, _batch)),
    "adl_pair_get_logits": (_floats, (_p, ctypes.c_int)),
    "adl_pair_memory_clear": (None, (_p,)),
    "adl_pair_memory_seq_rm": (_bool, (_p, _i32, _i32, _i32)),
    "adl_pair_touch": (None, (_p,)),
    "adl_pair_serial": (ctypes.c_uint64, (_p,)),
    "adl_pair_n_rows": (_i32, (_p,)),
    "adl_pair_adjust": (
        _i32,
        (_p, _floats, _i32, ctypes.POINTER(_f64), ctypes.POINTER(_f64), ctypes.POINTER(RowStruct)),
    ),
    "adl_pair_dose": (_f64, (_p, _i32, _i32)),
    "adl_adjust": (
        _i32,
        (
            *(_floats, _i32, _floats, _floats, _i32, _i32),
            *(ctypes.POINTER(_i32), ctypes.c_size_t, _f64, _f64, _f64, ctypes.POINTER(RowStruct)),
        ),
    ),
    "adl_lockstep_init": (_p, (_p, _p, LockstepParams)),
    "adl_lockstep_free": (None, (_p,)),
    "adl_lockstep_decode": (
        _i32,
        (_p, _batch, ctypes.POINTER(RowParams), _i32, ctypes.POINTER(RowResult)),
    ),
    "adl_lockstep_begin": (_i32, (_p, _batch, ctypes.POINTER(RowParams), _i32)),
    "adl_lockstep_end": (_i32, (_p, _i32, ctypes.POINTER(RowResult))),
    "adl_lockstep_doses": (_i32, (_p, _i32, _i32, ctypes.POINTER(_i32), ctypes.c_size_t, ctypes.POINTER(_f64))),
    "adl_lockstep_dose": (_f64, (_p, _i32, _i32)),
    "adl_lockstep_get_logits": (_floats, (_p, _i32, ctypes.c_int)),
    "adl_lockstep_get_stats": (LockstepStats, (_p,)),
    "adl_lockstep_memory_clear": (None, (_p,)),
    "adl_lockstep_memory_seq_rm": (_bool, (_p, _i32, _i32, _i32)),
    "adl_lockstep_memory_seq_cp": (_i32, (_p, _i32, _i32, _i32, _i32)),
    "adl_lockstep_n_held": (ctypes.c_size_t, (_p, _i32)),
    "adl_lockstep_restore": (
        _i32,
        (_p, _i32, ctypes.POINTER(_i32), ctypes.POINTER(_i32), ctypes.c_size_t, ctypes.c_size_t),
    ),
    "adl_sampler_init": (_p, (_p, _f64, _f64)),
    "adl_sampler_set_prefix": (_i32, (_p, ctypes.POINTER(_i32), ctypes.c_size_t)),
    "adl_sampler_error": (_str, (_p,)),
    "adl_sampler_get_dose": (DoseStruct, (_p,)),
}


@functools.cache
def library() -> Any:
    """The native core, loaded once.

    Raises:
        NativeError: it was not built, or belongs to another version of adlocal or of llama.cpp.
    """
    path = find(FILE_NAME)
    try:
        lib = ctypes.CDLL(str(path))
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path.name} cannot be used ({error}); {REMEDY}") from None
    version, ours = lib.adl_version().decode(), sys.modules["adlocal"].__version__
    if version != ours:
        raise NativeError(f"{path.name} is of adlocal {version}, this is adlocal {ours}; {REMEDY}")
    if lib.adl_llama_check(ctypes.byref(llama_table(lib))) != 0:
        raise NativeError(f"{lib.adl_last_error().decode()}: {REMEDY}, with the llama-cpp-python that runs it")
    return lib


def llama_table(lib: Any) -> ctypes.Structure:
    """llama.cpp's functions in this process, as struct adl_llama."""
    structs, functions = _names(lib.adl_llama_struct_name), _names(lib.adl_llama_function_name)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    fields = [("size", size), *((f"sizeof_{s}", size) for s in structs), *((f, pointer) for f in functions)]
    table: ctypes.Structure = type("adl_llama", (ctypes.Structure,), {"_fields_": fields})()
    table.size = ctypes.sizeof(table)
    for name in structs:
        setattr(table, f"sizeof_{name}", size_of(name))
    for name in functions:
        setattr(table, name, _replaced.get(name) or address_of(name))
    return table


@contextmanager
def replaced(function: str, by: Any) -> Iterator[None]:
    """Pairs that are loaded in this scope are given another function in the place of llama.cpp's.

    Args:
        function: llama.cpp's name of it.
        by: a ctypes callback of the same type, which has to live for as long as such a pair does.
    """
    _replaced[function] = ctypes.cast(by, ctypes.c_void_p).value
    try:
        yield
    finally:
        del _replaced[function]


def _names(function: Any) -> list[str]:
    names: Iterator[bytes | None] = map(function, itertools.count())
    return [name.decode() for name in itertools.takewhile(lambda name: name is not None, names) if name]


def size_of(struct: str) -> int:
    """Bytes of a structure as llama-cpp-python declares it; 0 where it does not."""
    return ctypes.sizeof(InitParams if struct == "gguf_init_params" else getattr(llama_cpp, struct))


def address_of(function: str) -> int | None:
    """Where llama.cpp's function lies, None if this llama.cpp has none of that name."""
    try:
        return ctypes.cast(getattr(ggml if function.startswith("gguf") else libllama, function), ctypes.c_void_p).value
    except AttributeError:
        return None


def error() -> AdlocalError:
    """What went wrong in this thread's last failed call."""
    return _ERRORS[library().adl_last_status()](last_words())


def last_words() -> str:
    """The same in words."""
    return str(library().adl_last_error().decode("utf-8", errors="replace"))


def check(status: int) -> int:
    """Returns the status of a call, or raises what went wrong."""
    if status < 0:
        raise error()
    return status
