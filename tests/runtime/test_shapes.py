"""Shapes of records, each written out with the conversation or the pair that it means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adlocal import TraceError
from adlocal.traces import Trace, read_prompts, read_traces
from support.encoders import Encoders

Row = dict[str, Any]
Lines = Callable[..., Path]

USER, ANSWER = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    """Writes JSON lines."""

    def write(*rows: Row) -> Path:
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "data.jsonl"

    return write


def one(lines: Lines, row: Row) -> Trace:
    (trace,) = read_traces(lines(row))
    return trace


# Pairs of texts

PAIRS: dict[str, tuple[Row, str, str]] = {
    "prompt and completion": ({"prompt": "a", "completion": "b"}, "a", "b"),
    "prompt and response": ({"prompt": "a", "response": "b"}, "a", "b"),
    "question and answer": ({"question": "a", "answer": "b"}, "a", "b"),
    "question and response": ({"question": "a", "response": "b"}, "a", "b"),
    "a response before the bare answer": ({"question": "a", "response": "So 4.", "answer": "4"}, "a", "So 4."),
    "problem and solution": ({"problem": "a", "solution": "b"}, "a", "b"),
    "a solution before the bare answer": ({"problem": "a", "solution": "So 4.", "answer": "4"}, "a", "So 4."),
    "query and response": ({"query": "a", "response": "b"}, "a", "b"),
    "input and output": ({"input": "a", "output": "b"}, "a", "b"),
    "Alpaca": ({"instruction": "Add.", "input": "2 2", "output": "4"}, "Add.\n\n2 2", "4"),
    "Alpaca without input": ({"instruction": "Say hi.", "input": "", "output": "hi"}, "Say hi.", "hi"),
    "Alpaca, input left out": ({"instruction": "Say hi.", "output": "hi"}, "Say hi.", "hi"),
    "Dolly": ({"instruction": "Add.", "context": "2 2", "response": "4"}, "Add.\n\n2 2", "4"),
    "a teacher's completion before a person's": (
        {"instruction": "Add.", "input": "2 2", "output": "4", "completion": "It is 4."},
        "Add.\n\n2 2",
        "It is 4.",
    ),
}


@pytest.mark.parametrize(("row", "prompt", "completion"), PAIRS.values(), ids=PAIRS)
def test_pairs(row: Row, prompt: str, completion: str, lines: Lines) -> None:
    path = lines(row)
    assert list(read_traces(path)) == [Trace(f"{path}:1", prompt=prompt, completion=completion)]
    (asked,) = read_prompts(path)
    assert (asked.prompt, asked.record.fields) == (prompt, row)


# Conversations

CONVERSATIONS: dict[str, tuple[Row, list[Row], int]] = {
    "messages": ({"messages": [USER, ANSWER]}, [USER, ANSWER], 0),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "It is 4."}]},
        [USER, ANSWER],
        0,
    ),
    "ShareGPT with roles": ({"conversations": [USER, ANSWER]}, [USER, ANSWER], 0),
    "ShareGPT, a system prompt beside it": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "What is 2+2?"}, ANSWER]},
        [SYSTEM, USER, ANSWER],
        0,
    ),
    "an empty system prompt": ({"system": "", "messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER], 0),
    "Anthropic": ({"system": "Be brief.", "messages": [USER, ANSWER]}, [SYSTEM, USER, ANSWER], 0),
    "OpenOrca": (
        {"system_prompt": "Be brief.", "question": "What is 2+2?", "response": "It is 4."},
        [SYSTEM, USER, ANSWER],
        2,
    ),
    "a pair of messages": ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER], 1),
    "messages and a text": ({"prompt": [SYSTEM, USER], "completion": "It is 4."}, [SYSTEM, USER, ANSWER], 2),
    "OpenAI's evaluations": ({"input": [SYSTEM, USER], "output": "It is 4."}, [SYSTEM, USER, ANSWER], 2),
    "OpenAI's batches": ({"custom_id": "1", "body": {"messages": [USER, ANSWER]}}, [USER, ANSWER], 0),
    "OpenAI's preferences": ({"input": {"messages": [USER]}, "completion": [ANSWER]}, [USER, ANSWER], 1),
    "a prompt that is repeated in the messages": ({"prompt": "What?", "messages": [USER, ANSWER]}, [USER, ANSWER], 0),
    "a response beside the messages": ({"prompt": "a", "response": "b", "messages": [USER, ANSWER]}, [USER, ANSWER], 0),
    "messages as JSON text": ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER], 0),
    "Alpaca with a history, which is learned too": (
        {"instruction": "And 3?", "history": [["What is 2+2?", "It is 4."]], "output": "6", "system": "Be brief."},
        [SYSTEM, USER, ANSWER, {"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "6"}],
        0,
    ),
    "the same, answered by a teacher": (
        {"instruction": "And 3?", "history": [["What is 2+2?", "It is 4."]], "output": "?", "completion": "6"},
        [USER, ANSWER, {"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "6"}],
        3,
    ),
}


@pytest.mark.parametrize(("row", "messages", "n_given"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(row: Row, messages: list[Row], n_given: int, lines: Lines) -> None:
    path = lines(row)
    assert list(read_traces(path)) == [Trace(f"{path}:1", messages=tuple(messages), n_given=n_given)]


def test_sharegpt_and_alpaca_say_what_the_plain_shapes_say(lines: Lines, encoders: Encoders) -> None:
    sharegpt = {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "It is 4."}]}
    plain = {"prompt": "What is 2+2?", "completion": "It is 4."}
    first, second = (encoders.says(one(lines, row)) for row in (sharegpt, plain))
    assert first == second == ("<s>user\nWhat is 2+2?</s>\n<s>assistant\nIt is 4.</s>\n", ["It is 4.</s>"])
    alpaca = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert encoders.says(one(lines, alpaca)) == ("<s>user\nAdd.\n\n2 2</s>\n<s>assistant\n4</s>\n", ["4</s>"])


# Tools


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [TOOL["function"]]},
        {"functions": [TOOL["function"]]},
    ],
    ids=["list", "JSON text", "bare", "OpenAI's older shape"],
)
def test_tools_beside_messages(columns: Row, lines: Lines) -> None:
    path = lines({"messages": [USER, ANSWER], **columns})
    assert list(read_traces(path)) == [Trace(f"{path}:1", messages=(USER, ANSWER), tools=(TOOL,))]
    (asked,) = read_prompts(lines({"messages": [USER], **columns}))
    assert (asked.messages, asked.tools) == ((USER,), (TOOL,))


@pytest.mark.parametrize("columns", [{"tools": None}, {"tools": []}, {"tools": ""}], ids=str)
def test_no_tools(columns: Row, lines: Lines) -> None:
    assert one(lines, {"messages": [USER, ANSWER], **columns}).tools == ()


# What is refused

REFUSED: dict[str, tuple[Row, str]] = {
    "unknown": ({"text": "a"}, r'data\.jsonl:1: has \[\'text\'\], expected "prompt" and "completion".*"instruction"'),
    "a preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"has \['chosen', 'prompt', 'rejected'\]"),
    "a bare answer": ({"problem": "a", "answer": "4"}, r"has \['answer', 'problem'\], expected"),
    "no list": ({"messages": "hello"}, "\"messages\" is 'hello'; expected a list, or a list as JSON text"),
    "a number of tools": ({"messages": [USER, ANSWER], "tools": 3}, "\"tools\" is int '3'; expected a list"),
    "a tool that is none": ({"messages": [USER, ANSWER], "tools": [3]}, "\"tools\" holds int '3'; expected objects"),
    "two system prompts": ({"system": "a", "messages": [SYSTEM, USER, ANSWER]}, "has two system prompts"),
    "a history of no pairs": ({"instruction": "a", "output": "b", "history": ["c"]}, '"history" is .*expected pairs'),
    "pictures": ({"messages": [USER, ANSWER], "images": ["a.png"]}, 'has "images", and adlocal reads text only'),
    "an empty completion": ({"prompt": [USER], "completion": " "}, "the completion is empty; remove the line"),
}


@pytest.mark.parametrize(("row", "words"), REFUSED.values(), ids=REFUSED)
def test_what_no_shape_fits_is_told(row: Row, words: str, lines: Lines) -> None:
    with pytest.raises(TraceError, match=words):
        read_traces(lines(row))


def test_pictures_that_are_none_are_no_pictures(lines: Lines) -> None:
    assert one(lines, {"messages": [USER, ANSWER], "images": [], "audio": None}).unused == ()


def test_keys_that_adlocal_does_not_follow_are_named(lines: Lines) -> None:
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}, "source": "left alone"}
    assert one(lines, row).unused == ("chat_template_kwargs",)
    assert read_prompts(lines({**row, "messages": [USER]}))[0].unused == ("chat_template_kwargs",)


PROMPTS_REFUSED: dict[str, tuple[Row, str]] = {
    "ends with an answer": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "turn of",
    ),
    "an empty instruction": ({"instruction": " ", "output": "b"}, "the prompt is empty; remove the line"),
    "no messages": ({"messages": []}, "the prompt is empty; remove the line"),
    "unknown": ({"text": "a"}, r'has \[\'text\'\], expected "prompt", a string or a list of messages, or a list "mess'),
}


@pytest.mark.parametrize(("row", "words"), PROMPTS_REFUSED.values(), ids=PROMPTS_REFUSED)
def test_what_is_no_prompt_is_told(row: Row, words: str, lines: Lines) -> None:
    with pytest.raises(TraceError, match=rf"data\.jsonl:1: .*{words}"):
        read_prompts(lines(row))
