"""Requests to a gateway before a scripted engine, and what a client of each protocol sees of the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adlocal.serve.protocols import Route
from adlocal.serve.tags import Tags
from support.recorded import Recorded
from support.scripted_engine import Script

OPEN, CLOSE = "<think>", "</think>"
TAGS = {
    "single tokens": Tags(OPEN, CLOSE, 1, 2),
    "several tokens": Tags(OPEN, CLOSE),
    "none": None,
}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


@dataclass(frozen=True)
class Case:
    """One request, and all that decides what becomes of it."""

    scripts: Sequence[Script]
    route: Route
    disclosure: str
    tags: str
    opens: bool
    thinks: bool | None
    stop: Sequence[str]
    logprobs: bool
    calls: bool


def prompt(case: Case) -> str:
    """What the engine reads."""
    return f"user\nHi\nassistant\n{OPEN}\n" if case.opens else "user\nHi\nassistant\n"


def body_of(case: Case, stream: bool) -> dict[str, Any]:
    """The request, as clients of its route write it."""
    n = len(case.scripts)
    body: dict[str, Any] = {"stream": stream}
    if case.route == "completions":
        body |= {"prompt": prompt(case), "max_tokens": 100}
    elif case.route == "responses":
        body |= {"input": "Hi", "max_output_tokens": 100}
    else:
        body |= {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}
    if case.route in ("chat", "completions"):
        body |= {"n": n, "seed": 0, "stop": list(case.stop)} if case.stop else {"n": n, "seed": 0}
        if stream:
            body["stream_options"] = {"include_usage": True}
    if case.route == "messages" and case.stop:
        body["stop_sequences"] = list(case.stop)
    if case.logprobs:
        body |= {"chat": {"logprobs": True, "top_logprobs": 1}, "completions": {"logprobs": 1}}.get(case.route, {})
    if case.thinks is not None and case.route != "completions":
        body["chat_template_kwargs"] = {"enable_thinking": case.thinks}
    if case.calls:
        body |= tools_of(case.route)
    return body


def tools_of(route: Route) -> dict[str, Any]:
    """The tool that a script may call."""
    function = TOOL["function"]
    assert isinstance(function, dict)
    if route == "messages":
        return {"tools": [{"name": "find", "input_schema": function["parameters"]}]}
    return {"tools": [{"type": "function", **function} if route == "responses" else TOOL]}


# What a client sees


@dataclass
class Seen:
    """An answer."""

    text: str = ""
    reasoning: str = ""
    arguments: str = ""
    reason: str | None = None
    tokens: tuple[str, ...] = ()


def seen(case: Case, found: Recorded, stream: bool) -> tuple[list[Seen], int | None]:
    """The answers, and the tokens that they are said to have."""
    read = {"chat": chat, "completions": completions, "responses": responses, "messages": messages}[case.route]
    return read(found, stream, len(case.scripts))


def chat(found: Recorded, stream: bool, n: int) -> tuple[list[Seen], int | None]:
    answers = [Seen() for _ in range(n)]
    usage = None
    for event in found.events[:-1] if stream else [found.json]:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            answer, message = answers[choice["index"]], choice["delta" if stream else "message"]
            answer.text += message.get("content") or ""
            answer.reasoning += message.get("reasoning_content") or ""
            for call in message.get("tool_calls") or ():
                answer.arguments += call["function"]["arguments"]
            answer.reason = choice["finish_reason"] or answer.reason
            answer.tokens += tuple(each["token"] for each in (choice["logprobs"] or {}).get("content") or ())
    return answers, usage and usage["completion_tokens"]


def completions(found: Recorded, stream: bool, n: int) -> tuple[list[Seen], int | None]:
    answers = [Seen() for _ in range(n)]
    usage = None
    for event in found.events[:-1] if stream else [found.json]:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            answer = answers[choice["index"]]
            answer.text += choice["text"]
            answer.reason = choice["finish_reason"] or answer.reason
            answer.tokens += tuple((choice["logprobs"] or {}).get("tokens", ()))
    return answers, usage and usage["completion_tokens"]


def responses(found: Recorded, stream: bool, n: int) -> tuple[list[Seen], int | None]:
    response = found.events[-1]["response"] if stream else found.json
    answer = Seen(reason={"completed": "stop", "incomplete": "length"}[response["status"]])
    for item in response["output"]:
        answer.text += "".join(part["text"] for part in item["content"]) if item["type"] == "message" else ""
        if item["type"] == "reasoning":
            answer.reasoning += "".join(part["text"] for part in item.get("content") or ())
        answer.arguments += item.get("arguments", "")
    if stream:
        deltas = [event["delta"] for event in found.events if event["type"] == "response.output_text.delta"]
        assert "".join(deltas) == answer.text
    return [answer], response["usage"]["output_tokens"]


def messages(found: Recorded, stream: bool, n: int) -> tuple[list[Seen], int | None]:
    answer = Seen()
    if not stream:
        body = found.json
        for block in body["content"]:
            answer.text += block.get("text", "")
            answer.reasoning += block.get("thinking", "")
            answer.arguments += json.dumps(block["input"]) if block["type"] == "tool_use" else ""
        answer.reason = body["stop_reason"]
        return [answer], body["usage"]["output_tokens"]
    usage = None
    for event in found.events:
        delta = event.get("delta", {})
        answer.text += delta.get("text", "")
        answer.reasoning += delta.get("thinking", "")
        answer.arguments += delta.get("partial_json", "")
        answer.reason = delta.get("stop_reason") or answer.reason
        usage = event.get("usage") or usage
    return [answer], usage and usage["output_tokens"]
