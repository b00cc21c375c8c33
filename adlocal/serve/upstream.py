"""What the gateway asks the engine, built from what it knows and never copied, and what the engine answers."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from .asked import Asked
from .events import ErrorType, Failed, FinishReason, Logprob, ToolCall
from .policy import Decision

LOG = logging.getLogger(__name__)
CHAT, COMPLETION, TEMPLATE = "/v1/chat/completions", "/completion", "/apply-template"
#: The engine's own temperature, where a client names none.
DEFAULT_TEMPERATURE = 0.8
MAX_TOP_LOGPROBS = 5
#: With these a client could narrow the choice to one token, which no temperature changes.
_NARROWING = frozenset({"top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold"})
#: Nats. A larger one could force any token, whatever the guard says.
MAX_BIAS = 5.0
_MESSAGE_LENGTH = 300
_FINISHED: Mapping[str, FinishReason] = {"length": "length", "limit": "length", "tool_calls": "tool_calls"}


@dataclass(frozen=True)
class Chunk:
    """A part of the engine's answer.

    Attributes:
        text: as the model wrote it, reasoning and its tags included.
        reasoning: what the engine has told apart from it, though it was asked not to.
        n_tokens: tokens that were generated so far.
        n_prompt: tokens of the prompt; 0 while it is not known.
        finished: why the answer ended, in its last part.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: Sequence[ToolCall] = ()
    logprobs: Sequence[Logprob] = ()
    n_tokens: int = 0
    n_prompt: int = 0
    finished: FinishReason | None = None


@dataclass(frozen=True)
class Body:
    """What the engine is asked.

    Attributes:
        path: of its API.
        fields: of the body, but for the slot's.
    """

    path: str
    fields: Mapping[str, Any]

    def at(self, slot: int, reuse: bool) -> dict[str, Any]:
        """The whole body, for a slot; `reuse` lets it go on with what the slot holds."""
        return {**self.fields, "id_slot": slot, "cache_prompt": reuse}


def bodies(asked: Asked, decision: Decision) -> list[Body]:
    """A body for each answer: for each prompt in turn, `asked.n` of them."""
    common = _common(asked, decision)
    if asked.kind == "chat":
        chat = {**template(asked, decision), **_chat(asked)}
        return [Body(CHAT, {**chat, **_seeded(common, i)}) for i in range(asked.n)]
    return [
        Body(COMPLETION, {"prompt": prompt, **_completion(asked), **_seeded(common, i)})
        for prompt in asked.prompts
        for i in range(asked.n)
    ]


def template(asked: Asked, decision: Decision) -> dict[str, Any]:
    """What decides how messages become a prompt."""
    thinks = {"on": True, "off": False, "client": asked.reasoning}[decision.reasoning]
    fields: dict[str, Any] = {"messages": list(asked.messages), "reasoning_format": "none"}
    if asked.tools:
        fields |= {"tools": list(asked.tools), "tool_choice": asked.tool_choice}
        if asked.parallel_tool_calls is not None:
            fields["parallel_tool_calls"] = asked.parallel_tool_calls
    if thinks is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": thinks}
    if asked.prefill:
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return fields


def n_predict(asked: Asked, decision: Decision) -> int | None:
    """The most tokens of an answer; None where its context alone bounds it."""
    given = [each for each in (asked.max_tokens, decision.max_tokens) if each is not None]
    return min(given, default=None)


def temperature(asked: Asked, decision: Decision) -> float:
    """What is sampled at."""
    return max(float(asked.sampling.get("temperature", DEFAULT_TEMPERATURE)), decision.min_temperature)


def _common(asked: Asked, decision: Decision) -> dict[str, Any]:
    dropped = _NARROWING if decision.min_temperature > 0 else ()
    fields: dict[str, Any] = {name: value for name, value in asked.sampling.items() if name not in dropped}
    fields["temperature"] = temperature(asked, decision)
    limit = n_predict(asked, decision)
    if limit is not None:
        fields["n_predict"] = limit
    if asked.logit_bias and decision.logit_bias:
        fields["logit_bias"] = [[i, max(-MAX_BIAS, min(MAX_BIAS, bias))] for i, bias in asked.logit_bias.items()]
    # Its count of tokens comes with each part: what a client who hangs up is charged.
    return {**fields, "stream": True, "stream_options": {"include_usage": True}, "timings_per_token": True}


def _seeded(fields: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Answers to the same prompt differ, also under a seed."""
    seed = fields.get("seed")
    return dict(fields) if seed is None or seed < 0 else {**fields, "seed": (seed + index) % 2**32}


def _chat(asked: Asked) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if asked.schema is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": asked.schema}}
    if asked.grammar:
        fields["grammar"] = asked.grammar
    if asked.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": min(asked.top_logprobs, MAX_TOP_LOGPROBS)}
    return fields


def _completion(asked: Asked) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if asked.schema is not None:
        fields["json_schema"] = asked.schema
    if asked.grammar:
        fields["grammar"] = asked.grammar
    if asked.top_logprobs is not None:
        fields["n_probs"] = max(1, min(asked.top_logprobs, MAX_TOP_LOGPROBS))
    return fields


@asynccontextmanager
async def answer(client: httpx2.AsyncClient, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[Chunk]]:
    """Asks, and gives the parts of the answer as they come. Leaving the context hangs up.

    Raises:
        Failed: the engine refused, broke off, or is not there.
    """
    read = _chat_chunk if path == CHAT else _completion_chunk
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                raise refused(response.status_code, await response.aread())
            yield _chunks(response, read)
    except httpx2.TransportError as error:
        raise Failed(503, "unavailable_error", "the engine broke off; try again") from error


async def ask(client: httpx2.AsyncClient, path: str, body: Mapping[str, Any]) -> Any:
    """Asks for JSON in one piece.

    Raises:
        Failed: the engine refused, or is not there.
    """
    try:
        response = await client.post(path, json=body)
    except httpx2.TransportError as error:
        raise Failed(503, "unavailable_error", "the engine is not there; try again") from error
    if response.status_code != 200:
        raise refused(response.status_code, response.content)
    return response.json()


async def _chunks(response: httpx2.Response, read: Any) -> AsyncIterator[Chunk]:
    finished = False
    rest = b""
    async for data in response.aiter_raw():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            name, _, value = line.partition(b": ")
            if name not in (b"data", b"error") or value.startswith(b"[DONE]"):
                continue
            found = json.loads(value)
            if name == b"error" or "error" in found:
                raise _broke_off(found.get("error", found))
            chunk = read(found)
            finished = finished or chunk.finished is not None
            yield chunk
    if not finished:
        raise Failed(503, "unavailable_error", "the engine broke off; try again")


def _chat_chunk(found: Mapping[str, Any]) -> Chunk:
    timings, usage = found.get("timings") or {}, found.get("usage") or {}
    n_prompt = usage.get("prompt_tokens") or timings.get("prompt_n", 0) + timings.get("cache_n", 0)
    n_tokens = usage.get("completion_tokens") or timings.get("predicted_n", 0)
    if not found["choices"]:
        return Chunk(n_tokens=n_tokens, n_prompt=n_prompt)
    (choice,) = found["choices"]
    delta = choice["delta"]
    reason = choice.get("finish_reason")
    return Chunk(
        text=delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or "",
        tool_calls=[_tool_call(each) for each in delta.get("tool_calls") or ()],
        logprobs=[_logprob(each) for each in (choice.get("logprobs") or {}).get("content") or ()],
        n_tokens=n_tokens,
        n_prompt=n_prompt,
        finished=_FINISHED.get(reason, "stop") if reason else None,
    )


def _completion_chunk(found: Mapping[str, Any]) -> Chunk:
    return Chunk(
        text=found.get("content") or "",
        logprobs=[_logprob(each) for each in found.get("completion_probabilities") or ()],
        n_tokens=found.get("tokens_predicted", 0),
        n_prompt=found.get("tokens_evaluated", 0),
        finished=_FINISHED.get(found.get("stop_type", ""), "stop") if found.get("stop") else None,
    )


def _tool_call(found: Mapping[str, Any]) -> ToolCall:
    function = found.get("function") or {}
    return ToolCall(found.get("index", 0), found.get("id"), function.get("name"), function.get("arguments") or "")


def _logprob(found: Mapping[str, Any]) -> Logprob:
    top = [_logprob(each) for each in found.get("top_logprobs") or ()]
    return Logprob(found["token"], bytes(found.get("bytes") or ()), found["logprob"], top)


def refused(status: int, content: bytes) -> Failed:
    """The engine's refusal in the gateway's words."""
    try:
        found = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        found = {}
    return _error(status, found)


def _error(status: int, found: Mapping[str, Any]) -> Failed:
    """What a client may know of it: what it did wrong, and nothing of the engine's insides."""
    message = str(found.get("message", ""))[:_MESSAGE_LENGTH]
    code = found.get("code", status)
    if found.get("type") == "exceed_context_size_error":
        return Failed(400, "exceed_context_size_error", message)
    if code == 400:
        kind: ErrorType = "invalid_request_error"
        return Failed(400, kind, message or "the engine refused the request")
    if code == 503:
        return Failed(503, "unavailable_error", "the engine is loading; try again", retry_after=2)
    LOG.error("the engine failed", extra={"status": status, "type": str(found.get("type", ""))})
    LOG.debug("the engine's words: %s", message)  # may repeat what was asked
    return Failed(500, "server_error", "the engine could not answer this request")


def _broke_off(found: Mapping[str, Any]) -> Failed:
    """An error in the middle of an answer, whose words may repeat what the model has thought."""
    words = found if found.get("type") == "exceed_context_size_error" else {**found, "code": 500}
    return _error(500, words)
