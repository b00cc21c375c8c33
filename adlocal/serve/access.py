"""Who is at the door: keys, operators, and pages of other sites."""

from __future__ import annotations

from starlette.requests import Request as HTTPRequest

from .events import Failed
from .gateway import Gateway
from .policy import Caller

#: For whom a trusted key asks.
USER_HEADER = "x-adlocal-user"
#: Asks to be told what was steered; for the operator.
STEERING_HEADER = "x-adlocal-steering"
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_USER_LENGTH = 128


async def caller(gateway: Gateway, request: HTTPRequest) -> Caller:
    """Who asks.

    Without keys, whoever can reach this machine's own address may ask, and is its operator unless a proxy stands
    between. A page of another site is refused then, whose name an attacker let point here.

    Raises:
        Failed: 401 for no or a wrong key, 421 for a strange name.
    """
    if not gateway.asks_for_keys:
        if _host(request) not in _LOCAL_NAMES | {gateway.config.listen.host.lower()}:
            raise Failed(421, "invalid_request_error", f"{_host(request)}: this server is http://localhost alone")
        if request.headers.get("origin", own := f"{request.url.scheme}://{request.headers.get('host')}") != own:
            raise Failed(403, "permission_error", "pages of other sites may not ask this server; use its own page")
        return Caller(operator=not any(name in request.headers for name in _FORWARDED))
    record = await gateway.keys.authenticate(_only(request, "authorization"), _only(request, "x-api-key"))
    return Caller(
        record.id,
        record.owner,
        record.tier,
        record.operator,
        record.trusted,
        record.budget_tokens,
        "evaluation" if record.declared == "evaluation" else None,
    )


def operator_only(found: Caller) -> None:
    """Refuses everybody else.

    Raises:
        Failed: the caller is not the operator.
    """
    if not found.operator:
        raise Failed(
            403, "permission_error", "this is for the operator's key; make one with adlocal keys add --operator"
        )


def user_of(found: Caller, request: HTTPRequest, said: str | None) -> str | None:
    """For whom a trusted caller asks: the header's, else the body's. What others say is not believed."""
    user = request.headers.get(USER_HEADER) or said
    return user[:_USER_LENGTH] if found.trusted and user else None


def _only(request: HTTPRequest, name: str) -> str | None:
    """A header that may come once."""
    values = set(request.headers.getlist(name))
    if len(values) > 1:
        raise Failed(401, "authentication_error", f"{name} came with different keys; send one of them")
    return values.pop() if values else None


def _host(request: HTTPRequest) -> str:
    name = request.headers.get("host", "").lower()
    return name if name.endswith("]") else name.rpartition(":")[0] or name
