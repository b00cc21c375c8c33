"""`adlocal bench`: what protection costs, as ratios measured side by side in one run."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import llama_cpp
from llama_cpp._internals import LlamaBatch, LlamaContext
from tqdm import tqdm

from .errors import InputError
from .generate import open_plain, open_protected
from .llama import AntidistillationLlama

_PROMPT = "Once upon a time, in a small town by the sea, there lived an old clockmaker who"
_ROUNDS = 5


@dataclass(frozen=True)
class Bench:
    """Medians over rounds in which the contestants take turns, in seconds a token, and peak memory of the process.

    Attributes:
        plain: `llama_cpp.Llama.generate`.
        protected, strength_0: `AntidistillationLlama.generate`.
        ideal: sum of the three contexts' bare `llama_decode` times, each context run alone.
        in_turns: the same three, a token of each in turns, as protection has to: three models share the caches then.
        adjustment: of one row, all of it.
        peak_bytes: resident memory with plain and protected model loaded.
    """

    plain: float
    protected: float
    strength_0: float
    ideal: float
    in_turns: float
    adjustment: float
    peak_bytes: int

    def report(self) -> dict[str, float]:
        """Every figure and ratio."""
        ratios = {
            "protected_of_ideal": self.ideal / self.protected,
            "protected_of_in_turns": self.in_turns / self.protected,
            "protected_of_plain": self.plain / self.protected,
            "strength_0_of_plain": self.plain / self.strength_0,
        }
        return {**asdict(self), **ratios}


def run(args: argparse.Namespace) -> None:
    """Prints a table, or with --json one object."""
    result = measure(args)
    print(json.dumps(result.report()) if args.json else describe(result))


def measure(args: argparse.Namespace) -> Bench:
    """Times each contestant for `-n` tokens, in turns, so that a drift of the machine hits all alike."""
    with closing(open_plain(args)) as plain, closing(open_protected(args)) as llm:
        n, pair = args.n_predict, llm.pair
        _check(args, llm)
        contestants: dict[str, Callable[[], float]] = {
            "plain": lambda: _generate(plain, n),
            "protected": lambda: _generate(llm, n),
            "strength_0": lambda: _generate(llm, n, strength=0.0),
            "ideal": lambda: sum(_decode([context], n) for context in (plain._ctx, pair.plus, pair.minus)),
            "in_turns": lambda: _decode([plain._ctx, pair.plus, pair.minus], n),
            "adjustment": lambda: _adjust(llm),
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        turns = [name for _ in range(_ROUNDS + 1) for name in contestants]
        for name in tqdm(turns, desc="bench", unit="turn", file=sys.stderr):
            times[name].append(contestants[name]())
        pair.clear()
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first round warms up
    return Bench(**medians, peak_bytes=peak_bytes())


def _check(args: argparse.Namespace, llm: AntidistillationLlama) -> None:
    if llm.strength == 0:
        raise InputError("--strength 0 is the plain teacher, which bench times anyway; give a positive strength")
    needed = len(llm.tokenize(_PROMPT.encode())) + args.n_predict + 1
    if needed > args.ctx_size:
        raise InputError(f"--ctx-size {args.ctx_size}: bench needs {needed} tokens of context; ask for fewer with -n")


def describe(result: Bench) -> str:
    """A table for people."""
    rows = [
        ("plain llama_cpp.Llama.generate", result.plain, ""),
        ("AntidistillationLlama", result.protected, f"{result.plain / result.protected:.3f} of plain"),
        ("AntidistillationLlama, strength 0", result.strength_0, f"{result.plain / result.strength_0:.3f} of plain"),
        (
            "three bare llama_decode, each alone",
            result.ideal,
            f"protected is {result.ideal / result.protected:.3f} of it",
        ),
        (
            "three bare llama_decode, in turns",
            result.in_turns,
            f"protected is {result.in_turns / result.protected:.3f} of it",
        ),
    ]
    lines = [f"{name:36} {1 / seconds:8.1f} tokens/s  {note}" for name, seconds, note in rows]
    lines.append(f"{'adjustment of a row, numpy':36} {result.adjustment * 1e3:8.3f} ms")
    lines.append(f"{'peak resident memory, plain + protected':36} {result.peak_bytes / 2**20:8.0f} MiB")
    return "\n".join(lines)


def _generate(llm: llama_cpp.Llama, n: int, **kwargs: Any) -> float:
    """Seconds a token of greedy generation, the prompt's evaluation left out."""
    llm.reset()
    stream = llm.generate(llm.tokenize(_PROMPT.encode()), temp=0.0, **kwargs)
    next(stream)
    started = time.perf_counter()
    for _ in itertools.islice(stream, n):
        pass
    return (time.perf_counter() - started) / n


def _decode(contexts: Sequence[LlamaContext], n: int) -> float:
    """Seconds for a token of every context with bare `llama_decode`, one token of each in turns."""
    for context in contexts:
        context.kv_cache_clear()
    with closing(LlamaBatch(n_tokens=1, embd=0, n_seq_max=1, verbose=False)) as batch:
        started = 0.0
        for i in range(n + 1):
            if i == 1:
                started = time.perf_counter()
            batch.set_batch([i % 100], i, False)
            for context in contexts:
                context.decode(batch)
                context.get_logits()
    return (time.perf_counter() - started) / n


def _adjust(llm: AntidistillationLlama, n: int = 20) -> float:
    """Seconds to adjust one row, everything between the proxies' logits and the adjusted ones."""
    llm.reset()
    next(llm.generate(llm.tokenize(_PROMPT.encode()), temp=0.0))
    started = time.perf_counter()
    for _ in range(n):
        llm._lockstep.adjust_rows(1)
    return (time.perf_counter() - started) / n


def peak_bytes() -> int:
    """Peak resident memory of this process; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
