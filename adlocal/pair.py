"""The pair: both perturbed proxies in two llama.cpp contexts that evaluate the same tokens."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._internals import LlamaBatch, LlamaContext, LlamaModel
from llama_cpp._logger import set_verbose

from . import adjust
from ._gguf import captured_log, last_line
from .bundle import MINUS_NAME, PLUS_NAME, Bundle
from .errors import InputError, ModelError, ProxyError


@dataclass(frozen=True)
class PairState:
    """Both proxies' memory, as `llama_state_get_data` gives it, and the tokens it holds."""

    bundle_id: str
    tokens: tuple[int, ...]
    plus: bytes
    minus: bytes


@dataclass(frozen=True)
class DeltaRow:
    """Δ for one position, (n_vocab,) float32, and its expectation under the proxy."""

    delta: npt.NDArray[np.float32]
    mean: float

    @classmethod
    def of(cls, z_plus: adjust.Floats, z_minus: adjust.Floats, epsilon: float) -> DeltaRow:
        row = adjust.delta(z_plus, z_minus, epsilon)
        return cls(row, adjust.expectation(z_plus, z_minus, row))

    def dose(self, token: int) -> float:
        """Δ(token) − E[Δ]; 0 for a token beyond the proxy's vocabulary, which has no Δ."""
        return float(self.delta[token]) - self.mean if token < len(self.delta) else 0.0


class ProxyPair:
    """Two proxies in lockstep. Make one with `ProxyPair.open`; close it, or use it in a `with` statement.

    The pair knows which tokens its memory holds, so that `sync` can follow any jump of the teacher: prefix reuse,
    rollback, a restored state. One sequence; not safe for use by several threads at once.

    Attributes:
        bundle: the bundle's metadata.
        plus, minus: the proxies at θ + εĝ and θ − εĝ.
        tokens: ids in the proxies' memory, in order.
    """

    def __init__(self, bundle: Bundle, plus: LlamaContext, minus: LlamaContext, stack: ExitStack) -> None:
        self.bundle = bundle
        self.plus, self.minus = plus, minus
        self.tokens: list[int] = []
        self._stack = stack
        self._rows = 0
        n_batch = llama_cpp.llama_n_batch(plus.ctx)
        self._batch = stack.enter_context(closing(LlamaBatch(n_tokens=n_batch, embd=0, n_seq_max=1, verbose=False)))

    @classmethod
    def open(
        cls,
        bundle_dir: str | os.PathLike[str],
        *,
        n_ctx: int = 0,
        n_batch: int = 512,
        n_outputs: int = 64,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_gpu_layers: int = 0,
        type_k: int | None = None,
        type_v: int | None = None,
        verbose: bool = False,
    ) -> ProxyPair:
        """Validates the bundle and loads both halves.

        Args:
            bundle_dir: what `adlocal convert` wrote.
            n_ctx: tokens of context; 0 takes the proxy's training length.
            n_batch: most tokens in one `llama_decode`.
            n_outputs: most rows of logits that one decode may ask for; sizes the compute buffer.
            n_threads, n_threads_batch: as in `llama_cpp.Llama`; all cores by default.
            n_gpu_layers: layers to offload, -1 for all.
            type_k, type_v: KV cache types, as in `llama_cpp.Llama`.

        Raises:
            BundleError: the halves are missing or do not fit together.
            ModelError: llama.cpp refuses a half, or `n_ctx` exceeds what the proxy was trained for.
        """
        directory = Path(bundle_dir)
        bundle = Bundle.open(directory)
        params = context_params(n_ctx, n_batch, n_outputs, n_threads, n_threads_batch, type_k, type_v)
        return cls.load(directory / PLUS_NAME, directory / MINUS_NAME, bundle, params, n_gpu_layers, verbose)

    @classmethod
    def load(
        cls,
        plus: Path,
        minus: Path,
        bundle: Bundle,
        params: llama_cpp.llama_context_params,
        n_gpu_layers: int = 0,
        verbose: bool = False,
    ) -> ProxyPair:
        """Loads two files as the halves of `bundle`, whatever their own metadata say. For the converter's sweep."""
        set_verbose(verbose)
        with ExitStack() as stack:
            contexts = [_load(path, params, n_gpu_layers, stack, verbose) for path in (plus, minus)]
            return cls(bundle, contexts[0], contexts[1], stack.pop_all())

    def close(self) -> None:
        """Frees both contexts and models."""
        self._stack.close()

    def __enter__(self) -> ProxyPair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def n_vocab(self) -> int:
        return int(self.plus.model.n_vocab())

    @property
    def n_ctx(self) -> int:
        return int(self.plus.n_ctx())

    @property
    def n_outputs(self) -> int:
        """Most rows of logits that one decode may ask for."""
        return int(self.plus.params.n_outputs_max)

    def decode(self, batch: LlamaBatch) -> None:
        """Evaluates one batch of sequence 0 in both proxies, `llama_decode`; `rows` reads the result.

        Raises:
            ProxyError: llama.cpp refused the batch in either proxy. The memory is cleared: `sync` starts afresh.
        """
        self._rows = 0
        tokens = batch.batch.token[: batch.n_tokens()]
        self._check(tokens)
        try:
            self.plus.decode(batch)
            self.minus.decode(batch)
        except Exception as error:
            self.clear()
            raise ProxyError(f"a proxy could not be evaluated: {error}; no token was emitted") from error
        self.tokens += tokens
        self._rows = n_outputs(batch)

    def _check(self, tokens: list[int]) -> None:
        """Says in words what llama.cpp would refuse with a number."""
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise ProxyError(
                f"{len(self.tokens)} + {len(tokens)} tokens exceed the context of {self.n_ctx}; ask for a larger n_ctx"
            )
        if not 0 <= min(tokens) <= max(tokens) < self.n_vocab:
            raise ProxyError(
                f"token {max(tokens) if min(tokens) >= 0 else min(tokens)} is none of the proxy's {self.n_vocab}; "
                "no token was emitted"
            )

    def sync(self, tokens: Sequence[int]) -> None:
        """Makes the memory hold exactly `tokens`: keeps the common prefix, drops the rest, decodes what is new."""
        if self.tokens == tokens:
            return
        keep = _common_prefix(self.tokens, tokens)
        if keep < len(self.tokens):
            self._truncate(keep)
        self._evaluate(tokens[len(self.tokens) :], logits_all=False)

    def rows(self) -> list[DeltaRow]:
        """Δ of each output row of the last decode."""
        if not self._rows:
            raise ProxyError("the pair has no evaluated rows: decode a batch first")
        plus, minus = _logits(self.plus, self._rows), _logits(self.minus, self._rows)
        return [DeltaRow.of(p, m, self.bundle.epsilon) for p, m in zip(plus, minus, strict=True)]

    def delta(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Δ after each prefix of `tokens`: row i is Δ for the token that follows tokens[: i + 1].

        Returns:
            float32 array of shape (len(tokens), n_vocab), in logits a unit of ε along ĝ.
        """
        return np.concatenate([adjust.delta(p, m, self.bundle.epsilon) for p, m in self.logits(tokens)])

    def logits(self, tokens: Sequence[int]) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """(z₊, z₋) after each prefix of `tokens`, in chunks of at most `n_outputs` rows, each (rows, n_vocab).

        A chunk is a view: it is valid until the next one is asked for.
        """
        if not 0 < len(tokens) <= self.n_ctx:
            raise InputError(
                f"{len(tokens)} tokens given, expected 1 to n_ctx={self.n_ctx}; open the pair with a larger n_ctx"
            )
        self.clear()
        for i in range(0, len(tokens), self.n_outputs):
            self._evaluate(tokens[i : i + self.n_outputs], logits_all=True)
            yield _logits(self.plus, self._rows), _logits(self.minus, self._rows)

    def clear(self) -> None:
        """Empties both memories."""
        self.tokens, self._rows = [], 0
        for context in (self.plus, self.minus):
            context.kv_cache_clear()

    def save_state(self) -> PairState:
        """Copy of both memories, for `load_state`."""
        return PairState(self.bundle.id, tuple(self.tokens), _get_state(self.plus), _get_state(self.minus))

    def load_state(self, state: PairState) -> None:
        """Restores a copy that `save_state` made. One of another bundle is left alone: `sync` evaluates afresh."""
        self.clear()
        if state.bundle_id == self.bundle.id:
            _set_state(self.plus, state.plus)
            _set_state(self.minus, state.minus)
            self.tokens = list(state.tokens)

    def _evaluate(self, tokens: Sequence[int], *, logits_all: bool) -> None:
        n_batch = self._batch._n_tokens
        for i in range(0, len(tokens), n_batch):
            self._batch.set_batch(tokens[i : i + n_batch], len(self.tokens), logits_all)
            self.decode(self._batch)

    def _truncate(self, n: int) -> None:
        """Drops every token from position n on. Recurrent memory cannot forget a part, and is cleared instead."""
        self._rows = 0
        removed = [bool(n) and context.kv_cache_seq_rm(0, n, -1) for context in (self.plus, self.minus)]
        if all(removed):
            del self.tokens[n:]
        else:
            self.clear()


def context_params(
    n_ctx: int = 0,
    n_batch: int = 512,
    n_outputs: int = 64,
    n_threads: int | None = None,
    n_threads_batch: int | None = None,
    type_k: int | None = None,
    type_v: int | None = None,
) -> llama_cpp.llama_context_params:
    """llama.cpp's context parameters for a proxy; the arguments are those of `ProxyPair.open`."""
    params: llama_cpp.llama_context_params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, min(n_batch, params.n_ubatch)
    params.n_outputs_max = params.n_outputs_max_per_seq = min(n_outputs, n_batch)
    params.n_threads = n_threads or os.cpu_count() or 1
    params.n_threads_batch = n_threads_batch or params.n_threads
    params.type_k = params.type_k if type_k is None else type_k
    params.type_v = params.type_v if type_v is None else type_v
    return params


def _load(
    path: Path, params: llama_cpp.llama_context_params, n_gpu_layers: int, stack: ExitStack, verbose: bool
) -> LlamaContext:
    """One half in its own context; freed when `stack` closes."""
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0x7FFFFFFF if n_gpu_layers == -1 else n_gpu_layers
    try:
        with captured_log() as log:
            model = LlamaModel(path_model=str(path), params=model_params, verbose=verbose)
            stack.enter_context(closing(model))
            if params.n_ctx > model.n_ctx_train():
                raise ModelError(
                    f"n_ctx={params.n_ctx} exceeds the {model.n_ctx_train()} tokens that the proxy was trained for; "
                    "ask for a smaller n_ctx, or convert a proxy with a longer context"
                )
            context = LlamaContext(model=model, params=params, verbose=verbose)
    except ValueError as error:
        raise ModelError(f"{path}: {error} ({last_line(log)})") from None
    return stack.enter_context(closing(context))


def n_outputs(batch: LlamaBatch) -> int:
    """How many rows of logits a batch asks for."""
    return int(np.count_nonzero(np.ctypeslib.as_array(batch.batch.logits, (batch.n_tokens(),))))


def _logits(context: LlamaContext, n_rows: int) -> npt.NDArray[np.float32]:
    """View of the last decode's logits, (n_rows, n_vocab); valid until the next decode."""
    return np.ctypeslib.as_array(context.get_logits(), (n_rows, context.model.n_vocab()))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _get_state(context: LlamaContext) -> bytes:
    size = llama_cpp.llama_state_get_size(context.ctx)
    buffer = (ctypes.c_uint8 * size)()
    return ctypes.string_at(buffer, llama_cpp.llama_state_get_data(context.ctx, buffer, size))


def _set_state(context: LlamaContext, state: bytes) -> None:
    buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    if llama_cpp.llama_state_set_data(context.ctx, buffer, len(state)) != len(state):
        raise ProxyError("llama.cpp refused a saved state of a proxy; call reset() and evaluate the prompt again")
