"""Where records lie: in memory only, in SQLite, or in Redis, where several nodes read what each wrote."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from ...errors import AdlocalError, InputError
from ..state import default_directory, is_redis

FILE = "watch.sqlite3"
STREAM = "adlocal:watch:log"
Entries = list[tuple[str, bytes]]


class Log(Protocol):
    """An ordered log of at most some number of records, the oldest dropped. Errors are `AdlocalError`s."""

    async def read(self, after: str) -> Entries:
        """Records that were appended after the one of this id, with theirs; from the first after ""."""

    async def append(self, records: Sequence[bytes]) -> None:
        """Keeps them: past a kill -9 when this returns."""

    async def close(self) -> None:
        """Gives back what is held."""


class SQLiteLog:
    """A file of its own, in WAL mode, used by one thread alone.

    Commits are not synced one by one (`synchronous=NORMAL`): a killed process loses none, a power cut the last ones.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._most = path, most
        self._thread = ThreadPoolExecutor(1, "adlocal-watch")
        self._connection: sqlite3.Connection | None = None

    async def read(self, after: str) -> Entries:
        found: Entries = await self._run(self._read, after)
        return found

    async def append(self, records: Sequence[bytes]) -> None:
        await self._run(self._append, records)

    async def close(self) -> None:
        await self._run(self._close)
        self._thread.shutdown()

    async def _run(self, function: Any, *args: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
        except sqlite3.Error as error:
            raise AdlocalError(f"{self._path}: the watch's state cannot be used ({error})") from None

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.touch(mode=0o600)
            self._connection = connection = sqlite3.connect(self._path, timeout=5, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS log (id INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB)")
            connection.commit()
        return self._connection

    def _read(self, after: str) -> Entries:
        rows = self._opened().execute("SELECT id, record FROM log WHERE id > ? ORDER BY id", (int(after or 0),))
        return [(str(number), bytes(record)) for number, record in rows]

    def _append(self, records: Sequence[bytes]) -> None:
        with self._opened() as connection:
            connection.executemany("INSERT INTO log (record) VALUES (?)", [(each,) for each in records])
            connection.execute("DELETE FROM log WHERE id <= (SELECT max(id) FROM log) - ?", (self._most,))

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class RedisLog:
    """A stream that all nodes append to and read. Redis decides what outlives a crash of its own."""

    _AT_ONCE = 1000

    def __init__(self, url: str, most: int) -> None:
        self._place = url.rpartition("@")[2]  # without a password
        try:
            import redis.asyncio as client
            from redis.exceptions import RedisError
        except ImportError:
            raise InputError(f"{self._place}: needs the Redis client; pip install 'adlocal[redis]'") from None
        try:
            self._client = client.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)
        except ValueError as error:
            raise InputError(
                f"{self._place}: not an address of Redis ({error}); give redis://HOST:PORT/NUMBER"
            ) from None
        self._most, self._error = most, RedisError

    async def read(self, after: str) -> Entries:
        found: Entries = []
        while True:
            start = f"({found[-1][0] if found else after}" if found or after else "-"
            rows = await self._run(self._client.xrange(STREAM, start, "+", self._AT_ONCE))
            found += [(number.decode(), fields[b"r"]) for number, fields in rows]
            if len(rows) < self._AT_ONCE:
                return found

    async def append(self, records: Sequence[bytes]) -> None:
        pipe = self._client.pipeline(transaction=True)
        for record in records:
            pipe.xadd(STREAM, {"r": record}, maxlen=self._most, approximate=True)
        await self._run(pipe.execute())

    async def close(self) -> None:
        await self._run(self._client.aclose())

    async def _run(self, call: Any) -> Any:
        try:
            return await call
        except (self._error, OSError) as error:
            raise AdlocalError(f"{self._place}: the watch's state cannot be used ({error})") from None


def open_log(state: str | Path | None, most: int) -> Log:
    """The log in a directory, which is made, or at redis://... ; nothing is read yet.

    Args:
        state: as of `open_store`: a directory, an address of Redis, or None for the default directory.
        most: records that are kept.

    Raises:
        InputError: it is none of these, the directory cannot be made, or Redis's client is not installed.
    """
    if is_redis(state):
        return RedisLog(str(state), most)
    directory = Path(state) if state else default_directory()
    if "://" in str(state or ""):
        raise InputError(f"state {str(state).partition('://')[0]}://...: give a directory, or redis://HOST:PORT/NUMBER")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{directory}: no state can be kept there ({error.strerror}); give another directory"
        ) from None
    return SQLiteLog(directory / FILE, most)
