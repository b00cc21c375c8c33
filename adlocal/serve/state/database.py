"""The SQLite database of `SqliteStore`. All calls come from one thread."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from ...errors import InputError
from .protocol import SCHEMA_VERSION, Charge, Claim, KeyRecord, Level, Taken

#: How long a transaction waits for another process's.
_BUSY_SECONDS = 5.0
#: `value` of a rate is the time at which it is refilled; of a budget, the tokens that are settled.
_SCHEMA = """
CREATE TABLE keys (id TEXT PRIMARY KEY, digest TEXT NOT NULL, record TEXT NOT NULL, revoked INTEGER);
CREATE TABLE pepper (mark TEXT NOT NULL);
CREATE TABLE clock (machine INTEGER NOT NULL, time INTEGER NOT NULL);
CREATE TABLE counters (subject TEXT, kind TEXT, value INTEGER NOT NULL, PRIMARY KEY (subject, kind)) WITHOUT ROWID;
CREATE TABLE leases (
    subject TEXT, kind TEXT, id TEXT, cost INTEGER NOT NULL, expires INTEGER NOT NULL, PRIMARY KEY (subject, kind, id)
) WITHOUT ROWID;
CREATE INDEX leases_by_id ON leases (id);
"""


class Database:
    """An open database.

    Args:
        path: the file, which exists, and may be empty.
        clock: the machine's, µs.

    Raises:
        InputError: the file is no database, or of another schema.
    """

    def __init__(self, path: Path, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            self._begin(path)
        except BaseException:
            self._connection.close()
            raise

    def _begin(self, path: Path) -> None:
        try:
            self._use_log()
            self._connection.execute("PRAGMA synchronous=NORMAL")
            with self._transaction():
                (version,) = self._connection.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    self._create()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise InputError(f"state {path}: {error}; give another directory") from None
        if version not in (0, SCHEMA_VERSION):
            raise InputError(
                f"state {path} has schema {version} and this adlocal knows {SCHEMA_VERSION}; "
                "use the adlocal that wrote it, or give another directory"
            )

    def _use_log(self) -> None:
        """Turns the write-ahead log on. SQLite does not wait for another process that is about to do the same."""
        until = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def _create(self) -> None:
        for statement in _SCHEMA.split(";"):
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    # Keys.

    def add_key(self, record: KeyRecord, digest: str) -> bool:
        row = (record.id, digest, json.dumps(asdict(record)), record.revoked)
        done = self._connection.execute("INSERT OR IGNORE INTO keys VALUES (?, ?, ?, ?)", row)
        return done.rowcount == 1

    def key(self, id: str) -> tuple[KeyRecord, str] | None:
        row = self._connection.execute("SELECT record, revoked, digest FROM keys WHERE id = ?", (id,)).fetchone()
        return row and (_record(row[0], row[1]), row[2])

    def keys(self) -> list[KeyRecord]:
        rows = self._connection.execute("SELECT record, revoked FROM keys")
        return sorted((_record(*row) for row in rows), key=lambda record: (record.created, record.id))

    def revoke_key(self, id: str, at: int) -> bool:
        done = self._connection.execute("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ?", (at, id))
        return done.rowcount == 1

    def pepper_mark(self, mark: str | None) -> str | None:
        with self._transaction():
            row = self._connection.execute("SELECT mark FROM pepper").fetchone()
            if row:
                return str(row[0])
            if mark is not None:
                self._connection.execute("INSERT INTO pepper VALUES (?)", (mark,))
            return mark

    # Limits.

    def reserve(self, claim: Claim, lease: int) -> Taken:
        with self._transaction():
            now = self._now()
            for subject in {charge.subject for charge in claim.charges}:
                self._settle_lapsed(subject, now)
            levels = tuple(self._level(charge, now) for charge in claim.charges)
            pairs = list(zip(claim.charges, levels, strict=True))
            granted = all(level.taken + charge.cost <= charge.limit for charge, level in pairs)
            for charge in claim.charges if granted else ():
                if charge.is_held:
                    row = (charge.subject, charge.kind, claim.id, charge.cost, now + lease)
                    self._connection.execute("INSERT INTO leases VALUES (?, ?, ?, ?, ?)", row)
                else:
                    self._add(charge, charge.cost, now)
            return Taken(granted, levels)

    def renew(self, ids: Sequence[str], lease: int) -> None:
        with self._transaction():
            rows = [(self._now() + lease, id) for id in ids]
            self._connection.executemany("UPDATE leases SET expires = ? WHERE id = ?", rows)

    def settle(self, claim: Claim, used: Sequence[int]) -> None:
        with self._transaction():
            now = self._now()
            if self._connection.execute("DELETE FROM leases WHERE id = ?", (claim.id,)).rowcount:
                for charge, cost in zip(claim.charges, used, strict=True):
                    if charge.is_held:
                        self._add(charge, cost, now)

    def levels(self, charges: Sequence[Charge]) -> tuple[Level, ...]:
        with self._transaction():
            now = self._now()
            return tuple(self._level(charge, now) for charge in charges)

    def _now(self) -> int:
        """The store's time, which goes forward as the machine's clock does, and stays when that is set back."""
        machine = self._clock()
        row = self._connection.execute("SELECT machine, time FROM clock").fetchone()
        if row is None:
            self._connection.execute("INSERT INTO clock VALUES (?, ?)", (machine, machine))
            return machine
        now = int(row[1]) + max(0, machine - int(row[0]))
        self._connection.execute("UPDATE clock SET machine = ?, time = ?", (machine, now))
        return now

    def _settle_lapsed(self, subject: str, now: int) -> None:
        """Settles what nobody renewed as if it had been used, at the time when it lapsed."""
        query = "SELECT kind, cost, expires FROM leases WHERE subject = ? AND expires <= ? ORDER BY expires"
        for kind, cost, expires in self._connection.execute(query, (subject, now)).fetchall():
            lapsed = Charge(subject, kind, 0, cost)
            self._add(lapsed, lapsed.if_lost, expires)
        self._connection.execute("DELETE FROM leases WHERE subject = ? AND expires <= ?", (subject, now))

    def _level(self, charge: Charge, now: int) -> Level:
        query = "SELECT coalesce(sum(cost), 0) FROM leases WHERE subject = ? AND kind = ?"
        (held,) = self._connection.execute(query, (charge.subject, charge.kind)).fetchone()
        value = self._value(charge)
        return Level(max(0, value - now) if charge.is_rate else value, held)

    def _value(self, charge: Charge) -> int:
        query = "SELECT value FROM counters WHERE subject = ? AND kind = ?"
        row = self._connection.execute(query, (charge.subject, charge.kind)).fetchone()
        return int(row[0]) if row else 0

    def _add(self, charge: Charge, cost: int, at: int) -> None:
        value = self._value(charge)
        row = (charge.subject, charge.kind, (max(value, at) if charge.is_rate else value) + cost)
        self._connection.execute("INSERT OR REPLACE INTO counters VALUES (?, ?, ?)", row)


def _record(text: str, revoked: int | None) -> KeyRecord:
    return replace(KeyRecord(**json.loads(text)), revoked=revoked)
