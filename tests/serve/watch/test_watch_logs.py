"""What outlives the process, and what two nodes know of each other."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adlocal.errors import AdlocalError, InputError
from adlocal.serve.watch import Capacity, Level, Observation, Outcome, Row, Watch, WatchSettings, open_log
from adlocal.serve.watch.logs import FILE
from adlocal.serve.watch.records import Admitted, Reset, decode, encode
from support.stores import KINDS, place

START = time.time() - 3000
WRITER = """
import asyncio, sys, time
from adlocal.serve.watch import Observation, Outcome, Watch, open_log

async def main():
    watch = Watch(log=open_log(sys.argv[1], 50_000))
    await watch.open()
    i = 0
    while True:
        text = "Solve this problem step by step and explain all of your reasoning: %d apples of %d" % (i, i * i)
        now = float(sys.argv[2]) + 10 * i
        level = await watch.admit(Observation(now, "h", "o", reasoning=True, temperature=0.0, prompt=text))
        await watch.finished(Outcome(now + 5, "h", "o", None, 700, 700, 400, 90.0))
        i += 1
        print(i, level.position, time.monotonic(), flush=True)
        await asyncio.sleep(0.01)

asyncio.run(main())
"""


@pytest.fixture(params=KINDS)
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with place(request.param, tmp_path) as found:
        yield found.state


async def opened(state: str, settings: WatchSettings | None = None) -> Watch:
    settings = settings or WatchSettings()
    watch = Watch(settings, open_log(state, settings.capacity.records))
    await watch.open()
    return watch


async def harvest(watch: Watch, n: int, first: int = 0) -> Level:
    level = Level()
    for i in range(first, first + n):
        now = START + 10 * i
        text = f"Solve this problem step by step and explain all of your reasoning: {i} apples and {i * i} pears"
        each = Observation(now, "h", "o", reasoning=True, temperature=0.0, prompt=text, prompt_tokens=50)
        level = await watch.admit(each)
        await watch.finished(Outcome(now + 5, "h", "o", None, 700, 700, 400, 90.0))
    return level


def timed(rows: list[Row]) -> list[tuple[str, int, int, float, float]]:
    return [(row.subject, row.requests, row.tokens, round(row.score, 6), round(row.position, 6)) for row in rows]


def test_a_restart_changes_nothing(state: str) -> None:
    async def use() -> tuple[list[Row], list[Row], Level]:
        watch = await opened(state)
        await harvest(watch, 60)
        before = watch.table(START + 600)
        await watch.close()
        again = await opened(state)
        after = again.table(START + 600)
        level = await harvest(again, 1, first=60)
        await again.close()
        return before, after, level

    before, after, level = asyncio.run(asyncio.wait_for(use(), 60))
    assert timed(after) == timed(before)
    assert max(row.position for row in before) > 0.5
    assert level.position > 0.5


def test_two_nodes_see_the_same(state: str) -> None:
    async def use() -> tuple[Level, Level, list[Row], list[Row]]:
        first, second = await opened(state), await opened(state)
        one = await harvest(first, 40)
        await asyncio.sleep(1.5)
        two = await harvest(second, 1, first=40)
        await asyncio.sleep(1.5)
        rows = first.table(START + 500), second.table(START + 500)
        await first.close()
        await second.close()
        return one, two, *rows

    one, two, ours, theirs = asyncio.run(asyncio.wait_for(use(), 60))
    assert one.position > 0.3
    assert two.position >= one.position
    assert timed(ours) == timed(theirs)
    assert {row.requests for row in ours} == {41}


def test_a_reset_reaches_the_nodes(state: str) -> None:
    async def use() -> tuple[list[str], Level]:
        first, second = await opened(state), await opened(state)
        await harvest(first, 60)
        await asyncio.sleep(1.5)
        await second.reset("key:h", START + 700)
        await second.reset("owner:o", START + 700)
        await asyncio.sleep(1.5)
        rows = [row.subject for row in first.table(START + 700)]
        level = await harvest(first, 1, first=70)
        await first.close()
        await second.close()
        return rows, level

    rows, level = asyncio.run(asyncio.wait_for(use(), 60))
    assert rows == ["all"]
    assert level.position == 0


def test_kill_9_loses_at_most_the_last_second(state: str) -> None:
    """A node that reads the log afterwards knows all but what was said in the last second."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, state, str(START)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        watchdog = time.monotonic() + 60
        lines: list[str] = []
        try:
            while time.monotonic() < watchdog and len(lines) < 150:
                lines.append(process.stdout.readline())
            os.kill(process.pid, signal.SIGKILL)
            lines += process.stdout.readlines()
        finally:
            process.kill()
    said = [
        (int(n), float(position), float(when))
        for n, position, when in (line.split() for line in lines if line.count(" ") == 2)
    ]
    sure = [n for n, _, when in said if when < said[-1][2] - 1.0]

    async def known() -> list[Row]:
        watch = await opened(state)
        rows = watch.table(START + 10 * said[-1][0])
        await watch.close()
        return rows

    row = next(row for row in asyncio.run(asyncio.wait_for(known(), 60)) if row.subject == "key:h")
    assert sure, "the writer was too slow to say anything"
    assert sure[-1] <= row.requests <= said[-1][0]
    position = {n: position for n, position, _ in said}[row.requests]
    assert row.position == pytest.approx(position)


def test_the_log_is_bounded(tmp_path: Path) -> None:
    async def use() -> None:
        watch = await opened(str(tmp_path), WatchSettings(capacity=Capacity(records=50)))
        for _ in range(3):
            await harvest(watch, 40)
            await watch.write()
        await watch.close()

    asyncio.run(asyncio.wait_for(use(), 60))
    connection = sqlite3.connect(tmp_path / FILE)
    assert connection.execute("SELECT count(*) FROM log").fetchone() == (50,)
    assert "apples" not in str(connection.execute("SELECT record FROM log").fetchall())
    connection.close()
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


def test_a_log_that_fails_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the database is locked the watch goes on, says so once, and writes it all later."""

    async def use() -> tuple[Level, int]:
        watch = await opened(str(tmp_path))
        lock = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        level = await harvest(watch, 40)
        for _ in range(2):
            with pytest.raises(AdlocalError, match="state cannot be used"):
                await watch.write()
        lock.execute("COMMIT")
        lock.close()
        await watch.close()
        again = await opened(str(tmp_path))
        n = next(row.requests for row in again.table(START + 400) if row.subject == "all")
        await again.close()
        return level, n

    level, n = asyncio.run(asyncio.wait_for(use(), 120))
    assert level.position > 0
    assert n == 40
    assert len([record for record in caplog.records if "goes on in memory" in record.message]) == 1


def test_records_come_back_as_they_were() -> None:
    admitted = Admitted.of(Observation(1.5, "k", "ö", "u", prompt="text", reasoning=True, temperature=0.1))
    for record in (Outcome(2.0, "k", "o", None, 3, 4, 2, -0.5), Reset(3.0, "key:k")):
        assert decode(encode("node", record)) == ("node", record)
    known = decode(encode("node", admitted))
    assert known is not None
    assert isinstance(known[1], Admitted)
    assert known[1].sketch.to_bytes() == admitted.sketch.to_bytes()
    assert (known[1].owner, known[1].cool, known[1].reasoning) == ("ö", True, True)
    for spoiled in (b"", b"{}\n", b"x\n", encode("node", admitted)[:-7], b'{"node":"a","record":"later"}\n'):
        assert decode(spoiled) is None


@pytest.mark.parametrize("state", ["http://x", "redis://:secret@localhost:x/0"])
def test_a_place_that_is_none_is_refused_without_its_password(state: str) -> None:
    with pytest.raises(InputError) as error:
        open_log(state, 100)
    assert "redis://HOST" in str(error.value)
    assert "secret" not in str(error.value)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no state can be kept there"):
        open_log(str(tmp_path / "file" / "state"), 100)
