"""The environment in which a program is under protection: the preloaded library, and what it is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..errors import InputError
from ..llamacpp import native
from ..settings import Settings

FILE_NAME = "libadlocal-plugin.so"
_PREFIX = "ADLOCAL_"


@dataclass(frozen=True)
class Protection:
    """What a program's text is protected with.

    Attributes:
        bundle: whose vocabulary tells which models are protected.
        settings: strength and guard.
        epsilon: step along ĝ, for an adapter bundle; None for the bundle's.
        observe: evaluate the pair and change nothing.
        proxy_n_threads, proxy_n_gpu_layers: None for the teacher's threads, and for llama.cpp's own number of layers.
        allow_models: models of other vocabularies that may generate unprotected.
    """

    bundle: Bundle
    settings: Settings
    epsilon: float | None = None
    observe: bool = False
    proxy_n_threads: int | None = None
    proxy_n_gpu_layers: int | None = None
    allow_models: Sequence[Path] = ()


def library() -> Path:
    """The library that is preloaded.

    Raises:
        InputError: this system has no way to preload one.
        NativeError: it was not built.
    """
    if sys.platform != "linux":
        raise InputError(
            f"a library can be preloaded on Linux alone, not on {sys.platform}; use adlocal engine --engine "
            "llama-cpp-python, AntidistillationLlama in Python, or the C library"
        )
    return native.find(FILE_NAME).resolve()


def environment(protection: Protection, before: Mapping[str, str]) -> dict[str, str]:
    """The variables of a program under protection, made from those of one without.

    Raises:
        InputError, NativeError: as `library`.
    """
    others = [each for each in before.get("LD_PRELOAD", "").replace(":", " ").split() if Path(each).name != FILE_NAME]
    told = {
        "BUNDLE": protection.bundle.directory.resolve(),
        "STRENGTH": repr(protection.settings.strength),
        "GUARD": repr(protection.settings.guard),
        "EPSILON": protection.epsilon and repr(protection.epsilon),
        "OBSERVE": "1" if protection.observe else None,
        "PROXY_THREADS": protection.proxy_n_threads,
        "PROXY_N_GPU_LAYERS": protection.proxy_n_gpu_layers,
        "PID": os.getpid(),  # which the program keeps, and its children have not
        "ALLOW_MODELS": "\n".join(str(path.resolve()) for path in protection.allow_models) or None,
    }
    kept = {name: value for name, value in before.items() if name.removeprefix(_PREFIX) not in told}
    ours = {f"{_PREFIX}{name}": str(value) for name, value in told.items() if value is not None}
    return {**kept, **ours, "LD_PRELOAD": ":".join([os.fspath(library()), *others])}
