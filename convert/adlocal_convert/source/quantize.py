"""llama.cpp's own quantizer."""

from __future__ import annotations

import os
from pathlib import Path

import llama_cpp

from adlocal.errors import ConversionError, InputError
from adlocal.llamacpp.log import captured_log, last_line

_PREFIX = "LLAMA_FTYPE_MOSTLY_"


def file_types() -> dict[str, int]:
    """Names that `--quant` takes, as llama-quantize writes them, and llama.cpp's `llama_ftype` of each."""
    types = {name.removeprefix(_PREFIX): value for name, value in vars(llama_cpp).items() if name.startswith(_PREFIX)}
    return {"F32": llama_cpp.LLAMA_FTYPE_ALL_F32, **types}


def quantize(source: Path, target: Path, type_name: str, n_threads: int) -> None:
    """Requantizes a GGUF with `llama_model_quantize`; a file that is quantized already may be quantized again.

    Raises:
        InputError: no such type.
        ConversionError: llama.cpp refuses; some types need an importance matrix.
    """
    ftype = file_types().get(type_name.upper())
    if ftype is None:
        raise InputError(f"--quant {type_name}: no such type; give one of {', '.join(file_types())}")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = ftype, n_threads, True
    with captured_log() as log:
        status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if status != 0:
        raise ConversionError(f"llama.cpp cannot quantize {source} to {type_name}: {last_line(log)}")
