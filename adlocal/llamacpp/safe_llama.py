"""`llama_cpp.Llama` without the faults that crash a process, hang it, or let text out that nobody asked for.

Nothing here is about protection: these are mends of llama-cpp-python, which `AntidistillationLlama` stands on.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import llama_cpp
from llama_cpp.llama import LlamaState

from ..errors import InputError
from .grammar import check_grammar, check_tool, grammar_of
from .processors import Processors

_RANDOM_SEEDS = (-1, llama_cpp.LLAMA_DEFAULT_SEED)
Scope = Callable[[], AbstractContextManager[None]]


class SafeLlama(llama_cpp.Llama):
    """`llama_cpp.Llama` that several threads may call, and that refuses what it cannot do.

    - Calls from several threads wait for each other. A stream that is resumed after another call began on the same
      model raises InputError: its context is gone.
    - A `response_format` with a JSON schema, OpenAI's envelope too, is obeyed or refused; so is that of a forced tool.
    - A grammar that llama.cpp cannot parse is refused.
    - What a logits processor raises reaches the caller, and the token is not emitted.
    - A seed of -1 is a new random one, for every call and for every model that is given it.
    - A prompt without tokens, and a model that was closed, are refused.
    """

    def __init__(self, model_path: str, **kwargs: Any) -> None:
        self._lock = threading.RLock()
        self._turn: object = None
        self._processors: Processors | None = None
        if kwargs.get("seed") == -1:
            kwargs["seed"] = _random_seed()
        super().__init__(model_path, **kwargs)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread at a time, and only while the model is open.

        Raises:
            InputError: it was closed.
        """
        with self._lock:
            if self._model.model is None:
                raise InputError("the model is closed; open another")
            yield

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """`llama_cpp.Llama.create_completion`."""
        return self._within(self._locked, super().create_completion, *args, **kwargs)

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """`llama_cpp.Llama.create_chat_completion`. A schema in `response_format` is obeyed or refused."""
        check_tool(kwargs.get("tools"), kwargs.get("tool_choice"))
        check_tool(kwargs.get("functions"), kwargs.get("function_call"))
        grammar = grammar_of(kwargs.get("response_format"))
        if grammar is not None:
            if kwargs.get("grammar") is not None:
                raise InputError("response_format and grammar both constrain the text; give one of them")
            kwargs |= {"grammar": grammar, "response_format": None}
        return self._within(self._locked, super().create_chat_completion, *args, **kwargs)

    def _create_completion(self, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        kwargs["logits_processor"] = Processors.of(logits_processor)
        return super()._create_completion(*args, **kwargs)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """`llama_cpp.Llama.generate`."""
        return self._stepwise(self._locked, self._in_turn(tokens, *args, **kwargs))

    def _in_turn(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As `generate`; ends in an error where it is resumed after another call took the context."""
        tokens = list(tokens)
        if not tokens and (kwargs.get("reset", True) or not self.n_tokens):
            raise InputError("the prompt is empty: it has no tokens to go on from; give some text")
        turn = self._turn = object()
        inner, sent = super().generate(tokens, *args, **kwargs), None
        while True:
            try:
                token = inner.send(sent)
            except StopIteration:
                return
            sent = yield token
            if self._turn is not turn:
                raise InputError(
                    "another call used this model while this stream was being read, and took its context; read a "
                    "stream to its end before the next call, or give it a model of its own"
                )

    def _init_sampler(self, *args: Any, logits_processor: Any = None, grammar: Any = None, **kwargs: Any) -> Any:
        if grammar is not None:
            check_grammar(self._model.vocab, grammar)
        self._processors = processors = Processors.of(logits_processor)
        kwargs["logits_processor"] = processors and [processors.apply]
        kwargs["grammar"] = grammar
        return super()._init_sampler(*args, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """`llama_cpp.Llama.sample`."""
        with self._locked():
            token = int(super().sample(*args, **kwargs))
            if self._processors is not None:
                self._processors.raise_failure()
            return token

    def eval(self, tokens: Sequence[int]) -> None:
        """`llama_cpp.Llama.eval`."""
        with self._locked():
            super().eval(tokens)

    def reset(self) -> None:
        """`llama_cpp.Llama.reset`."""
        with self._locked():
            super().reset()  # type: ignore[no-untyped-call]

    def save_state(self) -> LlamaState:
        """`llama_cpp.Llama.save_state`."""
        with self._locked():
            return super().save_state()

    def load_state(self, state: LlamaState) -> None:
        """`llama_cpp.Llama.load_state`."""
        with self._locked():
            self._turn = object()
            super().load_state(state)

    def set_seed(self, seed: int) -> None:
        """`llama_cpp.Llama.set_seed`; -1 draws a new one."""
        super().set_seed(_random_seed() if seed in _RANDOM_SEEDS else seed)

    def close(self) -> None:
        """`llama_cpp.Llama.close`, once nobody else is in the model."""
        if hasattr(self, "_stack"):
            with self._lock:
                super().close()

    def _within(self, scope: Scope, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls in a scope; what streams goes on in it, a step at a time."""
        with scope():
            result = call(*args, **kwargs)
        return result if isinstance(result, dict) else self._stepwise(scope, result)

    def _stepwise(self, scope: Scope, inner: Any) -> Generator[Any, Any, None]:
        """Runs each step of a generator in a scope, passing on what is sent to it."""
        sent = None
        try:
            while True:
                with scope():
                    try:
                        item = next(inner) if sent is None else inner.send(sent)
                    except StopIteration:
                        return
                sent = yield item
        finally:
            if hasattr(inner, "close"):
                inner.close()


def _random_seed() -> int:
    """One that llama.cpp takes as it is: it would draw one itself for the greatest."""
    return secrets.randbelow(llama_cpp.LLAMA_DEFAULT_SEED)
