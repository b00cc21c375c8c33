"""Limits of rate, budget and parallel requests: reserved before a request, settled with what it used.

A rate of C a minute is a bucket of C that is refilled evenly: C may come at once, and at most C + C·t within any
t minutes. Tokens count when they are settled; until then a request holds what it reserved. A request whose process is
killed is settled as if it had used all of that, `LEASE` seconds later, and its place among parallel ones is free again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

from ..errors import AdlocalError, InputError
from .events import Failed
from .rate_words import rate_headers, refusal
from .state.protocol import UNLIMITED, Charge, Claim, Kind, Store, Taken

R = TypeVar("R")
#: Seconds that a request holds what it reserved after its process was last heard of.
LEASE = 30.0
#: Of each rate, in µs.
WINDOWS: Mapping[Kind, int] = {
    "requests_per_minute": 60_000_000,
    "tokens_per_minute": 60_000_000,
    "tokens_per_day": 86_400_000_000,
}
#: The most that a limit may be: with it every count stays exact.
MOST = 10**12
#: The most that a request which used more than it reserved owes a rate, µs: a year.
_MOST_OWED = 365 * WINDOWS["tokens_per_day"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits of one subject; None for none. Tokens are those of prompt and answer.

    Attributes:
        requests_per_minute, tokens_per_minute, tokens_per_day: rates.
        budget_tokens: in all, for ever.
        max_parallel: requests at once.

    Raises:
        InputError: a limit is not a whole number from 1 to `MOST`.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    budget_tokens: int | None = None
    max_parallel: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (type(value) is not int or not 1 <= value <= MOST):
                raise InputError(
                    f"{field.name} {value!r}: give a whole number from 1 to {MOST}, or nothing for no limit"
                )


@dataclass(frozen=True)
class Subject:
    """Who is limited: "key:ID", "owner:NAME", or another name of such a shape."""

    name: str
    limits: Limits


@dataclass(frozen=True)
class Reservation:
    """What a request holds, until it is settled.

    Attributes:
        claim: in the store.
        capacities: of each of its charges, in the limit's own unit.
        headers: x-ratelimit-..., for the client.
    """

    claim: Claim
    capacities: tuple[int, ...]
    headers: Mapping[str, str]


class Limiter:
    """Reserves and settles. As a context manager it keeps up what is reserved, for requests that take long."""

    def __init__(self, store: Store, lease: float = LEASE) -> None:
        self._store = store
        self._lease = lease
        self._open: dict[str, Claim] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._renewing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._renewing = asyncio.create_task(self._renew())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Waits for what is being settled."""
        if self._renewing:
            self._renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewing
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def reserve(self, subjects: Sequence[Subject], tokens: int) -> Reservation:
        """Takes a request and its tokens from all subjects, or nothing.

        Args:
            subjects: of different names.
            tokens: the most that prompt and answer together may come to.

        Raises:
            Failed: 429 where the same request may succeed after `retry_after` seconds; 403 where a budget is spent;
                400 where the request is larger than a limit can ever hold; 503 where the store cannot be used. The
                openai and anthropic clients ask again after 408, 409, 429 and 5xx, whatever the error's type is: so
                429 is only for what passes.
        """
        charges, capacities = _charges(subjects, tokens)
        claim = Claim(secrets.token_hex(8), charges)
        taken = await self._taken(claim)
        if not taken.granted:
            raise refusal(charges, taken.levels, capacities, tokens) or _unavailable()
        self._open[claim.id] = claim
        after = [level.taken + charge.cost for charge, level in zip(charges, taken.levels, strict=True)]
        return Reservation(claim, capacities, rate_headers(charges, after, capacities))

    async def settle(self, reservation: Reservation, tokens_used: int) -> None:
        """Settles a reservation with the tokens that were used, more or fewer than were reserved.

        Only the first call for a reservation does anything. It is done to its end if its caller is cancelled. Where the
        store cannot be used, what was reserved is charged, and the log says so.
        """
        claim = self._open.pop(reservation.claim.id, None)
        if claim is not None:
            used = [_used(*pair, tokens_used) for pair in zip(claim.charges, reservation.capacities, strict=True)]
            await asyncio.shield(self._start(self._settle(claim, used)))

    async def _taken(self, claim: Claim) -> Taken:
        """Asks the store. If the request is cancelled meanwhile, nobody knows of the reservation: it is given back."""
        asking = self._start(self._store.reserve(claim, round(self._lease * 1e6)))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._start(self._give_back(asking, claim))
            raise
        except AdlocalError as error:
            _log.error("%s", error)
            raise _unavailable() from None

    async def _give_back(self, asking: asyncio.Task[Taken], claim: Claim) -> None:
        with contextlib.suppress(AdlocalError):
            if (await asking).granted:
                await self._settle(claim, [0] * len(claim.charges))

    async def _settle(self, claim: Claim, used: Sequence[int]) -> None:
        try:
            await self._store.settle(claim, used)
        except AdlocalError as error:
            _log.error("request %s is charged what it reserved: %s", claim.id, error)

    async def _renew(self) -> None:
        """Holds what is open, three times a lease."""
        while True:
            await asyncio.sleep(self._lease / 3)
            try:
                if self._open:
                    await self._store.renew(list(self._open.values()), round(self._lease * 1e6))
            except AdlocalError as error:
                _log.error("%s", error)

    def _start(self, work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        """A task that is kept until it ends, which asyncio does not do."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _charges(subjects: Sequence[Subject], tokens: int) -> tuple[tuple[Charge, ...], tuple[int, ...]]:
    """What a request takes, and the capacity of each limit.

    Tokens in all and requests in parallel are counted without a limit too: it may be set later.
    """
    if len({subject.name for subject in subjects}) < len(subjects):
        raise ValueError(f"subjects {[subject.name for subject in subjects]}: one of them twice; give each once")
    made: list[tuple[Charge, int]] = []
    for subject in subjects:
        for kind, window in WINDOWS.items():
            capacity: int | None = getattr(subject.limits, kind)
            if capacity is not None:
                n = 1 if kind == "requests_per_minute" else tokens
                made.append((Charge(subject.name, kind, window, _cost(n, window, capacity)), capacity))
        budget = subject.limits.budget_tokens or UNLIMITED
        parallel = subject.limits.max_parallel or UNLIMITED
        made.append((Charge(subject.name, "budget_tokens", budget, tokens), budget))
        made.append((Charge(subject.name, "max_parallel", parallel, 1), parallel))
    return tuple(charge for charge, _ in made), tuple(capacity for _, capacity in made)


def _cost(n: int, window: int, capacity: int) -> int:
    """µs in which `n` are refilled, rounded up."""
    return -(-n * window // capacity)


def _used(charge: Charge, capacity: int, tokens: int) -> int:
    """What a charge has come to."""
    if charge.kind == "requests_per_minute":
        return charge.cost
    if charge.kind == "max_parallel":
        return 0
    return min(_cost(tokens, charge.limit, capacity), _MOST_OWED) if charge.is_rate else tokens


def _unavailable() -> Failed:
    return Failed(503, "unavailable_error", "limits cannot be checked at the moment; try again later", retry_after=5.0)
