"""`adlocal watch`: the table, calibrate, reset; and that it needs no llama.cpp."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adlocal.commands import watch as command
from adlocal.commands.verb import Parser
from adlocal.commands.watch_verbs import add_watch
from adlocal.errors import InputError
from adlocal.serve.watch import Observation, Outcome, Row, Watch, open_log, read_baseline


def call(*argv: object) -> None:
    parser = Parser(prog="adlocal")
    add_watch(parser.add_subparsers(dest="verb", required=True))
    args = parser.parse_args(["watch", *map(str, argv)])
    args.handler(args)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Of a gateway that served two keys a minute ago."""

    async def fill() -> None:
        watch = Watch(log=open_log(tmp_path, 1000))
        await watch.open()
        now = time.time() - 1200
        for i in range(80):
            key = f"k{i % 2}"
            await watch.admit(Observation(now + 10 * i, key, "me", prompt=f"What is {i} and {i * i} in words?"))
            await watch.finished(Outcome(now + 10 * i + 5, key, "me", None, 100, 100, 30, 5.0))
        await watch.close()

    asyncio.run(asyncio.wait_for(fill(), 60))
    return tmp_path


def test_the_table(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("--state", state)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["subject", "owner", "requests", "tokens", "score", "level", "signals"]
    cells = {line.split()[0]: line.split() for line in lines[1:]}
    assert set(cells) == {"key:k0", "key:k1", "owner:me", "all"}
    assert cells["key:k0"][1:4] == ["me", "40", "4,000"]


def test_as_json(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("--state", state, "--json")
    rows = json.loads(capsys.readouterr().out)
    assert {row["subject"]: row["requests"] for row in rows}["all"] == 80
    assert set(rows[0]) == set(Row.__dataclass_fields__)


def test_calibrate_from_what_was_recorded(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("calibrate", "--state", state, "--out", tmp_path / "b.toml")
    baseline = read_baseline(tmp_path / "b.toml")
    assert set(baseline) == {600, 3600, 86_400}
    assert baseline[600]["reasoning"].median == 0
    assert baseline[600]["rate"].median > 2.5
    call("--state", state, "calibrate")
    assert capsys.readouterr().out == (tmp_path / "b.toml").read_text()
    call("--state", state, "--baseline", tmp_path / "b.toml")
    assert "key:k0" in capsys.readouterr().out


def test_calibrate_from_a_file(tmp_path: Path) -> None:
    each = {"key": "k", "temperature": 0.0, "completion_tokens": 1000, "user": None}
    lines = [{**each, "time": 1e9 + 30 * i, "prompt": f"Tell me of {i}"} for i in range(100)]
    path = tmp_path / "o.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    call("calibrate", "--from", path, "--out", tmp_path / "b.toml")
    found = read_baseline(tmp_path / "b.toml")[600]
    assert (found["cool"].median, found["long"].median) == (1, 1)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "line 2: give an object with time, key and prompt"),
        ('{"time": 1, "key": "k"}', "line 2: give an object"),
        ('{"time": "1", "key": "k", "prompt": ""}', "line 2: time='1'; give a number"),
        ('{"time": 1, "key": 5, "prompt": ""}', "line 2: key=5; give a text"),
    ],
)
def test_a_line_that_is_no_observation_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text('{"time": 1, "key": "k", "prompt": "p"}\n' + line + "\n")
    with pytest.raises(InputError) as error:
        call("calibrate", "--from", path)
    assert told in str(error.value)


def test_too_little_to_calibrate_on_is_said(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text('{"time": 1, "key": "k", "prompt": "p"}\n')
    with pytest.raises(InputError, match="1 records are too few"):
        call("calibrate", "--from", path)


def test_reset_forgets_a_subject(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("reset", "key:k0", "--state", state)
    call("--state", state, "--json")
    assert {row["subject"] for row in json.loads(capsys.readouterr().out)} == {"key:k1", "owner:me", "all"}
    with pytest.raises(InputError, match="key:k0: the watch has not seen it"):
        call("reset", "key:k0", "--state", state)


def test_a_place_without_a_watch_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no watch has kept its state there"):
        call("--state", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.describe([]) == "nobody has asked anything in the last day"


def test_it_needs_neither_llama_cpp_nor_redis(state: Path) -> None:
    program = (
        "import sys; sys.modules.update(llama_cpp=None, redis=None, torch=None)\n"
        "from adlocal.commands.verb import Parser\n"
        "from adlocal.commands.watch_verbs import add_watch\n"
        "parser = Parser(prog='adlocal'); add_watch(parser.add_subparsers(dest='verb'))\n"
        "args = parser.parse_args(['watch', '--state', sys.argv[1]]); args.handler(args)\n"
    )
    how = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", program, str(state)], **how, env=dict(os.environ), check=False)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert "key:k0" in done.stdout
