"""The shape of answers: by llm-comply's cases, and byte by byte where clients are particular."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import llm_comply  # type: ignore[import-untyped]
import pytest
from llm_comply import runner
from llm_comply.config import ComplianceConfig  # type: ignore[import-untyped]
from llm_comply.schema import SpecLoader  # type: ignore[import-untyped]
from llm_comply.test_case import TestCase as Case  # type: ignore[import-untyped]
from llm_comply.tests import get_tests  # type: ignore[import-untyped]

from adlocal.serve.asked import Asked
from adlocal.serve.events import Delta, Event, Failed, Finished, Logprob, ToolCall, Usage
from adlocal.serve.protocols import PATHS, PROTOCOLS, Route, error_body, error_headers, gather, read_json
from adlocal.serve.protocols.fields import ROUTES

USAGE = Usage(7, 9)
SPEC = SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / "openresponses.json"))
TEXT: list[Event] = [Delta(0, text="He"), Delta(0, text="llo"), Finished(0, "stop")]
CALL: list[Event] = [
    Delta(0, tool_calls=(ToolCall(0, "c1", "get_weather", ""),)),
    Delta(0, tool_calls=(ToolCall(0, arguments='{"location":"SF"}'),)),
    Finished(0, "tool_calls"),
]
#: Images; what is not offered; and bodies without a model's name, which llama-server takes as well.
UNFIT = {"image-input", "anth-image-input", "chat-image-input"} | {
    *("compact-response", "compact-missing-model", "error-handling", "chat-error-handling"),
}


def answer(path: str, body: dict[str, Any], streaming: bool) -> tuple[int, Any, list[dict[str, Any]] | None]:
    """What a server would answer that always says the same."""
    route = next(route for route in ROUTES if PATHS[route] == f"/v1{path}")
    protocol = PROTOCOLS[route]
    try:
        asked = protocol.asked_of(read_json(json.dumps(body | {"stream": streaming}).encode()), "refuse")
    except Failed as failed:
        return failed.status, error_body(failed, route), None
    events = CALL if asked.tools else TEXT
    to = protocol.renderer(asked, "abc", "teacher", 1)
    if not streaming:
        return 200, to.body(gather(events), USAGE), None
    written = [to.begin(), *map(to.event, events), to.end(USAGE)]
    found = [data for _, data in parsed(b"".join(written))]
    sent = [{"type": "[DONE]" if data == "[DONE]" else data.get("type"), "data": data} for data in found]
    return 200, found[-1]["response"] if route == "responses" else None, sent


def parsed(written: bytes) -> list[tuple[str | None, Any]]:
    events = []
    for block in written.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        data = lines["data"]
        events.append((lines.get("event"), data if data == "[DONE]" else json.loads(data)))
    return events


CASES = [
    (name, case)
    for name in ("openai-chat", "open-responses", "anthropic")
    for case in get_tests(name)  # those with a reason to skip want reasoning models by their names
    if case.id not in UNFIT and case.skip_reason is None
]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[case.id for _, case in CASES])
def test_llm_comply(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        runner, "make_request", lambda config, path, body, streaming=False: answer(path, body, streaming)
    )
    config = ComplianceConfig("http://gateway/v1", "key", "teacher")
    case = replace(case, schema_name=case.schema_name if name == "open-responses" else None)
    result: Any = runner.TestRunner(config, [case], SPEC).run_one(case)
    assert (result.errors, result.warnings, result.status.value) == ([], [], "passed")


@pytest.mark.parametrize("broken", [False, True])
def test_events_of_responses_by_their_schemas(broken: bool) -> None:
    """Where OpenAI's names are others than llm-comply's, its schemas still hold under its own names."""
    theirs = {"reasoning_text": "reasoning", "reasoning_summary_text": "reasoning_summary"}
    events: list[Event] = [
        Delta(0, reasoning="hm"),
        Delta(0, text="a", logprobs=(Logprob("a", b"a", -0.5, (Logprob("b", b"b", -1.5),)),)),
        *CALL[:2],
        Finished(0, "tool_calls", None, 3, 0.5),
    ]
    to = PROTOCOLS["responses"].renderer(asked_chat(), "abc", "m", 1)
    written = b"".join([to.begin(), *map(to.event, events)])
    written += to.failed(Failed(500, "server_error", "gone")) if broken else to.end(USAGE)
    sequence = []
    for name, data in parsed(written):
        kind = ".".join(theirs.get(part, part) for part in data["type"].split("."))
        errors = SPEC.validate_sse_event(kind, data)
        assert [error for error in errors if not error.startswith("type:")] == []
        assert data["type"] == name
        sequence.append(data["sequence_number"])
    assert sequence == list(range(len(sequence)))


def asked_chat(**fields: Any) -> Asked:
    return Asked("chat", messages=[{"role": "user", "content": "p"}], **fields)


def written_by(route: Route, asked: Asked, events: list[Event]) -> bytes:
    to = PROTOCOLS[route].renderer(asked, "abc", "m", 1)
    return b"".join([to.begin(), *map(to.event, events), to.end(USAGE)])


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("wanted", [True, False])
def test_usage_comes_in_an_empty_chunk_where_it_is_asked_for(route: Route, wanted: bool) -> None:
    asked = replace(asked_chat(include_usage=wanted), prompts=["p"])
    chunks = [data for _, data in parsed(written_by(route, asked, TEXT))]
    assert chunks.pop() == "[DONE]"
    told = [chunk for chunk in chunks if "usage" in chunk]
    assert [chunk["choices"] for chunk in told] == ([[]] if wanted else [])
    assert all(chunk["choices"] for chunk in chunks if "usage" not in chunk)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_the_first_chunk_of_each_answer_has_its_role_and_no_other() -> None:
    chunks = [
        data for _, data in parsed(written_by("chat", asked_chat(n=2), [*TEXT, *[replace(e, choice=1) for e in TEXT]]))
    ]
    roles = [choice["index"] for chunk in chunks[:-1] for choice in chunk["choices"] if "role" in choice["delta"]]
    assert roles == [0, 1]
    assert [choice["index"] for chunk in chunks[:2] for choice in chunk["choices"]] == [0, 1]


@pytest.mark.parametrize("route", ROUTES)
def test_hidden_reasoning_leaves_no_trace(route: Route) -> None:
    """An answer whose reasoning is hidden is byte by byte one of a model that does not reason."""
    asked = replace(asked_chat(), prompts=["p"])
    written = written_by(route, asked, TEXT)
    body = PROTOCOLS[route].renderer(asked, "abc", "m", 1).body(gather(TEXT), USAGE)
    for text in (written.decode(), json.dumps(body)):
        for name in (
            "timings",
            "thinking",
            "reasoning_content",
            "reasoning_summary",
            '"cached_tokens": 7',
            "prompt_progress",
        ):
            assert name not in text
    if route != "responses":  # its schema has the names, with 0
        assert "reason" not in written.decode().replace("finish_reason", "").replace("stop_reason", "")
        assert "cached" not in json.dumps(body)


def test_a_summary_in_each_protocols_own_form() -> None:
    events: list[Event] = [Delta(0, text="4"), Finished(0, "stop", None, 12, 3.25)]
    sentence = "Reasoned for 12 tokens in 3.2 seconds."
    chat = PROTOCOLS["chat"].renderer(asked_chat(), "abc", "m", 1).body(gather(events), USAGE)
    assert chat["choices"][0]["message"]["reasoning_summary"] == sentence
    assert chat["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}
    responses = PROTOCOLS["responses"].renderer(asked_chat(), "abc", "m", 1).body(gather(events), USAGE)
    assert responses["output"][-1]["summary"] == [{"type": "summary_text", "text": sentence}]
    assert responses["usage"]["output_tokens_details"] == {"reasoning_tokens": 12}
    message = PROTOCOLS["messages"].renderer(asked_chat(), "abc", "m", 1).body(gather(events), USAGE)
    assert message["content"][-1] == {"type": "thinking", "thinking": sentence, "signature": ""}
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 12}


def test_the_client_text_that_ended_a_message() -> None:
    events: list[Event] = [Delta(0, text="4"), Finished(0, "stop", "END")]
    deltas = dict(parsed(written_by("messages", asked_chat(), events)))
    assert deltas["message_delta"]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}


@pytest.mark.parametrize(
    ("reason", "told"), [("length", "max_tokens"), ("stop", "end_turn"), ("tool_calls", "tool_use")]
)
def test_why_a_message_ended(reason: Any, told: str) -> None:
    deltas = dict(parsed(written_by("messages", asked_chat(), [Finished(0, reason)])))
    assert deltas["message_delta"]["delta"]["stop_reason"] == told


def test_prompts_are_repeated_before_their_completions() -> None:
    asked = Asked("completion", prompts=["p", "q"], n=2, echo=True)
    events: list[Event] = [event for i in range(4) for event in (Delta(i, text=str(i)), Finished(i, "stop"))]
    body = PROTOCOLS["completions"].renderer(asked, "abc", "m", 1).body(gather(events, 4), USAGE)
    assert [choice["text"] for choice in body["choices"]] == ["p0", "p1", "q2", "q3"]
    streamed = ["", "", "", ""]
    for _, chunk in parsed(written_by("completions", asked, events))[:-1]:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == ["p0", "p1", "q2", "q3"]


def test_half_a_character_does_not_break_a_stream() -> None:
    for route in ROUTES:
        assert b"?" in written_by(
            route, replace(asked_chat(), prompts=["p"]), [Delta(0, text="\ud800"), Finished(0, "stop")]
        )


def test_errors_in_each_protocols_own_form() -> None:
    failed = Failed(400, "exceed_context_size_error", "too long", "messages")
    assert error_body(failed, "messages") == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "too long"},
    }
    for route in ("chat", "completions", "responses"):
        assert error_body(failed, route)["error"] == {
            "message": "too long",
            "type": "exceed_context_size_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }
    assert error_headers(failed) == {}
    assert error_headers(replace_retry(1.2)) == {"retry-after": "2"}
    assert error_headers(replace_retry(0.0)) == {"retry-after": "1"}
    assert error_headers(Failed(429, "insufficient_quota", "spent"))["x-should-retry"] == "false"


def replace_retry(seconds: float) -> Failed:
    return Failed(429, "rate_limit_error", "later", None, seconds)


@pytest.mark.parametrize("route", ROUTES)
def test_a_token_costs_little(route: Route) -> None:
    """It is written once for every token of every stream: 50 µs are meant, and twice that is allowed here."""
    to = PROTOCOLS[route].renderer(replace(asked_chat(), prompts=["p"]), "abc", "m", 1)
    to.begin()
    event, best = Delta(0, text=" token"), 1.0
    for _ in range(20):
        begun = time.process_time()
        for _ in range(100):
            to.event(event)
        best = min(best, (time.process_time() - begun) / 100)
    assert best < 100e-6
