"""A stand-in for the gateway under its page: it answers what a test says, when the test says it."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, SimpleQueue
from typing import Any

from adlocal.serve.page import PAGE, PAGE_HEADERS

#: Seconds between looks at whether the browser has hung up.
LOOK_SECONDS = 0.05
#: Seconds that an answer waits for the test's next word.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Seen:
    """A request, as it came.

    Attributes:
        headers: by names in small letters.
        body: JSON, None without one.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


class Answer:
    """One streamed answer of chat, in a test's hand.

    Attributes:
        hung_up: is set once the browser has closed the connection before the end.
    """

    def __init__(self) -> None:
        self.words: SimpleQueue[bytes | None] = SimpleQueue()
        self.hung_up = threading.Event()

    def say(
        self,
        text: str = "",
        *,
        reasoning: str = "",
        summary: str = "",
        steered: Mapping[str, float] | None = None,
        reason: str | None = None,
    ) -> None:
        """A chunk, with what steered it."""
        named = {"content": text, "reasoning_content": reasoning, "reasoning_summary": summary}
        delta = {name: value for name, value in named.items() if value}
        choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        self.event({"choices": [choice if steered is None else {**choice, "adlocal": steered}]})

    def event(self, value: Any) -> None:
        """Any event."""
        self.raw(f"data: {json.dumps(value)}\n\n".encode())

    def raw(self, data: bytes) -> None:
        """Bytes of the stream, wherever they are cut."""
        self.words.put(data)

    def finish(self, n_tokens: int, reason: str = "stop") -> None:
        """The ordinary end."""
        self.say(reason=reason)
        self.event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": n_tokens}})
        self.raw(b"data: [DONE]\n\n")
        self.hang_up()

    def hang_up(self) -> None:
        """Closes the connection."""
        self.words.put(None)


@dataclass(frozen=True)
class Refusal:
    """An answer of chat that is an error."""

    status: int
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


class PageServer:
    """The gateway's page and the routes that it asks.

    Attributes:
        address: as http://host:port.
        seen: the requests.
        key: what a caller must have; None to ask for none.
        watch: the table of the operator; None where the caller is not the operator.
    """

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.address = f"http://127.0.0.1:{server.server_port}"
        self.seen: list[Seen] = []
        self.key: str | None = None
        self.watch: list[dict[str, Any]] | None = None
        self.answers: SimpleQueue[Answer | Refusal] = SimpleQueue()

    def answer(self) -> Answer:
        """What the next request of chat gets."""
        answer = Answer()
        self.answers.put(answer)
        return answer

    def refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """What the next request of chat gets."""
        self.answers.put(Refusal(status, message, headers or {}))

    def asked(self, path: str = "/v1/chat/completions") -> list[Seen]:
        """The requests of one path."""
        return [each for each in self.seen if each.path == path]


@contextmanager
def page_server() -> Iterator[PageServer]:
    """Runs one on a free port of this machine."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.stand_in = PageServer(server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield Handler.stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    stand_in: PageServer

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._see()
        if self.path == "/":
            self._reply(200, PAGE.encode(), {"content-type": "text/html; charset=utf-8", **PAGE_HEADERS})
        elif not self._known():
            self._error(Refusal(401, "this key is not known"))
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": "teacher-8b"}]})
        elif self.path == "/operator/watch" and self.stand_in.watch is not None:
            self._json(200, self.stand_in.watch)
        elif self.path == "/operator/watch":
            self._error(Refusal(403, "this is for the operator's key"))
        else:
            self._error(Refusal(404, "there is no such route"))

    def do_POST(self) -> None:
        self._see()
        answer = self.stand_in.answers.get(timeout=PATIENCE_SECONDS)
        if not self._known():
            self._error(Refusal(401, "this key is not known"))
        elif isinstance(answer, Refusal):
            self._error(answer)
        else:
            self._stream(answer)

    def _see(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        named = {name.lower(): value for name, value in self.headers.items()}
        self.stand_in.seen.append(Seen(self.command, self.path, named, json.loads(raw) if raw else None))

    def _known(self) -> bool:
        key = self.stand_in.key
        return key is None or self.headers.get("authorization") == f"Bearer {key}"

    def _stream(self, answer: Answer) -> None:
        """HTTP/1.0: the end of the connection ends the body."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for _ in range(int(PATIENCE_SECONDS / LOOK_SECONDS)):
            if self._gone():
                answer.hung_up.set()
                return
            try:
                word = answer.words.get(timeout=LOOK_SECONDS)
            except Empty:
                continue
            if word is None:
                return
            self.wfile.write(word)

    def _gone(self) -> bool:
        """Whether the browser has closed its end. It sends nothing after its request, so what can be read is that."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except ConnectionError:
            return True

    def _json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._reply(status, json.dumps(value).encode(), {"content-type": "application/json", **(headers or {})})

    def _error(self, refusal: Refusal) -> None:
        self._json(refusal.status, {"error": {"message": refusal.message}}, refusal.headers)

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
