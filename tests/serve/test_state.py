"""Both stores: keys and counters are kept, by several processes, through kill -9 and a clock that is set back."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adlocal.errors import AdlocalError, InputError
from adlocal.serve.state import UNLIMITED, Charge, Claim, KeyRecord, Kind, Store, default_directory, open_store
from adlocal.serve.state.sqlite import SqliteStore
from support.stores import KINDS, Clock, Place, place

SECOND = 1_000_000
MINUTE = 60 * SECOND
LEASE = 30 * SECOND
KEY = KeyRecord("abcd1234", "alice", "default", 1000, expires=5000, trusted=True, budget_tokens=7, note="a note")


@pytest.fixture(params=KINDS)
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A place with nothing in it yet."""
    with place(request.param, tmp_path) as found:
        yield found


def charge(kind: Kind, cost: int, limit: int = UNLIMITED, subject: str = "key:a") -> Charge:
    return Charge(subject, kind, limit, cost)


def claim(id: str, *charges: Charge) -> Claim:
    return Claim(id, charges or (charge("budget_tokens", 10, 100), charge("max_parallel", 1, 2)))


async def taken(store: Store, kind: Kind, subject: str = "key:a") -> tuple[int, int]:
    """What is settled and held."""
    (level,) = await store.levels([charge(kind, 0, subject=subject)])
    return level.settled, level.held


# Keys.


def test_keys_are_kept_as_they_are_given(there: Place) -> None:
    other = KeyRecord("zzzz0000", "bob", "gold", 900, declared="evaluation", operator=True)

    async def add(store: Store) -> None:
        assert await store.add_key(KEY, "digest")
        assert await store.add_key(other, "another")

    async def look(store: Store) -> None:
        assert await store.key("abcd1234") == (KEY, "digest")
        assert await store.key("nothing0") is None
        assert await store.keys() == [other, KEY]

    there.run(add)
    there.run(look)


def test_an_id_is_given_once(there: Place) -> None:
    async def use(store: Store) -> None:
        assert await store.add_key(KEY, "digest")
        assert not await store.add_key(replace(KEY, owner="eve"), "another")
        assert await store.key(KEY.id) == (KEY, "digest")

    there.run(use)


def test_a_key_stays_revoked_since_the_first_time(there: Place) -> None:
    async def use(store: Store) -> None:
        await store.add_key(KEY, "digest")
        assert await store.revoke_key(KEY.id, 2000)
        assert await store.revoke_key(KEY.id, 3000)
        assert not await store.revoke_key("nothing0", 2000)
        assert await store.key(KEY.id) == (replace(KEY, revoked=2000), "digest")
        assert await store.keys() == [replace(KEY, revoked=2000)]

    there.run(use)


def test_the_first_mark_of_a_pepper_is_kept(there: Place) -> None:
    async def use(store: Store) -> None:
        assert await store.pepper_mark(None) is None
        assert await store.pepper_mark("one") == "one"
        assert await store.pepper_mark("two") == "one"
        assert await store.pepper_mark(None) == "one"

    there.run(use)


# Claims.


def test_a_claim_is_held_until_it_is_settled_and_that_once(there: Place) -> None:
    async def use(store: Store) -> None:
        asked = claim("r1")
        assert (await store.reserve(asked, LEASE)).granted
        assert await taken(store, "budget_tokens") == (0, 10)
        assert await taken(store, "max_parallel") == (0, 1)
        await store.settle(asked, [4, 0])
        await store.settle(asked, [9, 0])
        assert await taken(store, "budget_tokens") == (4, 0)
        assert await taken(store, "max_parallel") == (0, 0)

    there.run(use)


def test_all_of_a_claim_is_taken_or_nothing(there: Place) -> None:
    async def use(store: Store) -> None:
        asked = claim("r1", charge("budget_tokens", 10), charge("budget_tokens", 10, 9, "owner:o"))
        found = await store.reserve(asked, LEASE)
        assert not found.granted
        assert [level.taken for level in found.levels] == [0, 0]
        assert await taken(store, "budget_tokens") == (0, 0)
        await store.settle(asked, [10, 10])
        assert await taken(store, "budget_tokens") == (0, 0)

    there.run(use)


@pytest.mark.parametrize("over", [0, 1])
def test_a_limit_may_be_reached_and_not_passed(there: Place, over: int) -> None:
    async def use(store: Store) -> None:
        settled, held = (claim(id, charge("budget_tokens", 30, 100 - over)) for id in ("r1", "r2"))
        asked = claim("r3", charge("budget_tokens", 40, 100 - over))
        await store.reserve(settled, LEASE)
        await store.settle(settled, [30])
        await store.reserve(held, LEASE)
        found = await store.reserve(asked, LEASE)
        assert found.granted == (over == 0)
        assert (found.levels[0].settled, found.levels[0].held) == (30, 30)

    there.run(use)


def test_a_rate_is_refilled_a_microsecond_in_each(there: Place) -> None:
    clock = Clock()

    async def use(store: Store) -> None:
        asked = claim("r1", charge("tokens_per_minute", 40 * SECOND, MINUTE), charge("max_parallel", 1))
        await store.reserve(asked, LEASE)
        clock.pass_seconds(10)
        assert await taken(store, "tokens_per_minute") == (0, 40 * SECOND)  # held ones are not
        await store.settle(asked, [15 * SECOND, 0])
        clock.pass_seconds(4)
        assert await taken(store, "tokens_per_minute") == (11 * SECOND, 0)
        clock.pass_seconds(100)
        assert await taken(store, "tokens_per_minute") == (0, 0)

    there.run(use, clock)


def test_requests_count_at_once(there: Place) -> None:
    clock = Clock()

    async def use(store: Store) -> None:
        asked = claim("r1", charge("requests_per_minute", 20 * SECOND, MINUTE), charge("max_parallel", 1))
        await store.reserve(asked, LEASE)
        assert await taken(store, "requests_per_minute") == (20 * SECOND, 0)
        await store.settle(asked, [20 * SECOND, 0])
        assert await taken(store, "requests_per_minute") == (20 * SECOND, 0)

    there.run(use, clock)


def test_what_nobody_renews_lapses_and_counts_as_used_then(there: Place) -> None:
    clock = Clock()

    async def use(store: Store) -> None:
        first = claim("r1", charge("tokens_per_minute", 50 * SECOND, MINUTE), *claim("").charges)
        await store.reserve(first, LEASE)
        clock.pass_seconds(40)  # lapsed 10 seconds ago
        await store.reserve(claim("r2", charge("max_parallel", 1, 1)), LEASE)
        assert await taken(store, "tokens_per_minute") == (40 * SECOND, 0)
        assert await taken(store, "budget_tokens") == (10, 0)
        assert await taken(store, "max_parallel") == (0, 1)
        await store.settle(first, [0, 0, 0])
        assert await taken(store, "budget_tokens") == (10, 0)

    there.run(use, clock)


def test_what_is_renewed_does_not_lapse(there: Place) -> None:
    clock = Clock()

    async def use(store: Store) -> None:
        await store.reserve(claim("r1"), LEASE)
        clock.pass_seconds(20)
        await store.renew([claim("r1"), claim("never")], LEASE)
        clock.pass_seconds(20)
        found = await store.reserve(claim("r2", charge("max_parallel", 1, 1)), LEASE)
        assert not found.granted
        await store.settle(claim("r1"), [3, 0])
        await store.renew([claim("r1")], LEASE)
        assert await taken(store, "budget_tokens") == (3, 0)
        assert await taken(store, "max_parallel") == (0, 0)

    there.run(use, clock)


def test_time_goes_on_from_where_a_clock_was_set_back(there: Place) -> None:
    clock = Clock()

    async def use(store: Store) -> None:
        await store.reserve(claim("r1", charge("requests_per_minute", MINUTE, MINUTE)), LEASE)
        clock.pass_seconds(-3600)
        assert await taken(store, "requests_per_minute") == (MINUTE, 0)
        clock.pass_seconds(20)
        assert await taken(store, "requests_per_minute") == (40 * SECOND, 0)

    there.run(use, clock)


def test_levels_are_kept_while_nobody_runs(there: Place) -> None:
    clock = Clock()

    async def take(store: Store) -> None:
        await store.reserve(claim("r1", charge("requests_per_minute", MINUTE, MINUTE), *claim("").charges), LEASE)
        await store.settle(
            claim("r1", charge("requests_per_minute", MINUTE, MINUTE), *claim("").charges), [MINUTE, 6, 0]
        )

    async def look(store: Store) -> None:
        assert await taken(store, "requests_per_minute") == (50 * SECOND, 0)
        assert await taken(store, "budget_tokens") == (6, 0)

    there.run(take, clock)
    clock.pass_seconds(10)
    there.run(look, clock)


def test_redis_takes_a_script_that_it_has_run_already_as_done(tmp_path: Path) -> None:
    """Its client sends a script again if the answer was lost."""

    async def use(store: Store) -> None:
        asked = claim("r1", charge("requests_per_minute", SECOND, MINUTE), charge("max_parallel", 1, 1))
        assert (await store.reserve(asked, LEASE)).granted
        assert (await store.reserve(asked, LEASE)).granted
        assert (await taken(store, "requests_per_minute"))[0] <= SECOND
        assert await taken(store, "max_parallel") == (0, 1)

    with place("redis", tmp_path) as there:
        there.run(use)


# Several at once.

RESERVING = """
import asyncio, sys
from adlocal.serve.state import Charge, Claim, open_store

async def main(name, n, budget):
    store = await open_store(sys.argv[1])
    async def one(i):
        charges = (Charge("key:a", "budget_tokens", budget, 7), Charge("owner:o", "max_parallel", 40, 1))
        return (await store.reserve(Claim(f"{name}-{i}", charges), 60_000_000)).granted
    print("ready", flush=True)
    sys.stdin.readline()
    print(sum(await asyncio.gather(*(one(i) for i in range(n)))), flush=True)
    await store.close()

asyncio.run(main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


@pytest.mark.parametrize(("budget", "most"), [(7 * 33 + 6, 33), (10_000, 40)])
def test_two_processes_never_take_more_than_there_is(there: Place, budget: int, most: int) -> None:
    how = [sys.executable, "-c", RESERVING, there.state]
    both = [
        subprocess.Popen([*how, name, "60", str(budget)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for each in both:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in both:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    assert sum(int(each.communicate(timeout=60)[0]) for each in both) == most


COUNTING = """
import asyncio, itertools, sys
from adlocal.serve.state import Charge, Claim, open_store

async def main():
    store = await open_store(sys.argv[1])
    for i in itertools.count(1):
        claim = Claim(f"r{i}", (Charge("key:a", "budget_tokens", 2**50, 100), Charge("key:a", "max_parallel", 9, 1)))
        assert (await store.reserve(claim, 2_000_000)).granted
        print("held", i, flush=True)
        await store.settle(claim, [3, 0])
        print("settled", i, flush=True)

asyncio.run(main())
"""


def test_nothing_that_was_acknowledged_is_lost_by_kill_9(there: Place) -> None:
    process = subprocess.Popen([sys.executable, "-c", COUNTING, there.state], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:  # to its end: what it said before it was killed counts
        if line == "settled 150\n":
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    what, n = line.split()

    async def look(store: Store) -> None:
        await asyncio.sleep(0.3)  # Redis reads what the process had sent
        settled, held = await taken(store, "budget_tokens")
        done = int(n) if what == "settled" else int(n) - 1
        assert settled in (3 * done, 3 * (done + 1))  # one more may have been made, and not said
        assert held in (0, 100)
        if what == "held":
            assert held == 100 or settled == 3 * (done + 1)
        await asyncio.sleep(2.1)  # the lease ends
        await store.reserve(claim("next", charge("max_parallel", 1, 1)), LEASE)
        assert await taken(store, "budget_tokens") == (settled + held, 0)
        assert await taken(store, "max_parallel") == (0, 1)

    there.run(look)


def test_many_processes_make_one_database(tmp_path: Path) -> None:
    code = "import asyncio, sys; from adlocal.serve.state import open_store; asyncio.run(open_store(sys.argv[1]))"
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "state")]) for _ in range(4)]
    assert [each.wait(60) for each in started] == [0] * 4


# What is refused.


def opened(state: str | Path | None) -> None:
    async def use() -> None:
        await (await open_store(state)).close()

    asyncio.run(use())


def test_another_schema_is_refused(there: Place) -> None:
    async def spoil(store: Store) -> None:
        if isinstance(store, SqliteStore):
            with sqlite3.connect(Path(there.state) / "state.sqlite3") as connection:
                connection.execute("PRAGMA user_version=2")
        else:
            from redis.asyncio import Redis

            async with Redis.from_url(there.state) as client:
                await client.set("adlocal:schema", 2)

    there.run(spoil)
    with pytest.raises(InputError, match="has schema 2 and this adlocal knows 1; use the adlocal that wrote it"):
        opened(there.state)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite3").write_bytes(b"no database " * 100)
    with pytest.raises(InputError, match=r"state\.sqlite3: file is not a database; give another directory"):
        opened(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: File exists; give a directory"):
        opened(tmp_path / "file")


def test_other_addresses_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"state postgres://\.\.\.: give a directory, or an address that begins redis://"
    ):
        opened("postgres://user:pass@host")


def test_a_server_that_does_not_answer_is_told_without_its_password() -> None:
    with pytest.raises(AdlocalError, match=r"state redis://127\.0\.0\.1:9/0: .*is the Redis server running") as told:
        opened("redis://user:word@127.0.0.1:9/0")
    assert "word" not in str(told.value)


def test_redis_without_its_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "adlocal.serve.state.redis", raising=False)
    with pytest.raises(InputError, match=r"pip install 'adlocal\[redis\]'"):
        opened("redis://127.0.0.1:9/0")


def test_a_store_that_is_locked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adlocal.serve.state.database._BUSY_SECONDS", 0.1)

    async def use(store: Store) -> None:
        other = sqlite3.connect(tmp_path / "state.sqlite3", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(AdlocalError, match="database is locked; is the disk full, or another program using it"):
            await store.reserve(claim("r1"), LEASE)
        other.execute("ROLLBACK")
        assert (await store.reserve(claim("r1"), LEASE)).granted

    Place(str(tmp_path)).run(use)


def test_a_store_with_too_many_calls_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adlocal.serve.state.sqlite.MOST_WAITING", 3)

    async def use(store: Store) -> None:
        found = await asyncio.gather(*(store.keys() for _ in range(5)), return_exceptions=True)
        assert [type(each) for each in found] == [list, list, list, AdlocalError, AdlocalError]
        assert await store.keys() == []

    Place(str(tmp_path)).run(use)


# Files.


def test_state_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "own"))
    before = os.umask(0)
    try:
        store = asyncio.run(open_store(None))
    finally:
        os.umask(before)
    directory = tmp_path / "own" / "adlocal"
    assert default_directory() == directory
    assert directory.stat().st_mode & 0o777 == 0o700
    files = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert files == dict.fromkeys(("state.sqlite3", "state.sqlite3-shm", "state.sqlite3-wal"), 0o600)
    asyncio.run(store.close())


def test_the_default_directory_is_in_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".local" / "state" / "adlocal"


def test_the_clock_is_the_machines(tmp_path: Path) -> None:
    async def use(store: Store) -> None:
        await store.reserve(claim("r1", charge("requests_per_minute", MINUTE, MINUTE)), LEASE)
        began = time.monotonic()
        await asyncio.sleep(0.2)
        settled, _ = await taken(store, "requests_per_minute")
        assert 0.15 * SECOND < MINUTE - settled < (time.monotonic() - began + 0.5) * SECOND

    for kind in KINDS:
        with place(kind, tmp_path) as there:
            there.run(use)
