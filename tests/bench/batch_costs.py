"""`make batch-costs`: what llama.cpp takes on the CPU for a batch of some tokens, by the type of the weights.

Tokens that wait for the pair are decoded in one batch, and the logits of the last one are read. Here is what that
saves. K-quants come in blocks of 256 weights, and llama.cpp takes another type for rows that are no multiple of it: the
type that most weights really have is printed beside the one that was asked for. --random WIDTH gives rows that fit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
from llama_cpp._internals import LlamaBatch
from tqdm import tqdm

from adlocal.llamacpp.batching import Batching
from adlocal.llamacpp.gguf import GGUFHeader
from adlocal.llamacpp.model import load_model
from adlocal.pair import context_params
from adlocal_convert.demo.smollm2 import demo_model
from adlocal_convert.source.quantize import quantize
from bench.gradient_bench import random_model

TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "Q8_0", "F16", "F32")
SIZES = (1, 2, 4, 8, 16, 64)
_BEFORE = 64  # tokens of context in front of each batch
_KERNEL = {True: "yes", False: "no", None: "unknown"}


class Contestant:
    """One model in one context, with some tokens evaluated. Close it when done."""

    def __init__(self, path: Path, n_threads: int, most: int) -> None:
        self.batching = Batching.of(GGUFHeader(path).tensors)
        self._model = load_model(path)
        params = context_params(n_ctx=_BEFORE + most, n_outputs=1, n_threads=n_threads)
        self._context = llama_cpp.llama_init_from_model(self._model.model, params)
        self._batch = LlamaBatch(n_tokens=max(most, _BEFORE), embd=0, n_seq_max=1, verbose=False)
        self._decode(_BEFORE, 0)

    def seconds(self, size: int, n: int) -> float:
        """Of one batch of `size` tokens, over `n` of them; each begins where the others did."""
        memory = llama_cpp.llama_get_memory(self._context)
        started = time.perf_counter()
        for _ in range(n):
            llama_cpp.llama_memory_seq_rm(memory, 0, _BEFORE, -1)
            self._decode(size, _BEFORE)
        return (time.perf_counter() - started) / n

    def _decode(self, n: int, position: int) -> None:
        self._batch.set_batch([100 + i % 100 for i in range(n)], position, False)
        if llama_cpp.llama_decode(self._context, self._batch.batch) != 0:
            raise RuntimeError("llama_decode failed; nothing was measured")
        llama_cpp.llama_get_logits(self._context)  # waits until it is done

    def close(self) -> None:
        """Frees all of it."""
        self._batch.close()
        llama_cpp.llama_free(self._context)
        self._model.close()


def main() -> int:
    """Prints a row a type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model(), metavar="FILE.gguf")
    parser.add_argument("--random", type=int, metavar="WIDTH", help="a random llama of this width, 24 layers, instead")
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE", help="as --quant of adlocal convert")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="tokens of a batch")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="in which all types take turns")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = random_model(Path(name), args.random) if args.random else args.model
        with contestants(source, Path(name), args) as found:
            print(llama_cpp.llama_print_system_info().decode())
            print(heading(args.sizes))
            for kind, times in measured(found, args.sizes, args.rounds).items():
                print(row(kind, found[kind].batching, times))
    return 0


@contextmanager
def contestants(source: Path, directory: Path, args: argparse.Namespace) -> Iterator[dict[str, Contestant]]:
    """The model in every type, all of them loaded, so that they can take turns."""
    found: dict[str, Contestant] = {}
    try:
        for kind in tqdm(args.types, desc="quantizing", unit="type", file=sys.stderr):
            path = directory / f"{kind}.gguf"
            quantize(source, path, kind, args.threads)
            found[kind] = Contestant(path, args.threads, max(args.sizes))
        yield found
    finally:
        for contestant in found.values():
            contestant.close()


def measured(found: dict[str, Contestant], sizes: Sequence[int], rounds: int) -> dict[str, dict[int, float]]:
    """Median over rounds, in seconds a batch; the first round warms up and does not count."""
    times: dict[str, dict[int, list[float]]] = {kind: {size: [] for size in sizes} for kind in found}
    turns = [(size, kind) for _ in range(rounds + 1) for size in sizes for kind in found]
    for size, kind in tqdm(turns, desc="decoding", unit="turn", file=sys.stderr):
        times[kind][size].append(found[kind].seconds(size, max(1, 8 // size)))
    return {kind: {size: statistics.median(t[1:]) for size, t in row.items()} for kind, row in times.items()}


def heading(sizes: Sequence[int]) -> str:
    """Of the table."""
    cells = "".join(f"{f'{size} tokens':>16}" for size in sizes)
    return f"ms of a batch (its ratio to one of {min(sizes)})\n{'asked':8}{'mostly':8}{'kernel':8}{cells}"


def row(kind: str, batching: Batching, times: dict[int, float]) -> str:
    """Of the table."""
    one = times[min(times)]
    cells = "".join(f"{f'{1e3 * seconds:.1f} ({seconds / one:.2f})':>16}" for seconds in times.values())
    return f"{kind:8}{batching.type:8}{_KERNEL[batching.batched]:8}{cells}"


if __name__ == "__main__":
    sys.exit(main())
