"""`AntidistillationLlama`, a drop-in for `llama_cpp.Llama` that samples under protection."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.llama import LlamaState
from llama_cpp.llama_chat_format import Llava15ChatHandler, MTMDChatHandler

from .bundle import Bundle
from .dose import Dose
from .engine.llama_context import LockstepContext
from .engine.prefix import Prefix, cuts, whole_blocks
from .errors import InputError, ModelError
from .llamacpp.gguf import GGUFHeader
from .llamacpp.model import refusals
from .llamacpp.safe_llama import SafeLlama, Scope
from .pair import ProxyPair
from .pair.state import PairState
from .settings import Settings, resolve


@dataclass(frozen=True)
class _Proxies:
    """How the pair is opened, by the names of `AntidistillationLlama`'s arguments: what a pickle keeps of it."""

    bundle: Path
    epsilon: float | None
    full: bool
    proxy_n_gpu_layers: int | None
    proxy_n_threads: int | None
    proxy_type_k: int | None
    proxy_type_v: int | None


class ProtectedState(LlamaState):
    """What `AntidistillationLlama.save_state` returns: the teacher's state, the pair's, and how rows were adjusted."""

    def __init__(
        self, teacher: LlamaState, pair: PairState, evaluated_with: tuple[Settings, float], prefix: Prefix
    ) -> None:
        self.__dict__.update(teacher.__dict__)
        self.pair = pair
        self.evaluated_with = evaluated_with
        self.prefix = prefix


class AntidistillationLlama(SafeLlama):
    """`llama_cpp.Llama` whose logits carry the antidistillation term from the moment they are evaluated.

    Every completion call takes `strength` and `guard` for that call. After it, `last_dose` tells what protection did.
    Threads may share it, as `SafeLlama` says.

    Example:
        >>> llm = AntidistillationLlama("teacher.gguf", bundle="bundle/", strength=4.0, n_ctx=2048)
        >>> llm.create_chat_completion([{"role": "user", "content": "Why is the sky blue?"}], max_tokens=200)
        >>> llm.last_dose.per_token
    """

    def __init__(
        self,
        model_path: str,
        *,
        bundle: Bundle | str | os.PathLike[str],
        strength: float | str | None = None,
        guard: float | None = None,
        epsilon: float | None = None,
        full: bool = False,
        proxy_n_gpu_layers: int | None = None,
        proxy_n_threads: int | None = None,
        proxy_type_k: int | None = None,
        proxy_type_v: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads teacher and pair.

        Args:
            model_path: the teacher's GGUF.
            bundle: what `adlocal convert` wrote, or its directory.
            strength: typical shift of a plausible token's logit, in nats; 0 is exactly the teacher. None takes the
                bundle's calibrated strength if it has one, else 1.0; "calibrated" insists on one.
            guard: tokens under this share of the top token's probability are never lifted; 0 is the paper. None takes
                the calibrated guard, else 0.05.
            epsilon: step along ĝ, for an adapter bundle; the bundle's by default.
            full: evaluate the pair for every token, for the doses of all; else only where there is a choice to steer.
            proxy_n_gpu_layers, proxy_n_threads: as for the teacher, whose they are by default.
            proxy_type_k, proxy_type_v: types of the proxies' KV caches, llama.cpp's own by default.
            **kwargs: of `llama_cpp.Llama`.

        Raises:
            InputError: bundle, teacher or an argument cannot be used; the message says what would help.
        """
        _refuse_unprotectable(kwargs)
        # Before the teacher's weights are read, which can take a while.
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        settings = resolve(opened, model_path, strength, guard)
        GGUFHeader(model_path)
        self._proxies = _Proxies(
            opened.directory, epsilon, full, proxy_n_gpu_layers, proxy_n_threads, proxy_type_k, proxy_type_v
        )
        # A draft needs a row of scores for every position, not only for the last n_batch.
        kwargs["logits_all"] = kwargs.get("logits_all", False) or kwargs.get("draft_model") is not None
        self._has_sampled = False
        self._load_teacher(model_path, kwargs)
        self.last_dose = Dose(settings.strength, settings.guard)
        try:
            pair = self._open_pair(opened)
        except BaseException:
            self.close()
            raise
        self._stack.callback(pair.close)
        self._lockstep = LockstepContext(self._ctx, pair, settings, full=full)
        self._stack.callback(self._lockstep.close)  # before the pair
        self._n_ctx = len(self.input_ids)  # llama.cpp rounds n_ctx up, Llama's own buffers do not
        self._ctx = self._lockstep  # type: ignore[assignment]  # it offers what Llama asks of a context
        self.pair = pair

    def _load_teacher(self, model_path: str, kwargs: dict[str, Any]) -> None:
        with refusals(model_path):
            super().__init__(model_path, **kwargs)
        if llama_cpp.llama_model_has_encoder(self.model) or self._ctx.memory is None:
            self.close()
            raise ModelError(f"{model_path}: an embedding or encoder model writes no text; give a decoder-only model")

    def _open_pair(self, bundle: Bundle) -> ProxyPair:
        own = self._proxies
        layers, threads = own.proxy_n_gpu_layers, own.proxy_n_threads
        n_batch = whole_blocks(llama_cpp.llama_n_ubatch(self.ctx))  # so that its batches end where the teacher's do
        return ProxyPair.open(
            bundle,
            teacher=self._model,
            n_ctx=len(self.input_ids),  # as asked for; llama.cpp rounds it up alike for all three
            n_batch=n_batch,
            n_outputs=n_batch if self._logits_all else 1,
            n_threads=threads or self.n_threads,
            n_threads_batch=threads or self.n_threads_batch,
            n_gpu_layers=self.model_params.n_gpu_layers if layers is None else layers,
            type_k=own.proxy_type_k,
            type_v=own.proxy_type_v,
            verbose=self.verbose,
            epsilon=own.epsilon,
        )

    @property
    def strength(self) -> float:
        """Typical shift of a plausible token's logit, in nats. May be set; a call's own `strength` goes before it."""
        return self._lockstep.settings.strength

    @strength.setter
    def strength(self, value: float) -> None:
        with self._locked():
            self._lockstep.settings = self._lockstep.settings.but(strength=value)

    @property
    def guard(self) -> float:
        """Share of the top token's probability below which no token is lifted."""
        return self._lockstep.settings.guard

    @guard.setter
    def guard(self, value: float) -> None:
        with self._locked():
            self._lockstep.settings = self._lockstep.settings.but(guard=value)

    def create_completion(
        self, *args: Any, strength: float | None = None, guard: float | None = None, **kwargs: Any
    ) -> Any:
        """`llama_cpp.Llama.create_completion` with a `strength` and `guard` for this call."""
        return self._within(self._protected(strength, guard), super().create_completion, *args, **kwargs)

    def __call__(self, *args: Any, strength: float | None = None, guard: float | None = None, **kwargs: Any) -> Any:
        """As `create_completion`."""
        return self.create_completion(*args, strength=strength, guard=guard, **kwargs)

    def create_chat_completion(
        self, *args: Any, strength: float | None = None, guard: float | None = None, **kwargs: Any
    ) -> Any:
        """`llama_cpp.Llama.create_chat_completion` with a `strength` and `guard` for this call."""
        return self._within(self._protected(strength, guard), super().create_chat_completion, *args, **kwargs)

    def generate(
        self,
        tokens: Sequence[int],
        *args: Any,
        strength: float | None = None,
        guard: float | None = None,
        **kwargs: Any,
    ) -> Generator[int, Sequence[int] | None, None]:
        """`llama_cpp.Llama.generate` with a `strength` and `guard` for this call."""
        return self._stepwise(self._protected(strength, guard), self._generate(tokens, *args, **kwargs))

    def _generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        settings = self._lockstep.settings
        self.last_dose = Dose(settings.strength, settings.guard)
        self._has_sampled = False
        if self._lockstep.in_force != self._lockstep.evaluated_with:
            self._forget_rows(keep_context=not kwargs.get("reset", True))
        elif not self._lockstep.rows:  # after a failure: the prompt may be cached, but nothing to sample from
            self._requires_eval = True
        if settings.protects and kwargs.get("reset", True):
            self._keep_reusable(tokens)
        yield from self._in_turn(tokens, *args, **kwargs)

    def _keep_reusable(self, prompt: Sequence[int]) -> None:
        """Leaves no more of the context than what gives the prompt the rows that a fresh one would."""
        held = self._input_ids.tolist()
        n = self._lockstep.prefix.reusable(held, prompt)
        if n == len(prompt) - 1 and held == list(prompt) and not self._requires_eval:
            return  # the row to sample from is there
        self.n_tokens = n
        self._requires_eval = True

    def eval(self, tokens: Sequence[int]) -> None:
        """`llama_cpp.Llama.eval`. Under protection the last token of a prompt is decoded by itself: `engine.prefix`."""
        with self._locked():
            verifies = self.draft_model is not None and self._has_sampled
            if len(tokens) < 2 or verifies or not self._lockstep.settings.protects:
                super().eval(tokens)
                return
            done = 0
            for size in cuts(self.n_tokens, len(tokens), self._lockstep.prefix.n_batch):
                self._lockstep.wants_rows = self._logits_all or done + size == len(tokens)
                try:
                    super().eval(tokens[done : done + size])
                finally:
                    self._lockstep.wants_rows = True
                done += size

    def _forget_rows(self, keep_context: bool) -> None:
        """Rows adjusted with other settings must be neither sampled nor reported."""
        self._requires_eval = True
        if self._logits_all and keep_context:
            self._replay(self._input_ids.tolist())
        elif self._logits_all:
            self.n_tokens = 0

    def _replay(self, tokens: list[int]) -> None:
        self.reset()
        self.eval(tokens)

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """Samples from the adjusted logits, and counts the token's dose."""
        with self._locked():
            if self._lockstep.lacks_its_row():
                self._refresh()
            row = self._lockstep.row(self.n_tokens - 1 if idx is None else idx)
            token = super().sample(*args, idx=idx, **kwargs)
            self._has_sampled = True
            self.last_dose.add(row, self._lockstep.dose(row, token))
            return token

    def _refresh(self) -> None:
        """Evaluates the last token again for its row; all of them where memory cannot forget one."""
        tokens = self._input_ids.tolist()
        if self._lockstep.kv_cache_seq_rm(-1, len(tokens) - 1, -1):
            self.n_tokens -= 1
            self.eval(tokens[-1:])
        else:
            self._replay(tokens)

    def reset(self) -> None:
        """Forgets all tokens, in teacher and pair."""
        with self._locked():
            super().reset()
            self._lockstep.kv_cache_clear()

    def save_state(self) -> ProtectedState:
        """Copy of the teacher's and the pair's state, for `load_state`."""
        with self._locked():
            step = self._lockstep
            return ProtectedState(super().save_state(), step.pair_state(), step.evaluated_with, replace(step.prefix))

    def load_state(self, state: LlamaState) -> None:
        """Restores a saved state. Rows of scores that were adjusted otherwise, or never, are evaluated again."""
        tokens = state.input_ids[: state.n_tokens].tolist()
        with self._locked():
            if self._logits_all and not self._fits(state):
                self._replay(tokens)
                self._seed = state.seed
                return
            super().load_state(state)
            protected = state if isinstance(state, ProtectedState) else None
            if protected is None:
                self._lockstep.restored(tokens, None, None, None)
            else:
                self._lockstep.restored(tokens, protected.pair, protected.evaluated_with, protected.prefix)

    def __getstate__(self) -> dict[str, Any]:
        with self._locked():
            state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
            return {**state, **asdict(self._proxies), "strength": self.strength, "guard": self.guard}

    def _fits(self, state: LlamaState) -> bool:
        """Whether a state's rows of scores are those that the present settings and bundle give."""
        return (
            isinstance(state, ProtectedState)
            and state.evaluated_with == self._lockstep.in_force
            and state.pair.bundle_id == self.pair.bundle.id
        )

    def _protected(self, strength: float | None, guard: float | None) -> Scope:
        """A scope in which rows are adjusted with these settings, or with those in force where one is None."""
        with self._locked():  # another thread's call has its own in force
            settings = self._lockstep.settings.but(strength, guard)

        @contextmanager
        def scope() -> Iterator[None]:
            with self._locked():
                before, self._lockstep.settings = self._lockstep.settings, settings
                try:
                    yield
                finally:
                    self._lockstep.settings = before

        return scope


def _refuse_unprotectable(kwargs: dict[str, Any]) -> None:
    if kwargs.get("embedding"):
        raise InputError("embedding=True: embeddings cannot be protected; use llama_cpp.Llama for them")
    if kwargs.get("vocab_only"):
        raise InputError("vocab_only=True loads no weights to protect; use llama_cpp.Llama to tokenize")
    if isinstance(kwargs.get("chat_handler"), (Llava15ChatHandler, MTMDChatHandler)):
        raise InputError(
            f"chat_handler={type(kwargs['chat_handler']).__name__}: multimodal input is evaluated around the pair and "
            "cannot be protected; leave chat_handler out and send text"
        )
