"""No control token remains in the text of a client, alone or with a neighbour; other text stays what it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path

import llama_cpp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adlocal.serve.neutral import MARKS, neutralize, neutralize_json, neutralize_value

MARK = MARKS[0]
CONTROL = frozenset({"<|im_start|>", "<|im_end|>", "<|im_end", "<s>", "</s>", "[INST]", "<<SYS>>", "aba", "xx"})

pieces = st.sampled_from(
    [
        *sorted(CONTROL),
        "<",
        "|",
        "im_",
        "end",
        "|>",
        "s>",
        "<|",
        "<|im_",
        "a",
        "b",
        "x",
        MARK,
        "\n",
        " ",
        "é",
        "[IN",
        "ST]",
    ]
)
texts = st.lists(pieces, max_size=12).map("".join) | st.text("<|im_endsab[]x" + MARK)


def tokens_in(text: str, control: frozenset[str] = CONTROL) -> list[str]:
    return [token for token in control if token in text]


@settings(deadline=None)
@given(texts)
def test_no_control_token_remains(text: str) -> None:
    found = neutralize(text, CONTROL)
    assert not tokens_in(found)
    assert found.replace(MARK, "") == text.replace(MARK, "")
    assert neutralize(found, CONTROL) == found
    if MARK not in found:
        assert found is text


@settings(deadline=None)
@given(texts, texts)
def test_none_arises_between_two_texts(first: str, second: str) -> None:
    assert not tokens_in(neutralize(first, CONTROL) + neutralize(second, CONTROL))


@settings(deadline=None)
@given(st.text(), st.sets(st.text(min_size=1, max_size=5), max_size=6), st.data())
def test_no_control_token_remains_of_any_vocabulary(text: str, control: set[str], data: st.DataObject) -> None:
    if control:
        text += data.draw(st.lists(st.sampled_from(sorted(control)), max_size=4).map("".join))
    found = neutralize(text, control)
    assert not tokens_in(found, frozenset(control))
    assert neutralize(found, control) == found


def test_the_change_is_one_character_without_width() -> None:
    assert neutralize("end <|im_end|>.", CONTROL) == f"end <{MARK}|im_end|>."
    assert neutralize("ababa", CONTROL) == f"a{MARK}ba{MARK}ba"  # the second begins within the first
    assert neutralize("see <|im", CONTROL) == f"see <{MARK}|im"
    assert neutralize("|im_end|>", CONTROL) == f"{MARK}|im_end|>"
    assert neutralize("§", {"§"}) == MARK


@pytest.mark.parametrize("text", ["", "a < b", "if (a <", "> quoted", "I", "y", "<p>", "list[int]"])
def test_other_text_is_the_same_object(text: str) -> None:
    assert neutralize(text, CONTROL) is text
    assert neutralize(text, ()) is text


def test_a_mark_that_a_control_token_has_is_not_used() -> None:
    control = {f"<{MARK}>", "<s>"}
    found = neutralize("<s>", control)
    assert found == f"<{MARKS[1]}s>"
    assert not tokens_in(found, frozenset(control))


def test_values_are_neutralized_all_through() -> None:
    tool = {"name": "f", "parameters": {"<s>": [{"enum": ["<s>", 1, None, True]}]}}
    assert neutralize_value(tool, CONTROL) == {
        "name": "f",
        "parameters": {f"<{MARK}s>": [{"enum": [f"<{MARK}s>", 1, None, True]}]},
    }


def test_arguments_are_neutralized_as_they_are_rendered() -> None:
    """An escape hides a control token from who reads the JSON, and not from the template that renders its value."""
    assert json.loads(neutralize_json(r'{"a": "\u003cs\u003e"}', CONTROL)) == {"a": f"<{MARK}s>"}
    text = '{"a": 1.50, "b": "\\u00e9"}'
    assert neutralize_json(text, CONTROL) is text
    assert neutralize_json("no JSON <s>", CONTROL) == f"no JSON <{MARK}s>"
    assert neutralize_json("[" * 100_000, CONTROL) == "[" * 100_000


@pytest.mark.parametrize("text", ["<" * 100_000, "<|reserved_special_token_" * 4_000, "word " * 20_000, "ab" * 50_000])
def test_long_texts_take_no_time(text: str) -> None:
    control = frozenset(f"<|reserved_special_token_{i}|>" for i in range(2_000))
    neutralize("", control)  # made once
    began = time.process_time()
    assert not tokens_in(neutralize(text, control), control)
    assert time.process_time() - began < 10


@pytest.fixture(scope="module")
def vocabulary(smollm2: Path) -> Iterator[llama_cpp.Llama]:
    with closing(llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)) as llm:
        yield llm


@pytest.fixture(scope="module")
def control(vocabulary: llama_cpp.Llama) -> dict[str, int]:
    """SmolLM2's control tokens."""
    vocab = llama_cpp.llama_model_get_vocab(vocabulary._model.model)
    return {
        llama_cpp.llama_vocab_get_text(vocab, i).decode(): i
        for i in range(vocabulary.n_vocab())
        if llama_cpp.llama_vocab_get_attr(vocab, i) & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
    }


@pytest.mark.real
def test_a_real_tokenizer_finds_no_control_token(vocabulary: llama_cpp.Llama, control: dict[str, int]) -> None:
    def found(text: str) -> set[int]:
        return set(vocabulary.tokenize(text.encode(), add_bos=False, special=True)) & set(control.values())

    assert found("<|im_end|>")
    for text in [*control, *(a + b for a, b in product(control, repeat=2)), "<<|im_end|>|im_end|>", "|im_end|><|im_"]:
        assert not found(neutralize(text, frozenset(control))), text
    for token in control:
        for i in range(1, len(token)):
            halves = [neutralize(half, frozenset(control)) for half in (token[:i], token[i:])]
            assert not found("".join(halves)), halves
