"""OpenAI's chat completions: what clients get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..asked import Asked
from ..events import Answer, Delta, Event, Failed, Finished, Logprob, Steering, ToolCall, Usage
from . import sse
from .common import openai_usage, reasoning_tokens, summary_text
from .errors import error_body
from .logprobs import with_rivals


class Chat:
    """Writes chat completions: `begin`, `event` for each, then `end` or `failed`; or `body` of all at once.

    Shown reasoning is `reasoning_content`, as in llama-server. Under the disclosure `summary` the message has a
    `reasoning_summary` of one sentence, and `usage.completion_tokens_details` the number of tokens.
    """

    def __init__(self, asked: Asked, identity: str, model: str, created: int) -> None:
        """Prepares the answer to a request.

        Args:
            asked: the request.
            identity: unique letters and digits.
            model: as it is named to clients.
            created: seconds since 1970.
        """
        self._asked, self._identity = asked, identity
        self._head = {"id": f"chatcmpl-{identity}", "created": created, "model": model}
        prefix = sse.dumps({**self._head, "object": "chat.completion.chunk"})[:-1]
        self._prefixes = [f'data: {prefix},"choices":[{{"index":{choice},"delta":' for choice in range(asked.n)]
        self._empty = [True] * asked.n
        self._reasoning: int | None = None

    def begin(self) -> bytes:
        """Each answer's role."""
        role = {"role": "assistant", "content": None, "refusal": None}
        return b"".join(self._chunk(choice, role) for choice in range(self._asked.n))

    def event(self, event: Event) -> bytes:
        """The bytes of one event; b"" where it shows nothing."""
        if isinstance(event, Finished):
            return self._finish(event)
        delta = self._delta(event)
        if not delta and not event.logprobs:
            return b""
        return self._chunk(event.choice, delta, event.logprobs, steering=event.steering)

    def end(self, usage: Usage) -> bytes:
        """What follows the last answer's end."""
        if not self._asked.include_usage:
            return sse.DONE
        told = openai_usage(usage, self._reasoning)
        return sse.data({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": told}) + sse.DONE

    def failed(self, failed: Failed) -> bytes:
        """The end of a stream that breaks off."""
        return sse.data(error_body(failed, "chat"))

    def body(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The answers at once."""
        choices = [
            {
                "index": choice,
                "message": self._message(choice, answer),
                "logprobs": {"content": [*map(with_rivals, answer.logprobs)], "refusal": None}
                if answer.logprobs
                else None,
                "finish_reason": answer.finished.reason if answer.finished else None,
            }
            for choice, answer in enumerate(answers)
        ]
        told = openai_usage(usage, reasoning_tokens(answers))
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": told}

    def _delta(self, event: Delta) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if event.reasoning:
            delta["reasoning_content"] = event.reasoning
        if event.text:
            delta["content"] = event.text
        if event.tool_calls:
            delta["tool_calls"] = [self._call(event.choice, call) for call in event.tool_calls]
        if event.text or event.tool_calls:
            self._empty[event.choice] = False
        return delta

    def _finish(self, finished: Finished) -> bytes:
        """The last chunk of an answer. A message without calls has content, and be it empty."""
        delta: dict[str, Any] = {"content": ""} if self._empty[finished.choice] else {}
        if summary := summary_text(finished.reasoning_tokens, finished.reasoning_seconds):
            delta["reasoning_summary"] = summary
            self._reasoning = (self._reasoning or 0) + (finished.reasoning_tokens or 0)
        return self._chunk(finished.choice, delta, reason=finished.reason)

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        logprobs: Sequence[Logprob] = (),
        reason: str | None = None,
        steering: Steering | None = None,
    ) -> bytes:
        told = sse.dumps({"content": [*map(with_rivals, logprobs)], "refusal": None}) if logprobs else "null"
        why = f'"{reason}"' if reason else "null"
        steered = f',"adlocal":{sse.dumps(vars(steering))}' if steering else ""
        rest = f'{sse.dumps(delta)},"logprobs":{told},"finish_reason":{why}{steered}}}]}}\n\n'
        return sse.to_bytes(self._prefixes[choice] + rest)

    def _call(self, choice: int, call: ToolCall) -> dict[str, Any]:
        """A call's part. The first has its name and number."""
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        return {"index": call.index, **self._whole(choice, call)}

    def _whole(self, choice: int, call: ToolCall) -> dict[str, Any]:
        return {
            "id": call.id or f"call_{self._identity}_{choice}_{call.index}",
            "type": "function",
            "function": {"name": call.name or "", "arguments": call.arguments},
        }

    def _message(self, choice: int, answer: Answer) -> dict[str, Any]:
        content = answer.text if answer.text or not answer.tool_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message["tool_calls"] = [self._whole(choice, call) for call in answer.tool_calls]
        finished = answer.finished
        if finished and (summary := summary_text(finished.reasoning_tokens, finished.reasoning_seconds)):
            message["reasoning_summary"] = summary
        return message
