"""`make unified-memory`: what it takes to decode some of eight sequences, with their memory in one piece or in eight.

Those of a pair's sequences whose rows have a choice are any subset of them. llama.cpp joins sequences with memories of
their own into one graph only where their numbers are consecutive. In unified memory it joins any, but attention then
goes over the cells of all, of those too that are not decoded. Recurrent models have a state for each sequence and no
unified memory: for them the question is whether a subset takes longer than all eight.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import llama_cpp
from llama_cpp._internals import LlamaBatch, LlamaModel

from adlocal.llamacpp.model import load_model
from adlocal.pair import context_params
from adlocal_convert.demo.smollm2 import demo_model
from support.recurrent import write_mamba

N_SEQUENCES, N_BATCH = 8, 512
SIZES = (1, 2, 4, 6, 8)


class Memory:
    """A context with eight sequences of `n_held` tokens each. Close it when done."""

    def __init__(self, model: LlamaModel, n_held: int, n_room: int, n_threads: int, *, unified: bool) -> None:
        n_ctx = N_SEQUENCES * -(-(n_held + n_room) // 256) * 256  # as llama.cpp rounds
        params = context_params(n_ctx, N_BATCH, N_SEQUENCES, n_threads)
        params.n_seq_max, params.kv_unified = N_SEQUENCES, unified
        self._context = llama_cpp.llama_init_from_model(model.model, params)
        self._batch = LlamaBatch(n_tokens=N_BATCH, embd=0, n_seq_max=1, verbose=False)
        self._lengths = [0] * N_SEQUENCES
        for seq_id in range(N_SEQUENCES):
            while (left := n_held - self._lengths[seq_id]) > 0:
                self._decode([seq_id] * min(left, N_BATCH))

    def close(self) -> None:
        self._batch.close()
        llama_cpp.llama_free(self._context)

    def seconds(self, seq_ids: Sequence[int]) -> float:
        """Of decoding a token of each of these sequences, with a row for each."""
        started = time.perf_counter()
        self._decode(seq_ids)
        llama_cpp.llama_synchronize(self._context)
        return time.perf_counter() - started

    def _decode(self, seq_ids: Sequence[int]) -> None:
        raw = self._batch.batch
        n_each = len(seq_ids) // len(set(seq_ids))
        for i, seq_id in enumerate(seq_ids):
            pos = self._lengths[seq_id]
            raw.token[i], raw.pos[i], raw.logits[i] = 100 + 37 * pos % 90, pos, n_each == 1
            raw.seq_id[i][0], raw.n_seq_id[i] = seq_id, 1
            self._lengths[seq_id] += 1
        raw.n_tokens = len(seq_ids)
        if status := llama_cpp.llama_decode(self._context, raw):
            raise RuntimeError(f"llama_decode returned {status}")


def main() -> int:
    """Prints a table for each model and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, metavar="MODEL.gguf", help="default: the demo's SmolLM2")
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 1000], help="tokens in each sequence")
    parser.add_argument("--repetitions", type=int, default=20, help="subsets of each size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with closing(load_model(args.model or demo_model())) as model:
        for length in args.lengths:
            compare_memories(model, length, args.repetitions, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = write_mamba(Path(folder) / "mamba.gguf", n_layers=8, n_embd=256)
        with closing(load_model(path)) as model:
            compare_subsets(model, args.repetitions, args.threads)
    return 0


def subsets(n: int) -> Iterator[tuple[int, list[list[int]]]]:
    """For each size, n subsets of the sequences in increasing order, the same ones at every call."""
    rng = random.Random(0)
    for size in SIZES:
        yield size, [sorted(rng.sample(range(N_SEQUENCES), size)) for _ in range(n)]


@contextmanager
def memories(model: LlamaModel, length: int, n_room: int, n_threads: int) -> Iterator[tuple[Memory, Memory]]:
    """In eight pieces, and in one."""
    with (
        closing(Memory(model, length, n_room, n_threads, unified=False)) as separate,
        closing(Memory(model, length, n_room, n_threads, unified=True)) as unified,
    ):
        yield separate, unified


def compare_memories(model: LlamaModel, length: int, repetitions: int, n_threads: int) -> None:
    """Medians over random subsets of each size; turns are taken with every subset, so that both have the same noise."""
    print(f"\n{N_SEQUENCES} sequences of {length} tokens: ms a decode\n")
    print("decoded  separate  unified  unified / separate")
    with memories(model, length, len(SIZES) * repetitions, n_threads) as (separate, unified):
        for size, chosen in subsets(repetitions):
            times = [(separate.seconds(each), unified.seconds(each)) for each in chosen]
            a, b = (1000 * statistics.median(each) for each in zip(*times, strict=True))
            print(f"{size:7}  {a:8.2f}  {b:7.2f}  {b / a:18.2f}", flush=True)


def compare_subsets(model: LlamaModel, repetitions: int, n_threads: int) -> None:
    """Medians for random subsets of each size, and for all sequences, in turns."""
    print("\na recurrent model: ms a decode\n")
    print("decoded    some  all 8  some / all")
    everyone = list(range(N_SEQUENCES))
    with closing(Memory(model, 100, 2 * len(SIZES) * repetitions, n_threads, unified=False)) as memory:
        for size, chosen in subsets(repetitions):
            times = [(memory.seconds(each), memory.seconds(everyone)) for each in chosen]
            a, b = (1000 * statistics.median(each) for each in zip(*times, strict=True))
            print(f"{size:7}  {a:6.2f}  {b:5.2f}  {a / b:10.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
