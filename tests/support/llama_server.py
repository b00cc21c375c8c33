"""A llama-server that a test starts and asks, plain or under `adlocal run`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llama_server import server

from .client import Client, Refused

#: Threads and batches as the drop-in has them, nothing on a device, nothing from a network.
HOW = ("-t", 1, "-tb", 1, "-ngl", 0, "--no-warmup", "--offline", "--no-ui")
N_CTX = 256
START_SECONDS = 60


class Server(Client):
    """One llama-server, from the `with` to its end.

    Args:
        arguments: llama-server's, beside `HOW`.
        bundle: protects it under `adlocal run`; None leaves it plain.
        options: of `adlocal run`.
        n_parallel: slots, of N_CTX tokens each.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        bundle: Path | None,
        options: Sequence[object] = (),
        *,
        n_parallel: int = 1,
        log: Path,
    ) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        own = [sys.executable, "-m", "adlocal", "run", "--bundle", bundle, *options, "--"] if bundle else []
        slots = ("-c", N_CTX * n_parallel, "-np", n_parallel)
        self.command = [*own, server(), *HOW, *slots, "--host", "127.0.0.1", "--port", self.port, *arguments]
        self.log = log

    def __enter__(self) -> Server:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(map(str, self.command)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited, "OMP_NUM_THREADS": "1"},
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """Ends it without a word."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(START_SECONDS)

    def said(self) -> str:
        """What it has written."""
        return self.log.read_text(errors="replace")

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with status {self.process.returncode}:\n{self.said()[-3000:]}")
            try:
                self.ask("/health")
                return
            except (OSError, Refused):  # it does not listen yet, or loads
                time.sleep(0.05)
        raise AssertionError(f"does not answer after {START_SECONDS} s:\n{self.said()[-3000:]}")


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
