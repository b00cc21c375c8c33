"""A llama-server that a test starts and asks, plain or under `adlocal run`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama_server import server

#: Threads and batches as the drop-in has them, nothing on a device, nothing from a network.
HOW = ("-t", 1, "-tb", 1, "-ngl", 0, "--no-warmup", "--offline", "--no-ui")
N_CTX = 256
START_SECONDS, ASK_SECONDS = 60, 100


class Refused(Exception):
    """The server answered with an error.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status


class Server:
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
                self.get("/health")
                return
            except (OSError, Refused):  # it does not listen yet, or loads
                time.sleep(0.05)
        raise AssertionError(f"does not answer after {START_SECONDS} s:\n{self.said()[-3000:]}")

    def get(self, path: str) -> Any:
        return json.loads(self._open(urllib.request.Request(self._url(path))))

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """Posts and gives the answer.

        Raises:
            Refused: it is an error.
        """
        return json.loads(self._open(self._posted(path, body)))

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """Posts and gives the parts of the answer, as they come."""
        for line in self._open(self._posted(path, {**body, "stream": True})).decode().splitlines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))

    def complete(self, prompt: Sequence[int], n: int, **parameters: Any) -> list[int]:
        """The tokens that follow a prompt, greedily unless the parameters say otherwise."""
        tokens: list[int] = self.answer(prompt, n, **parameters)["tokens"]
        return tokens

    def answer(self, prompt: Sequence[int], n: int, **parameters: Any) -> Any:
        """The whole answer to a prompt."""
        body = {"prompt": list(prompt), "n_predict": n, "temperature": 0, "return_tokens": True, **parameters}
        return self.ask("/completion", body)

    def complete_at_once(self, prompts: Sequence[Sequence[int]], n: int, **parameters: Any) -> list[list[int]]:
        """The tokens that follow each prompt, asked for in threads of their own."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, n, **parameters), prompts))

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _posted(self, path: str, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        return urllib.request.Request(self._url(path), json.dumps(body).encode(), headers)

    def _open(self, request: urllib.request.Request) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=ASK_SECONDS) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from error


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
