"""A client of an application in this process, which records all that is sent to it: every byte and header."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Recorded:
    """All that went out for one request."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """In one piece."""
        return b"".join(self.sent)

    @property
    def all(self) -> bytes:
        """Headers, too."""
        return b"\n".join(name + b": " + value for name, value in self.headers) + b"\n\n" + self.body

    @property
    def json(self) -> Any:
        """Of a body that is JSON."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of each event of a stream; "[DONE]" as it is."""
        found = re.findall(rb"^data: (.*)$", self.body, re.M)
        return [each.decode() if each == b"[DONE]" else json.loads(each) for each in found]


async def post(app: Any, path: str, body: Any, *, leave_after: int | None = None, **headers: str) -> Recorded:
    """Asks an application, and records what it sends.

    Args:
        body: JSON, or bytes as they are; None for one that does not come.
        leave_after: the client hangs up when so many messages have been sent to it; never for None.
        headers: with underscores for dashes.
    """
    own = {"host": "localhost:8080", "content-type": "application/json", **headers}
    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in own.items()]
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
    }
    scope |= {"scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": encoded}
    scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8080)}
    recorded, left = Recorded(), asyncio.Event()
    raw = [] if body is None else [body if isinstance(body, bytes) else json.dumps(body).encode()]
    n_sent = 0
    if leave_after == 0:
        left.set()

    async def receive() -> dict[str, Any]:
        if raw:
            return {"type": "http.request", "body": raw.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal n_sent
        n_sent += 1
        if message["type"] == "http.response.start":
            recorded.status, recorded.headers = message["status"], message["headers"]
        else:
            recorded.sent.append(message.get("body", b""))
        if n_sent == leave_after:
            left.set()
        await asyncio.sleep(0)

    async with asyncio.timeout(30):
        await app(scope, receive, send)
    return recorded
