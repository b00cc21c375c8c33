"""A model's context for many sequences, with the pair in step: what the scheduler decodes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import llama_cpp
import numpy as np
from llama_cpp._internals import LlamaBatch, LlamaContext

from ..errors import AdlocalError, InputError
from ..llamacpp import native
from ..pair import ProxyPair, Rows
from ..settings import Settings
from .lockstep import DecodeError, Lockstep, row_params

_Params = Sequence[native.RowParams]
_OFF = row_params(Settings(0.0, 0.0))


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that go into the next batch; `settings` are those of the last one's row, None for none."""

    seq_id: int
    tokens: Sequence[int]
    n_past: int
    settings: Settings | None


@dataclass(frozen=True)
class Row:
    """A row of the last decode, or why it must not be sampled from.

    Attributes:
        index: its token's place in the batch, as `llama_get_logits_ith` takes it.
        output: its place among the rows.
        seq_id: whose it is.
        error: None if it may be sampled from.
    """

    index: int
    output: int
    seq_id: int
    error: AdlocalError | None = None


@dataclass(frozen=True)
class Evaluated:
    """What an adjuster works on.

    Attributes:
        teacher: logits, (n_rows, n_vocab): a view, what is written to it is sampled from.
        proxies: (z₊, z₋) of each pair, each (n_rows, n_proxy); none where no row's settings protect anything.
        pairs: all of them, in the same order, for their ε and scale.
    """

    teacher: Rows
    proxies: Sequence[tuple[Rows, Rows]]
    pairs: Sequence[ProxyPair]


class Adjuster(Protocol):
    """Changes rows in place of the product's adjustment: a baseline of an experiment, say.

    It is given all rows of a decode, in the order of the batch, whatever their settings.
    """

    def __call__(self, rows: Evaluated) -> None: ...


class Runner:
    """A context and its locksteps. The context's memory is changed through it alone.

    Args:
        context: the teacher's, empty; it stays the caller's.
        n_batch: its most tokens in one decode.
        pairs: made for the teacher's model. Without one the model is plain.
        adjuster: what rows go through; None for the product's adjustment, by the first pair.
    """

    def __init__(
        self, context: LlamaContext, n_batch: int, pairs: Sequence[ProxyPair] = (), adjuster: Adjuster | None = None
    ) -> None:
        self.context, self.n_batch, self.adjuster = context, n_batch, adjuster
        self._pairs = pairs
        self._locksteps = [Lockstep(context.ctx, pair) for pair in pairs]
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(context.model.model))
        self._batch = LlamaBatch(n_tokens=n_batch, embd=0, n_seq_max=1, verbose=False)
        self._contexts = [context.ctx, *(each for pair in pairs for each in pair.contexts)]

    def close(self) -> None:
        """Frees what is its own, before the pairs are closed."""
        for each in self._locksteps:
            each.close()
        self._batch.close()

    @property
    def lockstep(self) -> Lockstep | None:
        """That of the first pair."""
        return self._locksteps[0] if self._locksteps else None

    def decode(self, chunks: Sequence[Chunk]) -> list[Row]:
        """Decodes the chunks in one batch.

        Returns:
            the rows of those that ask for one, in their order.

        Raises:
            AdlocalError: llama.cpp failed. No row may be sampled from, and the memory is to be cleared.
        """
        rows = self._fill(chunks)
        settings = [chunk.settings for chunk in chunks if chunk.settings is not None]
        try:
            closed = self._evaluate(*self._params(settings))
        except DecodeError as error:
            raise AdlocalError(f"{len(chunks)} sequences: {error}; try fewer, or a smaller context") from None
        if closed:
            failure = native.error()
            if self.adjuster is not None:  # which has not seen the others
                closed = set(range(len(rows)))
            return [replace(row, error=failure if row.output in closed else None) for row in rows]
        if self.adjuster is not None and rows:
            self._adjust(self.adjuster, len(rows), _any_protects(settings))
        return rows

    def _params(self, settings: Sequence[Settings]) -> tuple[_Params, _Params]:
        """What becomes of each row in the first lockstep, and in the others."""
        off = [_OFF] * len(settings)
        if self.adjuster is None:  # the first pair alone adjusts
            return [row_params(each) for each in settings], off
        if not _any_protects(settings):
            return off, off
        observed = [native.RowParams(each.strength, each.guard, native.MODE_OBSERVE, True) for each in settings]
        return observed, observed

    def _fill(self, chunks: Sequence[Chunk]) -> list[Row]:
        raw, rows = self._batch.batch, list[Row]()
        i = 0
        for chunk in chunks:
            for pos, token in enumerate(chunk.tokens, chunk.n_past):
                raw.token[i], raw.pos[i], raw.logits[i] = token, pos, False
                raw.seq_id[i][0], raw.n_seq_id[i] = chunk.seq_id, 1
                i += 1
            if chunk.settings is not None:
                raw.logits[i - 1] = True
                rows.append(Row(i - 1, len(rows), chunk.seq_id))
        raw.n_tokens = i
        return rows

    def _evaluate(self, params: _Params, beside: _Params) -> set[int]:
        """Decodes the batch in all models. Returns the rows that must not be sampled from."""
        raw = self._batch.batch
        if not self._locksteps:
            if status := llama_cpp.llama_decode(self.context.ctx, raw):
                raise DecodeError(status, f"llama_decode returned {status}")
            return set()
        first, others = self._locksteps[0], self._locksteps[1:]
        for other in others:
            other.begin(raw, beside)
        status = -3  # as where llama.cpp failed in the middle
        try:
            results = [first.decode(raw, params)]
            status = 0
        finally:
            ended = [other.end(status) for other in others]
        return {i for each in (*results, *ended) for i, row in enumerate(each) if row.closed}

    def _adjust(self, adjuster: Adjuster, n_rows: int, are_evaluated: bool) -> None:
        logits: Any = llama_cpp.llama_get_logits(self.context.ctx)
        teacher = np.ctypeslib.as_array(logits, (n_rows, self._n_vocab))
        proxies = [each.proxies(n_rows) for each in self._locksteps] if are_evaluated else []
        adjuster(Evaluated(teacher, proxies, self._pairs))

    def doses(self, seq_id: int, position: int, tokens: Sequence[int]) -> list[float]:
        """As `Lockstep.doses`, by the first pair.

        Raises:
            InputError: there is none.
        """
        if self.lockstep is None:
            raise InputError("dosed=True: a dose is measured by a bundle's proxies; give one")
        return self.lockstep.doses(seq_id, position, tokens)

    def forget(self, seq_id: int, n: int) -> bool:
        """Keeps the first n tokens of a sequence; False, and nothing is kept, where memory cannot forget a part."""
        if n and all(self._remove(seq_id, n)):
            return True
        for _ in self._remove(seq_id, -1):
            pass
        return n == 0

    def _remove(self, seq_id: int, first: int) -> list[bool]:
        if self._locksteps:
            return [each.seq_rm(seq_id, first, -1) for each in self._locksteps]
        memory = llama_cpp.llama_get_memory(self.context.ctx)
        return [bool(llama_cpp.llama_memory_seq_rm(memory, seq_id, first, -1))]

    def share(self, source: int, target: int, n: int) -> bool:
        """Makes the first n tokens of a sequence all that another one has, which is empty; False as `forget`.

        llama.cpp copies whole streams, when it decodes next, and cuts what is cut here at once (`llama_memory_seq_cp`).
        """
        for each in self._locksteps:
            each.seq_cp(source, target, -1, -1)
        if not self._locksteps:
            memory = llama_cpp.llama_get_memory(self.context.ctx)
            llama_cpp.llama_memory_seq_cp(memory, source, target, -1, -1)
        return self.forget(target, n)

    def clear(self) -> None:
        """Empties all memories."""
        for each in self._locksteps:
            each.clear()
        self.context.kv_cache_clear()

    def can_share(self) -> bool:
        """Whether all contexts keep every token of a sequence, as neither sliding windows nor recurrent states do."""
        models = map(llama_cpp.llama_get_model, self._contexts)
        return not any(
            llama_cpp.llama_model_n_swa(m)
            or llama_cpp.llama_model_is_recurrent(m)
            or llama_cpp.llama_model_is_hybrid(m)
            for m in models
        )


def _any_protects(settings: Sequence[Settings]) -> bool:
    return any(each.protects for each in settings)
