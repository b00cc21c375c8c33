"""An answer on its way to one client: in its protocol's form, at once or in parts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any

from .admission import Request
from .asgi import Gone, Sender
from .events import Answer, Failed
from .gateway import Gateway
from .protocols import ClientProtocol, Renderer, Route, error_body, error_headers
from .protocols.common import add
from .protocols.sse import PING
from .records import record

LOG = logging.getLogger(__name__)


async def answer(gateway: Gateway, request: Request, protocol: ClientProtocol, sender: Sender) -> None:
    """Answers an admitted request, and finishes it, however it ends."""
    name = request.asked.model or gateway.model.name
    renderer, route = protocol.renderer(request.asked, request.id, name, int(time.time())), protocol.route
    send = _stream if request.asked.stream else _whole
    status, failed = 499, None  # nginx's word for a client that left
    try:
        async with _limited(gateway.config.limits.total_seconds):
            await send(gateway, request, renderer, sender)
        status = 200
    except Failed as error:
        status, failed = error.status, error
        with contextlib.suppress(Gone):
            await _fail(error, route, renderer, request, sender)
    except Gone:
        pass
    except Exception:
        status = 500
        LOG.exception("request failed", extra={"request": request.id})
        with contextlib.suppress(Gone):
            await _fail(_unexpected(request), route, renderer, request, sender)
    finally:
        await asyncio.shield(_finish(gateway, request, route, status, failed))


async def at_once(answering: Awaitable[Any], seconds: float, route: Route, sender: Sender) -> None:
    """Sends what something comes to, in so many seconds, or its failure."""
    try:
        async with _limited(seconds):
            body = encoded(await answering)
        await sender.whole(body)
    except Failed as failed:
        await sender.whole(encoded(error_body(failed, route)), failed.status, error_headers(failed))


def encoded(value: Any) -> bytes:
    """JSON as it is sent. Half a surrogate pair, which has no UTF-8, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


async def _whole(gateway: Gateway, request: Request, renderer: Renderer, sender: Sender) -> None:
    asked = request.asked
    answers = [Answer() for _ in range(asked.n * max(1, len(asked.prompts)))]
    async with contextlib.aclosing(gateway.answers(request)) as events:
        async for event in events:
            add(answers[event.choice], event)
    body = renderer.body(answers, gateway.usage(request))
    await sender.whole(encoded(body), 200, _headers(request))


async def _stream(gateway: Gateway, request: Request, renderer: Renderer, sender: Sender) -> None:
    async def begin() -> None:
        await sender.start_stream(_headers(request))
        await sender.part(renderer.begin())

    limits = gateway.config.limits
    async with (
        sender.kept_alive(limits.ping_seconds, begin, PING),
        contextlib.aclosing(gateway.answers(request)) as events,
    ):
        async for event in events:
            if not sender.started:
                await begin()
            if data := renderer.event(event):
                await sender.part(data)
        if not sender.started:
            await begin()
        await sender.part(renderer.end(gateway.usage(request)))
    await sender.end()


async def _fail(failed: Failed, route: Route, renderer: Renderer, request: Request, sender: Sender) -> None:
    if not sender.started:
        await sender.whole(
            encoded(error_body(failed, route)), failed.status, {**_headers(request), **error_headers(failed)}
        )
    elif request.asked.stream:
        await sender.part(renderer.failed(failed))
        await sender.end()


@contextlib.asynccontextmanager
async def _limited(seconds: float) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Failed(504, "timeout_error", f"the answer took longer than {seconds:g} s, this server's limit") from None


async def _finish(gateway: Gateway, request: Request, route: Route, status: int, failed: Failed | None) -> None:
    await gateway.finish(request)
    key = request.caller.key or "none"
    gateway.metrics.requests.labels(route, str(status), key).inc()
    if failed is not None:
        gateway.metrics.refusals.labels(failed.type).inc()
    LOG.info("answered", extra=record(request, route, status, failed, gateway.config.log_text))


def _headers(request: Request) -> Mapping[str, str]:
    limits = request.reservation.headers
    if request.decision.disclosure == "answer-only":  # what is left of tokens would tell how long the reasoning was
        limits = {name: value for name, value in limits.items() if not name.endswith("-tokens")}
    return {"x-request-id": request.id, **limits}


def _unexpected(request: Request) -> Failed:
    return Failed(500, "server_error", f"this is the server's fault; tell its operator of request {request.id}")
