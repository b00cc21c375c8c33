"""Server-sent events: the bytes between the gateway and a client that streams."""

from __future__ import annotations

import json
from typing import Any

CONTENT_TYPE = "text/event-stream"
#: A comment, which parsers skip: it keeps a silent connection open.
PING = b": ping\n\n"
#: What ends OpenAI's older streams, and only those that came to their end.
DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dumps(value: Any) -> str:
    """JSON without spaces, in one line.

    Raises:
        ValueError: a number in it is not finite.
    """
    return _encode(value)


def to_bytes(text: str) -> bytes:
    """UTF-8. Half a surrogate pair, which has no UTF-8, becomes a question mark."""
    return text.encode("utf-8", "replace")


def data(value: Any) -> bytes:
    """An event without a name."""
    return to_bytes(f"data: {_encode(value)}\n\n")


def named(name: str, value: Any) -> bytes:
    """An event with a name."""
    return to_bytes(f"event: {name}\ndata: {_encode(value)}\n\n")
