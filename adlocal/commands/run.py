"""`adlocal run`: starts a llama.cpp program that nobody changed, under protection."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from ..bundle import Bundle
from ..errors import InputError
from ..plugin import Protection, check_program, environment
from ..settings import resolve


def run(args: argparse.Namespace) -> None:
    """Becomes the program: its signals, its terminal and its exit status are its own."""
    variables = environment(protection_of(args), os.environ)
    program = _found(args.program[0])
    sys.stdout.flush()
    os.execve(program, args.program, variables)


def protection_of(args: argparse.Namespace, teacher: str | None = None) -> Protection:
    """What `arguments.add_preloaded` asked for.

    Args:
        teacher: the GGUF that is protected; None where the program alone knows which it loads.

    Raises:
        InputError: the bundle or a value cannot be used.
    """
    bundle = Bundle.open(args.bundle)
    return Protection(
        bundle,
        resolve(bundle, teacher, args.strength, args.guard),
        epsilon=args.epsilon,
        observe=args.observe,
        proxy_n_threads=args.proxy_threads,
        proxy_n_gpu_layers=args.proxy_gpu_layers,
        allow_models=args.allow_model,
        control_directory=args.control,
        libllama=args.libllama,
    )


def _found(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise InputError(f"{name}: no such program; give one that can be run, after --")
    check_program(Path(path))
    return path
