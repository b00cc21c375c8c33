"""The pair: both perturbed proxies in two llama.cpp contexts that evaluate the same tokens, in the native core.

Of an adapter bundle one model is loaded for both contexts, and ĝ is attached to them at +ε and −ε.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._internals import LlamaBatch, LlamaModel

from ..bundle import ADAPTER, Bundle
from ..errors import InputError, ProxyError
from ..llamacpp import native
from .analysis import Rows, TextAnalysis
from .loading import load_files
from .parameters import context_params
from .state import PairState, get_state, set_state


class ProxyPair(TextAnalysis):
    """Two proxies in lockstep. Make one with `ProxyPair.open`; close it, or use it in a `with` statement.

    The pair knows which tokens its memory holds, so that `sync` can follow any jump of the teacher: prefix reuse,
    rollback, a restored state. One sequence; not safe for use by several threads at once.

    """

    def __init__(self, handle: int, n_batch: int, n_outputs: int, bundle: Bundle | None) -> None:
        self._bundle = bundle
        self._tokens: list[int] = []
        self._known_at = -1  # the serial number at which the memory held `_tokens`
        self.n_outputs = n_outputs
        self._lib = native.library()
        self._handle: int | None = handle
        self._free = weakref.finalize(self, self._lib.adl_pair_free, handle)
        self._batch = LlamaBatch(n_tokens=n_batch, embd=0, n_seq_max=1, verbose=False)

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | os.PathLike[str],
        *,
        teacher: LlamaModel | None = None,
        n_ctx: int = 0,
        n_batch: int = 512,
        n_outputs: int = 64,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_gpu_layers: int = 0,
        type_k: int | None = None,
        type_v: int | None = None,
        verbose: bool = False,
        epsilon: float | None = None,
    ) -> ProxyPair:
        """Validates the bundle and loads it, whichever format it is of.

        Args:
            bundle: what `adlocal convert` wrote, or its directory.
            teacher: whose logits the pair is to adjust; without one it only evaluates.
            n_ctx: tokens of context; 0 takes the proxy's training length.
            n_batch: most tokens in one `llama_decode`.
            n_outputs: most rows of logits that one decode may ask for; sizes the compute buffer.
            n_threads, n_threads_batch: as in `llama_cpp.Llama`; all cores by default.
            n_gpu_layers: layers to offload, -1 for all.
            type_k, type_v: KV cache types, as in `llama_cpp.Llama`.
            epsilon: step along ĝ, in units of the weights, for an adapter bundle; the bundle's by default.

        Raises:
            BundleError: a file is missing, or the two do not fit together.
            InputError: `epsilon` is no positive number, or the bundle is of halves and was written at another.
            ModelError: llama.cpp refuses a file, or `n_ctx` exceeds what the proxy was trained for.
            VocabularyError: teacher and proxy number their tokens differently.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        params = context_params(n_ctx, n_batch, n_outputs, n_threads, n_threads_batch, type_k, type_v)
        return cls.of(bundle, params, n_gpu_layers, teacher, verbose, epsilon)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        params: llama_cpp.llama_context_params,
        n_gpu_layers: int = 0,
        teacher: LlamaModel | None = None,
        verbose: bool = False,
        epsilon: float | None = None,
    ) -> ProxyPair:
        """As `open`, with llama.cpp's own parameters of a context."""
        if epsilon == 0:  # the core's word for the bundle's
            raise InputError("epsilon=0: give a positive number")
        return cls.load(
            *bundle.files,
            format=bundle.format,
            epsilon=bundle.epsilon,
            delta_scale=bundle.delta_scale,
            params=params,
            n_gpu_layers=n_gpu_layers,
            teacher=teacher,
            verbose=verbose,
            own_epsilon=epsilon,
            bundle=bundle,
        )

    @classmethod
    def load(
        cls,
        first: Path,
        second: Path,
        *,
        format: str,
        epsilon: float,
        delta_scale: float,
        params: llama_cpp.llama_context_params,
        n_gpu_layers: int = 0,
        teacher: LlamaModel | None = None,
        verbose: bool = False,
        own_epsilon: float | None = None,
        bundle: Bundle | None = None,
    ) -> ProxyPair:
        """Loads two files as a pair, whatever their own metadata say.

        Args:
            first, second: the halves, or base and adapter.
            format: HALVES or ADAPTER.
            epsilon, delta_scale: as a bundle has them.
            own_epsilon: for an adapter, the ε to attach it at in place of `epsilon`.
            bundle: which the files are of, for states that are saved.
            params, n_gpu_layers, teacher, verbose: as in `open`.
        """
        files, scales = (first, second), (epsilon, delta_scale)
        handle = load_files(files, format == ADAPTER, scales, own_epsilon, params, n_gpu_layers, teacher, verbose)
        return cls(handle, params.n_batch, params.n_outputs_max, bundle)

    def close(self) -> None:
        """Frees contexts and models."""
        self._handle = None
        self._free()

    def __enter__(self) -> ProxyPair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def bundle(self) -> Bundle:
        """The bundle that the pair was opened from.

        Raises:
            InputError: it was loaded from two files that are no bundle yet.
        """
        if self._bundle is None:
            raise InputError("this pair was loaded from two files; open one from a bundle")
        return self._bundle

    @property
    def handle(self) -> int:
        """The core's `struct adl_pair *`."""
        if self._handle is None:
            raise InputError("the pair is closed; open another")
        return self._handle

    @property
    def contexts(self) -> tuple[int, int]:
        """llama.cpp's contexts of the proxies at θ + εĝ and θ − εĝ, for reading."""
        plus, minus = (self._lib.adl_pair_get_context(self.handle, sign) for sign in (native.PLUS, native.MINUS))
        return plus, minus

    @property
    def epsilon(self) -> float:
        """The step along ĝ to either proxy that is in force, in units of the weights: Δ = (z₊ − z₋) / 2ε."""
        return float(self._lib.adl_pair_epsilon(self.handle))

    def set_epsilon(self, value: float) -> None:
        """Attaches the adapter at another ε, for adapter bundles. The memory is cleared: `sync` starts afresh.

        Raises:
            InputError: `value` is no positive number, or the pair is of halves; nothing is changed.
            ProxyError: llama.cpp refuses. The pair keeps its ε.
        """
        status = self._lib.adl_pair_set_epsilon(self.handle, value)
        error = native.error() if status < 0 else None
        if not isinstance(error, InputError):
            self.clear()
        if error is not None:
            raise error

    @property
    def serial(self) -> int:
        """A number that changes whenever the memory does, whoever changed it."""
        return int(self._lib.adl_pair_serial(self.handle))

    @property
    def tokens(self) -> list[int]:
        """Ids in the proxies' memory, in order; none where somebody else, a lockstep say, has changed it."""
        return self._tokens if self._known_at == self.serial else []

    @property
    def n_vocab(self) -> int:
        return int(self._lib.adl_pair_n_vocab(self.handle))

    @property
    def n_ctx(self) -> int:
        return int(self._lib.adl_pair_n_ctx(self.handle))

    def decode(self, batch: LlamaBatch) -> int:
        """Evaluates one batch of sequence 0 in both proxies, `llama_decode`.

        Returns:
            the number of rows of logits that the batch asks for; `rows` reads them.

        Raises:
            ProxyError: llama.cpp refused the batch in either proxy. The memory is cleared: `sync` starts afresh.
        """
        tokens = self.tokens
        n_rows = int(self._lib.adl_pair_decode(self.handle, batch.batch))
        if n_rows < 0:
            error = native.error()
            self.clear()
            raise error
        tokens += batch.batch.token[: batch.batch.n_tokens]
        self._know(tokens)
        return n_rows

    def sync(self, tokens: Sequence[int]) -> None:
        """Makes the memory hold exactly `tokens`: keeps the common prefix, drops the rest, decodes what is new."""
        if self._known_at != self.serial:
            self.clear()
        if self.tokens == tokens:
            return
        keep = _common_prefix(self.tokens, tokens)
        if keep < len(self.tokens):
            self._truncate(keep)
        self.evaluate(tokens[len(self.tokens) :], logits_all=False)

    def adjust(self, logits: Any, strength: float, guard: float) -> list[tuple[float, int]]:
        """Adjusts the teacher's rows of the batch that was decoded last, in place.

        Args:
            logits: `llama_get_logits` of the teacher's context, as many rows as the batch asked for.
            strength: nats, above 0.
            guard: 0 to 1.

        Returns:
            (KL(adjusted ‖ teacher) in nats, how many tokens passed the guard) of each row.

        Raises:
            ProxyError: nothing was decoded, or a number that has to be finite is not. Nothing may be sampled.
        """
        n = self._require_rows()
        strengths, guards = ((ctypes.c_double * n)(*[value] * n) for value in (strength, guard))
        out = (native.RowStruct * n)()
        native.check(self._lib.adl_pair_adjust(self.handle, logits, n, strengths, guards, out))
        return [(row.kl, row.n_candidates) for row in out]

    def dose(self, row: int, token: int) -> float:
        """Δ(token) − E[Δ] for a row of the last decode; 0 for a token beyond the proxy's vocabulary, which has no Δ."""
        if not 0 <= row < self._require_rows():
            raise InputError(f"row {row} of {self._require_rows()}: the last decode did not ask for it")
        return float(self._lib.adl_pair_dose(self.handle, row, token))

    def rows(self) -> tuple[Rows, Rows]:
        """(z₊, z₋) of the last decode's output rows, each (rows, n_vocab). Views: valid until the next decode."""
        shape = (self._require_rows(), self.n_vocab)
        plus, minus = (
            np.ctypeslib.as_array(self._lib.adl_pair_get_logits(self.handle, sign), shape)
            for sign in (native.PLUS, native.MINUS)
        )
        return plus, minus

    def _require_rows(self) -> int:
        n_rows = int(self._lib.adl_pair_n_rows(self.handle))
        if not n_rows:
            raise ProxyError("the pair has no evaluated rows: decode a batch first")
        return n_rows

    def clear(self) -> None:
        """Empties both memories."""
        self._lib.adl_pair_memory_clear(self.handle)
        self._know([])

    def save_state(self, tokens: Sequence[int] | None = None) -> PairState:
        """Copy of both memories, for `load_state`; `tokens` are what they hold, where the pair itself does not know."""
        plus, minus = map(get_state, self.contexts)
        held = self.tokens if tokens is None else tokens
        return PairState(self.bundle.id, self.epsilon, tuple(held), plus, minus)

    def load_state(self, state: PairState) -> int:
        """Restores a copy that `save_state` made. One of another bundle or ε is left alone: `sync` evaluates afresh.

        Returns:
            the number of tokens that the memory holds now.
        """
        self.clear()
        if (state.bundle_id, state.epsilon) == (self.bundle.id, self.epsilon):
            for context, data in zip(self.contexts, (state.plus, state.minus), strict=True):
                set_state(context, data)
            self._lib.adl_pair_touch(self.handle)
            self._know(list(state.tokens))
        return len(self.tokens)

    def evaluate(self, tokens: Sequence[int], *, logits_all: bool) -> int:
        """Goes on from `self.tokens`, with a row for the last token of each batch, or for every one.

        Returns:
            the number of rows of the last batch; `rows` reads them.
        """
        n_rows, n_batch = 0, self._batch._n_tokens
        for i in range(0, len(tokens), n_batch):
            self._batch.set_batch(tokens[i : i + n_batch], len(self.tokens), logits_all)
            n_rows = self.decode(self._batch)
        return n_rows

    def _truncate(self, n: int) -> None:
        """Drops every token from position n on. Recurrent memory cannot forget a part, and is cleared instead."""
        tokens = self.tokens
        if n and self._lib.adl_pair_memory_seq_rm(self.handle, 0, n, -1):
            self._know(tokens[:n])
        else:
            self.clear()

    def _know(self, tokens: list[int]) -> None:
        """Notes what the memory holds now."""
        self._tokens, self._known_at = tokens, self.serial


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
