"""An engine that says what a test wrote: it stands behind a gateway in llama-server's place, in the same process.

It streams as llama-server does (a role, the tokens with their log-probabilities and counts, calls of tools, the end,
the usage), in bytes that are cut anywhere, and forbids tags as the plugin would.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import httpx2

from adlocal.plugin import Counters, InForce, Think
from adlocal.plugin.control import Decodes
from adlocal.serve import gateway as gateway_module
from adlocal.serve.tags import Tags
from adlocal.settings import Settings

#: How an answer ends: as the model meant it, or by the engine's death (a lost connection, a stream without an end),
#: or by its error in the middle, which repeats what the model said.
End = Literal["stop", "length", "tool_calls", "lost", "cut", "error", "error 400"]
BROKEN: tuple[End, ...] = ("lost", "cut", "error", "error 400")
PROMPT_TOKENS = 11


@dataclass(frozen=True)
class Part:
    """One chunk: the tokens in it, and the calls and the reasoning that the engine has parsed out of the text."""

    tokens: tuple[str, ...]
    calls: tuple[Mapping[str, Any], ...] = ()
    reasoning: str = ""


@dataclass(frozen=True)
class Script:
    """One answer.

    Attributes:
        parts: its chunks.
        end: how it ends.
        cuts: lengths of the pieces that its bytes come in; the last one repeats.
        seconds: before the first of them.
    """

    parts: Sequence[Part]
    end: End = "stop"
    cuts: Sequence[int] = (1 << 20,)
    seconds: float = 0.0


class ScriptedControl:
    """A control file's words. Every batch that one asks about has ended."""

    def __init__(self) -> None:
        self.asked: dict[int, tuple[int, Settings, Think | None]] = {}
        self._n_decodes = 0

    def ask(self, seq_id: int, settings: Settings, mode: str = "protect", think: Think | None = None) -> int:
        """Remembers it."""
        assert mode == "protect"
        epoch = self.asked[seq_id][0] + 2 if seq_id in self.asked else 2
        self.asked[seq_id] = epoch, settings, think
        return epoch

    def in_force(self, seq_id: int) -> InForce:
        """What was asked."""
        epoch, settings, think = self.asked[seq_id]
        return InForce(settings.strength, settings.guard, "protect", epoch, think)

    def counters(self, seq_id: int | None = None) -> Counters:
        """None of any."""
        return Counters()

    def decodes(self) -> Decodes:
        """More each time, so that a slot that was left is soon idle."""
        self._n_decodes += 3
        return Decodes(self._n_decodes, self._n_decodes)


class ScriptedEngine:
    """Has the attributes of `adlocal.serve.engine.Engine`.

    Attributes:
        scripts: of the answers, by the seed of their request; the first for a request without one.
        template: the prompt that messages become.
        tags: what a ban forbids.
        said: what each request was answered, by its script's number: the parts as the ban left them.
        bodies: of requests, with their paths.
    """

    def __init__(self, config: Any, floor: Settings, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
        self._on_start = on_start
        self.control = ScriptedControl()
        self.n_starts = 0
        self.scripts: Sequence[Script] = ()
        self.template: Callable[[Mapping[str, Any]], str] = lambda body: "assistant\n"
        self.tags: Tags | None = None
        self.said: dict[int, list[Part]] = {}
        self.bodies: list[tuple[str, dict[str, Any]]] = []

    def client(self) -> httpx2.AsyncClient:
        """One that talks to it."""
        return httpx2.AsyncClient(transport=_Transport(self), base_url="http://engine", trust_env=False)

    async def start(self) -> None:
        """There is nothing to start."""
        self.n_starts += 1
        self._on_start()

    async def stop(self) -> None:
        """Nor to stop."""

    def is_stalled(self, working: bool) -> bool:
        """Never."""
        return False

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """The bytes of an answer."""
        number = int(body.get("seed", 0))
        script = self.scripts[number]
        think = self.control.asked[body["id_slot"]][2]
        parts = self.said[number] = [*self._allowed(script.parts, think)]
        lines = "".join(_events(path, body, parts, script.end)).encode()
        sizes = [*script.cuts]
        await asyncio.sleep(script.seconds)
        while lines:
            size = max(1, sizes.pop(0) if len(sizes) > 1 else sizes[0])
            yield lines[:size]
            lines = lines[size:]
            await asyncio.sleep(0)
        if script.end == "lost":
            raise httpx2.ReadError("the connection was lost")

    def _allowed(self, parts: Sequence[Part], think: Think | None) -> Iterator[Part]:
        """The parts, without the tokens that the plugin would have forbidden."""
        tags = (self.tags.open, self.tags.close) if self.tags is not None else ("", "")
        forbids = think is not None and think.from_start
        for part in parts:
            kept = []
            for token in part.tokens:
                if not (forbids and token in tags):
                    kept.append(token)
                forbids = forbids or (think is not None and token == tags[1])
            yield replace(part, tokens=tuple(kept))


class _Transport(httpx2.AsyncBaseTransport):
    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(await request.aread())
        path = request.url.path
        self._engine.bodies.append((path, body))
        if path == "/apply-template":
            return httpx2.Response(200, json={"prompt": self._engine.template(body)})
        if path == "/tokenize":
            return httpx2.Response(200, json={"tokens": [*body["content"].encode()]})
        if path == "/detokenize":
            return httpx2.Response(200, json={"content": bytes(body["tokens"]).decode("utf-8", "replace")})
        return httpx2.Response(200, stream=_Bytes(self._engine.stream(path, body)))


class _Bytes(httpx2.AsyncByteStream):
    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._parts:
            yield part


# llama-server's stream


def _events(path: str, body: Mapping[str, Any], parts: Sequence[Part], end: End) -> Iterator[str]:
    chat = path == "/v1/chat/completions"
    event, n = (_chat if chat else _completion), 0
    if chat:
        yield _data(_choice({"role": "assistant", "content": None}))
    for part in parts:
        n += len(part.tokens)
        yield _data(event(part, n, bool(body.get("logprobs") or body.get("n_probs"))))
    if end in ("lost", "cut"):
        return
    if end.startswith("error"):
        said = "".join(token for part in parts for token in part.tokens)
        code = 400 if end == "error 400" else 500
        error = {"error": {"code": code, "message": f"failed to parse: {said}", "type": "server_error"}}
        yield _data(error)
    elif chat:
        yield _data(_choice({}, end))
        usage = {"completion_tokens": n, "prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS + n}
        yield _data({"choices": [], "object": "chat.completion.chunk", "usage": usage, "timings": _timings(n)})
        yield "data: [DONE]\n\n"
    else:
        stop = {"stop": "eos", "length": "limit"}.get(end, "eos")
        last = {**_completion(Part(()), n, False), "stop": True, "stop_type": stop, "generation_settings": {}}
        yield _data(last)


def _data(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _choice(delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {
        "choices": [{"finish_reason": reason, "index": 0, "delta": delta}],
        "created": 1,
        "id": "chatcmpl-engine",
        "model": "/the/model.gguf",
        "object": "chat.completion.chunk",
    }


def _chat(part: Part, n: int, logprobs: bool) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if part.tokens:
        delta["content"] = "".join(part.tokens)
    if part.calls:
        delta["tool_calls"] = list(part.calls)
    if part.reasoning:
        delta["reasoning_content"] = part.reasoning
    found = {**_choice(delta), "timings": _timings(n)}
    if logprobs:
        found["choices"][0]["logprobs"] = {"content": [*map(_logprob, part.tokens)]}
    return found


def _completion(part: Part, n: int, logprobs: bool) -> dict[str, Any]:
    found = {"index": 0, "content": "".join(part.tokens), "tokens": [], "stop": False, "id_slot": 1}
    found |= {"tokens_predicted": n, "tokens_evaluated": PROMPT_TOKENS, "timings": _timings(n)}
    if logprobs:
        found["completion_probabilities"] = [*map(_logprob, part.tokens)]
    return found


def _timings(n: int) -> dict[str, Any]:
    return {"cache_n": 4, "prompt_n": PROMPT_TOKENS - 4, "prompt_ms": 1.5, "predicted_n": n, "predicted_ms": 2.5}


def _logprob(token: str) -> dict[str, Any]:
    """Its rival has the token in it, so that one of hidden text would be seen."""
    rival = {"id": 2, "token": f"~{token}", "bytes": [*f"~{token}".encode()], "logprob": -2.0}
    return {"id": 1, "token": token, "bytes": [*token.encode()], "logprob": -1.0, "top_logprobs": [rival]}


@contextmanager
def scripted() -> Iterator[None]:
    """Gateways that are made meanwhile have a scripted engine."""
    with mock.patch.object(gateway_module, "Engine", ScriptedEngine):
        yield
