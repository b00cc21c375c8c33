"""ggml as llama-cpp-python has loaded it.

It is reached through libllama, which depends on it: a wheel holds copies where a build has symbolic links, and opening
another name would load a second ggml, whose log is not ours. Windows looks up no dependencies, but opens one file a
name.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library
from llama_cpp.llama_cpp import _lib as libllama

ggml = (
    libllama
    if hasattr(libllama, "gguf_init_from_file")
    else load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
)


class InitParams(ctypes.Structure):
    """struct gguf_init_params"""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))
