"""Several sequences of a model, plain or protected, decoded together in one llama.cpp context: continuous batching.

A sequence that ends makes room for the next request at once. One with the prompt of another copies what that one has
computed of it. Every sequence has a stream of the KV cache to itself, so what is sampled for a request depends on the
others only through rounding: llama.cpp picks kernels by batch size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import llama_cpp
from llama_cpp._internals import LlamaBatch, LlamaContext, LlamaModel

from ..bundle import Bundle
from ..errors import AdlocalError, InputError, ModelError, ProxyError
from ..llamacpp.model import context_length, load_model, refusals
from ..llamacpp.tokens import text_of
from ..pair import ProxyPair, context_params
from ..settings import Settings, resolve
from . import prompt_memory
from .best_of import consistent, repeated
from .sequences import Completion, Queue, Request, Sampling, Slot


class ParallelLlama:
    """A model with a context for `n_parallel` sequences. Close it when done; not safe for several threads at once.

    Args:
        path: GGUF of the model.
        n_ctx: tokens of context for each sequence; no more than the model was trained for is used.
        n_parallel: most sequences decoded together.
        n_threads: as in `llama_cpp.Llama`, for prompts too.
        n_gpu_layers: layers to offload, -1 for all.
        flash_attn: as in `llama_cpp.Llama`.
        bundle: what `adlocal convert` wrote, to protect what is generated; None for the plain model.
        strength, guard: with a bundle, as in `AntidistillationLlama`.
        best_of: with a bundle, how many completions are sampled for each request. The one with the highest dose is
            kept: it teaches the proxy worst, to first order, and each of them is the teacher's own.
        answer: with best_of, what a completion's text answers, or None for nothing. The one kept is among those with
            the most frequent answer, as in self-consistency (arXiv 2203.11171), so that a dose does not choose wrong
            ones. A completion that was cut answers nothing; where none answers, the dose alone decides.

    Attributes:
        pair: the bundle's proxies, or None.
        settings: those in force, of strength 0 without a bundle.

    Raises:
        ModelError: llama.cpp refuses the file or the context; the message says why.
        InputError: bundle, strength, guard, best_of or answer cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int = 2048,
        n_parallel: int = 4,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        flash_attn: bool = False,
        bundle: Bundle | str | os.PathLike[str] | None = None,
        strength: float | str | None = None,
        guard: float | None = None,
        best_of: int = 1,
        answer: Callable[[str], Hashable] | None = None,
    ) -> None:
        if best_of < 1 or (best_of > 1 and bundle is None):
            raise InputError(f"best_of={best_of}: give a whole number from 1 up, and a bundle to choose by")
        if answer is not None and best_of < 3:
            raise InputError(f"best_of={best_of}: no answer has a majority among so few; give 3 or more, 8 perhaps")
        self.best_of, self._answer = best_of, answer
        self.settings = Settings(0.0, 0.0)
        if bundle is not None:  # before any weights are read
            bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
            self.settings = resolve(bundle, path, strength, guard)
        elif strength is not None or guard is not None:
            raise InputError(f"strength={strength}, guard={guard}: they act through a bundle; give one")
        self.n_ctx = context_length(path, n_ctx)
        self.n_parallel = n_parallel
        self._n_batch = max(512, n_parallel)
        self._params = params = context_params(self.n_ctx * n_parallel, self._n_batch, n_parallel, n_threads)
        params.n_seq_max = n_parallel
        enabled, disabled = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = enabled if flash_attn else disabled
        self.model, self._context = _load(path, params, n_gpu_layers)
        self._batch = LlamaBatch(n_tokens=self._n_batch, embd=0, n_seq_max=1, verbose=False)
        try:
            self.pair = None if bundle is None else self._open_pair(bundle, params, n_gpu_layers)
        except BaseException:
            self._close_teacher()
            raise
        self._contexts = [self._context.ctx, *(self.pair.contexts if self.pair else ())]
        self._shares = prompt_memory.can_share(self._contexts)

    def close(self) -> None:
        """Frees contexts and models."""
        if self.pair is not None:
            self.pair.close()
        self._close_teacher()

    def _close_teacher(self) -> None:
        self._batch.close()
        self.model.close()

    def _open_pair(self, bundle: Bundle, params: llama_cpp.llama_context_params, n_gpu_layers: int) -> ProxyPair:
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO  # as in the drop-in, whatever the teacher's is
        return ProxyPair.of(bundle, params, n_gpu_layers, self.model)

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: Callable[[int], None] = lambda n: None
    ) -> Iterator[Completion]:
        """Completions in the order in which they end.

        Args:
            requests: taken one by one as sequences become free; each prompt has to be shorter than `n_ctx`.
            sampling: for all of them; each has a chain with its own seed.
            on_tokens: told how many tokens every decode sampled.

        Raises:
            AdlocalError: llama_decode fails, or a dose is not finite.
        """
        candidates: dict[int, list[Completion]] = {}
        for completion in self._sampled(repeated(requests, self.best_of), sampling, on_tokens):
            found = candidates.setdefault(completion.index, [])
            found.append(completion)
            if len(found) == self.best_of:
                yield max(self._consistent(candidates.pop(completion.index)), key=lambda c: c.dose or 0.0)

    def _consistent(self, candidates: Sequence[Completion]) -> Sequence[Completion]:
        """Those that may be chosen among."""
        if self._answer is None:
            return candidates
        ended = [c.finish_reason == "stop" for c in candidates]
        answers = [self._answer(self.text(c.tokens)) if e else None for c, e in zip(candidates, ended, strict=True)]
        return consistent(candidates, answers)

    def _sampled(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        queue = Queue(requests)
        slots: list[Slot | None] = [None] * self.n_parallel
        self._context.kv_cache_clear()
        if self.pair is not None:
            self.pair.clear()
        while True:
            self._fill(slots, queue, sampling)
            if not any(slots):
                return
            ready = self._decode(slots)
            on_tokens(len(ready))
            ended = []
            for output, (seq_id, slot, row) in enumerate(ready):
                if (reason := self._sample(slot, row, output)) is not None:
                    slots[seq_id] = None
                    slot.sampler.close()
                    ended.append((seq_id, slot.completion(reason)))
            for seq_id, completion in ended:  # not before: the pair's rows are lost with what it forgets
                self._forget(seq_id)
                yield completion

    def _fill(self, slots: list[Slot | None], queue: Queue, sampling: Sampling) -> None:
        """Gives requests to the slots that are free. One whose prompt is being read for another waits to share it."""
        for seq_id in [i for i, slot in enumerate(slots) if slot is None]:
            if (request := queue.head) is None:
                return
            source = self._same_prompt(slots, request)
            if source is None:
                slots[seq_id] = self._slot(queue.pop(), sampling)
            elif source[1].n_past >= len(request.tokens):
                slots[seq_id] = self._shared(source[0], seq_id, self._slot(queue.pop(), sampling))
            else:
                return

    def _same_prompt(self, slots: Sequence[Slot | None], request: Request) -> tuple[int, Slot] | None:
        """A sequence that the request can take its prompt from, once that has been read."""
        if not self._shares:
            return None
        return next(((i, s) for i, s in enumerate(slots) if s and s.request.tokens == request.tokens), None)

    def _shared(self, source: int, seq_id: int, slot: Slot) -> Slot:
        """The slot with its prompt in memory but for the last token, whose logits are its own to ask for."""
        slot.n_past = len(slot.pending) - 1
        slot.pending = slot.pending[-1:]
        prompt_memory.share(self._contexts, source, seq_id, slot.n_past)
        return slot

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say. Special tokens say nothing, and bytes that make no character are left out."""
        return text_of(self.model.vocab, tokens)

    def _slot(self, request: Request, sampling: Sampling) -> Slot:
        limit = min(request.n_predict, self.n_ctx - len(request.tokens))
        return Slot(request, limit, sampling.chain(request.seed), request.tokens)

    def _decode(self, slots: Sequence[Slot | None]) -> list[tuple[int, Slot, int]]:
        """Decodes a token of every sequence, and of those with more to read as many as the batch holds.

        Returns:
            Sequence id, slot and row of the logits of those that have been read to the end.
        """
        busy = [(seq_id, slot) for seq_id, slot in enumerate(slots) if slot is not None]
        batch, ready, n_spare = self._batch, [], self._n_batch - len(busy)
        batch.reset()
        for seq_id, slot in busy:
            n = min(len(slot.pending), 1 + n_spare)
            n_spare -= n - 1
            for token in slot.pending[:n]:
                _add(batch, token, slot.n_past, seq_id)
                slot.n_past += 1
            slot.pending = slot.pending[n:]
            if not slot.pending:
                batch.batch.logits[batch.n_tokens() - 1] = True
                ready.append((seq_id, slot, batch.n_tokens() - 1))
        self._evaluate(len(busy), len(ready))
        return ready

    def _evaluate(self, n_sequences: int, n_rows: int) -> None:
        """Decodes the batch in all models, the proxies first: where one fails there are no plain logits to sample."""
        if self.pair is not None and (self.settings.protects or self.best_of > 1):
            self.pair.decode_sequences(self._batch)
        if status := llama_cpp.llama_decode(self._context.ctx, self._batch.batch):
            raise AdlocalError(
                f"llama_decode of {n_sequences} sequences failed ({status}); try fewer, or a smaller context"
            )
        if n_rows:
            self._adjust(n_rows)

    def _adjust(self, n_rows: int) -> None:
        """Adjusts the teacher's rows of the batch that was decoded, in place."""
        if self.pair is not None and self.settings.protects:
            logits = llama_cpp.llama_get_logits(self._context.ctx)
            self.pair.adjust(logits, self.settings.strength, self.settings.guard)

    def _forget(self, seq_id: int) -> None:
        self._context.kv_cache_seq_rm(seq_id, -1, -1)
        if self.pair is not None:
            self.pair.remove_sequence(seq_id)

    def _sample(self, slot: Slot, row: int, output: int) -> str | None:
        """Samples the slot's next token from a row of the batch, the `output`th that it asks logits of.

        Returns:
            Why the sequence ends there, if it does.
        """
        token = slot.sampler.sample(self._context, row)
        if self.pair is not None and self.best_of > 1:
            slot.doses.append(_finite(self.pair.dose(output, token)))
        if llama_cpp.llama_vocab_is_eog(self.model.vocab, token):
            return "stop"
        slot.sampled.append(token)
        slot.pending = [token]
        return "length" if len(slot.sampled) == slot.limit else None


def _load(
    path: str | os.PathLike[str], params: llama_cpp.llama_context_params, n_gpu_layers: int
) -> tuple[LlamaModel, LlamaContext]:
    model = load_model(path, n_gpu_layers)
    try:
        with refusals(path):
            return model, LlamaContext(model=model, params=params, verbose=False)
    except ModelError:
        model.close()
        raise


def _finite(dose: float) -> float:
    if not math.isfinite(dose):
        raise ProxyError(f"a token's dose is {dose}: the proxies' logits are no numbers; no text is emitted")
    return dose


def _add(batch: LlamaBatch, token: int, pos: int, seq_id: int) -> None:
    raw, i = batch.batch, batch.batch.n_tokens
    raw.token[i], raw.pos[i], raw.logits[i] = token, pos, False
    raw.seq_id[i][0], raw.n_seq_id[i] = seq_id, 1
    raw.n_tokens = i + 1
