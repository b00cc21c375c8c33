"""The description of the routes, from the models that check their bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from .protocols.common import Body

_REFERENCE = "#/components/schemas/{model}"
_ERRORS: Mapping[int, str] = {
    400: "the request makes no sense, or is not allowed",
    401: "no key, or a wrong one",
    403: "not allowed to this key",
    408: "the body came too slowly",
    413: "the body is too large",
    421: "the server was called by a strange name",
    429: "a limit; try again after Retry-After",
    500: "the server's fault",
    501: "the engine was not set up for it",
    503: "the engine is not there now",
    504: "the answer took too long",
}


def described(summary: str, request: type[Body], streams: bool) -> dict[str, Any]:
    """Arguments of `FastAPI.add_api_route` for a POST whose body the route itself reads."""
    schema = {"$ref": _REFERENCE.format(model=request.__name__)}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    kinds = ["application/json", *(["text/event-stream"] if streams else [])]
    answers = {200: {"description": "the answer", "content": {kind: {} for kind in kinds}}}
    errors = {status: {"description": what} for status, what in _ERRORS.items()}
    return {
        "summary": summary,
        "response_model": None,
        "openapi_extra": {"requestBody": body},
        "responses": {**answers, **errors},
    }


def add_schemas(app: FastAPI, requests: list[type[Body]]) -> None:
    """Makes `app.openapi()` tell the models of the bodies as well."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        found = original()
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for request in requests:
            schema = request.model_json_schema(ref_template=_REFERENCE)
            schemas |= schema.pop("$defs", {})
            schemas[request.__name__] = schema
        keys = {"type": "http", "scheme": "bearer"}
        found["components"].setdefault("securitySchemes", {})["key"] = keys
        return found

    app.openapi = openapi  # type: ignore[method-assign]
