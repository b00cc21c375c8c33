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
    bundle = Bundle.open(args.bundle)
    protection = Protection(
        bundle,
        resolve(bundle, None, args.strength, args.guard),  # which teacher it loads, the program alone knows
        epsilon=args.epsilon,
        observe=args.observe,
        proxy_n_threads=args.proxy_threads,
        proxy_n_gpu_layers=args.proxy_gpu_layers,
        allow_models=args.allow_model,
        control_directory=args.control,
        libllama=args.libllama,
    )
    variables = environment(protection, os.environ)
    program = _found(args.program[0])
    sys.stdout.flush()
    os.execve(program, args.program, variables)


def _found(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise InputError(f"{name}: no such program; give one that can be run, after --")
    check_program(Path(path))
    return path
