"""What the log says of a request for text."""

from __future__ import annotations

import time
from typing import Any

from .admission import Request
from .events import Failed
from .protocols import Route
from .single import Applied


def record(request: Request, route: Route, status: int, failed: Failed | None, text: bool) -> dict[str, Any]:
    """Who asked, what was applied, and what it took.

    Args:
        text: tell prompts, answers and the words of errors as well.
    """
    caller, level = request.caller, request.level
    found: dict[str, Any] = {
        "request": request.id,
        "route": route,
        "status": status,
        "key": caller.key,
        "owner": caller.owner,
        "tier": caller.tier,
        "user": request.user,
        "strength": request.settings.strength,
        "guard": request.settings.guard,
        "disclosure": request.decision.disclosure,
        "watch": {
            "score": round(level.score, 4),
            "position": round(level.position, 4),
            "signals": list(level.signals),
            "subject": level.subject,
        },
        "seconds": round(time.monotonic() - request.began, 4),
        "answers": [_answer(single.applied) for single in request.singles],
    }
    if failed is not None:
        found["error"] = {"type": failed.type, "message": failed.message if text else ""}
    if text:
        found["messages"] = list(request.asked.messages) or list(request.asked.prompts)
        found["texts"] = [single.text for single in request.singles]
    return found


def _answer(applied: Applied) -> dict[str, Any]:
    counters, in_force = applied.counters, applied.in_force
    return {
        "slot": applied.slot,
        "strength": in_force and in_force.strength,
        "guard": in_force and in_force.guard,
        "prompt_tokens": applied.n_prompt,
        "tokens": applied.n_tokens,
        "hidden_tokens": applied.n_hidden,
        "rows": counters.n_rows,
        "choices": counters.n_choices,
        "evaluated": counters.n_evaluated,
        "closed": counters.n_closed,
        "kl": round(counters.kl, 6),
        "dose": round(counters.dose, 6),
        "finish_reason": applied.reason,
        "queued": round(applied.queued, 4),
        "seconds": round(applied.seconds, 4),
    }
