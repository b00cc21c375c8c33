"""What protected text must be sampled from, computed apart from it: plain llama.cpp, a second pair, adjust.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp._internals import LlamaBatch, LlamaContext, LlamaSampler

from adlocal import AntidistillationLlama, ProxyPair
from adlocal.adjust import adjust
from adlocal.engine.llama_context import LockstepContext
from adlocal.llamacpp.tokens import end_tokens

Rows = npt.NDArray[np.float32]


class Reference:
    """The teacher in a plain `llama_cpp.Llama(logits_all=True)`, and the proxies in a pair of their own."""

    def __init__(self, teacher: llama_cpp.Llama, pair: ProxyPair) -> None:
        self.teacher = teacher
        self.pair = pair

    def plain(self, tokens: Sequence[int]) -> Rows:
        """The teacher's logits after each prefix of `tokens`."""
        self.teacher.reset()
        self.teacher.eval(tokens)
        return self.teacher.scores[: len(tokens)].copy()

    def adjusted(self, tokens: Sequence[int], strength: float, guard: float) -> Rows:
        """The adjusted logits after each prefix of `tokens`."""
        lam, ends = self.pair.bundle.lam(strength), end_tokens(self.teacher._model.vocab)
        rows = zip(self.plain(tokens), self.pair.delta(tokens), strict=True)
        return np.stack([adjust(z, delta, lam=lam, guard=guard, ends=ends).logits for z, delta in rows])

    def replayed(
        self, batches: Sequence[tuple[int, list[int]]], strength: float, guard: float
    ) -> dict[int, tuple[Rows, Rows]]:
        """The teacher's own and the adjusted row after each position, over the very batches of another run.

        A position that comes twice, because a draft was wrong, has its last row.
        """
        teacher, pair, rows, held = self.teacher, self.pair, dict[int, tuple[Rows, Rows]](), list[int]()
        lam, ends = pair.bundle.lam(strength), end_tokens(teacher._model.vocab)
        teacher.reset()
        pair.clear()
        for start, tokens in batches:
            assert start <= len(held), f"the batch at position {start} goes on from tokens that were not recorded"
            teacher.n_tokens, held = start, held[:start]
            teacher.eval(tokens)
            pair.sync(held)
            pair.evaluate(tokens, logits_all=True)
            for i, (plus, minus) in enumerate(zip(*pair.rows(), strict=True), start):
                z, delta = teacher.scores[i].copy(), (plus - minus) / np.float32(2 * pair.epsilon)
                rows[i] = z, adjust(z, delta, lam=lam, guard=guard, ends=ends).logits
            held += tokens
        return rows


@dataclass
class Samples:
    """Sampled tokens, the logits that llama.cpp itself held for each at that moment, and the position they follow.

    Also the batches that were decoded meanwhile: their first position and their tokens.
    """

    tokens: list[int] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    batches: list[tuple[int, list[int]]] = field(default_factory=list)


@contextmanager
def sampling(monkeypatch: pytest.MonkeyPatch, llm: llama_cpp.Llama) -> Iterator[Samples]:
    """Records what is decoded, and what is sampled from what."""
    samples = Samples()
    sample: Callable[..., int] = LlamaSampler.sample
    decode = LockstepContext.decode

    def noting(self: LockstepContext, batch: LlamaBatch) -> None:
        samples.batches.append((batch.batch.pos[0], batch.batch.token[: batch.n_tokens()]))
        decode(self, batch)

    def spy(self: LlamaSampler, ctx: LlamaContext, idx: int = -1) -> int:
        pointer: Any = llama_cpp.llama_get_logits_ith(llm.ctx, idx)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        samples.rows.append(np.ctypeslib.as_array(address, (llm.n_vocab(),)).copy())
        samples.positions.append(llm.n_tokens + idx)
        samples.tokens.append(sample(self, ctx, idx))
        return samples.tokens[-1]

    with monkeypatch.context() as patch:
        patch.setattr(LlamaSampler, "sample", spy)
        patch.setattr(LockstepContext, "decode", noting)
        yield samples


def log_softmax(rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """In float64, over the last axis."""
    z = np.array(rows, dtype=np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


def eval_prompt(llm: llama_cpp.Llama, tokens: Sequence[int]) -> None:
    """Evaluates a prompt with the last token by itself, as the drop-in does of its own accord."""
    if not isinstance(llm, AntidistillationLlama):
        llm.eval(tokens[:-1])
        tokens = tokens[-1:]
    llm.eval(tokens)


def last_row(llm: llama_cpp.Llama, tokens: Sequence[int]) -> Rows:
    """Logits after a prompt, (n_vocab,), of a model that is asked for the last row alone."""
    eval_prompt(llm, tokens)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).copy()
