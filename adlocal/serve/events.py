"""What becomes of a request, in no protocol's own words: what routes render in theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability after adjustment, and its rivals'.

    Attributes:
        token: its text.
        bytes: of its text, which alone may be no UTF-8.
        logprob: nats.
        top: the likeliest candidates, without `top` of their own.
    """

    token: str
    bytes: bytes
    logprob: float
    top: Sequence[Logprob] = ()


@dataclass(frozen=True)
class ToolCall:
    """A part of a call: `id` and `name` come with the first part of their `index`; `arguments` is JSON in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Steering:
    """What was steered since the last part of an answer; for the operator.

    Attributes:
        rows, choices: that were sampled from, and of these, those where more than one token passed the guard.
        kl: KL to the teacher, nats, summed over rows.
        dose: nats; it is known of a token when the next one is decoded, so it comes one part later.
    """

    rows: int
    choices: int
    kl: float
    dose: float


@dataclass(frozen=True)
class Delta:
    """More of the answer `choice`, as far as it may be shown."""

    choice: int
    text: str = ""
    reasoning: str = ""
    tool_calls: Sequence[ToolCall] = ()
    logprobs: Sequence[Logprob] = ()
    steering: Steering | None = None


@dataclass(frozen=True)
class Finished:
    """The answer `choice` has ended.

    Attributes:
        stop: the client's text that ended it, if one did.
        reasoning_tokens, reasoning_seconds: of what was hidden under the disclosure `summary`; None otherwise.
    """

    choice: int
    reason: FinishReason
    stop: str | None = None
    reasoning_tokens: int | None = None
    reasoning_seconds: float | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens, over all answers of a request. A prompt counts once, however many answers it has."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


#: OpenAI's and llama-server's words for what went wrong, which Anthropic's routes translate.
ErrorType = Literal[
    "invalid_request_error",
    "exceed_context_size_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "insufficient_quota",
    "server_error",
    "unavailable_error",
    "timeout_error",
]


@dataclass(eq=False)  # not frozen: Python writes the traceback into it
class Failed(Exception):
    """A request cannot be answered, or not to its end.

    Attributes:
        status: of HTTP, where nothing has been sent yet.
        type: what kind of error.
        message: for the client: what was wrong, what was expected, the remedy.
        param: the field of the request's body that is at fault.
        retry_after: seconds after which the same request may succeed.
    """

    status: int
    type: ErrorType
    message: str
    param: str | None = None
    retry_after: float | None = None


Event = Delta | Finished


@dataclass
class Answer:
    """A whole answer, from its events."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finished: Finished | None = None
