"""What the extraction watch is told of a request."""

from __future__ import annotations

import time

from . import admission, upstream
from .admission import Request
from .asked import Asked
from .model import Model
from .policy import Caller, Decision
from .watch import Observation, Outcome

#: What it calls those who need no key.
ANYONE = "anyone"


def observations(caller: Caller, asked: Asked, decision: Decision, user: str | None, model: Model) -> list[Observation]:
    """One for each prompt."""
    may_reason = model.tags is not None or asked.reasoning is True
    return [
        Observation(
            time=time.time(),
            key=caller.key or ANYONE,
            owner=caller.owner or ANYONE,
            user=user,
            kind=asked.kind,
            reasoning=may_reason and asked.kind == "chat" and admission.thinks(asked, decision),
            temperature=upstream.temperature(asked, decision),
            prompt=text,
            declared=caller.declared,
        )
        for text in admission.user_texts(asked)
    ]


def outcome(request: Request) -> Outcome:
    """Of all its answers."""
    applied = [single.applied for single in request.singles]
    return Outcome(
        time.time(),
        request.caller.key or ANYONE,
        request.caller.owner or ANYONE,
        request.user,
        completion_tokens=sum(each.n_tokens for each in applied),
        n_rows=sum(each.counters.n_rows for each in applied),
        n_choices=sum(each.counters.n_choices for each in applied),
        dose=sum(each.counters.dose for each in applied),
        prompt_tokens=sum(each.n_prompt for each in applied),
    )
