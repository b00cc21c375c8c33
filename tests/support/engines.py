"""Engines that others made, where `make test-server` puts them, and what they are asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import tiny
from support.paths import ROOT

ENGINES = ROOT / "build" / "engines"
STRENGTH, N = 3.0, 16
PROMPTS = [[tiny.BOS, *text] for text in (b"3 + 4 =", b"a longer one, of some more tokens", b"x", b"and one more")]


class Server:
    """An HTTP server of a process."""

    def __init__(self, process: subprocess.Popen[str], address: str, log: Path) -> None:
        self.process = process
        self.address = address
        self.log = log

    def ask(self, path: str, body: Any = None, key: str | None = None) -> Any:
        """The answer to a GET, or with a body to a POST: JSON, else text. Raises urllib's HTTPError."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers), timeout=100) as answer:
            text = answer.read().decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def tokens(self, prompt: Sequence[int], **more: Any) -> list[int]:
        """What it goes on with, greedily."""
        body = {"prompt": prompt, "n_predict": N, "temperature": 0, "return_tokens": True, **more}
        found: list[int] = self.ask("/completion", body)["tokens"]
        return found

    def tokens_at_once(self, prompts: Sequence[Sequence[int]], **more: Any) -> list[list[int]]:
        """Each of the prompts in a thread of its own."""
        found: dict[int, list[int]] = {}
        threads = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, self.tokens(prompts[i], **more)))
            for i in range(len(prompts))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[i] for i in range(len(prompts))]

    def status(self, path: str, body: Any = None, key: str | None = None) -> int:
        """Of the answer."""
        try:
            self.ask(path, body, key)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

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
