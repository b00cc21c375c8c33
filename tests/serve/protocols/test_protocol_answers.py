"""Answers through the official clients: what they gather from a stream is what they get at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState

from adlocal.serve.asked import Asked
from adlocal.serve.events import Delta, Event, Failed, Finished, FinishReason, Logprob, ToolCall, Usage
from adlocal.serve.protocols import PROTOCOLS, Renderer, Route, gather
from adlocal.serve.protocols.sse import CONTENT_TYPE

USAGE = Usage(prompt_tokens=7, completion_tokens=9)
FAILED = Failed(503, "unavailable_error", "the engine has gone; try again")
ROUTES_OF_ONE: tuple[Route, ...] = ("chat", "completions", "responses", "messages")

texts = st.text(st.characters(codec="utf-8") | st.sampled_from('\n\r\u2028\0"\\'), min_size=1, max_size=6)
numbers = st.floats(-50, 0) | st.just(float("-inf"))
tokens = st.builds(lambda token, logprob: Logprob(token, token.encode(), logprob), texts, numbers)
logprobs = st.builds(Logprob, texts, st.binary(max_size=4), numbers, st.lists(tokens, max_size=2))
arguments = st.dictionaries(texts, st.integers(-9, 9) | texts, max_size=3).map(json.dumps)


@st.composite
def calls(draw: st.DrawFn) -> list[list[ToolCall]]:
    """Calls in parts, as the engine sends them: the number and name first, then arguments."""
    written = []
    for index in range(draw(st.integers(0, 3))):
        whole = draw(arguments)
        cut = draw(st.integers(0, len(whole)))
        first = ToolCall(
            index, draw(st.none() | st.just(f"id{index}")), f"f{index}", draw(st.sampled_from(["", whole[:cut]]))
        )
        rest = whole[len(first.arguments) :]
        written.append([first, *(ToolCall(index, arguments=piece) for piece in (rest[:3], rest[3:]) if piece)])
    return written


@st.composite
def answers(draw: st.DrawFn, choice: int = 0, mixed: bool = False) -> list[Event]:
    """The events of one answer: reasoning, text, calls, or the first two in any order."""
    thoughts: list[Event] = [Delta(choice, reasoning=piece) for piece in draw(st.lists(texts, max_size=4))]
    spoken: list[Event] = [
        Delta(choice, text=piece, logprobs=tuple(draw(st.lists(logprobs, max_size=2))))
        for piece in draw(st.lists(texts, max_size=4))
    ]
    said = draw(st.permutations([*thoughts, *spoken])) if mixed else [*thoughts, *spoken]
    called: list[Event] = [Delta(choice, tool_calls=(part,)) for call in draw(calls()) for part in call]
    count = draw(st.none() | st.integers(0, 99))
    ended: FinishReason = "tool_calls" if called else "stop"
    reason: FinishReason = draw(st.booleans().map(lambda cut: "length" if cut else ended))
    return [*said, *called, Finished(choice, reason, None, count, None if count is None else 1.25)]


@st.composite
def several(draw: st.DrawFn) -> tuple[int, list[Event]]:
    """A number of answers and their events, one answer's among another's."""
    n = draw(st.integers(1, 3))
    waiting = [draw(answers(choice, mixed=True)) for choice in range(n)]
    events: list[Event] = []
    while any(waiting):
        events.append(draw(st.sampled_from([one for one in waiting if one])).pop(0))
    return n, events


def asked_for(route: Route, n: int = 1) -> Asked:
    if route == "completions":
        return Asked("completion", prompts=["p"] * n, include_usage=True)
    return Asked("chat", messages=[{"role": "user", "content": "p"}], n=n, include_usage=True)


def renderer(route: Route, n: int = 1) -> Renderer:
    return PROTOCOLS[route].renderer(asked_for(route, n), "abc", "teacher", 1_700_000_000)


def stream_of(route: Route, events: list[Event], n: int = 1, failed_at: int | None = None) -> bytes:
    to = renderer(route, n)
    parts = [to.begin(), *(to.event(event) for event in events[:failed_at])]
    return b"".join([*parts, to.end(USAGE) if failed_at is None else to.failed(FAILED)])


def body_of(route: Route, events: list[Event], n: int = 1) -> dict[str, Any]:
    return renderer(route, n).body(gather(events, n), USAGE)


class Clients:
    """Official clients of a server that answers what it is told to."""

    def __init__(self) -> None:
        self.stream, self.whole = b"", {}  # type: bytes, dict[str, Any]
        transport = httpx2.MockTransport(self._answer)
        url = "http://gateway"
        self.openai = openai.OpenAI(
            api_key="k", base_url=f"{url}/v1", max_retries=0, http_client=httpx2.Client(transport=transport)
        )
        self.anthropic = anthropic.Anthropic(
            api_key="k", base_url=url, max_retries=0, http_client=httpx2.Client(transport=transport)
        )

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        if json.loads(request.content).get("stream"):
            return httpx2.Response(200, headers={"content-type": CONTENT_TYPE}, content=self.stream)
        return httpx2.Response(200, json=self.whole)


CLIENTS = Clients()
USER: Any = [{"role": "user", "content": "p"}]


def chat_streamed() -> Any:
    state = ChatCompletionStreamState()
    for chunk in CLIENTS.openai.chat.completions.create(model="m", messages=USER, stream=True):
        state.handle_chunk(chunk)
    return state.current_completion_snapshot  # the final one must not be cut off


def choices_of(completion: Any) -> list[Any]:
    """What a user of the client sees."""
    seen = []
    for choice in completion.choices:
        message = choice.message.to_dict()
        called = [
            (call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls") or ()
        ]
        told = [each.to_dict() for each in choice.logprobs.content] if choice.logprobs else []
        texts_of = [message.get(name) for name in ("role", "content", "reasoning_content", "reasoning_summary")]
        seen.append((choice.index, texts_of, called, told, choice.finish_reason))
    return seen


@settings(max_examples=60, deadline=None)
@given(several())
def test_chat(given: tuple[int, list[Event]]) -> None:
    n, events = given
    CLIENTS.stream, CLIENTS.whole = stream_of("chat", events, n), body_of("chat", events, n)
    whole = CLIENTS.openai.chat.completions.create(model="m", messages=USER)
    streamed = chat_streamed()
    assert choices_of(streamed) == choices_of(whole)
    assert [choice.index for choice in streamed.choices] == list(range(n))
    assert streamed.usage == whole.usage
    assert (streamed.id, streamed.model, streamed.created) == (whole.id, whole.model, whole.created)
    text = "".join(event.text for event in events if isinstance(event, Delta) and event.choice == 0)
    assert (whole.choices[0].message.content or "") == text


@settings(max_examples=40, deadline=None)
@given(several())
def test_completions(given: tuple[int, list[Event]]) -> None:
    n, events = given
    CLIENTS.stream, CLIENTS.whole = stream_of("completions", events, n), body_of("completions", events, n)
    whole = CLIENTS.openai.completions.create(model="m", prompt="p")
    seen, at_once, usage = blank(n), blank(n), None
    for chunk in CLIENTS.openai.completions.create(model="m", prompt="p", stream=True):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            add_choice(seen[choice.index], choice)
    for choice in whole.choices:
        add_choice(at_once[choice.index], choice)
    assert seen == at_once
    assert usage == whole.usage


def blank(n: int) -> list[dict[str, Any]]:
    return [{"text": "", "tokens": [], "offsets": [], "tops": [], "why": None} for _ in range(n)]


def add_choice(seen: dict[str, Any], choice: Any) -> None:
    seen["text"] += choice.text
    seen["why"] = choice.finish_reason or seen["why"]
    if choice.logprobs:
        seen["tokens"] += zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True)
        seen["offsets"] += choice.logprobs.text_offset
        seen["tops"] += choice.logprobs.top_logprobs


@settings(max_examples=50, deadline=None)
@given(answers())
def test_messages(events: list[Event]) -> None:
    CLIENTS.stream, CLIENTS.whole = stream_of("messages", events), body_of("messages", events)
    whole = CLIENTS.anthropic.messages.create(model="m", messages=USER, max_tokens=9)
    with CLIENTS.anthropic.messages.stream(model="m", messages=USER, max_tokens=9) as stream:
        streamed = stream.get_final_message()
    assert streamed.to_dict(exclude_none=True) == whole.to_dict(exclude_none=True)
    check_blocks(CLIENTS.stream)


@settings(max_examples=60, deadline=None)
@given(answers(mixed=True))
def test_blocks_of_messages_in_any_order(events: list[Event]) -> None:
    CLIENTS.stream = stream_of("messages", events)
    with CLIENTS.anthropic.messages.stream(model="m", messages=USER, max_tokens=9) as stream:
        content = stream.get_final_message().content
    (answer,) = gather(events)
    assert "".join(block.text for block in content if block.type == "text") == answer.text
    thought = "".join(block.thinking for block in content if block.type == "thinking")
    assert thought.startswith(answer.reasoning)
    check_blocks(CLIENTS.stream)


@settings(max_examples=50, deadline=None)
@given(answers())
def test_responses(events: list[Event]) -> None:
    CLIENTS.stream, CLIENTS.whole = stream_of("responses", events), body_of("responses", events)
    whole = CLIENTS.openai.responses.create(model="m", input="p").to_dict()
    with CLIENTS.openai.responses.stream(model="m", input="p") as stream:
        kinds: list[Any] = list(stream)
    last = kinds[-1]
    streamed = last.response.to_dict()
    for each in (whole, streamed):
        each.pop("completed_at", None)
        output: Any = each["output"]
        for item in output:  # the client adds what it parses
            item.pop("parsed_arguments", None)
            for part in item.get("content", ()):
                part.pop("parsed", None)
    assert streamed == whole
    assert last.type == ("response.incomplete" if events[-1] == cut(events[-1]) else "response.completed")


def cut(event: Event) -> Event | None:
    return event if isinstance(event, Finished) and event.reason == "length" else None


def events_in(written: bytes) -> Iterator[tuple[str | None, Any]]:
    """Names and data, by a parser that knows nothing of protocols."""
    for block in written.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        yield lines.get("event"), lines["data"] if lines["data"] == "[DONE]" else json.loads(lines["data"])


def check_blocks(written: bytes) -> None:
    """One start, one stop; each block has an index of its own and is closed before the next one opens."""
    names = [name for name, _ in events_in(written)]
    assert [names.count(name) for name in ("message_start", "message_delta", "message_stop")] == [1, 1, 1]
    assert (names[0], names[-1]) == ("message_start", "message_stop")
    opened, last, kinds = None, -1, {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "tool_use"}
    for name, data in events_in(written):
        assert data["type"] == name
        if name == "content_block_start":
            assert (opened, data["index"]) == (None, last + 1)
            last, opened = data["index"], data["content_block"]["type"]
        elif name == "content_block_delta":
            assert (data["index"], kinds[data["delta"]["type"]]) == (last, opened)
        elif name == "content_block_stop":
            assert (data["index"], opened is None) == (last, False)
            opened = None
    assert opened is None


@pytest.mark.parametrize("route", ROUTES_OF_ONE)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_stream_that_breaks_off(route: Route, data: st.DataObject) -> None:
    """The client raises the gateway's own words, and nothing claims that the answer is whole."""
    events = data.draw(answers())
    at = data.draw(st.integers(0, len(events)))
    CLIENTS.stream = stream_of(route, events, failed_at=at)
    names = [name for name, _ in events_in(CLIENTS.stream)]
    assert not {"message_stop", "response.completed", "response.incomplete"} & set(names)
    assert all(each != "[DONE]" for _, each in events_in(CLIENTS.stream))
    with pytest.raises((openai.APIError, anthropic.APIError), match="the engine has gone; try again"):
        read_all(route)


def read_all(route: Route) -> None:
    client = CLIENTS.openai
    if route == "chat":
        chat_streamed()
    elif route == "completions":
        list(client.completions.create(model="m", prompt="p", stream=True))
    elif route == "responses":
        list(client.responses.create(model="m", input="p", stream=True))
    else:
        list(CLIENTS.anthropic.messages.create(model="m", messages=USER, max_tokens=9, stream=True))
