"""Requests of all kinds for a llama-server: answers, hang-ups and garbage, and what has to hold afterwards."""

from __future__ import annotations

import http.client
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adlocal.plugin import Control

from . import request_bodies
from .llama_server import Server

#: Nobody asks for as many seconds.
PATIENCE = 60.0


class Barrage:
    """Sends random requests to a server, the same ones for the same seed.

    Attributes:
        outcomes: how often each status was answered, and how often was hung up.
        n_tokens: tokens that were told of in answers.
    """

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.outcomes: Counter[str] = Counter()
        self.n_tokens = 0
        self._rng = random.Random(seed)

    def one(self) -> None:
        """One request; one in eight is hung up on before its answer is read."""
        route, body = request_bodies.request(self._rng)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
        try:
            connection.request("POST", route, body, {"Content-Type": "application/json"})
            if self._rng.random() < 0.125:
                connection.sock.settimeout(self._rng.random() * 0.02)
                self.outcomes["hung up"] += 1
                _read_some(connection)
                return
            answer = connection.getresponse()
            content = answer.read()
            self.outcomes[str(answer.status)] += 1
            if answer.status == 200:
                self.n_tokens += sum(map(_told, _parts(content)))
        finally:
            connection.close()

    def pause(self, rate: float) -> float:
        """Seconds to the next request, of `rate` a second."""
        return self._rng.expovariate(rate)


def control_of(server: Server, directory: Path) -> Control:
    """The control file of a server under protection."""
    return Control.open(directory / f"{server.process.pid}.control")


def _read_some(connection: http.client.HTTPConnection) -> None:
    try:
        connection.sock.recv(1)
    except (TimeoutError, OSError):
        return


def _parts(content: bytes) -> Iterator[Any]:
    """The JSON of an answer, or of each event of a stream."""
    lines = content.decode(errors="replace").splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    for text in events or ["\n".join(lines)]:
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue


def _told(part: Any) -> int:
    """How many tokens an answer, or the end of a stream, says that were generated."""
    if isinstance(part, list):
        return sum(map(_told, part))
    if not isinstance(part, dict):
        return 0
    timings = part.get("timings")
    return int(timings["predicted_n"]) if isinstance(timings, dict) else 0
