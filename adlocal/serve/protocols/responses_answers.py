"""OpenAI's responses: what clients get."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from ..asked import Asked
from ..events import Answer, Delta, Event, Failed, Finished, Logprob, ToolCall, Usage
from . import sse
from .common import summary_text
from .errors import openai_error
from .logprobs import with_rivals
from .responses_items import (
    Item,
    Status,
    call_item,
    ended,
    is_cut,
    item_id,
    message_item,
    reasoning_item,
    response_body,
    summary_item,
    text_part,
    whole_body,
)

Kind = Literal["message", "reasoning", "call"]


class _Open:
    """The item that is being written.

    Attributes:
        kind: what it is.
        index: its place in the output.
        identity: its number.
        pieces: of its text, or of a call's arguments.
        logprobs: of a message's tokens.
        call: the first part of a call.
    """

    def __init__(self, kind: Kind, index: int, identity: str, call: ToolCall | None) -> None:
        self.kind, self.index, self.identity, self.call = kind, index, identity, call
        self.pieces: list[str] = []
        self.logprobs: list[Logprob] = []

    def item(self, status: Status) -> Item:
        """As it is now."""
        text = "".join(self.pieces)
        if self.kind == "message":
            return message_item(self.identity, text, self.logprobs, status)
        if self.call is None:
            return reasoning_item(self.identity, text, status)
        call = ToolCall(self.call.index, self.call.id, self.call.name, text)
        return call_item(self.identity, call, status)


class Responses:
    """Writes a response: `begin`, `event` for each, then `end` or `failed`; or `body` of it at once.

    Each item is closed before the next one opens. Under the disclosure `summary` a reasoning item with one sentence
    of summary comes last, when the count is known.
    """

    def __init__(self, asked: Asked, identity: str, model: str, created: int) -> None:
        """Prepares the answer to a request.

        Args:
            asked: the request.
            identity: unique letters and digits.
            model: as it is named to clients.
            created: seconds since 1970.
        """
        self._identity = identity
        self._response = response_body(asked, identity, model, created)
        self._number = 0
        self._output: list[Item] = []
        self._open: _Open | None = None
        self._waiting: list[Logprob] = []
        self._finished: Finished | None = None

    def begin(self) -> bytes:
        """The response before anything of it is there."""
        return self._write("response.created", response=self._response) + self._write(
            "response.in_progress", response=self._response
        )

    def event(self, event: Event) -> bytes:
        """The bytes of one event; b"" where it shows nothing."""
        if isinstance(event, Finished):
            self._finished = event
            return self._close("incomplete" if is_cut(event) else "completed") + self._summary(event)
        written = b""
        if event.reasoning:
            written += self._enter("reasoning")
            written += self._piece("response.reasoning_text.delta", event.reasoning, content_index=0)
        written += self._text(event)
        for call in event.tool_calls:
            written += self._call(call)
        return written

    def end(self, usage: Usage) -> bytes:
        """What follows the last event."""
        cut = is_cut(self._finished)
        n_reasoning = self._finished.reasoning_tokens if self._finished else None
        response = ended(self._response, self._output, cut, usage, n_reasoning, int(time.time()))
        return self._write("response.incomplete" if cut else "response.completed", response=response)

    def failed(self, failed: Failed) -> bytes:
        """The end of a stream that breaks off: the error, which official clients raise, and the response as it is."""
        told = openai_error(failed)
        output = [*self._output, *([self._open.item("incomplete")] if self._open else [])]
        error = {"code": told["code"] or "server_error", "message": failed.message}
        response = {**self._response, "status": "failed", "error": error, "output": output}
        flat = {"code": told["code"], "message": failed.message, "param": failed.param}
        return self._write("error", error=told, **flat) + self._write("response.failed", response=response)

    def body(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The response at once."""
        (answer,) = answers
        return whole_body(self._response, answer, usage, self._identity, int(time.time()))

    def _write(self, name: str, /, **fields: Any) -> bytes:
        written = sse.named(name, {"type": name, "sequence_number": self._number, **fields})
        self._number += 1
        return written

    def _text(self, event: Delta) -> bytes:
        """Text with the log-probabilities of its tokens, and of those before it that had no text of their own."""
        self._waiting += event.logprobs
        if not event.text:
            return b""
        written = self._enter("message")
        logprobs, self._waiting = self._waiting, []
        if self._open:
            self._open.logprobs += logprobs
        told = [*map(with_rivals, logprobs)]
        return written + self._piece("response.output_text.delta", event.text, content_index=0, logprobs=told)

    def _call(self, call: ToolCall) -> bytes:
        """A part of a call. The parts of one call follow one another."""
        written = b""
        if self._open is None or self._open.call is None or self._open.call.index != call.index:
            written = self._enter("call", call)
        if call.arguments:
            written += self._piece("response.function_call_arguments.delta", call.arguments)
        return written

    def _piece(self, name: str, piece: str, **fields: Any) -> bytes:
        if self._open is None:
            return b""
        self._open.pieces.append(piece)
        return self._write(name, item_id=self._open.identity, output_index=self._open.index, delta=piece, **fields)

    def _enter(self, kind: Kind, call: ToolCall | None = None) -> bytes:
        """Opens an item, unless one of its kind is open."""
        if self._open and self._open.kind == kind and call is None:
            return b""
        written = self._close("completed")
        index = len(self._output)
        identity = item_id(kind, self._identity, index)
        first = None if call is None else ToolCall(call.index, call.id, call.name)
        self._open = _Open(kind, index, identity, first)
        item = self._open.item("in_progress")
        written += self._write("response.output_item.added", output_index=index, item=item)
        if kind == "call":
            return written
        return written + self._write("response.content_part.added", **self._place(), part=self._part())

    def _place(self) -> dict[str, Any]:
        if self._open is None:
            return {}
        return {"item_id": self._open.identity, "output_index": self._open.index, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        """The text of the open item, as a part of it."""
        if self._open is None:
            return {}
        text = "".join(self._open.pieces)
        if self._open.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return text_part(text, self._open.logprobs)

    def _close(self, status: Status) -> bytes:
        """Ends the open item."""
        if self._open is None:
            return b""
        item = self._open.item(status)
        written = self._done(self._open, item)
        written += self._write("response.output_item.done", output_index=self._open.index, item=item)
        self._output.append(item)
        self._open = None
        return written

    def _done(self, ending: _Open, item: Item) -> bytes:
        text = "".join(ending.pieces)
        if ending.kind == "call":
            place = {"item_id": ending.identity, "output_index": ending.index}
            return self._write("response.function_call_arguments.done", **place, name=item["name"], arguments=text)
        part = self._part()
        if ending.kind == "message":
            name, fields = "response.output_text.done", {"text": text, "logprobs": part["logprobs"]}
        else:
            name, fields = "response.reasoning_text.done", {"text": text}
        return self._write(name, **self._place(), **fields) + self._write(
            "response.content_part.done", **self._place(), part=part
        )

    def _summary(self, finished: Finished) -> bytes:
        """A whole reasoning item, of one sentence."""
        text = summary_text(finished.reasoning_tokens, finished.reasoning_seconds)
        if not text:
            return b""
        index = len(self._output)
        identity = item_id("summary", self._identity, index)
        item, part = summary_item(identity, text, "completed"), {"type": "summary_text", "text": text}
        place = {"item_id": identity, "output_index": index, "summary_index": 0}
        self._output.append(item)
        begun = summary_item(identity, text, "in_progress")
        return b"".join(
            (
                self._write("response.output_item.added", output_index=index, item=begun),
                self._write("response.reasoning_summary_part.added", **place, part=part | {"text": ""}),
                self._write("response.reasoning_summary_text.delta", **place, delta=text),
                self._write("response.reasoning_summary_text.done", **place, text=text),
                self._write("response.reasoning_summary_part.done", **place, part=part),
                self._write("response.output_item.done", output_index=index, item=item),
            )
        )
