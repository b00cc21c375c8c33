"""A hub of models on 127.0.0.1: what huggingface_hub asks of the real one to list and download a repository."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_accepted"


@dataclass
class StubHub:
    """What is served. Change it while the server runs.

    Attributes:
        endpoint: for HF_ENDPOINT.
        repositories: `owner/name` -> a directory with its files.
        gated: repositories whose files only TOKEN may have.
        cuts: file name -> how often its connection is still closed in the middle.
        dead: every connection is closed at once, from the first cut on if `cuts` says so.
        requests: method, path and Range of each.
    """

    endpoint: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cuts: dict[str, int] = field(default_factory=dict)
    dead: bool = False
    dies_at_a_cut: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[StubHub]:
    """Runs a hub on a free port until the block ends."""
    hub = StubHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StubHub

    def log_message(self, format: str, *args: object) -> None:
        """Not on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers["Range"]))
        if self.hub.dead:
            self._hang_up()
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path):
            self._about(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(match[1], match[2])
        else:
            self._send(404, b"{}")

    def _about(self, repository: str, what: str | None) -> None:
        if repository not in self.hub.repositories:
            # The real one does not tell an anonymous user whether the repository is private or is not there.
            return self._send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        root = self.hub.repositories[repository]
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        if what == "tree":
            sizes = [(name, (root / name).stat().st_size) for name in names]
            found: object = [{"type": "file", "path": n, "size": s, "oid": _hash(n.encode())} for n, s in sizes]
        else:
            found = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: str, name: str) -> None:
        if repository not in self.hub.repositories:
            return self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        if repository in self.hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 403 if self.headers["Authorization"] else 401
            return self._send(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        path = self.hub.repositories[repository] / name
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = path.read_bytes()
        headers = {"ETag": f'"{_hash(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206 if start else 200, content[start:], headers, cut=self._is_cut(name))

    def _is_cut(self, name: str) -> bool:
        left = self.hub.cuts.get(name, 0)
        if self.command == "GET" and left:
            self.hub.cuts[name] = left - 1
            self.hub.dead = self.hub.dies_at_a_cut
        return self.command == "GET" and left > 0

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
