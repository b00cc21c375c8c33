"""Sends many requests to a gateway at once, and keeps what came back."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from adlocal.serve.protocols.fields import FIELDS

from .gateway import Gateway
from .gateway_bodies import ROUTE_OF, Sent, minimal

N_THREADS = 4
_PIECE = 7  # bytes of a chunk of a request's body


@dataclass(frozen=True)
class Came:
    """What a request was answered.

    Attributes:
        key: the name of whose key it was.
        status: 0 where nobody waited for it, -1 where nothing came.
        request: the gateway's number of it; "" for a request that was not admitted.
        content: all that came.
    """

    sent: Sent
    key: str
    status: int
    request: str = ""
    content: bytes = b""

    @property
    def text(self) -> str:
        """The answer's, reasoning first, from its parts or at once."""
        return "".join(_texts(self.parts()))

    def parts(self) -> list[Any]:
        """The JSON of the answer, or of each event of a stream."""
        lines = self.content.decode().split("\n")
        events = [line[6:] for line in lines if line.startswith("data: {")]
        return [json.loads(each) for each in events] or [json.loads(self.content)]


def barrage(gateway: Gateway, asked: Sequence[tuple[Sent, str]], keys: Mapping[str, str]) -> list[Came]:
    """Sends all of it, several at once.

    Args:
        asked: requests, and the names of whose keys they have.
        keys: by name.
    """
    came: list[Came] = []

    def send(share: Sequence[tuple[Sent, str]]) -> None:
        with gateway.client() as client:
            came.extend(_one(client, sent, name, keys[name]) for sent, name in share)

    threads = [threading.Thread(target=send, args=(asked[i::N_THREADS],)) for i in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(came) == len(asked), gateway.log_tail()
    return came


def exchange(gateway: Gateway, raw: bytes, seconds: float = 5.0) -> bytes:
    """What comes back for bytes, until the other side is done or silent."""
    where = urlsplit(gateway.url)
    found = b""
    place = where.hostname or "", where.port or 0
    with contextlib.suppress(OSError), socket.create_connection(place, timeout=seconds) as connection:
        connection.sendall(raw)
        while part := connection.recv(65536):
            found += part
    return found


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def report(came: Sequence[Came]) -> str:
    """Counts of statuses by what made a request, by route, and by what becomes of its fields. 0 was hung up on."""
    lines = []
    for name, of in (("source", _source), ("route", _path)):
        counts: dict[str, Counter[int]] = {}
        for each in came:
            counts.setdefault(of(each), Counter())[each.status] += 1
        lines += [f"{name} {what}: {dict(sorted(found.items()))}" for what, found in sorted(counts.items())]
    for fate in ("obeyed", "policy", "ignored", "refused"):
        having = Counter(each.status for each in came if fate in fates(each.sent))
        lines.append(f"with a field that is {fate}: {dict(sorted(having.items()))}")
    lines.append(f"streams: {sum(each.content.startswith((b'data: ', b'event: ')) for each in came)}")
    return "\n".join(lines)


def _source(came: Came) -> str:
    return came.sent.source


def _path(came: Came) -> str:
    return came.sent.path


def fates(sent: Sent) -> set[str]:
    """Of the fields of a body, but for those of the least that is answered."""
    body, route = sent.body(), ROUTE_OF.get(sent.path)
    if not isinstance(body, dict) or route is None:
        return set()
    least = minimal(route, "", 1).keys() | {"stream"}
    return {each.fate for each in FIELDS if route in each.routes and each.name in body.keys() - least}


def _one(client: httpx2.Client, sent: Sent, name: str, key: str) -> Came:
    headers = {"authorization": f"Bearer {key}", "content-type": sent.content_type, **dict(sent.headers)}
    content: Any = _chunks(sent.raw) if sent.how == "chunked" else sent.raw
    if sent.how == "hang up":
        with contextlib.suppress(httpx2.TimeoutException):
            patience = httpx2.Timeout(60, read=0.001 * (len(sent.raw) % 40 + 1))
            with client.stream("POST", sent.path, content=content, headers=headers, timeout=patience) as response:
                next(response.iter_raw(), None)
        return Came(sent, name, 0)
    try:
        response = client.post(sent.path, content=content, headers=headers)
    except httpx2.TransportError as error:
        return Came(sent, name, -1, content=repr(error).encode())
    return Came(sent, name, response.status_code, response.headers.get("x-request-id", ""), response.content)


def _chunks(raw: bytes) -> Iterator[bytes]:
    for i in range(0, len(raw), _PIECE):
        yield raw[i : i + _PIECE]


def _texts(parts: Sequence[Any]) -> Iterator[str]:
    """Text in any protocol's answer, or in the parts of its streams."""
    for part in parts:
        for choice in part.get("choices") or ():
            said = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
            yield (said.get("reasoning_content") or "") + (said.get("content") or "")
        for block in part.get("content") or () if isinstance(part.get("content"), list) else ():
            yield block.get("thinking") or block.get("text") or ""
        delta = part.get("delta")
        if isinstance(delta, dict):
            yield delta.get("thinking") or delta.get("text") or ""
        if part.get("type") in ("response.output_text.delta", "response.reasoning_text.delta"):
            yield delta
        for item in part.get("output") or ():
            yield from (each["text"] for each in item.get("content") or ())
