"""`adlocal serve` in a process of its own, before a real engine, as tests ask it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from adlocal.plugin import Control
from support.engines import Server, serving

COMMAND = [sys.executable, "-m", "adlocal", "serve"]
ALONE = ["-t", 1, "--port", 0]
SECONDS = 60.0


class Gateway:
    """One that runs.

    Attributes:
        url: where it listens.
        server: its process.
        directory: of its own: configuration, state, log, and temporary files.
    """

    def __init__(self, server: Server, directory: Path) -> None:
        self.server, self.directory, self.url = server, directory, server.address

    def client(self, key: str | None = None, **headers: str) -> httpx2.Client:
        """One of HTTP, with a key."""
        own = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers={**own, **headers}, timeout=SECONDS, trust_env=False)

    def post(self, path: str, body: Any, key: str | None = None, **headers: str) -> httpx2.Response:
        """The whole answer to a POST."""
        with self.client(key, **headers) as client:
            return client.post(path, json=body)

    def get(self, path: str, key: str | None = None) -> httpx2.Response:
        """The whole answer to a GET."""
        with self.client(key) as client:
            return client.get(path)

    def chat(self, text: str = "Hi", n: int = 8, key: str | None = None, **fields: Any) -> httpx2.Response:
        """The answer to one message."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": n, **fields}
        return self.post("/v1/chat/completions", body, key)

    def control(self) -> Control:
        """The control file of its engine."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            found = sorted(self.directory.glob("adlocal-serve-*/*.control"), key=lambda path: path.stat().st_mtime)
            if found:
                return Control.open(found[-1])
            time.sleep(0.05)
        raise AssertionError(f"no control file appeared under {self.directory}")

    def records(self, event: str = "answered") -> list[dict[str, Any]]:
        """What its log says of one kind of event."""
        found = []
        for line in self.server.log.read_text(encoding="utf-8").splitlines():
            if line.startswith("{"):
                record = json.loads(line)
                if record["event"] == event:
                    found.append(record)
        return found

    def n_records(self) -> int:
        """How many requests have been answered, once the last one's end is in the log: it comes after the answer."""
        n = -1
        while n != (n := len(self.records())):
            time.sleep(0.3)
        return n

    def wait_for_record(self, n: int, event: str = "answered") -> list[dict[str, Any]]:
        """The same, once there are as many."""
        self.wait_until(lambda: len(self.records(event)) >= n)
        return self.records(event)

    def wait_until(self, found: Any, seconds: float = SECONDS) -> Any:
        """What a function gives, once that is true."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := found():
                return value
            time.sleep(0.02)
        raise AssertionError(f"nothing came within {seconds} s; the log ends: {self.log_tail()}")

    def log_tail(self) -> str:
        """The end of its log."""
        return self.server.log.read_text(encoding="utf-8")[-3000:]

    def end(self, by: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status."""
        return self.server.end(by)


@contextmanager
def gateway(
    model: Path,
    bundle: Path,
    directory: Path,
    *options: object,
    config: str = "",
    environment: Mapping[str, str] | None = None,
    seconds: float = 240,
) -> Iterator[Gateway]:
    """Starts one, with state under `directory`, and ends it."""
    path = directory / "serve.toml"
    path.write_text(config)
    arguments = [*COMMAND, "-m", model, "--bundle", bundle, "--config", path, "--state", directory / "state", *ALONE]
    variables = {"TMPDIR": str(directory), **(environment or {})}
    with serving([*arguments, *options], directory / "gateway.log", variables, seconds) as server:
        try:
            yield Gateway(server, directory)
        finally:
            if server.process.poll() is None:
                server.end()  # so that its engine ends, too


def add_key(directory: Path, owner: str = "alice", *options: str) -> str:
    """A new key, made by the command."""
    command = [sys.executable, "-m", "adlocal", "keys", "add", "--owner", owner, "--json"]
    command += ["--state", str(directory / "state"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    key: str = json.loads(done.stdout)["key"]
    return key
