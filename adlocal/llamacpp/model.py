"""Loading models. There is one way, and llama.cpp's own reason is in the error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp
from llama_cpp._internals import LlamaModel
from llama_cpp._logger import set_verbose

from ..errors import ModelError
from .gguf import GGUFHeader
from .log import captured_log, last_line

StrPath = str | os.PathLike[str]

_ALL_LAYERS = 0x7FFFFFFF


def load_model(path: StrPath, n_gpu_layers: int = 0) -> LlamaModel:
    """Loads a GGUF's tokenizer and weights.

    Args:
        path: of the GGUF.
        n_gpu_layers: layers to offload, -1 for all.

    Raises:
        ModelError: llama.cpp refuses the file.
    """
    set_verbose(False)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = offloaded(n_gpu_layers)
    return _load(path, params)


def open_vocabulary(path: StrPath) -> LlamaModel:
    """Loads a GGUF's tokenizer and metadata, no weights.

    Raises:
        ModelError: llama.cpp refuses the file.
    """
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    return _load(path, params)


def _load(path: StrPath, params: llama_cpp.llama_model_params) -> LlamaModel:
    with refusals(path):
        return LlamaModel(path_model=os.fspath(path), params=params, verbose=False)


@contextmanager
def refusals(path: StrPath) -> Iterator[None]:
    """Turns llama-cpp-python's refusal of a model or a context into a `ModelError` with llama.cpp's reason."""
    try:
        with captured_log() as log:
            yield
    except ValueError as error:
        raise ModelError(f"{path}: {error} ({last_line(log)})") from None


def offloaded(n_gpu_layers: int) -> int:
    """The number of layers that llama.cpp is to offload; -1 is all of them."""
    return _ALL_LAYERS if n_gpu_layers == -1 else n_gpu_layers


def context_length(path: StrPath, asked: int) -> int:
    """Tokens of context: as many as were asked for, and no more than the model was trained for.

    Raises:
        ModelError: the file is no GGUF.
    """
    return min(asked, GGUFHeader(path).n_ctx_train or asked)
