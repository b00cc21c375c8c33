"""Engines that others made, where `make test-server` puts them, and what they are asked."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support import tiny
from support.client import Client
from support.paths import ROOT

ENGINES = ROOT / "build" / "engines"
STRENGTH, N = 3.0, 16
PROMPTS = [[tiny.BOS, *text] for text in (b"3 + 4 =", b"a longer one, of some more tokens", b"x", b"and one more")]


class Server(Client):
    """An HTTP server of a process."""

    def __init__(self, process: subprocess.Popen[str], address: str, log: Path) -> None:
        self.process = process
        self.address = address
        self.log = log

    def end(self, by: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status, negative for a signal."""
        self.process.send_signal(by)
        return self.process.wait(60)


@contextmanager
def serving(
    command: Sequence[object], log: Path, environment: dict[str, str] | None = None, seconds: float = 150
) -> Iterator[Server]:
    """A server, from the line on which it says where it listens. It is killed after so many seconds."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    argv = list(map(str, command))
    with (
        open(log, "w", encoding="utf-8") as err,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err, text=True, env=variables) as process,
    ):
        limit = threading.Timer(seconds, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "listening on " in line, log.read_text(encoding="utf-8", errors="replace")[-2000:]
            yield Server(process, line.rpartition(" ")[2].strip(), log)
        finally:
            limit.cancel()
            process.kill()
