"""Loading two files as a pair in the native core."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import llama_cpp
from llama_cpp._internals import LlamaModel
from llama_cpp._logger import set_verbose

from ..llamacpp import native
from ..llamacpp.log import captured_log, last_line
from ..llamacpp.model import offloaded


def load_files(
    files: tuple[Path, Path],
    is_adapter: bool,
    scales: tuple[float, float],
    own_epsilon: float | None,
    params: llama_cpp.llama_context_params,
    n_gpu_layers: int,
    teacher: LlamaModel | None,
    verbose: bool,
) -> int:
    """The core's `struct adl_pair *` of two files; `scales` are ε and delta_scale, the rest is as in `ProxyPair.load`.

    Raises:
        AdlocalError: of the kind that the core says, with llama.cpp's reason.
    """
    set_verbose(verbose)
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = offloaded(n_gpu_layers)
    pair_params = native.sized(native.PairParams, model_params, params, 0, own_epsilon or 0.0)
    lib = native.library()
    init = lib.adl_pair_init_from_adapter if is_adapter else lib.adl_pair_init_from_files
    with captured_log() as log:
        table, model = native.llama_table(lib), teacher and ctypes.cast(teacher.model, ctypes.c_void_p)
        handle: int | None = init(ctypes.byref(table), *map(os.fsencode, files), *scales, model, pair_params)
    if handle is None:
        error = native.error()
        raise type(error)(f"{error} ({last_line(log)})" if log else str(error))
    return handle
