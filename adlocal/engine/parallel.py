"""Several sequences of a model, plain or protected, decoded together in one llama.cpp context: continuous batching.

A sequence that ends makes room for the next request at once. What is in memory of a prompt is not computed again. What
is sampled for a request depends on the others only through rounding: llama.cpp picks kernels by batch size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import llama_cpp
from llama_cpp._internals import LlamaContext, LlamaModel

from ..bundle import Bundle
from ..errors import InputError, ModelError
from ..llamacpp.model import context_length, load_model, refusals
from ..llamacpp.tokens import text_of
from ..pair import ProxyPair, context_params
from ..settings import Settings, resolve
from .best_of import best_of, repeated
from .runner import Adjuster, Runner
from .scheduler import Scheduler
from .sequences import Completion, Ended, Failed, Request, Sampled, Sampling

_BundlePath = Bundle | str | os.PathLike[str]
#: Rows of the pair in one decode when finished traces are scored.
_N_DOSED = 64


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
        adjuster: what changes rows in place of the product's adjustment, given the teacher's and, with a bundle, the
            proxies'.
        beside: with a bundle, further ones whose proxies it is given. The product's adjustment is by the first alone.

    Attributes:
        pair: the bundle's proxies, or None.
        scheduler: answers requests one step at a time, for those who want tokens as they come.

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
        adjuster: Adjuster | None = None,
        beside: Sequence[_BundlePath] = (),
    ) -> None:
        if best_of < 1 or (best_of > 1 and bundle is None):
            raise InputError(f"best_of={best_of}: give a whole number from 1 up, and a bundle to choose by")
        if answer is not None and best_of < 3:
            raise InputError(f"best_of={best_of}: no answer has a majority among so few; give 3 or more, 8 perhaps")
        self.best_of, self._answer, self._is_generating = best_of, answer, False
        settings = Settings(0.0, 0.0)
        if bundle is not None:  # before any weights are read
            bundle = _opened(bundle)
            settings = resolve(bundle, path, strength, guard)
        elif strength is not None or guard is not None:
            raise InputError(f"strength={strength}, guard={guard}: they act through a bundle; give one")
        bundles = [] if bundle is None else [bundle, *map(_opened, beside)]
        self.n_ctx = context_length(path, n_ctx)
        self.n_parallel = n_parallel
        n_batch = max(512, n_parallel)
        params = context_params(self.n_ctx * n_parallel, n_batch, n_parallel, n_threads)
        params.n_seq_max = n_parallel
        enabled, disabled = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = enabled if flash_attn else disabled
        self.model, context = _load(path, params, n_gpu_layers)
        self._pairs: list[ProxyPair] = []
        try:
            n_outputs = max(n_parallel, _N_DOSED)
            for each in bundles:
                self._pairs.append(_open_pair(each, params, n_outputs, n_gpu_layers, self.model))
            self._runner = Runner(context, n_batch, self._pairs, adjuster)
        except BaseException:
            self._close_models()
            raise
        self.scheduler = Scheduler(self._runner, n_parallel, self.n_ctx, settings)

    @property
    def pair(self) -> ProxyPair | None:
        """The bundle's proxies."""
        return self._pairs[0] if self._pairs else None

    @property
    def context(self) -> int:
        """llama.cpp's context of the model, for reading."""
        return int(self._runner.context.ctx)

    @property
    def settings(self) -> Settings:
        """Those of requests that have none of their own; of strength 0 without a bundle."""
        return self.scheduler.settings

    @settings.setter
    def settings(self, value: Settings) -> None:
        self.scheduler.settings = value

    @property
    def adjuster(self) -> Adjuster | None:
        """What changes rows in place of the product's adjustment; None for that."""
        return self._runner.adjuster

    @adjuster.setter
    def adjuster(self, value: Adjuster | None) -> None:
        self._runner.adjuster = value

    def stats(self) -> dict[str, int]:
        """Rows, rows with a choice, rows whose Δ was computed, batches of the pair and tokens in them; of a bundle."""
        return self._runner.lockstep.stats() if self._runner.lockstep else {}

    def close(self) -> None:
        """Frees contexts and models."""
        self._runner.close()
        self._close_models()

    def _close_models(self) -> None:
        for pair in self._pairs:
            pair.close()
        self.model.close()

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: Callable[[int], None] = lambda n: None
    ) -> Iterator[Completion]:
        """Completions in the order in which they end.

        Args:
            requests: taken one by one as sequences become free; each prompt has to be shorter than `n_ctx`.
            sampling: for those that have none of their own; each has a chain with its own seed.
            on_tokens: told how many tokens every decode sampled.

        Raises:
            AdlocalError: llama_decode fails, or a proxy does.
            InputError: another call's completions are still being read.
        """
        if self._is_generating or not self.scheduler.is_idle:
            raise InputError("another call's completions are still being read; read or close them first")
        self._is_generating = True
        try:
            with closing(self._completions(self._asked(requests, sampling), on_tokens)) as completions:
                yield from best_of(completions, self.best_of, self._said)
        finally:
            self._is_generating = False

    def _asked(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Request]:
        """What the scheduler is asked for."""
        for each in repeated(requests, self.best_of):
            yield replace(each, sampling=each.sampling or sampling, dosed=each.dosed or self.best_of > 1)

    def _completions(
        self, requests: Iterator[Request], on_tokens: Callable[[int], None]
    ) -> Generator[Completion, None, None]:
        scheduler, open_ids = self.scheduler, set[int]()
        try:
            while True:
                while scheduler.n_waiting < max(scheduler.n_free, 1) and (request := next(requests, None)) is not None:
                    open_ids.add(scheduler.submit(request))
                if scheduler.is_idle:
                    return
                events = scheduler.step()
                for event in events:
                    if isinstance(event, Failed):
                        raise event.error
                ended = [event for event in events if isinstance(event, Ended)]
                on_tokens(sum(isinstance(event, Sampled) or _was_stopped(event) for event in events))
                open_ids -= {event.id for event in ended}
                for event in ended:
                    yield event.completion
        finally:
            for id in open_ids:
                scheduler.cancel(id)
            if not scheduler.is_idle:
                scheduler.step()  # tells of the cancelled ones, whom nobody asks for

    def _said(self, completion: Completion) -> Hashable | None:
        """What a completion answers, by `answer`; None for nothing."""
        ended = completion.finish_reason == "stop"
        return self._answer(self.text(completion.tokens)) if ended and self._answer else None

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say. Special tokens say nothing, and bytes that make no character are left out."""
        return text_of(self.model.vocab, tokens)


def _was_stopped(event: object) -> bool:
    """Whether it tells of a token that ended a turn."""
    return isinstance(event, Ended) and event.completion.finish_reason == "stop"


def _opened(bundle: _BundlePath) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)


def _open_pair(
    bundle: Bundle, teachers: llama_cpp.llama_context_params, n_outputs: int, n_gpu_layers: int, model: LlamaModel
) -> ProxyPair:
    """The pair with the teacher's sizes, all sequences in one memory: those with a choice are any subset."""
    params = llama_cpp.llama_context_params.from_buffer_copy(teachers)
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO  # as in the drop-in, whatever the teacher's is
    params.n_outputs_max = params.n_outputs_max_per_seq = n_outputs
    params.kv_unified = True
    return ProxyPair.of(bundle, params, n_gpu_layers, model)


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
