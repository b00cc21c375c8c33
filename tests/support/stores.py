"""Stores of the gateway's state, of both kinds, for tests."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from adlocal.serve.state import Store
from adlocal.serve.state.sqlite import SqliteStore

T = TypeVar("T")
KINDS = ("sqlite", "redis")
REDIS_SERVER = shutil.which("redis-server")


@dataclass
class Clock:
    """A machine's clock that a test sets, µs."""

    now: int = 1_700_000_000_000_000

    def __call__(self) -> int:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += round(seconds * 1_000_000)


@dataclass(frozen=True)
class Place:
    """Where a store is: a directory, or Redis's address."""

    state: str

    async def open(self, clock: Callable[[], int] | None = None) -> Store:
        if "://" in self.state:
            from adlocal.serve.state.redis import RedisStore

            return await RedisStore.open(self.state, clock)
        return await (SqliteStore.open(Path(self.state), clock) if clock else SqliteStore.open(Path(self.state)))

    def run(self, use: Callable[[Store], Coroutine[Any, Any, T]], clock: Callable[[], int] | None = None) -> T:
        """What a function makes of the store, which is opened for it."""

        async def opened() -> T:
            store = await self.open(clock)
            try:
                return await asyncio.wait_for(use(store), 60)
            finally:
                await store.close()

        return asyncio.run(opened())


@contextmanager
def redis_server() -> Iterator[str]:
    """The address of an empty Redis server of this test's own. Skips where there is none."""
    if REDIS_SERVER is None:
        pytest.skip("redis-server is not installed")
    with tempfile.TemporaryDirectory(prefix="adl-redis-") as directory:  # a socket's path may not be long
        socket = Path(directory) / "redis.sock"
        how = ["--port", "0", "--unixsocket", str(socket), "--dir", directory, "--save", "", "--appendonly", "no"]
        process = subprocess.Popen([REDIS_SERVER, *how], stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 20
            while not socket.exists():
                assert process.poll() is None, "redis-server has ended"
                assert time.monotonic() < until, "redis-server did not begin"
                time.sleep(0.02)
            yield f"unix://{socket}"
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def place(kind: str, directory: Path) -> Iterator[Place]:
    """An empty place of a kind."""
    if kind == "sqlite":
        yield Place(str(directory / "state"))
        return
    with redis_server() as address:
        yield Place(address)
