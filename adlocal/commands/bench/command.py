"""What `adlocal bench` does, in order."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from ...bundle import Bundle
from ...engine.parallel import ParallelLlama
from ...engine.prefix import BLOCK
from ...errors import InputError
from ...llama import AntidistillationLlama
from ...llamacpp.model import context_length
from ...settings import Settings
from ..teacher import open_plain, open_protected
from . import many, shape
from .gaps import Gaps
from .prompts import prompt
from .report import Bench, describe, peak_bytes
from .single import Single


def run(args: argparse.Namespace) -> None:
    """Prints tables, or with --json one object."""
    report = measure(args).report()
    print(json.dumps(report) if args.json else describe(report))


@dataclass(frozen=True)
class _One:
    """What the run of one sequence found, and what the others go on with."""

    settings: Settings
    prompt: list[int]
    text: list[int]
    figures: dict[str, float]
    gaps: Gaps
    peak_bytes: int


def measure(args: argparse.Namespace) -> Bench:
    """Times one sequence, then many, then compares batches."""
    args.ctx_size = _context(args)
    one = _measure_one(args)
    n_sequences = sorted(set(args.parallel))
    found = _measure_many(args, one, n_sequences) if n_sequences else []
    settings = {
        "strength": one.settings.strength,
        "guard": one.settings.guard,
        "n_prompt": len(one.prompt),
        "n_predict": args.n_predict,
        "rounds": args.rounds,
        "threads": args.threads,
        "gpu_layers": args.gpu_layers,
    }
    return Bench(
        settings=settings,
        single=one.figures,
        gaps=one.gaps,
        many=dict(zip(n_sequences, found, strict=True)),
        shape=_measure_shape(args, one),
        peak_bytes=one.peak_bytes,
    )


def _context(args: argparse.Namespace) -> int:
    """Tokens of context: as many as were asked for, and no more than teacher and proxies were trained for."""
    first, _ = Bundle.open(args.bundle).files
    return context_length(first, context_length(args.model, args.ctx_size))


def _measure_one(args: argparse.Namespace) -> _One:
    with closing(open_plain(args)) as plain, closing(open_protected(args)) as llm:
        tokens = prompt(plain, args.prompt)
        _check(args, llm, tokens)
        single = Single(plain, llm, tokens, args.n_predict)
        figures = single.measure(args.rounds)
        return _One(Settings(llm.strength, llm.guard), tokens, single.text, figures, single.gaps, peak_bytes())


def _check(args: argparse.Namespace, llm: AntidistillationLlama, tokens: Sequence[int]) -> None:
    if llm.strength == 0:
        raise InputError("--strength 0 is the plain teacher, which bench times anyway; give a positive strength")
    needed = len(tokens) + args.n_predict + 1
    if needed > args.ctx_size:
        raise InputError(
            f"{args.ctx_size} tokens of context, from --ctx-size or from what the models were trained for: bench needs "
            f"{needed}; ask for fewer with -n, or give a shorter --prompt"
        )
    if len(tokens) < (most := max(args.parallel, default=1)):
        raise InputError(
            f"--prompt has {len(tokens)} tokens: --parallel {most} cuts it at {most} places; give a longer one"
        )


def _measure_many(args: argparse.Namespace, one: _One, n_sequences: Sequence[int]) -> list[dict[str, float]]:
    def open_teacher(protected: bool) -> ParallelLlama:
        return ParallelLlama(
            args.model,
            n_ctx=len(one.prompt) + args.n_predict + 1,
            n_parallel=max(n_sequences),
            n_threads=args.threads,
            n_gpu_layers=args.gpu_layers,
            bundle=args.bundle if protected else None,
            strength=one.settings.strength if protected else None,
            guard=one.settings.guard if protected else None,
        )

    return many.measure(open_teacher, one.prompt, args.n_predict, n_sequences, args.rounds)


def _measure_shape(args: argparse.Namespace, one: _One) -> shape.Shape:
    size = -(-len(one.text) // BLOCK) * BLOCK  # the pair's batches are whole blocks
    with closing(open_protected(args, one.settings, n_ctx=size, n_batch=size, n_ubatch=size, logits_all=True)) as llm:
        return shape.measure(llm, one.text)
