"""Traces as token ids, rendered by the model's own chat template and tokenized by llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import llama_cpp
from llama_cpp._internals import LlamaModel

from ..errors import InputError, TraceError
from ..llamacpp.chat import ChatTemplate, thought
from ..llamacpp.tokens import token_pieces
from .messages import Message
from .trace import Trace


@dataclass(frozen=True)
class EncodedTrace:
    """A trace as token ids; `targets[i]` says that token i counts in the loss, given the ids before it."""

    where: str
    tokens: list[int]
    targets: list[bool]

    @property
    def n_targets(self) -> int:
        return sum(self.targets)

    def cut(self, n_ctx: int) -> EncodedTrace:
        """The first `n_ctx` tokens."""
        return EncodedTrace(self.where, self.tokens[:n_ctx], self.targets[:n_ctx])


class _Piece(NamedTuple):
    """Part of a trace's text. `counts` says that it was sampled, `ended` that its turn came to its end."""

    text: str
    counts: bool
    ended: bool = True


class TraceEncoder:
    """Turns traces into token ids with one model's tokenizer and chat template.

    Prompt and completion are tokenized apart, as at inference, where the prompt is given and the completion sampled.

    Args:
        model: where tokenizer and template come from.
        raw: concatenate string pairs as they are, even if the model has a chat template.

    Attributes:
        template: the model's chat template, None if it has none.
    """

    def __init__(self, model: LlamaModel, *, raw: bool = False) -> None:
        self._model = model
        self.template = ChatTemplate.of(model)
        self._raw = raw or self.template is None

    def is_raw(self, messages: Sequence[Message] | None) -> bool:
        """Whether the template has no part in a text: messages have always need of it."""
        return self._raw and not messages

    def encode(self, trace: Trace) -> EncodedTrace:
        """Token ids of a trace and which of them count.

        Raises:
            TraceError: the template cannot render the trace, or nothing in it counts.
        """
        raw = self.is_raw(trace.messages)
        tokens: list[int] = []
        targets: list[bool] = []
        for i, piece in enumerate(_joined(trace) if raw else self._rendered(trace)):
            ids = self._tokenize(piece.text, trace.where, raw, is_first=i == 0)
            tokens += ids
            targets += self._until_end(ids, piece.ended) if piece.counts else [False] * len(ids)
        if targets:
            targets[0] = False  # nothing comes before the first token to predict it from
        if not any(targets):
            raise TraceError(f"{trace.where}: no token of it counts in the loss; check its roles and completion")
        return EncodedTrace(trace.where, tokens, targets)

    def encode_prompt(
        self, where: str, prompt: str | Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a prompt alone, up to where the model is to answer.

        Raises:
            TraceError: the template cannot render it.
        """
        if isinstance(prompt, str) and self._raw:
            return self._tokenize(prompt, where, raw=True, is_first=True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        with _located(where):
            text = self._needed(where).render(messages, tools=tools, add_generation_prompt=True)
        return self._tokenize(text, where, raw=False, is_first=True)

    def narrowed(self, traces: Iterable[EncodedTrace], expression: str) -> list[EncodedTrace]:
        """The traces with only those targets whose own text holds a match; those that have none are left out."""
        found: dict[int, bool] = {}

        def matches(token: int) -> bool:
            if token not in found:
                (piece,) = token_pieces(self._model.vocab, [token])
                found[token] = re.search(expression, piece.decode("utf-8", errors="replace")) is not None
            return found[token]

        narrowed = [
            replace(trace, targets=[c and matches(t) for t, c in zip(trace.tokens, trace.targets, strict=True)])
            for trace in traces
        ]
        return [trace for trace in narrowed if trace.n_targets]

    def _tokenize(self, text: str, where: str, raw: bool, is_first: bool) -> list[int]:
        ids: list[int] = self._model.tokenize(_utf8(text, where), add_bos=is_first and raw, special=not raw)
        return ids

    def _needed(self, where: str) -> ChatTemplate:
        if self.template is None:
            raise TraceError(f"{where}: messages need a chat template and the model has none; use string pairs")
        return self.template

    def _rendered(self, trace: Trace) -> list[_Piece]:
        """The conversation's text, cut where assistant turns that count begin and end."""
        template, messages = self._needed(trace.where), list(trace.messages or _as_messages(trace))
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        pieces: list[_Piece] = []
        done = ""
        for i in self._learned(trace, messages):
            ended = trace.ended or i != last
            with _located(trace.where):
                before, after = template.turn(messages, i, tools=trace.tools, ended=ended)
            if not (before.startswith(done) and after.startswith(before)):
                raise TraceError(
                    f"{trace.where}: the chat template rewrites earlier turns, so turn {i + 1} cannot be told apart; "
                    "give one assistant turn a line"
                )
            said = after[len(before) :]
            _check_reasoning(trace.where, messages[i], said)
            said = said if ended else _without_closing(said, messages[i])
            pieces += [_Piece(before[len(done) :], False), _Piece(said, True, ended)]
            done = after
        return pieces

    def _learned(self, trace: Trace, messages: Sequence[Message]) -> list[int]:
        """The turns that count: the assistant's own, where the template has a place for what they say."""
        template = self._needed(trace.where)
        turns = [i for i, message in enumerate(messages) if i >= trace.n_given and message["role"] == "assistant"]
        turns = [i for i in turns if i not in trace.unlearned]
        said = [i for i in turns if template.knows_tool_calls or not _only_calls(messages[i])]
        if turns and not said:
            raise TraceError(
                f"{trace.where}: its answers are calls of tools, and the model's chat template has no place for them; "
                "remove the line, or take a model whose template has"
            )
        return said

    def _until_end(self, ids: list[int], ended: bool) -> list[bool]:
        """True up to the end-of-turn token, and for it if the turn ended; what a template puts after it is never
        sampled."""
        ends = [i for i, token in enumerate(ids) if llama_cpp.llama_vocab_is_eog(self._model.vocab, token)]
        n = ends[0] + ended if ends else len(ids)
        return [i < n for i in range(len(ids))]


def encode_all(traces: Iterable[Trace], encoder: TraceEncoder, n_ctx: int) -> tuple[list[EncodedTrace], int, int]:
    """Encodes traces for a context of `n_ctx` tokens.

    Returns:
        The traces that have something to learn from; how many of them were cut to `n_ctx`; how many were skipped
        because their prompt alone fills it.
    """
    encoded = [encoder.encode(trace) for trace in traces]
    fitting = [kept for trace in encoded if (kept := trace.cut(n_ctx)).n_targets]
    n_cut = sum(len(trace.tokens) > n_ctx for trace in encoded)
    n_skipped = len(encoded) - len(fitting)
    if not fitting:
        raise TraceError(f"all {len(encoded)} prompts fill the context of {n_ctx} tokens; ask for a larger one")
    return fitting, n_cut - n_skipped, n_skipped


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TraceError(f"{where}: half a surrogate pair, no text ({error.reason}); mend or remove the line") from None


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Says of a template's refusal which record it is about."""
    try:
        yield
    except TraceError:
        raise
    except InputError as error:
        raise TraceError(f"{where}: {error}") from None


def _check_reasoning(where: str, message: Message, text: str) -> None:
    if (reasoning := message.get("reasoning_content", "").strip()) and reasoning not in text:
        raise TraceError(
            f"{where}: the model's chat template drops the reasoning of a turn that is to be learned; put it into the "
            "content as the model writes it"
        )


def _only_calls(message: Message) -> bool:
    has_text = message["content"].strip() or message.get("reasoning_content", "").strip()
    return bool(message.get("tool_calls")) and not has_text


def _without_closing(text: str, message: Message) -> str:
    """A rendered answer without what the template closes it with; whole if the template changed the answer itself."""
    answer = message["content"] if message["content"].strip() else message.get("reasoning_content", "")
    for said in (answer, answer.strip()):  # templates strip
        if said and said in text and not message.get("tool_calls"):
            return text[: text.rindex(said) + len(said)]
    return text


def _joined(trace: Trace) -> list[_Piece]:
    """A pair of strings as it is."""
    said = (thought(trace.reasoning) if trace.reasoning else "") + (trace.completion or "")
    return [_Piece(trace.prompt or "", False), _Piece(said, True, trace.ended)]


def _as_messages(trace: Trace) -> list[Message]:
    answer = {"role": "assistant", "content": trace.completion}
    answer |= {"reasoning_content": trace.reasoning} if trace.reasoning else {}
    return [{"role": "user", "content": trace.prompt}, answer]
