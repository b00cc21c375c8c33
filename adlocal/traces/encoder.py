"""Traces as token ids, rendered by the model's own chat template and tokenized by llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import llama_cpp
from llama_cpp._internals import LlamaModel
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import TraceError
from ..llamacpp.tokens import token_pieces
from .trace import Message, Trace


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


class TraceEncoder:
    """Turns traces into token ids with one model's tokenizer and chat template.

    Prompt and completion are tokenized apart, as at inference, where the prompt is given and the completion sampled.

    Args:
        model: where tokenizer and template come from.
        raw: concatenate string pairs as they are, even if the model has a chat template.
    """

    def __init__(self, model: LlamaModel, *, raw: bool = False) -> None:
        self._model = model
        template = model.metadata().get("tokenizer.chat_template")
        self._open, self._closed = (_formatter(model, template, generate) for generate in (True, False))
        self._raw = raw or template is None

    def encode(self, trace: Trace) -> EncodedTrace:
        """Token ids of a trace and which of them count.

        Raises:
            TraceError: the template cannot render the trace, or nothing in it counts.
        """
        raw = self._raw and trace.messages is None
        pieces = [(trace.prompt or "", False), (trace.completion or "", True)] if raw else self._rendered(trace)
        tokens: list[int] = []
        targets: list[bool] = []
        for i, (text, counts) in enumerate(pieces):
            ids = self._tokenize(text, trace.where, raw, is_first=i == 0)
            tokens += ids
            ended = trace.ended or i < len(pieces) - 1
            targets += self._until_end(ids, ended) if counts else [False] * len(ids)
        if targets:
            targets[0] = False  # nothing comes before the first token to predict it from
        if not any(targets):
            raise TraceError(f"{trace.where}: no token of it counts in the loss; check its roles and completion")
        return EncodedTrace(trace.where, tokens, targets)

    def encode_prompt(self, where: str, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt alone, up to where the model is to answer.

        Raises:
            TraceError: the template cannot render it.
        """
        if isinstance(prompt, str) and self._raw:
            return self._tokenize(prompt, where, raw=True, is_first=True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self._open is None:
            raise _no_template(where)
        return self._tokenize(self._text(self._open, messages, where), where, raw=False, is_first=True)

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

    def _rendered(self, trace: Trace) -> list[tuple[str, bool]]:
        """The conversation's text, cut where assistant turns that count begin and end."""
        messages = list(trace.messages or _as_messages(trace))
        if self._open is None or self._closed is None:
            raise _no_template(trace.where)
        pieces: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if i < trace.n_given or message["role"] != "assistant":
                continue
            before, after = (
                self._text(self._open, messages[:i], trace.where),
                self._text(self._closed, messages[: i + 1], trace.where),
            )
            if not (before.startswith(done) and after.startswith(before)):
                raise TraceError(
                    f"{trace.where}: the chat template rewrites earlier turns, so turn {i + 1} cannot be told apart; "
                    "give one assistant turn a line"
                )
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        if pieces and not trace.ended:
            pieces[-1] = (_without_closing(pieces[-1][0], _last_answer(messages)), True)
        return pieces

    def _text(self, formatter: Jinja2ChatFormatter, messages: Sequence[Message], where: str) -> str:
        try:
            return str(formatter(messages=cast(Any, messages)).prompt)
        except Exception as error:  # a template may raise anything
            raise TraceError(f"{where}: the model's chat template refuses the messages: {error}") from None

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


def _no_template(where: str) -> TraceError:
    return TraceError(f"{where}: messages need a chat template and the model has none; use string pairs")


def _last_answer(messages: Sequence[Message]) -> str:
    return str(next(m["content"] for m in reversed(messages) if m["role"] == "assistant") or "")


def _without_closing(text: str, answer: str) -> str:
    """A rendered answer without what the template closes it with; whole if the template changed the answer itself."""
    for said in (answer, answer.strip()):  # templates strip
        if said and said in text:
            return text[: text.rindex(said) + len(said)]
    return text


def _as_messages(trace: Trace) -> list[Message]:
    return [{"role": "user", "content": trace.prompt}, {"role": "assistant", "content": trace.completion}]


def _formatter(model: LlamaModel, template: str | None, generate: bool) -> Jinja2ChatFormatter | None:
    if template is None:
        return None
    bos, eos = (model.token_get_text(token) if token >= 0 else "" for token in (model.token_bos(), model.token_eos()))
    return Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos, add_generation_prompt=generate)
