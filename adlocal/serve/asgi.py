"""What clients can do to a connection: send too much or too slowly, read too slowly, and leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .events import Failed


class Gone(Exception):
    """The client has left, or reads nothing."""


async def read_body(request: Request, n_bytes: int, seconds: float) -> bytes:
    """All that a client sends.

    Args:
        n_bytes: at most.
        seconds: in which it must have come.

    Raises:
        Failed: it is too large, too slow, or the client has left.
    """
    declared = request.headers.get("content-length", "0")
    too_large = Failed(413, "request_too_large", f"the body is larger than {n_bytes} bytes")
    if declared.isdecimal() and int(declared) > n_bytes:
        raise too_large
    parts, length = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                length += len(part)
                if length > n_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Failed(408, "timeout_error", f"the body did not come within {seconds:g} s") from None
    except ClientDisconnect:
        raise Failed(400, "invalid_request_error", "the body ended before its end") from None  # nobody reads it
    return b"".join(parts)


class Work(Response):
    """A response that is made while it is sent. The work is cancelled when the client leaves.

    Args:
        work: is given a `Sender`, and sends the whole response through it.
        stall_seconds: how long the client may leave what is sent unread.
    """

    def __init__(self, work: Callable[[Sender], Coroutine[Any, Any, None]], stall_seconds: float) -> None:
        super().__init__()
        self._work, self._stall_seconds = work, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(Sender(send, self._stall_seconds)))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            found = await asyncio.gather(work, gone, return_exceptions=True)
        for error in found:
            if isinstance(error, Exception) and not isinstance(error, Gone):
                raise error


class Sender:
    """Sends a response: in one piece, or bit by bit.

    Attributes:
        started: whether its status has been sent.
    """

    def __init__(self, send: Send, stall_seconds: float) -> None:
        self._send_message, self._stall_seconds = send, stall_seconds
        self._sent = time.monotonic()
        self.started = False

    async def whole(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """A JSON response."""
        own = {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(status, {**own, **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self, headers: Mapping[str, str]) -> None:
        """Server-sent events, which `part` sends."""
        await self._start(
            200,
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # nginx would hold parts back
                **headers,
            },
        )

    async def part(self, data: bytes) -> None:
        """More of a stream."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Ends a stream."""
        await self._send({"type": "http.response.body", "body": b""})

    @asynccontextmanager
    async def kept_alive(
        self, seconds: float, begin: Callable[[], Awaitable[None]], ping: bytes
    ) -> AsyncIterator[None]:
        """Sends `ping` whenever nothing was sent for so long; `begin` first, where nothing was sent at all."""

        async def keep() -> None:
            while True:
                await asyncio.sleep(max(0.01, self._sent + seconds - time.monotonic()))
                if time.monotonic() - self._sent >= seconds:
                    if not self.started:
                        await begin()
                    await self.part(ping)

        keeper = asyncio.create_task(keep())
        try:
            yield
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        encoded = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._stall_seconds):
                await self._send_message(message)
                self._sent = time.monotonic()
        except (TimeoutError, OSError):
            raise Gone from None


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
