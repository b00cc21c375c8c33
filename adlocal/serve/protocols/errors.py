"""What went wrong, in each protocol's own form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ..events import ErrorType, Failed
from .fields import Route

#: Codes by which OpenAI's clients tell errors of one type apart; other types have none.
_CODES: Final[Mapping[ErrorType, str]] = {
    "exceed_context_size_error": "context_length_exceeded",
    "authentication_error": "invalid_api_key",
    "insufficient_quota": "insufficient_quota",
    "rate_limit_error": "rate_limit_exceeded",
}

#: Anthropic's words, which are fewer.
_ANTHROPIC: Final[Mapping[ErrorType, str]] = {
    "invalid_request_error": "invalid_request_error",
    "exceed_context_size_error": "invalid_request_error",
    "authentication_error": "authentication_error",
    "permission_error": "permission_error",
    "not_found_error": "not_found_error",
    "request_too_large": "request_too_large",
    "rate_limit_error": "rate_limit_error",
    "insufficient_quota": "billing_error",
    "server_error": "api_error",
    "unavailable_error": "overloaded_error",
    "timeout_error": "timeout_error",
}


def error_body(failed: Failed, route: Route) -> dict[str, Any]:
    """The body of the answer to a request that failed before anything was sent."""
    if route == "messages":
        return {"type": "error", "error": {"type": _ANTHROPIC[failed.type], "message": failed.message}}
    return {"error": openai_error(failed)}


def openai_error(failed: Failed) -> dict[str, Any]:
    """OpenAI's description of an error."""
    return {
        "message": failed.message,
        "type": failed.type,
        "param": failed.param,
        "code": _CODES.get(failed.type),
    }


def error_headers(failed: Failed) -> dict[str, str]:
    """Headers that tell clients when to try again.

    Official clients repeat 409, 429 and 5xx by themselves, so an answer that will stay the same says so.
    """
    headers = {}
    if failed.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(failed.retry_after)))
    if failed.type == "insufficient_quota":
        headers["x-should-retry"] = "false"
    return headers
