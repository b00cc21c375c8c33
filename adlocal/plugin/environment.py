"""The environment in which a program is under protection: the preloaded library, and what it is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..errors import InputError
from ..llamacpp.installed import find
from ..settings import Settings
from .build import ALIKE, FILE_NAME, kept, version_of
from .directory import control_directory

_PREFIX = "ADLOCAL_"
#: llama-server's variable for what `--fit` leaves free on each device, and its default.
_FIT_TARGET, _FIT_TARGET_MIB = "LLAMA_ARG_FIT_TARGET", 1024


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
        control_directory: where its control file is made; None for the user's own.
        libllama: the program's llama.cpp, if it is none of those that the plugin which came with adlocal knows.
    """

    bundle: Bundle
    settings: Settings
    epsilon: float | None = None
    observe: bool = False
    proxy_n_threads: int | None = None
    proxy_n_gpu_layers: int | None = None
    allow_models: Sequence[Path] = ()
    control_directory: Path | None = None
    libllama: Path | None = None


def library(libllama: Path | None = None) -> Path:
    """The library that is preloaded: the one that came with adlocal, or the one that was built for a llama.cpp.

    Raises:
        InputError: this system has no way to preload one, or there is none for this llama.cpp.
        NativeError: it was not built.
    """
    if sys.platform != "linux":
        raise InputError(
            f"a library can be preloaded on Linux alone, not on {sys.platform}; use adlocal engine --engine "
            "llama-cpp-python, AntidistillationLlama in Python, or the C library"
        )
    if libllama is None or (version := version_of(libllama)) in ALIKE:
        return find(FILE_NAME).resolve()
    if not (path := kept(version)).exists():
        raise InputError(
            f"{libllama} is llama.cpp {version}, and there is no plugin for it yet; build one with "
            f"`adlocal plugin build --include DIR --libllama {libllama}`, DIR being where its llama.h is"
        )
    return path


def environment(protection: Protection, before: Mapping[str, str]) -> dict[str, str]:
    """The variables of a program under protection, made from those of one without.

    Raises:
        InputError, NativeError: as `library` and `control_directory`.
    """
    preloaded = library(protection.libllama)
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
        "CONTROL_DIR": control_directory(protection.control_directory),
        "ALLOW_MODELS": "\n".join(str(path.resolve()) for path in protection.allow_models) or None,
    }
    inherited = {name: value for name, value in before.items() if name.removeprefix(_PREFIX) not in told}
    ours = {f"{_PREFIX}{name}": str(value) for name, value in told.items() if value is not None}
    return {**inherited, **ours, **_room(protection, before), "LD_PRELOAD": ":".join([os.fspath(preloaded), *others])}


def proxies_bytes(protection: Protection) -> int:
    """What the proxies' weights take of the teacher's devices. Nobody knows yet how much context they get."""
    return 0 if protection.proxy_n_gpu_layers == 0 else sum(path.stat().st_size for path in protection.bundle.files)


def _room(protection: Protection, before: Mapping[str, str]) -> dict[str, str]:
    """Where llama-server fits a model into a device (`--fit`), it leaves room for proxies of which it knows nothing."""
    mib = -(-proxies_bytes(protection) // 2**20)
    if mib == 0:
        return {}
    targets = before.get(_FIT_TARGET, str(_FIT_TARGET_MIB)).replace("/", ",").split(",")
    if not all(each.strip().isdecimal() for each in targets):  # llama-server will say what is wrong with it
        return {}
    return {_FIT_TARGET: ",".join(str(int(each) + mib) for each in targets)}
