"""Whether a request is answered, and with what: policy, limits, and the form in which the engine reads it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..settings import Settings
from .asked import Asked
from .disclosure import scrub
from .events import Failed
from .limits import Limits, Reservation, Subject
from .model import Model
from .neutral import neutralize_json, neutralize_value
from .policy import Caller, Decision
from .single import CHARACTERS, Single
from .watch import Level, Ramp

#: Tokens of an answer that are reserved where nobody bounds it.
_UNBOUNDED = 1024


@dataclass
class Request:
    """A request that was admitted.

    Attributes:
        id: for the client and the log.
        caller, asked, decision: who asks what, and what policy says.
        settings: in force; the decision's, or more where the watch raised them.
        level: of the watch.
        user: for whom the caller asks.
        steering: tell what was steered.
        reservation: of limits.
        singles: its answers, once they have begun.
        began: monotonic seconds.
    """

    id: str
    caller: Caller
    asked: Asked
    decision: Decision
    settings: Settings
    level: Level
    user: str | None
    steering: bool
    reservation: Reservation
    singles: list[Single] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)


def permit(asked: Asked, decision: Decision) -> None:
    """Refuses what policy does not allow.

    Raises:
        Failed: 400, and which field it was.
    """
    for wanted, allowed, param, what in (
        (asked.top_logprobs is not None, decision.logprobs, "logprobs", "log-probabilities are"),
        (bool(asked.logit_bias), decision.logit_bias, "logit_bias", "biases are"),
        (bool(asked.grammar), decision.grammar, "grammar", "grammars are"),
        (bool(asked.tools), decision.tools, "tools", "tools are"),
        (asked.prefill, decision.prefill, "messages", "going on with an assistant's message is"),
        (asked.kind == "completion", decision.raw, "prompt", "raw prompts are"),
    ):
        if wanted and not allowed:
            raise Failed(
                400, "invalid_request_error", f"{what} not allowed by this server's policy; leave it out", param
            )
    if asked.top_logprobs is not None and asked.tools:
        raise Failed(
            400, "invalid_request_error", "log-probabilities are not told with tools; leave one out", "logprobs"
        )


def bounded(asked: Asked, most: int) -> None:
    """Refuses more answers than slots and queue can hold, which no trying again would bring.

    Raises:
        Failed: 400.
    """
    n = asked.n * max(1, len(asked.prompts))
    if n > most:
        raise Failed(400, "invalid_request_error", f"n: {n} answers in all; at most {most} are given at once", "n")


def cleaned(asked: Asked, model: Model, decision: Decision) -> Asked:
    """The same request without what would reach into the template: control tokens, and reasoning that is hidden.

    Raises:
        Failed: 400, a raw prompt has what the engine cannot read.
    """
    try:
        return _cleaned(asked, model, decision)
    except RecursionError:
        raise Failed(400, "invalid_request_error", "messages or tools have too many levels") from None


def _cleaned(asked: Asked, model: Model, decision: Decision) -> Asked:
    if asked.kind != "chat":
        model.check_text((each for each in asked.prompts if isinstance(each, str)), "prompt")
        model.check_tokens((token for each in asked.prompts if not isinstance(each, str) for token in each), "prompt")
        return asked
    messages = list(asked.messages)
    if decision.disclosure != "show":
        messages = scrub(messages, model.tags)
    return replace(
        asked,
        messages=[_message(each, model.control) for each in messages],
        tools=neutralize_value(list(asked.tools), model.control),
        reasoning=False if asked.reasoning is None and has_form(asked) else asked.reasoning,
    )


def has_form(asked: Asked) -> bool:
    """Whether a schema or a grammar says what the whole answer is: the engine's holds from the first token on."""
    return asked.schema is not None or bool(asked.grammar)


def starts_hidden(asked: Asked, decision: Decision, opened: bool) -> bool:
    """Whether what the model writes first is reasoning.

    Args:
        opened: whether the prompt ends inside reasoning.

    Raises:
        Failed: 400, it would be, and the engine would let nothing but the answer's form be written there.
    """
    if not opened or not has_form(asked):
        return opened
    if decision.disclosure != "show":
        message = "this model reasons first here, so that no form can be given; ask for no reasoning, or for free text"
        raise Failed(400, "invalid_request_error", message, "response_format" if asked.schema else "grammar")
    return False


def _message(message: Mapping[str, Any], control: frozenset[str]) -> dict[str, Any]:
    found = {name: neutralize_value(value, control) for name, value in message.items() if name != "tool_calls"}
    if message.get("tool_calls"):
        found["tool_calls"] = [_call(call, control) for call in message["tool_calls"]]
    return found


def _call(call: Mapping[str, Any], control: frozenset[str]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        function["arguments"] = neutralize_json(function["arguments"], control)
    function["name"] = neutralize_value(function.get("name", ""), control)
    return {**neutralize_value({k: v for k, v in call.items() if k != "function"}, control), "function": function}


def raised(decision: Decision, level: Level) -> Settings:
    """Strength and guard, with what the watch adds. A caller who sees log-probabilities keeps one strength for ever."""
    if decision.fixed or not decision.settings.protects:
        return decision.settings
    strength = Ramp.strength(decision.settings.strength, decision.max_strength, level.position)
    return decision.settings.but(strength=strength)


def thinks(asked: Asked, decision: Decision) -> bool:
    """Whether the model may reason before it answers."""
    return (
        asked.kind == "completion"
        or {"on": True, "off": False, "client": asked.reasoning}[decision.reasoning] is not False
    )


def subjects(caller: Caller, decision: Decision) -> tuple[Subject, ...]:
    """Whom a request is charged to."""
    of_key = Limits(
        requests_per_minute=decision.requests_per_minute,
        tokens_per_minute=decision.tokens_per_minute,
        tokens_per_day=decision.tokens_per_day,
        budget_tokens=caller.budget_tokens,
        max_parallel=decision.parallel,
    )
    if not caller.key:
        return (Subject("all", of_key),)
    of_owner = Limits(
        requests_per_minute=decision.owner_requests_per_minute,
        tokens_per_minute=decision.owner_tokens_per_minute,
        tokens_per_day=decision.owner_tokens_per_day,
    )
    return Subject(f"key:{caller.key}", of_key), Subject(f"owner:{caller.owner}", of_owner)


def tokens_at_most(prompts: Sequence[str], n: int, limit: int | None) -> int:
    """What is reserved: prompts as reckoned, and answers as long as they may be."""
    per_prompt = sum(len(prompt) // CHARACTERS + 1 for prompt in prompts)
    return n * per_prompt + n * len(prompts) * (limit or _UNBOUNDED)


def user_texts(asked: Asked) -> list[str]:
    """What the watch reads, and forgets: each prompt, or what the user said last."""
    if asked.kind == "completion":
        return [each if isinstance(each, str) else "" for each in asked.prompts]
    for message in reversed(asked.messages):
        if message.get("role") == "user":
            content = message.get("content")
            return [content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())]
    return [""]
