"""What a client is told of its limits: in errors, and in headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .events import Failed
from .state.protocol import Charge, Kind, Level

#: Seconds after which to ask again for a place among parallel requests, or for tokens that running ones hold.
WAIT = 1.0
_UNITS: Mapping[Kind, str] = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "tokens_per_day": "tokens a day",
    "budget_tokens": "tokens in all",
    "max_parallel": "requests at once",
}


def refusal(
    charges: Sequence[Charge], levels: Sequence[Level], capacities: Sequence[int], tokens: int
) -> Failed | None:
    """Why charges are not granted; None where they are. What never passes goes before what takes the longest."""
    refused = [
        _refusal(charge, level, capacity, tokens)
        for charge, level, capacity in zip(charges, levels, capacities, strict=True)
        if level.taken + charge.cost > charge.limit
    ]
    return max(refused, key=lambda each: (each.retry_after is None, each.retry_after or -each.status), default=None)


def _refusal(charge: Charge, level: Level, capacity: int, tokens: int) -> Failed:
    who, limit = charge.subject.replace(":", " ", 1), f"{capacity} {_UNITS[charge.kind]}"
    if charge.cost > charge.limit:
        what = f"this request may take {tokens} tokens, and {who} has {limit}"
        return Failed(
            400, "invalid_request_error", f"{what}; send a shorter prompt or a smaller max_tokens", "max_tokens"
        )
    if charge.kind == "budget_tokens" and level.settled + charge.cost > charge.limit:
        left = f"{who} has {max(0, charge.limit - level.settled)} left of {limit}"
        remedy = "ask for fewer, or the operator for more"
        return Failed(403, "insufficient_quota", f"{left}, and this request may take {tokens}; {remedy}")
    wait = WAIT
    if charge.is_rate:
        wait = -(-(level.taken + charge.cost - charge.limit) // 1000) / 1000
    return Failed(429, "rate_limit_error", f"{who} has used its {limit}; retry in {wait:g} s", retry_after=wait)


def rate_headers(charges: Sequence[Charge], taken: Sequence[int], capacities: Sequence[int]) -> dict[str, str]:
    """OpenAI's x-ratelimit-... headers, of the limit that is nearest to its end; none where there is no such limit.

    Args:
        charges: of a request.
        taken: of each, in its unit.
        capacities: of each limit.
    """
    headers: dict[str, str] = {}
    for what in ("requests", "tokens"):
        found = sorted(_rates(what, charges, taken, capacities))
        if found:
            remaining, capacity, reset = found[0]
            headers[f"x-ratelimit-limit-{what}"] = str(capacity)
            headers[f"x-ratelimit-remaining-{what}"] = str(remaining)
            headers[f"x-ratelimit-reset-{what}"] = duration(reset)
    return headers


def _rates(
    what: str, charges: Sequence[Charge], taken: Sequence[int], capacities: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """What remains of each rate of requests or tokens, its capacity, and µs until it is full again."""
    for charge, each, capacity in zip(charges, taken, capacities, strict=True):
        if charge.is_rate and charge.kind.startswith(what):
            yield max(0, charge.limit - each) * capacity // charge.limit, capacity, each


def duration(microseconds: int) -> str:
    """As OpenAI writes it: "1h0m3s", "6m0s", "1.5s", "12ms"; rounded up to a millisecond."""
    milliseconds = -(-microseconds // 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds
