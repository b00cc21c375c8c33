"""The `adlocal` command, run in the process of a test."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from adlocal.cli import main


class Done(NamedTuple):
    """How a command ended: its exit status, and what it wrote to stdout and stderr."""

    status: int
    out: str
    err: str

    def message(self) -> str:
        """The last line of stderr, without what progress bars left on it."""
        return self.err.rstrip("\n").splitlines()[-1].rpartition("\r")[2]


#: Runs the command with these words.
Cli = Callable[..., Done]


@contextmanager
def runner(capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """The command in this process, whose handler of SIGTERM it takes: it is made to own its process."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*argv: object) -> Done:
        try:
            status = main([str(part) for part in argv])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        captured = capfd.readouterr()
        return Done(status, captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, before)


def refused(done: Done, verb: str, *words: str, status: int = 2) -> None:
    """One line on stderr that begins with the verb and says these words, and nothing on stdout."""
    assert done.status == status, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if line.startswith("adlocal")]
    assert lines == [done.message()], done.err
    assert done.message().startswith(f"adlocal {verb}: ")
    for word in words:
        assert word in done.message()


def only_line(done: Done) -> None:
    """Nothing else is on stderr, no progress bar and no line of llama.cpp's."""
    assert done.err.count("\n") == 1, done.err
