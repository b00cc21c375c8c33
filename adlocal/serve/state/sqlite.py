"""State in SQLite, for one machine.

A change is acknowledged when it is committed, with a write-ahead log and `synchronous=NORMAL`: it survives the death of
every process (kill -9). A power cut may lose the last changes, and never harms the file.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from ...errors import AdlocalError, InputError
from .database import Database
from .protocol import Charge, Claim, KeyRecord, Level, Taken

P = ParamSpec("P")
R = TypeVar("R")
#: Calls that may wait for the thread: more than that many requests are told that the store cannot be used.
MOST_WAITING = 4096


def microseconds() -> int:
    """The machine's clock, µs since 1970."""
    return time.time_ns() // 1000


class SqliteStore:
    """A `Store` in `state.sqlite3` of a directory. Several processes may use it at once; each has one thread for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adlocal-state")
        self._waiting = 0
        self._database: Database

    @classmethod
    async def open(cls, directory: Path, clock: Callable[[], int] = microseconds) -> SqliteStore:
        """Opens the store of a directory; both are made if they are missing.

        Raises:
            InputError: the directory cannot be written to, or holds something else.
        """
        path = directory / "state.sqlite3"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite gives its other files this one's mode
        except OSError as error:
            raise InputError(f"state {directory}: {error.strerror}; give a directory that can be written to") from None
        store = cls(path)
        try:
            store._database = await store._run(Database, path, clock)
        except BaseException:
            store._thread.shutdown(wait=False)
            raise
        return store

    async def add_key(self, record: KeyRecord, digest: str) -> bool:
        return await self._run(self._database.add_key, record, digest)

    async def key(self, id: str) -> tuple[KeyRecord, str] | None:
        return await self._run(self._database.key, id)

    async def keys(self) -> list[KeyRecord]:
        return await self._run(self._database.keys)

    async def revoke_key(self, id: str, at: int) -> bool:
        return await self._run(self._database.revoke_key, id, at)

    async def pepper_mark(self, mark: str | None) -> str | None:
        return await self._run(self._database.pepper_mark, mark)

    async def reserve(self, claim: Claim, lease: int) -> Taken:
        return await self._run(self._database.reserve, claim, lease)

    async def renew(self, claims: Sequence[Claim], lease: int) -> None:
        await self._run(self._database.renew, [claim.id for claim in claims], lease)

    async def settle(self, claim: Claim, used: Sequence[int]) -> None:
        await self._run(self._database.settle, claim, used)

    async def levels(self, charges: Sequence[Charge]) -> tuple[Level, ...]:
        return await self._run(self._database.levels, charges)

    async def close(self) -> None:
        await self._run(self._database.close)
        self._thread.shutdown()

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls a function in the store's thread, after those that wait already."""
        if self._waiting >= MOST_WAITING:
            raise AdlocalError(f"state {self._path}: {self._waiting} calls wait already; try again later")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))
        except sqlite3.Error as error:
            raise AdlocalError(f"state {self._path}: {error}; is the disk full, or another program using it?") from None
        finally:
            self._waiting -= 1
