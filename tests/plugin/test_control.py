"""Control files: what a program under `adlocal run` shows, what may be asked of it, and `adlocal status`."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from adlocal import AntidistillationLlama, InputError, Settings
from adlocal.bundle import MINUS_NAME, PLUS_NAME
from adlocal.plugin import Control, control, control_directory, controls
from support.cli import Cli
from support.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")

GUARD, N = 0.05, 16
PROMPT = "a longer one, of some more tokens"

# Each line that it reads is a request: a prompt, or "more", which goes on from what was said.
PROGRAM = """
import json, sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
def take(n):
    return [next(text) for _ in range(n)]
for line in sys.stdin:
    prompt, n = json.loads(line)
    if prompt == "exit":
        break
    if prompt != "more":
        text = llm.generate(llm.tokenize(prompt.encode()), temp=0.0)
    print(json.dumps(take(n)), flush=True)
"""


class Program:
    """A program under protection that answers what it is asked."""

    def __init__(self, words: list[object]) -> None:
        argv = [sys.executable, "-m", "adlocal", "run", *map(str, words)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(argv, text=True, env=variables, **pipes)  # type: ignore[call-overload]

    def ask(self, prompt: str, n: int = N) -> list[int]:
        self.process.stdin.write(json.dumps([prompt, n]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        tokens: list[int] = json.loads(line)
        return tokens

    def end(self) -> str:
        """Lets it end; returns what it complained of."""
        _, said = self.process.communicate(json.dumps(["exit", 0]) + "\n", timeout=60)
        return str(said)


Start = Callable[..., tuple[Program, Control]]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return control_directory(tmp_path / "control")


@pytest.fixture
def start(tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, directory: Path) -> Iterator[Start]:
    """Starts the program with some options of `adlocal run`, and opens its control file once it has one."""
    script, started = tmp_path / "program.py", list[Program]()
    script.write_text(PROGRAM)

    def start(*options: object) -> tuple[Program, Control]:
        own = ["--bundle", tiny_bundle, "--guard", GUARD, "--control", directory, *options, "--"]
        program = Program([*own, sys.executable, script, tiny_llama])
        started.append(program)
        program.ask("x", 1)
        return program, Control.open(directory / f"{program.process.pid}.control")

    yield start
    for program in started:
        program.process.kill()
        program.process.communicate(timeout=60)


class DropIn:
    """What the drop-in says to the prompt, and what it tells of it."""

    def __init__(self, teacher: Path, bundle: Path) -> None:
        kwargs: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
        self.llm = AntidistillationLlama(str(teacher), bundle=bundle, **kwargs)

    def says(self, strength: float, guard: float = GUARD, n: int = N) -> list[int]:
        prompt = self.llm.tokenize(PROMPT.encode())
        with closing(self.llm.generate(prompt, temp=0.0, strength=strength, guard=guard)) as text:
            return [next(text) for _ in range(n)]

    def tells(self, strength: float, n: int) -> Any:
        self.says(strength, n=n)
        return self.llm.last_dose


@pytest.fixture(scope="module")
def drop_in(tiny_llama: Path, tiny_bundle: Path) -> Iterator[DropIn]:
    found = DropIn(tiny_llama, tiny_bundle)
    with closing(found.llm):
        yield found


# Settings


def test_what_is_asked_for_is_in_force_from_the_next_request_on(start: Start, drop_in: DropIn) -> None:
    program, control = start("--strength", 0)
    assert program.ask(PROMPT) == drop_in.says(0.0)
    epoch = control.ask(0, Settings(3.0, GUARD))
    assert control.in_force(0).epoch == 0
    assert program.ask(PROMPT) == drop_in.says(3.0)
    assert control.in_force(0) == control_in_force(3.0, GUARD, epoch)
    control.ask(0, Settings(0.0, GUARD))
    assert program.ask(PROMPT) == drop_in.says(0.0)


def control_in_force(strength: float, guard: float, epoch: int) -> control.InForce:
    return control.InForce(strength, guard, "protect", epoch)


def test_a_request_under_way_keeps_its_own(start: Start, drop_in: DropIn) -> None:
    """What is left of a cancelled request is not given the settings of the one that follows it."""
    program, control = start("--strength", 0)
    control.ask(0, Settings(3.0, GUARD))
    first = program.ask(PROMPT, 6)
    control.ask(0, Settings(0.0, GUARD))
    assert first + program.ask("more", N - 6) == drop_in.says(3.0)
    assert program.ask(PROMPT) == drop_in.says(0.0)


@pytest.mark.parametrize(
    ("strength", "guard", "mode"),
    [
        (0.0, GUARD, "protect"),
        (1.0, GUARD, "protect"),
        (3.0, 1.0, "protect"),
        (9.0, 1.0, "off"),
        (9.0, 0.0, "observe"),
    ],
)
def test_no_less_than_the_program_was_started_with(
    strength: float, guard: float, mode: str, start: Start, drop_in: DropIn
) -> None:
    program, control = start("--strength", 3)
    control.ask(0, Settings(strength, guard), mode)
    assert program.ask(PROMPT) == drop_in.says(3.0)


@pytest.mark.parametrize("floor", [("--strength", 1), ("--strength", 3, "--guard", 1)], ids=["strength", "guard"])
def test_more_than_the_program_was_started_with(floor: tuple[object, ...], start: Start, drop_in: DropIn) -> None:
    program, control = start(*floor)
    assert program.ask(PROMPT) != drop_in.says(3.0)
    control.ask(0, Settings(3.0, GUARD))
    assert program.ask(PROMPT) == drop_in.says(3.0)


def test_the_floor_in_the_file_is_for_show(start: Start, drop_in: DropIn) -> None:
    """Who writes there changes nothing."""
    program, control = start("--strength", 3)
    control._file.floor.strength = 0.0
    control._file.sequences[0].in_force.strength = 0.0
    control.ask(0, Settings(0.0, 1.0))
    assert program.ask(PROMPT) == drop_in.says(3.0)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("strength", math.nan, "out of range"),
        ("strength", -1.0, "out of range"),
        ("guard", 2.0, "out of range"),
        ("mode", 7, "out of range"),
        ("think_state", 3, "out of range"),
        ("epoch", 3, "begun and not finished"),
    ],
)
def test_settings_that_make_no_sense_close_the_rows(
    field: str, value: float, words: str, start: Start, tiny_llama: Path
) -> None:
    program, control = start("--strength", 3)
    control.ask(0, Settings(4.0, GUARD))
    program.ask("y", 1)
    before = control.counters(0)
    setattr(control._file.sequences[0].asked, field, value)
    with closing(llama_cpp.Llama(str(tiny_llama), vocab_only=True, verbose=False)) as vocabulary:
        (token,) = program.ask(PROMPT, 1)
        assert llama_cpp.llama_vocab_is_eog(vocabulary._model.vocab, token)
    assert (control.counters(0) - before).n_closed == 1
    control.ask(0, Settings(4.0, GUARD))  # and it heals
    program.ask("z")
    assert (control.counters(0) - before).n_closed == 1
    assert words in program.end()


# Counters


def test_counters_are_the_drop_ins(start: Start, drop_in: DropIn) -> None:
    """The last token's dose is not known: no program decodes it."""
    program, control = start("--strength", 3)
    before = control.counters(0)
    program.ask(PROMPT)
    found, rows, tokens = control.counters(0) - before, drop_in.tells(3.0, N), drop_in.tells(3.0, N - 1)
    assert (found.n_begun, found.n_rows, found.n_closed) == (1, rows.n_tokens, 0)
    assert 0 < found.n_choices == found.n_evaluated == rows.n_steerable
    assert found.kl == pytest.approx(rows.kl, rel=1e-5)
    assert found.n_dosed == tokens.n_dosed
    assert found.dose == pytest.approx(tokens.total, rel=1e-5)
    assert control.counters() - before == found  # of all sequences
    assert control.begun() == [0]


FAILING = """
import json, os, sys, llama_cpp
from pathlib import Path
from adlocal.plugin import Control
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
try:
    llm.eval(llm.tokenize(b"3 + 4 ="))
except RuntimeError as error:
    control = Control.open(Path(os.environ["ADLOCAL_CONTROL_DIR"]) / f"{os.getpid()}.control")
    row = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
    print(json.dumps([str(error), row[65], control.counters(0).n_rows, control.counters(0).n_closed]))
"""


def test_rows_that_a_proxy_failed_for_are_closed_and_counted(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, directory: Path
) -> None:
    """A weight of the proxies that is no number."""
    bundle, script = shutil.copytree(tiny_bundle, tmp_path / "bundle"), tmp_path / "program.py"
    script.write_text(FAILING)
    for name in (PLUS_NAME, MINUS_NAME):
        (norm,) = (t for t in gguf.GGUFReader(bundle / name, "r+").tensors if t.name == "output_norm.weight")
        norm.data[:] = np.nan
    own = [sys.executable, "-m", "adlocal", "run", "--bundle", bundle, "--strength", 3, "--control", directory, "--"]
    command = list(map(str, [*own, sys.executable, script, tiny_llama]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == ["llama_decode returned -3", -1e9, 0, 1]
    assert "NaN" in done.stderr or "not numbers" in done.stderr


def test_the_layout_is_the_headers(tmp_path: Path) -> None:
    """As a C compiler sees it."""
    structures = {
        "adl_control": control._File,
        "adl_control_settings": control._Settings,
        "adl_control_counters": control._Counters,
        "adl_control_sequence": control._Sequence,
    }
    fields = [(name, field) for name, structure in structures.items() for field, *_ in structure._fields_]
    lines = [f'printf("%zu ", offsetof(struct {name}, {field}));' for name, field in fields]
    lines += [f'printf("%zu ", sizeof(struct {name}));' for name in structures]
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text(
        '#include "adlocal-control.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n'
        + "\n".join(lines)
        + '\nprintf("%s %d %d", ADL_CONTROL_MAGIC, ADL_CONTROL_VERSION, ADL_CONTROL_N_SEQ_MAX);\n}\n'
    )
    subprocess.run(["cc", "-I", ROOT / "native" / "include", "-o", program, source], check=True, timeout=60)
    *numbers, magic, version, n_seq_max = subprocess.run(
        [program], capture_output=True, text=True, timeout=60
    ).stdout.split()
    expected = [getattr(structures[name], field).offset for name, field in fields]
    assert list(map(int, numbers)) == expected + [ctypes.sizeof(each) for each in structures.values()]
    assert (magic.encode(), int(version), int(n_seq_max)) == (control.MAGIC, control.VERSION, control.N_SEQ_MAX)


# Files and adlocal status


def test_status_shows_the_programs_that_live(start: Start, directory: Path, tiny_bundle: Path, cli: Cli) -> None:
    program, _ = start("--strength", 3)
    program.ask(PROMPT)
    (found,) = json.loads(cli("status", "--control", directory, "--json").out)
    assert (found["pid"], found["bundle"]) == (program.process.pid, str(tiny_bundle.resolve()))
    assert found["floor"] == {"strength": 3.0, "guard": GUARD, "mode": "protect", "epoch": 0, "think": None}
    assert found["total"]["n_rows"] == found["sequences"]["0"]["n_rows"] == N + 1
    table = cli("status", "--control", directory).out.splitlines()
    assert [line.split()[0] for line in table[1:]] == [str(program.process.pid), "0"]
    assert f"{N + 1}" in table[1]
    program.end()
    assert cli("status", "--control", directory).out == "no program runs under adlocal run\n"
    assert list(directory.iterdir()) == []


def test_status_of_a_program_that_is_not_there(directory: Path, cli: Cli) -> None:
    done = cli("status", "--control", directory, "1")
    assert (done.status, done.err) == (
        2,
        "adlocal status: 1: no program under adlocal run has this number; see adlocal status\n",
    )


def test_what_a_killed_program_left_is_removed(start: Start, directory: Path) -> None:
    program, _ = start()
    (path,) = directory.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.pid for each in controls(directory)] == [program.process.pid]
    program.process.send_signal(signal.SIGKILL)
    program.process.communicate(timeout=60)
    assert path.exists()
    assert controls(directory) == []
    assert not path.exists()


def test_a_directory_where_others_may_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(InputError, match="others may write there"):
        control_directory(shared)


def test_what_no_sequence_can_be_asked_for_is_refused(start: Start) -> None:
    _, control = start()
    with pytest.raises(InputError, match="mode='none': give one of off, observe, protect"):
        control.ask(0, Settings(), "none")
    with pytest.raises(InputError, match="seq_id=256: give one from 0 to 255"):
        control.ask(256, Settings())


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "1.control"
    path.write_bytes(b"adlctrl\0" + (9).to_bytes(4, "little") + bytes(ctypes.sizeof(control._File)))
    with pytest.raises(InputError, match="a control file of version 9, and this adlocal knows version 2"):
        Control.open(path)
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="not a control file of adlocal"):
        Control.open(path)


def test_a_directory_that_goes_away_takes_no_protection_along(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, drop_in: DropIn
) -> None:
    """The library is told of one that is not there, as `adlocal run` never does."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    own = ["--bundle", tiny_bundle, "--guard", GUARD, "--strength", 3, "--control", tmp_path / "control", "--"]
    gone = ["sh", "-c", f'rmdir {tmp_path / "control"}; exec "$@"', "sh"]
    program = Program([*own, *gone, sys.executable, script, tiny_llama])
    assert program.ask(PROMPT) == drop_in.says(3.0)
    assert "no control file can be made there (No such file or directory)" in program.end()
