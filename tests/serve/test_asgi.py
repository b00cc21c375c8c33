"""What clients can do to a connection."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from adlocal.serve.asgi import read_body
from adlocal.serve.events import Failed


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault() -> None:
    """Once it was, and each such client wrote a traceback into the log."""
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    with pytest.raises(Failed) as caught:
        asyncio.run(read_body(request, 100, 5.0))
    assert caught.value.status == 400
