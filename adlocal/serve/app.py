"""The routes. What is not here does not exist."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from . import access
from .asgi import Sender, Work, read_body
from .events import Failed
from .gateway import Gateway
from .generation import answer, at_once, encoded
from .openapi import add_schemas, described
from .page import PAGE, PAGE_HEADERS
from .policy import Caller
from .protocols import PATHS, PROTOCOLS, ClientProtocol, Route, error_body, error_headers, read_json
from .simple import SIMPLE, Simple

LOG = logging.getLogger(__name__)
_SUMMARIES: Mapping[Route, str] = {
    "chat": "Chat, as OpenAI's",
    "completions": "Completions of raw prompts, as OpenAI's",
    "responses": "Responses, as OpenAI's",
    "messages": "Messages, as Anthropic's",
}


def make_app(gateway: Gateway) -> FastAPI:
    """The application, of a gateway that is open."""
    app = FastAPI(title="adlocal serve", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.exception_handler(Failed)
    async def _failed(request: HTTPRequest, failed: Failed) -> Response:
        gateway.metrics.refusals.labels(failed.type).inc()
        LOG.info("refused", extra={"path": request.url.path[:80], "status": failed.status, "type": failed.type})
        return refusal(failed, _route_of(request.url.path))

    @app.exception_handler(HTTPException)
    async def _http(request: HTTPRequest, error: HTTPException) -> Response:
        what = {404: "there is no such route", 405: "this route has another method"}.get(
            error.status_code, error.detail
        )
        failed = Failed(error.status_code, "not_found_error", f"{request.method} {request.url.path}: {what}")
        return refusal(failed, _route_of(request.url.path))

    @app.exception_handler(Exception)
    async def _unexpected(request: HTTPRequest, error: Exception) -> Response:
        LOG.error("request failed", exc_info=error)
        return refusal(Failed(500, "server_error", "this is the server's fault"), _route_of(request.url.path))

    for protocol in PROTOCOLS.values():
        how = described(_SUMMARIES[protocol.route], protocol.request, streams=True)
        app.add_api_route(PATHS[protocol.route], _generation(gateway, protocol), methods=["POST"], **how)
    for simple in SIMPLE:
        how = described(simple.summary, simple.request, streams=False)
        app.add_api_route(simple.path, _simple(gateway, simple), methods=["POST"], **how)
    _add_readings(app, gateway)
    add_schemas(app, [*(protocol.request for protocol in PROTOCOLS.values()), *(simple.request for simple in SIMPLE)])
    return app


def refusal(failed: Failed, route: Route) -> Response:
    """An error, in its protocol's form."""
    return Response(encoded(error_body(failed, route)), failed.status, error_headers(failed), "application/json")


Endpoint = Callable[[HTTPRequest], Awaitable[Response]]


def _generation(gateway: Gateway, protocol: ClientProtocol) -> Endpoint:
    async def endpoint(request: HTTPRequest) -> Response:
        found, body = await _read(gateway, request)
        asked = protocol.asked_of(body, gateway.unknown_fields(found, protocol.route))
        user = access.user_of(found, request, asked.user)
        steering = found.operator and access.STEERING_HEADER in request.headers
        admitted = await gateway.admit(found, asked, user, steering)

        async def work(sender: Sender) -> None:
            await answer(gateway, admitted, protocol, sender)

        return Work(work, gateway.config.limits.stall_seconds)

    return endpoint


def _simple(gateway: Gateway, simple: Simple) -> Endpoint:
    async def endpoint(request: HTTPRequest) -> Response:
        found, body = await _read(gateway, request)
        route = _route_of(simple.path)

        async def work(sender: Sender) -> None:
            await at_once(simple.answer(gateway, found, body), gateway.config.limits.total_seconds, route, sender)

        return Work(work, gateway.config.limits.stall_seconds)

    return endpoint


async def _read(gateway: Gateway, request: HTTPRequest) -> tuple[Caller, dict[str, Any]]:
    """Who asks, before anything is read, and what."""
    found = await access.caller(gateway, request)
    limits = gateway.config.limits
    raw = await read_body(request, limits.body_bytes, limits.body_seconds)
    return found, read_json(raw)


def _add_readings(app: FastAPI, gateway: Gateway) -> None:
    """Routes that only tell something."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @app.get("/health", summary="Whether requests that come now will be answered")
    async def health() -> Response:
        if not gateway.is_well:
            return refusal(Failed(503, "unavailable_error", "the engine is not well", retry_after=5), "chat")
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.get("/v1/models", summary="The model")
    async def models(request: HTTPRequest) -> dict[str, Any]:
        await access.caller(gateway, request)
        return {"object": "list", "data": [_model(gateway)]}

    @app.get("/v1/models/{name:path}", summary="The model, by its name")
    async def model(request: HTTPRequest, name: str) -> dict[str, Any]:
        await access.caller(gateway, request)
        if name != gateway.model.name:
            raise Failed(404, "not_found_error", f"{name}: there is no such model; there is {gateway.model.name}")
        return _model(gateway)

    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: HTTPRequest) -> Response:
        access.operator_only(await access.caller(gateway, request))
        return Response(gateway.measured(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/operator/watch", include_in_schema=False)
    async def watched(request: HTTPRequest) -> list[dict[str, Any]]:
        access.operator_only(await access.caller(gateway, request))
        return gateway.watched()

    @app.get("/openapi.json", include_in_schema=False)
    async def schema(request: HTTPRequest) -> dict[str, Any]:
        await access.caller(gateway, request)
        return app.openapi()


def _model(gateway: Gateway) -> dict[str, Any]:
    return {"id": gateway.model.name, "object": "model", "created": gateway.model.created, "owned_by": "adlocal"}


def _route_of(path: str) -> Route:
    """Whose form an error takes."""
    return "messages" if path.startswith("/v1/messages") else "chat"
