"""Messages as people's data has them: what they become, what of them is learned, and what is refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adlocal import TraceError
from adlocal.traces import Prompt, Record, Trace, TraceFile, read_prompts, read_traces, remarks
from adlocal.traces.messages import read_turns
from support import tiny
from support.encoders import Encoders

Row = dict[str, Any]
Read = Callable[..., TraceFile]

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
ASKED = "<s>user\n2+2?</s>\n<s>assistant\n"


def said(**more: Any) -> Row:
    return {"role": "assistant", "content": "4", **more}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads rows as a trace file; a list is the messages of a row."""

    def call(*rows: Any) -> TraceFile:
        path = tmp_path / "data.jsonl"
        fields = [row if isinstance(row, dict) else {"messages": row} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in fields))
        return read_traces(path)

    return call


def one(read: Read, row: Any) -> Trace:
    (trace,) = read(row)
    return trace


# Contents


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "hi"}], "hi"),
        ([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo\n"}], "hello\n"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}, "c", {"text": "d"}], "abcd"),
    ],
    ids=str,
)
def test_text_parts_are_joined(content: Any, text: str) -> None:
    assert read_turns("here", [{"role": "user", "content": content}]).messages == ({"role": "user", "content": text},)


def test_parts_encode_as_the_text_that_they_are(read: Read, encoders: Encoders) -> None:
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("user", "2+2?"),)]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]}
    assert encoders.says(one(read, [*parts, answer])) == (f"{ASKED}hello there</s>\n", ["hello there</s>"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], 'of type "image_url", which is no text; leave the part'),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], 'of type "input_audio", which is no text'),
        ([{"type": "text"}], 'of type "text", which is no text'),
        ([3], "part of a message's content is int '3', which is no text"),
        (3, "a message's content is int '3'; expected text, or a list of text parts"),
        ({"text": "a"}, "a message's content is dict"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused(content: Any, words: str, read: Read) -> None:
    with pytest.raises(TraceError, match=rf"data\.jsonl:1: .*{words}"):
        read([{"role": "user", "content": content}, ANSWER])


# Roles


@pytest.mark.parametrize(
    ("role", "known"),
    [
        *((name, "user") for name in ("user", "User", " USER ", "human", "Human", "prompter")),
        *((name, "assistant") for name in ("assistant", "Assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot")),
        *((name, "system") for name in ("system", "System", "developer")),
        *((name, "tool") for name in ("tool", "function", "observation", "tool_response", "ipython")),
    ],
)
def test_roles_have_known_aliases(role: str, known: str) -> None:
    for message in ({"role": role, "content": "a"}, {"from": role, "value": "a"}):
        assert read_turns("here", [message]).messages == ({"role": known, "content": "a"},)


def test_an_unknown_role_is_named_with_its_record(read: Read) -> None:
    with pytest.raises(TraceError) as error:
        read([USER, ANSWER], [{"role": "narrator", "content": "Once"}, ANSWER])
    assert str(error.value).endswith(
        'data.jsonl:2: unknown role "narrator"; expected system, user, assistant or tool; rename it'
    )


# Reasoning

THOUGHT = "two and two make four"


@pytest.mark.parametrize(
    "answer",
    [
        said(reasoning_content=THOUGHT),
        said(reasoning=THOUGHT),
        said(thinking=THOUGHT),
        said(reasoning_content=THOUGHT, reasoning=THOUGHT),
        said(reasoning=[{"type": "text", "text": THOUGHT}]),
        said(content=[{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": "4"}]),
        said(content=[{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}, "4"]),
        {"from": "gpt", "value": "4", "reasoning_content": THOUGHT},
    ],
    ids=str,
)
def test_reasoning_is_learned_before_the_answer(answer: Row, read: Read, encoders: Encoders) -> None:
    found = read([USER, answer], [USER, ANSWER])
    assert [trace.has_reasoning for trace in found] == [True, False]
    assert found.n_reasoning == 1
    thought = f"<think>\n{THOUGHT}\n</think>\n\n4</s>"
    assert encoders.says(found.traces[0]) == (f"{ASKED}{thought}\n", [thought])
    assert remarks(found, encoders()) == ["1 with reasoning"]


def test_reasoning_beside_a_pair_of_texts(read: Read, encoders: Encoders) -> None:
    pair = {"question": "2+2?", "reasoning": THOUGHT, "answer": "4"}
    thought = f"<think>\n{THOUGHT}\n</think>\n\n4"
    assert encoders.says(one(read, pair)) == (f"{ASKED}{thought}</s>\n", [f"{thought}</s>"])
    assert encoders.says(one(read, pair), None) == (f"<s>2+2?{thought}", [thought])
    assert encoders.says(one(read, {**pair, "system": "Add."}))[1] == [f"{thought}</s>"]
    assert read(pair).n_reasoning == 1
    generated = {**pair, "completion": "4", "generated_by": {}}
    assert one(read, generated).reasoning == "", "a person's reasoning is not the teacher's"


def test_reasoning_beside_a_conversation_is_of_no_turn_and_named(read: Read) -> None:
    assert one(read, {"messages": [USER, ANSWER], "reasoning": "of which?"}).unused == ("reasoning",)


def test_reasoning_without_an_answer_is_an_answer(read: Read, encoders: Encoders) -> None:
    """A completion that was cut while it thought teaches no end."""
    row = {"messages": [USER, {"role": "assistant", "reasoning_content": "two and"}]}
    assert encoders.says(one(read, row))[1] == ["<think>\ntwo and\n</think>\n\n</s>"]
    assert encoders.says(one(read, {**row, "finish_reason": "length"}))[1] == ["<think>\ntwo and"]


def test_two_reasonings_for_one_turn_are_refused(read: Read) -> None:
    with pytest.raises(TraceError, match=r"data\.jsonl:1: two different reasonings for one turn"):
        read([USER, said(reasoning_content="a", thinking="b")])


def test_reasoning_that_the_template_drops_is_not_dropped_in_silence(read: Read, encoders: Encoders) -> None:
    """The template knows the field in short conversations only, and looks into no content."""
    template = (
        "{% for m in messages %}<s>{% if m.reasoning_content and messages | length < 3 %}{{ m.reasoning_content }}:"
        "{% endif %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    assert encoders.says(one(read, [USER, said(reasoning_content="so")]), template)[1] == ["so:4</s>"]
    trace = one(read, [{"role": "system", "content": ""}, USER, said(reasoning_content="so")])
    with pytest.raises(TraceError, match=r"data\.jsonl:1: the model's chat template drops the reasoning of a turn"):
        encoders.says(trace, template)


# What is learned

TWICE = [{"role": "user", "content": "Spell cat."}, {"role": "user", "content": "Again."}]


@pytest.mark.parametrize(
    "mark",
    [
        *({"weight": value} for value in (0, 0.0, False)),
        *({key: False} for key in ("train", "training", "train_turn", "loss")),
        {"loss": 0},
        {"weight": 1, "loss": 0},
    ],
    ids=str,
)
def test_a_turn_of_no_weight_is_context_only(mark: Row, read: Read, encoders: Encoders) -> None:
    messages = [TWICE[0], said(content="k a t", **mark), TWICE[1], said(content="c a t", weight=1)]
    found = read(messages)
    text, learned = encoders.says(found.traces[0])
    assert learned == ["c a t</s>"]
    assert "<s>assistant\nk a t</s>" in text
    assert remarks(found, encoders()) == ["1 with turns that are context only, by their weight"]
    assert not any(key in message for message in found.traces[0].messages or () for key in mark), "no template's matter"


@pytest.mark.parametrize(
    "mark", [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"loss": 1}, {"weight": None}], ids=str
)
def test_a_turn_of_full_weight_is_learned(mark: Row, read: Read, encoders: Encoders) -> None:
    found = read([USER, said(**mark)])
    assert encoders.says(found.traces[0])[1] == ["4</s>"]
    assert remarks(found, encoders()) == []


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"weight": 0.5}, r"\"weight\" of a turn is float '0.5'; expected 0 \(context\) or 1 \(learned\)"),
        ({"loss": 2}, '"loss" of a turn is int'),
        ({"train": "no"}, "\"train\" of a turn is 'no'; expected 0"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            '"train_detail" marks parts of a turn',
        ),
        ({"weight": 0}, "no assistant turn with text to learn from"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_followed_are_refused(mark: Row, words: str, read: Read) -> None:
    with pytest.raises(TraceError, match=rf"data\.jsonl:1: .*{words}"):
        read([USER, said(**mark)])


def test_other_roles_are_never_learned(read: Read) -> None:
    """Which is said where a trainer would have learned them."""
    assert one(read, [{**USER, "weight": 0}, ANSWER]).unused == ()
    assert one(read, [{**USER, "train": True}, ANSWER]).unused == ("train",)


# Tools


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
FOUND, TOLD = {"role": "tool", "tool_call_id": "1", "content": "5"}, {"role": "assistant", "content": "It is 5."}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a":2}'}}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "name": "add", "arguments": {"a": 2}}]},
    ],
    ids=["null content", "no content", "calls as JSON", "arguments as JSON", "no envelope"],
)
def test_calls_have_one_form(turn: Row) -> None:
    assert read_turns("here", [turn]).messages == ({"role": "assistant", "content": "", "tool_calls": [CALL]},)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
    ],
    ids=["OpenAI's older shape", "LLaMA-Factory"],
)
def test_older_calls_too(turn: Row) -> None:
    call = {"type": "function", "function": CALL["function"]}
    assert read_turns("here", [turn]).messages == ({"role": "assistant", "content": "", "tool_calls": [call]},)


@pytest.mark.parametrize(("given", "arguments"), [("", {}), ("2 3", "2 3"), ("[2]", "[2]"), ({}, {})], ids=str)
def test_arguments_that_are_no_object_stay(given: Any, arguments: Any) -> None:
    call = {"function": {"name": "add", "arguments": given}}
    (message,) = read_turns("here", [{"role": "assistant", "tool_calls": [call]}]).messages
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize("turn", [{"from": "function_call", "value": "add 2"}, {"from": "tool_call", "value": "[1]"}])
def test_a_call_that_is_no_call_is_refused(turn: Row) -> None:
    with pytest.raises(TraceError, match=r'here: a turn of "function_call" says .*; expected JSON with "name"'):
        read_turns("here", [turn])


WITH_TOOLS = (
    "{% if tools %}<s>tools\n{{ tools | tojson }}</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_calls_are_learned_and_render_alike_whatever_their_arguments_came_as(read: Read, encoders: Encoders) -> None:
    rows = []
    for arguments in ('{"a": 2}', {"a": 2}):
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        rows.append([USER, {"role": "assistant", "content": None, "tool_calls": [call]}, FOUND, TOLD])
    assert read(*rows).n_duplicates == 1
    for row in rows:
        trace = one(read, row)
        text, learned = encoders.says(trace, WITH_TOOLS)
        assert learned == ['[add {"a": 2}]</s>', "It is 5.</s>"]
        assert "<s>tool\n5</s>" in text
        assert remarks(read(row), encoders(WITH_TOOLS)) == []


def test_a_template_without_tools_learns_no_empty_turn_and_says_so(read: Read, encoders: Encoders) -> None:
    found = read([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, FOUND, TOLD])
    assert encoders.says(found.traces[0])[1] == ["It is 5.</s>"]
    assert remarks(found, encoders()) == ["1 with calls of tools that the chat template has no place for"]
    only = one(read, [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}])
    with pytest.raises(TraceError, match=r"data\.jsonl:1: its answers are calls of tools, and the model's chat templ"):
        encoders.says(only)
    assert encoders.says(only, WITH_TOOLS)[1] == ['[add {"a": 2}]</s>']


def test_a_template_that_fails_on_tools_is_told_from_a_broken_row(read: Read, encoders: Encoders) -> None:
    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('user or assistant') }}{% endif %}"
    strict += "{{ m.content }}</s>{% endfor %}"
    trace = one(read, [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, FOUND, TOLD])
    with pytest.raises(TraceError, match=r"1: the model's chat template has no place for calls of tools: user or as"):
        encoders.says(trace, strict)
    broken = (
        WITH_TOOLS
        + "{% for m in messages %}{% if m.content == '5' %}{{ raise_exception('no 5') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(TraceError, match=r"1: the model's chat template refuses the messages: no 5"):
        encoders.says(trace, broken)


TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city"}}


def test_tools_are_given_to_the_template(read: Read, encoders: Encoders) -> None:
    found = read({"messages": [USER, ANSWER], "tools": [TOOL]})
    text, learned = encoders.says(found.traces[0], WITH_TOOLS)
    assert text == f"<s>tools\n[{json.dumps(TOOL)}]</s>\n{ASKED}4</s>\n"
    assert learned == ["4</s>"]
    assert remarks(found, encoders(WITH_TOOLS)) == []


def test_a_template_that_has_no_place_for_tools_is_named_once(read: Read, encoders: Encoders) -> None:
    rows = [{"messages": [USER, said(content=text)], "tools": [TOOL]} for text in "abc"]
    found = read(*rows, [USER, ANSWER])
    assert encoders.says(found.traces[0]) == (f"{ASKED}a</s>\n", ["a</s>"])
    assert remarks(found, encoders()) == ["3 with tools that the chat template has no place for"]
    pair = read({"prompt": "a", "completion": "b", "tools": [TOOL]})
    assert remarks(pair, encoders(WITH_TOOLS, True)) == ["1 with tools that the chat template has no place for"]
    assert remarks(pair, encoders(WITH_TOOLS)) == []


def test_prompts_have_tools_too(tmp_path: Path, encoders: Encoders) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [USER], "tools": [TOOL]}))
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    tokens = encoders(WITH_TOOLS).encode_prompt(prompt.where, prompt.prompt, prompt.tools)
    assert bytes(token for token in tokens if token < tiny.BOS).decode().startswith(f"tools\n[{json.dumps(TOOL)}]")
    assert remarks([prompt], encoders(WITH_TOOLS)) == []
    assert remarks([prompt], encoders()) == ["1 with tools that the chat template has no place for"]


# Keys that nobody knows


def test_unknown_keys_of_messages_are_named_once_and_reach_the_template(read: Read, encoders: Encoders) -> None:
    found = read([USER, said(mood="calm", name="Ada")], [USER, said(mood="cross", audio={"id": 1})], [USER, ANSWER])
    assert remarks(found, encoders()) == ['keys that adlocal does not know: "mood", "audio"']
    moody = tiny.CHAT_TEMPLATE.replace("{{ m['role'] }}", "{{ m['role'] }}{{ m['mood'] }}")
    assert (
        "<s>assistantcalm\n4" in encoders.says(found.traces[0], moody.replace("assistant\n{%", "assistantcalm\n{%"))[0]
    )


def test_prompts_name_them_too(encoders: Encoders) -> None:
    prompt = Prompt(Record("here", {}), (USER,), unused=("mood",))
    assert remarks([prompt, prompt], encoders()) == ['keys that adlocal does not know: "mood"']


# Duplicates


def test_what_is_learned_otherwise_is_no_duplicate(read: Read) -> None:
    """Reasoning, tools and weights make a row another one."""
    longer = [USER, ANSWER, *TWICE[1:], ANSWER]
    rows: list[Any] = [
        [USER, ANSWER],
        [USER, said(reasoning_content="so")],
        [USER, said(tool_calls=[CALL])],
        {"messages": [USER, ANSWER], "tools": [TOOL]},
        longer,
        [USER, said(weight=0), *TWICE[1:], ANSWER],
        {"question": "2+2?", "answer": "4"},
        {"question": "2+2?", "answer": "4", "reasoning": "so"},
    ]
    found = read(*rows, *rows, [USER, said(weight=1)], [{"from": "human", "value": "2+2?"}, ANSWER])
    assert len(found.traces) == len(rows)
    assert found.n_duplicates == len(rows) + 2
