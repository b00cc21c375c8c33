"""`adlocal bench`: what protection costs, as ratios measured side by side in one run."""

from __future__ import annotations

import argparse
import ctypes
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
import numpy as np
from llama_cpp._internals import LlamaBatch
from tqdm import tqdm

from .. import adjust
from ..errors import InputError, ProxyError
from ..llama import AntidistillationLlama
from ..llamacpp import native
from ..settings import DEFAULT_GUARD
from .teacher import open_plain, open_protected

_PROMPT = "Once upon a time, in a small town by the sea, there lived an old clockmaker who"
_ROUNDS = 9
N_LARGE = 152_064


@dataclass(frozen=True)
class Bench:
    """Medians over rounds in which the contestants take turns, in seconds a token, and peak memory of the process.

    Attributes:
        plain: `llama_cpp.Llama.generate`.
        protected, strength_0: `AntidistillationLlama.generate`.
        bare: the teacher's bare `llama_decode`; what plain costs more is llama-cpp-python's own.
        ideal: sum of the three contexts' bare `llama_decode` times, each context run alone.
        in_turns: the same three, a token of each in turns, as protection has to: three models share the caches then.
        adjustment, adjustment_numpy: of one row of N_LARGE tokens, by the native core and by its oracle.
        peak_bytes: resident memory with plain and protected model loaded.
    """

    plain: float
    protected: float
    strength_0: float
    bare: float
    ideal: float
    in_turns: float
    adjustment: float
    adjustment_numpy: float
    peak_bytes: int

    def report(self) -> dict[str, float]:
        """Every figure and ratio."""
        ratios = {
            "protected_of_ideal": self.ideal / self.protected,
            "protected_of_in_turns": self.in_turns / self.protected,
            "protected_of_plain": self.plain / self.protected,
            "plain_of_bare": self.bare / self.plain,
            "strength_0_of_plain": self.plain / self.strength_0,
            "native_of_numpy": self.adjustment / self.adjustment_numpy,
        }
        return {**asdict(self), **ratios}


def run(args: argparse.Namespace) -> None:
    """Prints a table, or with --json one object."""
    result = measure(args)
    print(json.dumps(result.report()) if args.json else describe(result))


def measure(args: argparse.Namespace) -> Bench:
    """Times each contestant for `-n` tokens, in turns, so that a drift of the machine hits all alike."""
    with closing(open_plain(args)) as plain, closing(open_protected(args)) as llm:
        n, pair, row = args.n_predict, llm.pair, _LargeRow()
        _check(args, llm)
        contexts = [plain.ctx, *pair.contexts]
        contestants: dict[str, Callable[[], float]] = {
            "plain": lambda: _generate(plain, n),
            "protected": lambda: _generate(llm, n),
            "strength_0": lambda: _generate(llm, n, strength=0.0),
            "bare": lambda: _decode([plain.ctx], n),
            "ideal": lambda: sum(_decode([context], n) for context in contexts),
            "in_turns": lambda: _decode(contexts, n),
            "adjustment": row.native,
            "adjustment_numpy": row.numpy,
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
        ("bare llama_decode of the teacher", result.bare, f"plain is {result.bare / result.plain:.3f} of it"),
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
    for name, seconds in (("native", result.adjustment), ("numpy", result.adjustment_numpy)):
        lines.append(f"{f'adjustment of {N_LARGE} logits, {name}':36} {seconds * 1e3:8.3f} ms")
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


def _decode(contexts: Sequence[Any], n: int) -> float:
    """Seconds for a token of every context with bare `llama_decode`, one token of each in turns."""
    for context in contexts:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    with closing(LlamaBatch(n_tokens=1, embd=0, n_seq_max=1, verbose=False)) as batch:
        started = 0.0
        for i in range(n + 1):
            if i == 1:
                started = time.perf_counter()
            batch.set_batch([i % 100], i, False)
            for context in contexts:
                if llama_cpp.llama_decode(context, batch.batch) != 0:
                    raise ProxyError("llama_decode failed in bench; nothing was measured")
                llama_cpp.llama_get_logits(context)
    return (time.perf_counter() - started) / n


class _LargeRow:
    """A row of the largest vocabulary in use (Qwen2.5's), with forty plausible tokens."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.z, self.plus = rng.normal(size=(2, N_LARGE)).astype(np.float32) * 3
        self.minus = self.plus + rng.normal(size=N_LARGE).astype(np.float32) / 100
        self.z[:: N_LARGE // 40] += 14
        self.ends = (ctypes.c_int32 * 2)(0, N_LARGE - 1)

    def native(self, n: int = 50) -> float:
        """Seconds to adjust it in the native core, dose and KL among it."""
        lib, out = native.library(), native.RowStruct()
        started = time.perf_counter()
        for _ in range(n):
            z, plus, minus = (
                row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for row in (self.z, self.plus, self.minus)
            )
            row = z, N_LARGE, plus, minus, N_LARGE, N_LARGE
            native.check(lib.adl_adjust(*row, self.ends, len(self.ends), 0.01, 1.0, DEFAULT_GUARD, out))
        return (time.perf_counter() - started) / n

    def numpy(self, n: int = 5) -> float:
        """The same by the oracle."""
        started = time.perf_counter()
        for _ in range(n):
            delta = adjust.delta(self.plus, self.minus, 0.01)
            adjust.expectation(self.plus, self.minus, delta)
            adjust.adjust(self.z, delta, lam=1.0, guard=DEFAULT_GUARD, ends=np.asarray(self.ends))
        return (time.perf_counter() - started) / n


def peak_bytes() -> int:
    """Peak resident memory of this process; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
