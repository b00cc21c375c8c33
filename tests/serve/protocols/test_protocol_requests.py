"""What clients send: which meaning it has, and in which words it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adlocal.serve.asked import Asked
from adlocal.serve.events import Failed
from adlocal.serve.protocols import PROTOCOLS, Route, read_json
from adlocal.serve.protocols.fields import FIELDS, ROUTES
from adlocal.serve.protocols.messages import counted_of

USER = {"role": "user", "content": "hi"}
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FLAT = {"type": "function", "name": "f", "parameters": {}}


def asked(route: Route, **body: Any) -> Asked:
    """The meaning of a body, with the least that the route needs."""
    least: dict[Route, dict[str, Any]] = {
        "chat": {"messages": [USER]},
        "completions": {"prompt": "hi"},
        "responses": {"input": "hi"},
        "messages": {"messages": [USER], "max_tokens": 5},
    }
    return PROTOCOLS[route].asked_of(read_json(json.dumps(least[route] | body).encode()), "ignore")


def refused(route: Route, **body: Any) -> Failed:
    with pytest.raises(Failed) as found:
        asked(route, **body)
    failed = found.value
    assert (failed.status, failed.type) == (400, "invalid_request_error")
    assert failed.param is None or failed.message.startswith(f"{failed.param}: ")
    return failed


FORMAT = {"type": "json_schema", "name": "n", "schema": {"const": 1}}
ANTHROPIC_TOOL = {"name": "f", "input_schema": {}}


@pytest.mark.parametrize(
    ("route", "body", "attribute", "meaning"),
    [
        ("chat", {"max_completion_tokens": 9, "n_predict": 9}, "max_tokens", 9),
        ("chat", {"max_tokens": -1}, "max_tokens", None),
        ("completions", {"n_predict": 9}, "max_tokens", 9),
        ("responses", {"max_output_tokens": 9}, "max_tokens", 9),
        ("messages", {"max_tokens": 9}, "max_tokens", 9),
        ("chat", {"n_cmpl": 3}, "n", 3),
        ("chat", {"stop": "a"}, "stop", ["a"]),
        ("messages", {"stop_sequences": ["a", "b"]}, "stop", ["a", "b"]),
        ("chat", {"temperature": 1, "top_k": -1, "seed": -1}, "sampling", {"temperature": 1.0, "top_k": 0}),
        ("messages", {"temperature": 0.5, "top_k": 3, "min_p": 1}, "sampling", {"temperature": 0.5, "top_k": 3}),
        ("chat", {"logit_bias": {"5": 1, "6": False}}, "logit_bias", {5: 1.0, 6: -100.0}),
        ("completions", {"logit_bias": [[5, 1.0], [6, False]]}, "logit_bias", {5: 1.0, 6: -100.0}),
        ("chat", {"logprobs": True}, "top_logprobs", 0),
        ("chat", {"logprobs": True, "top_logprobs": 4}, "top_logprobs", 4),
        ("chat", {"n_probs": 4}, "top_logprobs", 4),
        ("chat", {"logprobs": False, "n_probs": 0}, "top_logprobs", None),
        ("completions", {"logprobs": 0}, "top_logprobs", 0),
        ("responses", {"include": ["message.output_text.logprobs"], "top_logprobs": 2}, "top_logprobs", 2),
        ("responses", {"include": ["reasoning.encrypted_content"], "top_logprobs": 2}, "top_logprobs", None),
        ("chat", {"reasoning_effort": "none"}, "reasoning", False),
        ("chat", {"reasoning_effort": "high"}, "reasoning", True),
        ("chat", {"chat_template_kwargs": {"enable_thinking": False}}, "reasoning", False),
        ("responses", {"reasoning": {"effort": "low", "summary": "auto"}}, "reasoning", True),
        ("responses", {"reasoning": {"effort": "none"}}, "reasoning", False),
        ("messages", {"thinking": {"type": "enabled", "budget_tokens": 9}}, "reasoning", True),
        ("messages", {"thinking": {"type": "adaptive"}}, "reasoning", True),
        ("messages", {"thinking": {"type": "disabled"}}, "reasoning", False),
        ("chat", {"response_format": {"type": "json_object"}}, "schema", {"type": "object"}),
        ("chat", {"response_format": {"type": "json_schema", "json_schema": FORMAT}}, "schema", {"const": 1}),
        ("chat", {"json_schema": {"const": 1}}, "schema", {"const": 1}),
        ("responses", {"text": {"format": FORMAT}}, "schema", {"const": 1}),
        ("responses", {"text": {"format": {"type": "text"}}}, "schema", None),
        ("completions", {"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ("completions", {"prompt": [1, 2]}, "prompts", [[1, 2]]),
        ("completions", {"prompt": ["a", "b"]}, "prompts", ["a", "b"]),
        ("completions", {"prompt": [[1], [2, 3]]}, "prompts", [[1], [2, 3]]),
        ("chat", {"stream": True, "stream_options": {"include_usage": True}}, "include_usage", True),
        ("chat", {"stream": True}, "include_usage", False),
        ("chat", {"safety_identifier": "u"}, "user", "u"),
        ("messages", {"metadata": {"user_id": "u"}}, "user", "u"),
        ("chat", {"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "required"),
        ("messages", {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "any"}}, "tool_choice", "required"),
        ("messages", {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
         "parallel_tool_calls", False),
        ("chat", {"messages": [USER, {"role": "assistant", "content": "Well"}]}, "prefill", True),
        ("chat", {}, "prefill", False),
    ],
)  # fmt: skip
def test_meanings(route: Route, body: dict[str, Any], attribute: str, meaning: Any) -> None:
    assert getattr(asked(route, **body), attribute) == meaning


def test_a_choice_of_tool_reads_the_same_in_every_protocol() -> None:
    chosen = {"type": "function", "function": {"name": "f"}}
    anthropic = {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool", "name": "f"}}
    for given_as in (
        asked("chat", tools=[TOOL], tool_choice=chosen),
        asked("responses", tools=[FLAT], tool_choice={"type": "function", "name": "f"}),
        asked("messages", **anthropic),
    ):
        assert given_as.tool_choice == chosen
        assert given_as.tools[0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("chat", {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ("chat", {"n_predict": 0}, "n_predict"),
        ("chat", {"n": 1, "n_cmpl": 2}, "n_cmpl"),
        ("chat", {"n": 17}, "n"),
        ("chat", {"n": True}, "n"),
        ("chat", {"temperature": 999999}, "temperature"),
        ("messages", {"temperature": -1}, "temperature"),
        ("chat", {"top_p": -1}, "top_p"),
        ("chat", {"repeat_penalty": 0}, "repeat_penalty"),
        ("chat", {"stop": ""}, "stop"),
        ("chat", {"stop": ["a", ""]}, "stop[1]"),
        ("chat", {"stop": ["a"] * 17}, "stop"),
        ("chat", {"stop": "a" * 257}, "stop"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": None}, "messages"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("chat", {"messages": [{"role": "god", "content": ""}]}, "messages[0].role"),
        ("chat", {"messages": [{"content": ""}]}, "messages[0].role"),
        ("chat", {"messages": ["hi"]}, "messages[0]"),
        ("chat", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "messages"),
        ("chat", {"messages": [{"role": "assistant", "content": "a"}] * 2}, "messages"),
        ("chat", {"continue_final_message": True}, "continue_final_message"),
        ("chat", {"add_generation_prompt": False}, "add_generation_prompt"),
        ("chat", {"logit_bias": {"the": 1}}, "logit_bias.the"),
        ("chat", {"logit_bias": [["the", 1]]}, "logit_bias[0][0]"),
        ("chat", {"logit_bias": [[1.5, 1]]}, "logit_bias"),
        ("chat", {"logit_bias": {"1": 101}}, "logit_bias.1"),
        ("chat", {"logit_bias": {"1": True}}, "logit_bias"),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ("chat", {"tools": [TOOL, TOOL]}, "tools"),
        ("chat", {"tool_choice": "required"}, "tool_choice"),
        ("chat", {"tools": [TOOL], "grammar": "root ::= [a]"}, "grammar"),
        ("chat", {"json_schema": {}, "grammar": "root ::= [a]"}, "grammar"),
        ("chat", {"json_schema": {"const": 1}, "response_format": {"type": "json_object"}}, "json_schema"),
        ("chat", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ("chat", {"response_format": {"type": "xml"}}, "response_format.type"),
        ("chat", {"chat_template_kwargs": {"enable_thinking": "false"}}, "chat_template_kwargs.enable_thinking"),
        ("chat", {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
         "chat_template_kwargs.enable_thinking"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ["a", 1]}, "prompt[0]"),
        ("completions", {"prompt": {"prompt_string": "x", "multimodal_data": []}}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt[0]"),
        ("completions", {"echo": True, "logprobs": 1}, "echo"),
        ("completions", {"echo": True, "prompt": [1]}, "echo"),
        ("responses", {"input": []}, "input"),
        ("responses", {"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ("responses", {"input": [{"type": "item_reference"}]}, "input[0].type"),
        ("responses", {"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ("messages", {"max_tokens": None}, "max_tokens"),
        ("messages", {"max_tokens": 0}, "max_tokens"),
        ("messages", {"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ("messages", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ("messages", {"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_its_field(route: Route, body: dict[str, Any], param: str) -> None:
    assert refused(route, **body).param == param


@pytest.mark.parametrize(
    ("route", "name", "part"),
    [
        ("chat", "messages", {"type": "image_url", "image_url": {"url": "data:,"}}),
        ("chat", "messages", {"type": "input_audio", "input_audio": {}}),
        ("chat", "messages", {"type": "file", "file": {}}),
        ("responses", "input", {"type": "input_image", "image_url": "data:,"}),
        ("responses", "input", {"type": "input_file", "file_id": "x"}),
        ("messages", "messages", {"type": "image", "source": {"type": "base64"}}),
        ("messages", "messages", {"type": "tool_result", "content": [{"type": "document"}]}),
    ],
)
def test_images_and_files_are_refused_in_words(route: Route, name: str, part: Any) -> None:
    assert "takes text alone" in refused(route, **{name: [{"role": "user", "content": [part]}]}).message


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"1", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b'{"a": "\xff"}',
     b'{"a":' * 100000, b'{"a": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_what_is_no_json_object(raw: bytes) -> None:
    with pytest.raises(Failed) as found:
        read_json(raw)
    assert found.value.status == 400


def test_whole_characters_outside_the_first_plane_are_read() -> None:
    assert read_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}', "", None, "[1]", '{"a"', "\\", '"\\ud800"'])
def test_histories_of_tools_as_clients_keep_them(arguments: Any) -> None:
    """Numbers may be missing, content null; arguments reach templates as an object whatever they were."""
    turns: list[Any] = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}]
    turns[1]["tool_calls"] = [{"function": {"name": "f", "arguments": arguments}}] * 2
    meant = asked("chat", messages=[*turns, {"role": "tool", "content": "1"}, {"role": "tool", "content": None}])
    calls = meant.messages[1]["tool_calls"]
    assert [call["id"] for call in calls] == ["call_0", "call_1"]
    assert [answer["tool_call_id"] for answer in meant.messages[2:]] == ["call_0", "call_1"]
    assert isinstance(json.loads(calls[0]["function"]["arguments"]), dict)
    assert meant.messages[1]["content"] == meant.messages[3]["content"] == ""


def test_one_conversation_in_three_protocols() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    wanted = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    assert asked("chat", messages=wanted).messages == wanted
    items = [
        USER,
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "secret"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
    ]
    assert asked("responses", instructions="s", input=items).messages == wanted
    blocks = [
        {"type": "thinking", "thinking": "secret", "signature": ""},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
    ]
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "42"}]}
    turns = [USER, {"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
    assert asked("messages", system=[{"type": "text", "text": "s"}], messages=turns).messages == wanted
    assert counted_of({"system": "s", "messages": turns}).messages == wanted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
words = st.sampled_from(
    (
        *("user", "assistant", "tool", "system", "message", "text", "function", "f", "type", "role", "content", "name"),
        *("reasoning", "tool_use", "tool_result", "function_call", "function_call_output", "object", "properties"),
        *("$ref", "#", "#/properties/a", "allOf", "anyOf", "items", "id", "input", "call_id", "tool_calls"),
        *("arguments", "schema", "parameters"),
    )
)
likely = st.recursive(
    words | st.integers(-2, 300) | st.booleans() | st.none() | st.just(1e308),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            words | st.sampled_from(["tool_calls", "arguments", "schema", "parameters"]), inner, max_size=5
        )
    ),
    max_leaves=25,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
        optional={
            "content": likely,
            "tool_calls": st.lists(st.fixed_dictionaries({"function": likely}, optional={"id": likely}), max_size=2),
            "tool_call_id": likely,
            "type": words,
        },
    ),
    max_size=5,
)
bodies = st.dictionaries(
    st.sampled_from(sorted({field.name.partition(".")[0] for field in FIELDS})), json_values | likely, max_size=8
)


def understood(route: Route, raw: bytes) -> Asked | Failed:
    try:
        return PROTOCOLS[route].asked_of(read_json(raw), "ignore")
    except Failed as failed:
        return failed


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=100, deadline=None)
@given(body=bodies, turns=messages, schema=likely, with_turns=st.booleans())
def test_any_body_is_understood_or_refused(
    route: Route, body: dict[str, Any], turns: Any, schema: Any, with_turns: bool
) -> None:
    if with_turns:
        body |= {"messages": turns, "input": turns}
        body |= {"tools": [{"type": "function", "name": "f", "function": {"name": "f", "parameters": schema}}]}
        body = {name: value for name, value in body.items() if name in PROTOCOLS[route].request.model_fields}
        body |= {"max_tokens": 4} if route == "messages" else {}
    meant = understood(route, json.dumps(body).encode())
    if isinstance(meant, Failed):
        assert meant.status == 400
        assert meant.message.encode()
    else:
        assert json.dumps([meant.messages, meant.tools, meant.schema, meant.sampling], allow_nan=False)


@pytest.mark.parametrize("route", ROUTES)
def test_the_schema_for_openapi_is_made(route: Route) -> None:
    schema = PROTOCOLS[route].request.model_json_schema()
    assert schema["type"] == "object"
    assert "lora" not in schema["properties"]
