"""Bare `llama_decode`, in contexts whose memory it replaces."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import llama_cpp
from llama_cpp._internals import LlamaBatch

from ...errors import ProxyError


def decode(context: Any, batch: Any) -> None:
    """Evaluates a `llama_batch`, and waits for its rows."""
    if (status := llama_cpp.llama_decode(context, batch)) != 0:
        raise ProxyError(f"llama_decode returned {status} in bench; nothing was measured")
    llama_cpp.llama_get_logits(context)


def clear(context: Any) -> None:
    """Empties a context's memory."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)


def evaluate(context: Any, tokens: Sequence[int], start: int, size: int, rows: bool = False) -> Iterator[int]:
    """Decodes tokens from position `start` on in batches of `size`, with a row for each, or for each batch's last.

    Yields:
        the number of tokens of each batch, while its rows can be read.
    """
    with closing(LlamaBatch(n_tokens=size, embd=0, n_seq_max=1, verbose=False)) as batch:
        for i in range(0, len(tokens), size):
            batch.set_batch(tokens[i : i + size], start + i, rows)
            decode(context, batch.batch)
            yield batch.n_tokens()


def rewind(context: Any, text: Sequence[int], n: int) -> None:
    """Makes the memory hold `n` tokens: those that it holds, or a text's where they are too few."""
    memory = llama_cpp.llama_get_memory(context)
    held = llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1
    if held < n or not llama_cpp.llama_memory_seq_rm(memory, 0, n, -1):  # recurrent memory cannot forget a part
        clear(context)
        for _ in evaluate(context, text[:n], 0, llama_cpp.llama_n_batch(context)):
            pass


def timed(context: Any, tokens: Sequence[int], start: int, size: int) -> float:
    """Seconds of decoding tokens from position `start` on, in batches of `size`."""
    started = time.perf_counter()
    for _ in evaluate(context, tokens, start, size):
        pass
    return time.perf_counter() - started
