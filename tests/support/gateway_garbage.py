"""What no client should send to the gateway: bodies that are too big, too deep or none, and bytes that are no HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

from adlocal.serve.protocols.fields import PATHS


def monsters() -> Iterator[tuple[str, bytes]]:
    """Bodies that are too big, too deep, or none, with a name for each."""
    deep = b"[" * 1000 + b"]" * 1000
    yield "nothing", b""
    yield "deep", b'{"messages":' + deep + b"}"
    yield "deep_unclosed", b"[" * 100_000
    yield "deep_object", b'{"a":' * 1000 + b"1" + b"}" * 1000
    yield "deep_schema", _chat(json_schema=b'{"items":' * 500 + b"{}" + b"}" * 500)
    yield "wide_schema", _chat(json_schema=json.dumps({"properties": {f"p{i}": {} for i in range(3000)}}).encode())
    yield "long_text", json.dumps({"messages": [{"role": "user", "content": "ab " * 350_000}]}).encode()
    yield "long_control", json.dumps({"messages": [{"role": "user", "content": "<s>" * 350_000}]}).encode()
    yield "long_name", json.dumps({"x" * 10**6: 1, "messages": [{"role": "user", "content": "a"}]}).encode()
    yield "long_number", _chat(temperature=b"1" * 5000)
    yield "long_exponent", _chat(temperature=b"1e99999999")
    yield "nan", _chat(temperature=b"NaN")
    yield "infinity", _chat(top_p=b"-Infinity")
    yield "half_pair", _chat(user=b'"\\ud800"')
    yield "nul", _chat(user=b'"\\u0000"')
    yield "too_large", b'{"a":"' + b"x" * (2 * 2**20) + b'"}'
    yield "many_messages", json.dumps({"messages": [{"role": "user", "content": "a"}] * 4096}).encode()
    yield "many_prompts", json.dumps({"prompt": ["a"] * 64, "n": 16, "max_tokens": 2}).encode()
    yield "twice", b'{"messages":[],"samplers":["temperature"],"samplers":[],' + _chat()[1:]
    yield "proto", _chat(__proto__=b'{"backend_sampling":true}', constructor=b"{}", __verbose=b"true")


def _chat(**fields: bytes) -> bytes:
    extra = b"".join(b',"%s":%s' % (name.encode(), value) for name, value in fields.items())
    return b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":3' + extra + b"}"


def transport(key: str) -> Iterator[bytes]:
    """Requests that no client writes, as bytes; they hold a key."""
    body = _chat()
    own = f"Host: localhost\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n".encode()
    length = b"Content-Length: %d\r\n" % len(body)

    def post(path: str = PATHS["chat"], more: bytes = length, said: bytes = body) -> bytes:
        return f"POST {path} HTTP/1.1\r\n".encode() + own + more + b"Connection: close\r\n\r\n" + said

    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for encoding in (b"chunked", b"garbage", b"gzip, chunked", b"chunked, chunked", b"\x0bchunked", b"xchunked"):
        yield post(more=b"Transfer-Encoding: " + encoding + b"\r\n", said=chunks)
        yield post(more=b"Transfer-Encoding: " + encoding + b"\r\n" + length)
    for bad in (b"zz\r\n", b"-1\r\n\r\n", b"ffffffffffffffffff\r\nx", b"5;a=b\r\nab"):
        yield post(more=b"Transfer-Encoding: chunked\r\n", said=bad)
    for n in (b"-1", b"99999999999999999999", b"1e3", b"0x10", b"5, 5", b"+9", b"3"):
        yield post(more=b"Content-Length: " + n + b"\r\n")
    yield post(more=length + b"Content-Length: 3\r\n")
    for header in (
        b"X: a\0b",
        b"X\0: a",
        b" X: a",
        b"X : a",
        b"X: a\nY: b",
        b"X: " + b"a" * 100_000,
        b"Expect: 100-continue",
    ):
        yield post(more=length + header + b"\r\n")
    yield post(more=length + b"Upgrade: websocket\r\nX-Conversation-Id: 1\r\nX-Adlocal-User: \xff\xfe\r\n")
    yield post(more=length + b"Authorization: Bearer other\r\n")
    yield post(more=length + b"Authorization: Bearer \xff\xfe\r\nX-Api-Key: \xe9\r\n")
    for path in (
        *("//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/", "/v1/chat/completions?x=1"),
        *("/%76%31/chat/completions", "/v1/%2e%2e/completion", "/v1/../completion", "/completion", "/infill", "/slots"),
        *("/v1/chat/completions%00", "/v1/chat/completions%0d%0aX:1", "/V1/CHAT/COMPLETIONS", "/v1/messages/%2e%2e"),
        *(
            "http://evil.example/v1/chat/completions",
            "*",
            "/v1/models/..%2f..%2fetc",
            "/v1/chat/completions;a",
            "/" + "a" * 9000,
        ),
    ):
        yield post(path)
        yield post(path).replace(b"POST", b"GET", 1)
    yield from (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"GET /slots\r\n\r\n",
        b"\r\n" * 50,
        b"A" * 70_000,
    )
    yield post().replace(b"HTTP/1.1", b"HTTP/9.9", 1)
    yield post().replace(b"POST", b"BREW", 1)
    yield post() + post("/slots")
