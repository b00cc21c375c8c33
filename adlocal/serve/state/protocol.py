"""What a store offers. Every method of it is atomic, over all processes and nodes that share the store.

A limit of any kind is one rule: what is settled, what running requests hold and what a new one asks for may together
not exceed the limit. Of a rate, "settled" is what has not been refilled yet. It is counted in microseconds (GCRA): a
limit of C per window of W µs is full at W, a cost of n is ⌈n·W/C⌉, and a microsecond refills one. So stores add whole
numbers only, and every rounding is against the client.

What a running request holds is a lease. A lease that its process does not renew lapses, and is settled as if all of it
had been used: the process was killed.

Time in a store never goes back, and does not stand still while a clock that was set back catches up: it is the sum of
the steps forward that the machine's clock made (with Redis: its server's clock).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

#: Fields of `Limits`. Stores take a name with "_per_" in it as a rate.
Kind = Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day", "budget_tokens", "max_parallel"]
#: The greatest number that Redis's scripts count exactly: no limit.
UNLIMITED = 2**53 - 1
#: Of what a store holds.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Charge:
    """What a request takes of one limit.

    Attributes:
        subject: whose limit.
        kind: which of its limits.
        limit: the most that may be settled and held: µs of a rate, tokens of a budget, or requests in parallel.
        cost: in the same unit.
    """

    subject: str
    kind: Kind
    limit: int
    cost: int

    @property
    def is_rate(self) -> bool:
        """Whether it is refilled as time passes."""
        return "_per_" in self.kind

    @property
    def is_held(self) -> bool:
        """Whether the request holds it while it runs. The number of requests is settled at once: it is known."""
        return self.kind != "requests_per_minute"

    @property
    def if_lost(self) -> int:
        """What is settled if the request's process dies: all, but a place among requests in parallel is free again."""
        return 0 if self.kind == "max_parallel" else self.cost

    def of(self, cost: int) -> Charge:
        """The charge with another cost."""
        return replace(self, cost=cost)


@dataclass(frozen=True)
class Claim:
    """All that one request takes.

    Attributes:
        id: unique among all requests.
        charges: at most one for each subject and kind.
    """

    id: str
    charges: tuple[Charge, ...]


@dataclass(frozen=True)
class Level:
    """What is taken of a limit: `settled`, and `held` by requests that run. Units as in `Charge`."""

    settled: int
    held: int

    @property
    def taken(self) -> int:
        return self.settled + self.held


@dataclass(frozen=True)
class Taken:
    """Whether a claim was granted, and the level before it of each of its charges."""

    granted: bool
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class KeyRecord:
    """What is known of a key, which is not the key itself.

    Attributes:
        id: 8 lower-case letters and digits, which begin the key.
        owner: a person or program, who may have several keys.
        tier: a name that policy gives a meaning.
        created, expires, revoked: seconds since 1970; None for never.
        operator: may see the operator's part of the page.
        trusted: may name its end users in a header.
        budget_tokens: in all, for ever; None for no budget.
        declared: "evaluation" for traffic that its owner declared as an evaluation loop.
        note: the operator's own.
    """

    id: str
    owner: str
    tier: str
    created: int
    expires: int | None = None
    revoked: int | None = None
    operator: bool = False
    trusted: bool = False
    budget_tokens: int | None = None
    declared: str | None = None
    note: str = ""


class Store(Protocol):
    """Keys, and what is taken of limits. Every method raises AdlocalError where the store cannot be used."""

    async def add_key(self, record: KeyRecord, digest: str) -> bool:
        """Keeps a key under the digest of its text; False, and nothing, where its id is taken."""

    async def key(self, id: str) -> tuple[KeyRecord, str] | None:
        """A key and its digest."""

    async def keys(self) -> list[KeyRecord]:
        """All keys, the oldest first."""

    async def revoke_key(self, id: str, at: int) -> bool:
        """Revokes a key at these seconds since 1970, if it is not revoked already; False for an unknown id."""

    async def pepper_mark(self, mark: str | None) -> str | None:
        """Keeps the mark of the pepper that digests are made with, if none is kept yet. The one that is kept."""

    async def reserve(self, claim: Claim, lease: int) -> Taken:
        """Takes all of a claim or nothing, for as many µs as `lease` says."""

    async def renew(self, claims: Sequence[Claim], lease: int) -> None:
        """Holds claims for as many µs from now. Those that have been settled, or have lapsed and were seen, stay so."""

    async def settle(self, claim: Claim, used: Sequence[int]) -> None:
        """Ends what a claim holds, and settles the cost that each of its charges has come to. Does so once."""

    async def levels(self, charges: Sequence[Charge]) -> tuple[Level, ...]:
        """What is taken, whatever the charges cost. Changes nothing."""

    async def close(self) -> None:
        """Ends the connection."""
