"""The teacher that a command asks for, plain or under protection."""

from __future__ import annotations

import argparse
from typing import Any

import llama_cpp

from ..llama import AntidistillationLlama
from ..llamacpp.gguf import GGUFHeader
from ..llamacpp.model import refusals
from ..settings import Settings


class PlainLlama(llama_cpp.Llama):
    """The unprotected teacher, counting what it samples."""

    n_sampled = 0

    def sample(self, *args: Any, **kwargs: Any) -> int:
        self.n_sampled += 1
        return int(super().sample(*args, **kwargs))


def open_teacher(args: argparse.Namespace) -> llama_cpp.Llama:
    """The teacher that `-m`, `-c`, `-t`, `-ngl` and, unless unprotected, `--bundle` ask for."""
    return open_plain(args) if args.bundle is None else open_protected(args)


def open_protected(
    args: argparse.Namespace, settings: Settings | None = None, *, full: bool = False, **kwargs: Any
) -> AntidistillationLlama:
    """The teacher with `--bundle`, at these settings, or at those that `--strength` and `--guard` ask for.

    Further arguments are of `llama_cpp.Llama`, and go before those of the command.
    """
    strength, guard = (args.strength, args.guard) if settings is None else (settings.strength, settings.guard)
    how = {**_arguments(args), **kwargs}
    return AntidistillationLlama(args.model, bundle=args.bundle, strength=strength, guard=guard, full=full, **how)


def open_plain(args: argparse.Namespace) -> llama_cpp.Llama:
    """The plain teacher, with llama.cpp's reason in the error where it will not load."""
    GGUFHeader(args.model)
    with refusals(args.model):
        return PlainLlama(args.model, **_arguments(args))


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What `-c`, `-t` and `-ngl` are to `llama_cpp.Llama`."""
    return {
        "n_ctx": args.ctx_size,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "n_gpu_layers": args.gpu_layers,
        "verbose": False,
    }
