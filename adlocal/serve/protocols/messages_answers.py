"""Anthropic's messages: what clients get."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..asked import Asked
from ..events import Answer, Event, Failed, Finished, ToolCall, Usage
from . import sse
from .common import reasoning_tokens, summary_text
from .errors import error_body


class Messages:
    """Writes a message: `begin`, `event` for each, then `end` or `failed`; or `body` of it at once.

    Each block has an index of its own and is closed before the next one opens. Shown reasoning is a thinking block;
    under the disclosure `summary` a thinking block of one sentence comes last, when the count is known. Signatures
    are empty: reasoning that comes back is not read, so there is nothing to sign.
    """

    def __init__(self, asked: Asked, identity: str, model: str, created: int) -> None:
        """Prepares the answer to a request.

        Args:
            asked: the request.
            identity: unique letters and digits.
            model: as it is named to clients.
            created: seconds since 1970, which this protocol does not tell.
        """
        self._identity = identity
        self._head = {"id": f"msg_{identity}", "type": "message", "role": "assistant", "model": model}
        self._index, self._open = -1, ""
        self._calls: dict[int, int] = {}
        self._finished: Finished | None = None

    def begin(self) -> bytes:
        """The start of the message."""
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        return sse.named("message_start", {"type": "message_start", "message": message})

    def event(self, event: Event) -> bytes:
        """The bytes of one event; b"" where it shows nothing."""
        if isinstance(event, Finished):
            self._finished = event
            return self._summary(event)
        written = b""
        if event.reasoning:
            written += self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            written += self._delta(self._index, {"type": "thinking_delta", "thinking": event.reasoning})
        if event.text:
            written += self._enter("text", {"type": "text", "text": ""})
            written += self._delta(self._index, {"type": "text_delta", "text": event.text})
        for call in event.tool_calls:
            written += self._call(call)
        return written

    def end(self, usage: Usage) -> bytes:
        """What follows the last event."""
        count = self._finished.reasoning_tokens if self._finished else None
        delta = {
            "type": "message_delta",
            "delta": _stop(self._finished, bool(self._calls)),
            "usage": _usage(usage, count),
        }
        return self._close() + sse.named("message_delta", delta) + sse.named("message_stop", {"type": "message_stop"})

    def failed(self, failed: Failed) -> bytes:
        """The end of a stream that breaks off."""
        return sse.named("error", error_body(failed, "messages"))

    def body(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The message at once."""
        (answer,) = answers
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if answer.text:
            content.append({"type": "text", "text": answer.text})
        content += [self._use(call, _object(call.arguments)) for call in answer.tool_calls]
        finished = answer.finished
        if finished and (summary := summary_text(finished.reasoning_tokens, finished.reasoning_seconds)):
            content.append({"type": "thinking", "thinking": summary, "signature": ""})
        stop = _stop(finished, bool(answer.tool_calls))
        return {**self._head, "content": content, **stop, "usage": _usage(usage, reasoning_tokens(answers))}

    def _enter(self, kind: str, block: dict[str, Any]) -> bytes:
        """Opens a block, unless one of its kind is open."""
        if self._open == kind:
            return b""
        written = self._close()
        self._index, self._open = self._index + 1, kind
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return written + sse.named("content_block_start", start)

    def _close(self) -> bytes:
        if not self._open:
            return b""
        self._open = ""
        return sse.named("content_block_stop", {"type": "content_block_stop", "index": self._index})

    def _delta(self, index: int, delta: dict[str, Any]) -> bytes:
        return sse.named("content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta})

    def _call(self, call: ToolCall) -> bytes:
        """A part of a call, which may follow the end of its block if another one has begun: clients go by the index."""
        written = b""
        if call.index not in self._calls:
            written = self._enter(f"call {call.index}", self._use(call, {}))
            self._calls[call.index] = self._index
        if not call.arguments:
            return written
        part = {"type": "input_json_delta", "partial_json": call.arguments}
        return written + self._delta(self._calls[call.index], part)

    def _use(self, call: ToolCall, arguments: Any) -> dict[str, Any]:
        identity = call.id or f"toolu_{self._identity}_{call.index}"
        return {"type": "tool_use", "id": identity, "name": call.name or "", "input": arguments}

    def _summary(self, finished: Finished) -> bytes:
        summary = summary_text(finished.reasoning_tokens, finished.reasoning_seconds)
        if not summary:
            return b""
        written = self._enter("summary", {"type": "thinking", "thinking": "", "signature": ""})
        return written + self._delta(self._index, {"type": "thinking_delta", "thinking": summary})


def _stop(finished: Finished | None, called: bool) -> dict[str, Any]:
    if finished is None:
        return {"stop_reason": None, "stop_sequence": None}
    if finished.reason == "length":
        reason = "max_tokens"
    elif finished.reason == "tool_calls" or called:
        reason = "tool_use"
    else:
        reason = "end_turn" if finished.stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": finished.stop if reason == "stop_sequence" else None}


def _usage(usage: Usage, thinking_tokens: int | None) -> dict[str, Any]:
    told: dict[str, Any] = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
    if thinking_tokens is not None:
        told["output_tokens_details"] = {"thinking_tokens": thinking_tokens}
    return told


def _object(arguments: str) -> Any:
    """A call's arguments; none where they were cut off, which `stop_reason` tells."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
