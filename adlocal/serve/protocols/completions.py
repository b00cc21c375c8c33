"""OpenAI's completions of prompts as they are: what clients send, and what they get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from ..asked import Asked
from ..events import Answer, Event, Failed, Finished, Logprob, Usage
from . import limits, sse
from .common import bad, openai_usage, read, reasoning_tokens
from .errors import error_body
from .fields import Unknown
from .logprobs import bounded
from .samplers import Sampled, sampled_fields, schema_of

Tokens = Annotated[list[limits.Token], Field(min_length=1)]


class CompletionRequest(Sampled):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=limits.PROMPTS_MAX)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=limits.PROMPTS_MAX)]
    )
    logprobs: Annotated[int, Field(ge=0, le=limits.LOGPROBS_MAX)] | None = None
    echo: bool | None = None


def asked_of(body: Mapping[str, Any], unknown: Unknown = "ignore") -> Asked:
    """What a client asks for by a body; arguments and errors as for `common.read`."""
    request = read(CompletionRequest, body, "completions", unknown)
    prompts = _prompts(request.prompt)
    top_logprobs = request.logprobs if request.logprobs is not None else request.n_probs or None
    if request.echo and top_logprobs is not None:
        raise bad("echo", "true: a prompt's log-probabilities are not told; leave out echo or logprobs")
    if request.echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise bad("echo", "true: only prompts that are text can be repeated")
    return Asked(
        kind="completion",
        prompts=prompts,
        schema=schema_of(request, None, "json_schema"),
        top_logprobs=top_logprobs,
        echo=bool(request.echo),
        **sampled_fields(request) | {"user": request.user},
    )


def _prompts(prompt: str | Sequence[Any]) -> Sequence[str | Sequence[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


class Completions:
    """Writes text completions: `begin`, `event` for each, then `end` or `failed`; or `body` of all at once."""

    def __init__(self, asked: Asked, identity: str, model: str, created: int) -> None:
        """Prepares the answer to a request.

        Args:
            asked: the request; answers of one prompt follow one another.
            identity: unique letters and digits.
            model: as it is named to clients.
            created: seconds since 1970.
        """
        self._asked = asked
        self._head = {"id": f"cmpl-{identity}", "object": "text_completion", "created": created, "model": model}
        self._prefix = sse.dumps(self._head)[:-1]
        self._offsets = [len(prompt) for prompt in self._echoes()]
        self._reasoning: int | None = None

    def begin(self) -> bytes:
        """The prompts, where they are to be repeated."""
        return b"".join(
            self._chunk(choice, prompt, None, None) for choice, prompt in enumerate(self._echoes()) if prompt
        )

    def event(self, event: Event) -> bytes:
        """The bytes of one event; b"" where it shows nothing here."""
        if isinstance(event, Finished):
            if event.reasoning_tokens is not None:
                self._reasoning = (self._reasoning or 0) + event.reasoning_tokens
            return self._chunk(event.choice, "", None, _reason(event))
        if not event.text and not event.logprobs:
            return b""
        logprobs = _logprobs(event.logprobs, self._offsets[event.choice])
        self._offsets[event.choice] += sum(len(each.token) for each in event.logprobs)
        return self._chunk(event.choice, event.text, logprobs, None)

    def end(self, usage: Usage) -> bytes:
        """What follows the last answer's end."""
        if not self._asked.include_usage:
            return sse.DONE
        return sse.data({**self._head, "choices": [], "usage": openai_usage(usage, self._reasoning)}) + sse.DONE

    def failed(self, failed: Failed) -> bytes:
        """The end of a stream that breaks off."""
        return sse.data(error_body(failed, "completions"))

    def body(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The answers at once."""
        choices = [
            {
                "text": prompt + answer.text,
                "index": choice,
                "logprobs": _logprobs(answer.logprobs, len(prompt)),
                "finish_reason": _reason(answer.finished),
            }
            for choice, (prompt, answer) in enumerate(zip(self._echoes(), answers, strict=True))
        ]
        return {**self._head, "choices": choices, "usage": openai_usage(usage, reasoning_tokens(answers))}

    def _echoes(self) -> list[str]:
        """What each answer begins with."""
        prompts = [str(prompt) if self._asked.echo else "" for prompt in self._asked.prompts]
        return [prompt for prompt in prompts for _ in range(self._asked.n)]

    def _chunk(self, choice: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> bytes:
        shown = {"text": text, "index": choice, "logprobs": logprobs, "finish_reason": reason}
        return sse.to_bytes(f'data: {self._prefix},"choices":[{sse.dumps(shown)}]}}\n\n')


def _logprobs(logprobs: Sequence[Logprob], offset: int) -> dict[str, Any] | None:
    """OpenAI's older form. Offsets count characters from the beginning of the answer."""
    if not logprobs:
        return None
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.token)
    return {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [bounded(each.logprob) for each in logprobs],
        "top_logprobs": [{rival.token: bounded(rival.logprob) for rival in each.top} for each in logprobs],
        "text_offset": offsets,
    }


def _reason(finished: Finished | None) -> str | None:
    return None if finished is None else "length" if finished.reason == "length" else "stop"
