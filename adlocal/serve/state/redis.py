"""State in Redis, for several nodes.

What was acknowledged survives the death of every node. Whether it survives Redis's own is Redis's to say: turn
`appendonly` on. Its scripts name their keys themselves, so it must be one server with replicas, not a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import urlsplit

from redis import asyncio as client
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError

from ...errors import AdlocalError, InputError
from .protocol import SCHEMA_VERSION, Charge, Claim, KeyRecord, Level, Taken
from .scripts import LEVELS, RENEW, RESERVE, SETTLE

PREFIX = "adlocal:"
#: Seconds for a connection, and for an answer.
_TIMEOUT = 5.0


class RedisStore:
    """A `Store` in a Redis server, under keys that begin with "adlocal:"."""

    def __init__(self, address: str, clock: Callable[[], int] | None = None) -> None:
        self._clock = clock
        self._place = _without_secrets(address)
        try:
            self._redis = client.Redis.from_url(
                address,
                decode_responses=True,
                socket_timeout=_TIMEOUT,
                socket_connect_timeout=_TIMEOUT,
                # A script that was run and whose answer was lost is run again: all of them allow that.
                retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 3),
            )
        except ValueError as error:
            raise InputError(f"state {self._place}: {error}; give redis://HOST:PORT/DATABASE") from None
        scripts = (RESERVE, RENEW, SETTLE, LEVELS)
        self._reserve, self._renew, self._settle, self._levels = map(self._redis.register_script, scripts)

    @classmethod
    async def open(cls, address: str, clock: Callable[[], int] | None = None) -> RedisStore:
        """Connects to a server.

        Args:
            address: "redis://...", "rediss://..." or "unix://...".
            clock: the machine's, µs; None for the server's own, which all nodes share.

        Raises:
            InputError: the address is wrong, or what lies there is of another schema.
            AdlocalError: the server does not answer.
        """
        store = cls(address, clock)
        try:
            await store._check_version()
        except BaseException:
            await store._redis.aclose()
            raise
        return store

    async def _check_version(self) -> None:
        name = PREFIX + "schema"
        with self._told():
            await self._redis.set(name, SCHEMA_VERSION, nx=True)
            version: Any = await self._redis.get(name)
        if version != str(SCHEMA_VERSION):
            raise InputError(
                f"state {self._place} has schema {version} and this adlocal knows {SCHEMA_VERSION}; "
                "use the adlocal that wrote it, or give another database"
            )

    async def add_key(self, record: KeyRecord, digest: str) -> bool:
        value = json.dumps({"record": asdict(record), "digest": digest})
        with self._told():
            return bool(await _awaited(self._redis.hsetnx(PREFIX + "keys", record.id, value)))

    async def key(self, id: str) -> tuple[KeyRecord, str] | None:
        with self._told():
            value = await _awaited(self._redis.hget(PREFIX + "keys", id))
            revoked = await _awaited(self._redis.hget(PREFIX + "revoked", id))
        return _record(value, revoked) if value else None

    async def keys(self) -> list[KeyRecord]:
        with self._told():
            found = await _awaited(self._redis.hgetall(PREFIX + "keys"))
            revoked = await _awaited(self._redis.hgetall(PREFIX + "revoked"))
        records = (_record(value, revoked.get(id))[0] for id, value in found.items())
        return sorted(records, key=lambda record: (record.created, record.id))

    async def revoke_key(self, id: str, at: int) -> bool:
        with self._told():
            if not await _awaited(self._redis.hexists(PREFIX + "keys", id)):
                return False
            await _awaited(self._redis.hsetnx(PREFIX + "revoked", id, str(at)))
        return True

    async def pepper_mark(self, mark: str | None) -> str | None:
        name = PREFIX + "pepper"
        with self._told():
            if mark is not None:
                await self._redis.set(name, mark, nx=True)
            found: Any = await self._redis.get(name)
        return None if found is None else str(found)

    async def reserve(self, claim: Claim, lease: int) -> Taken:
        granted, *numbers = await self._call(self._reserve, claim.id, _json(claim.charges), lease)
        return Taken(bool(granted), _read_levels(numbers))

    async def renew(self, claims: Sequence[Claim], lease: int) -> None:
        held = [[claim.id, json.loads(_json(claim.charges))] for claim in claims]
        await self._call(self._renew, json.dumps(held), lease)

    async def settle(self, claim: Claim, used: Sequence[int]) -> None:
        await self._call(self._settle, claim.id, _json(claim.charges), json.dumps(list(used)))

    async def levels(self, charges: Sequence[Charge]) -> tuple[Level, ...]:
        return _read_levels(await self._call(self._levels, _json(charges)))

    async def close(self) -> None:
        await self._redis.aclose()

    async def _call(self, script: Any, *args: str | int) -> list[int]:
        clock = self._clock() if self._clock else ""
        with self._told():
            found: list[int] = await script(keys=[PREFIX], args=[clock, *args])
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Redis's errors in adlocal's words."""
        try:
            yield
        except (RedisError, OSError) as error:
            raise AdlocalError(f"state {self._place}: {error}; is the Redis server running?") from None


async def _awaited(answer: Awaitable[Any] | Any) -> Any:
    """An answer whose type is that of redis's two clients, with and without asyncio."""
    return await answer


def _without_secrets(address: str) -> str:
    """An address as it may be shown and logged: without user, password and query."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _json(charges: Sequence[Charge]) -> str:
    return json.dumps([asdict(each) | {"rate": each.is_rate, "held": each.is_held} for each in charges])


def _read_levels(numbers: Sequence[int]) -> tuple[Level, ...]:
    return tuple(Level(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True))


def _record(text: str, revoked: str | None) -> tuple[KeyRecord, str]:
    found = json.loads(text)
    return replace(KeyRecord(**found["record"]), revoked=int(revoked) if revoked else None), found["digest"]
