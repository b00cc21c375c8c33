"""What llama-cpp-python answers with a crash, a hang or text that nobody asked for: an answer, or one clear error."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_cpp import LogitsProcessorList
from llama_cpp.llama_grammar import LlamaGrammar

from adlocal import AntidistillationLlama, InputError, ProxyError

PROMPT, OTHER = "3 + 4 =", "Once upon a time"
KWARGS: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "strength": 4.0}
USER = [{"role": "user", "content": PROMPT}]
# Some tokens of the tiny model are no text, and completions only count what is.
LETTERS: Any = LlamaGrammar.from_string("root ::= [A-Za-z]+", verbose=False)
UNPARSABLE = {"type": "string", "pattern": "^ok\\!$"}  # llama.cpp's grammar knows no such escape


@pytest.fixture
def llm(tiny_llama: Path, tiny_bundle: Path) -> Iterator[AntidistillationLlama]:
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, **KWARGS)) as llm:
        yield llm


def text(llm: AntidistillationLlama, prompt: str = PROMPT, **kwargs: Any) -> str:
    """A completion of a model that has forgotten all before."""
    llm.reset()
    completion = llm.create_completion(prompt, **{"max_tokens": 8, "temperature": 0.0, "grammar": LETTERS, **kwargs})
    return str(completion["choices"][0]["text"])


def chat(llm: AntidistillationLlama, **kwargs: Any) -> str:
    completion = llm.create_chat_completion(USER, **{"max_tokens": 24, "temperature": 0.0, **kwargs})
    return str(completion["choices"][0]["message"]["content"])


# Threads

THREADS = """
import sys, threading
from llama_cpp.llama_grammar import LlamaGrammar
from adlocal import AntidistillationLlama, InputError
letters = LlamaGrammar.from_string("root ::= [A-Za-z]+", verbose=False)
model, bundle, streams = sys.argv[1], sys.argv[2], sys.argv[3] == "streams"
llm = AntidistillationLlama(model, bundle=bundle, strength=4.0, n_ctx=128, n_threads=1, verbose=False)

def ask(prompt, strength):
    kwargs = dict(max_tokens=12, temperature=0.0, strength=strength, grammar=letters)
    if not streams:
        return llm.create_completion(prompt, **kwargs)["choices"][0]["text"]
    return "".join(c["choices"][0]["text"] for c in llm.create_completion(prompt, stream=True, **kwargs))

prompts = [("3 + 4 =", 0.0), ("Once upon a time", 6.0)]
alone = []
for prompt, strength in prompts:
    llm.reset()
    alone.append(ask(prompt, strength))
ends = []

def work(i):
    for _ in range(20):
        try:
            ends.append("right" if ask(*prompts[i]) == alone[i] else "wrong")
        except InputError as error:
            ends.append("told" if "another call used this model" in str(error) else str(error))

threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
for t in threads: t.start()
for t in threads: t.join()
print(len(ends), *sorted(set(ends)), llm.strength)
"""


@pytest.mark.parametrize("how", ["calls", "streams"])
def test_two_threads_wait_or_are_told(how: str, tiny_llama: Path, tiny_bundle: Path) -> None:
    """Never a crash, never the other's text, and the other's strength in neither."""
    command = [sys.executable, "-c", THREADS, str(tiny_llama), str(tiny_bundle), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    n, *ends, strength = done.stdout.split()
    assert (n, strength) == ("40", "4.0")
    assert "right" in ends
    assert set(ends) <= ({"right"} if how == "calls" else {"right", "told"})


def test_a_stream_whose_context_was_taken_ends_in_an_error(llm: AntidistillationLlama) -> None:
    expected = text(llm, OTHER)
    stream = llm.create_completion(PROMPT, max_tokens=8, temperature=0.0, grammar=LETTERS, stream=True)
    next(stream)
    assert text(llm, OTHER) == expected
    with pytest.raises(InputError, match="another call used this model"):
        list(stream)
    assert text(llm, OTHER) == expected


def test_a_model_that_was_closed_is_refused(llm: AntidistillationLlama) -> None:
    stream = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
    next(stream)
    llm.close()
    for call in (lambda: next(stream), lambda: text(llm), llm.save_state, lambda: chat(llm)):
        with pytest.raises(InputError, match="the model is closed; open another"):
            call()
    llm.close()


# Schemas and grammars


@pytest.mark.parametrize(
    "envelope",
    [
        lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        lambda schema: {"type": "json_object", "schema": schema},
    ],
    ids=["OpenAI's", "llama-cpp-python's"],
)
def test_a_schema_is_obeyed(envelope: Callable[[Any], Any], llm: AntidistillationLlama) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}}, "required": ["a"]}
    assert json.loads(chat(llm, response_format=envelope(schema)))["a"] in ("yes", "no")
    streamed = llm.create_chat_completion(
        USER, max_tokens=24, temperature=0.0, stream=True, response_format=envelope(schema)
    )
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed)
    assert json.loads(said)["a"] in ("yes", "no")


@pytest.mark.parametrize(
    ("response_format", "words"),
    [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": UNPARSABLE}}, "cannot parse the grammar"),
        ({"type": "json_object", "schema": UNPARSABLE}, "cannot parse the grammar"),
        ({"type": "json_object", "schema": {"type": "nonsense"}}, "cannot be made a grammar"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "a json_schema needs its schema"),
        ({"type": "json_schema"}, "a json_schema needs its schema"),
        ({"type": "json_schema", "json_schema": {"schema": 3}}, "is no JSON schema"),
        ({"type": "regex"}, "give a type, one of text, json_object, json_schema"),
        ("json", "give a type"),
    ],
)
def test_a_format_that_cannot_be_obeyed_is_refused(
    response_format: Any, words: str, llm: AntidistillationLlama
) -> None:
    expected = text(llm)
    with pytest.raises(InputError, match=words):
        chat(llm, response_format=response_format)
    assert text(llm) == expected


@pytest.mark.parametrize(
    "grammar", [r'root ::= "\!"', "no rules", 'other ::= "a"', 'root ::= root "a" | "b"', 'root ::= ("a"']
)
def test_a_grammar_that_cannot_be_parsed_is_refused(grammar: str, llm: AntidistillationLlama) -> None:
    """In completions and in chat; the next call works."""
    expected, given = text(llm), LlamaGrammar.from_string(grammar, verbose=False)
    for call in (lambda: text(llm, grammar=given), lambda: chat(llm, grammar=given)):
        with pytest.raises(InputError, match=r"llama\.cpp cannot parse the grammar"):
            call()  # type: ignore[no-untyped-call]
    assert text(llm) == expected


@pytest.mark.parametrize("parameters", [{"type": "nonsense"}, UNPARSABLE])
def test_a_forced_tool_whose_schema_cannot_be_obeyed_is_refused(parameters: Any, llm: AntidistillationLlama) -> None:
    """Any JSON would do for llama-cpp-python."""
    function = {"name": "f", "parameters": parameters}
    for asked in (
        {"tools": [{"type": "function", "function": function}], "tool_choice": {"function": {"name": "f"}}},
        {"functions": [function], "function_call": {"name": "f"}},
    ):
        with pytest.raises(InputError, match="grammar"):
            chat(llm, **asked)


def test_what_is_no_grammar_is_refused(llm: AntidistillationLlama) -> None:
    with pytest.raises(InputError, match="give a LlamaGrammar"):
        text(llm, grammar='root ::= "a"')
    with pytest.raises(InputError, match="give one of them"):
        chat(llm, grammar=LETTERS, response_format={"type": "json_object", "schema": {"type": "integer"}})


# Processors


def failing_at(n: int, failure: BaseException) -> Callable[[Any, Any], Any]:
    """Raises when it is called for the nth time, from 0."""
    calls = itertools.count()

    def process(_ids: Any, scores: Any) -> Any:
        if next(calls) == n:
            raise failure
        return scores

    return process


@pytest.mark.parametrize("failure", [ValueError("mine"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("n", [0, 2])
def test_what_a_processor_raises_reaches_the_caller(
    n: int, failure: BaseException, llm: AntidistillationLlama, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = text(llm)
    llm.reset()
    stream = llm.generate(
        llm.tokenize(PROMPT.encode()), temp=0.0, logits_processor=LogitsProcessorList([failing_at(n, failure)])
    )
    emitted = list(itertools.islice(stream, n))
    assert len(emitted) == n
    with pytest.raises(type(failure)):
        next(stream)
    assert llm.last_dose.n_tokens == n, "a token that is not emitted has no dose"
    with pytest.raises(type(failure)):
        text(llm, logits_processor=LogitsProcessorList([failing_at(n, failure)]))
    assert capfd.readouterr().err == ""
    assert text(llm) == expected


@pytest.mark.parametrize(
    ("processors", "words"),
    [
        ([None], "give a LogitsProcessorList of functions"),
        (lambda ids, scores: scores, "give a LogitsProcessorList of functions"),
        ([lambda ids, scores: scores[:3]], r"scores of shape \(3,\), expected \(264,\)"),
        ([lambda ids, scores: None], r"scores of shape \(\)"),
    ],
)
def test_processors_that_are_none_are_refused(processors: Any, words: str, llm: AntidistillationLlama) -> None:
    expected = text(llm)
    with pytest.raises(InputError, match=words):
        text(llm, logits_processor=processors)
    assert text(llm) == expected


def test_processors_and_a_logit_bias_both_act(llm: AntidistillationLlama) -> None:
    """llama-cpp-python drops both where both are given."""
    forbidden, wanted = ord("Q"), ord("Z")

    def forbid(_ids: Any, scores: Any) -> Any:
        changed = np.array(scores)
        changed[forbidden] = -np.inf
        return changed

    given = LogitsProcessorList([forbid])
    bias = {str(forbidden): 100.0, str(wanted): 50.0}
    assert text(llm, logit_bias=bias) == "Q" * 8
    assert text(llm, logit_bias={str(wanted): 50.0}, logits_processor=given) == "Z" * 8
    assert text(llm, logit_bias={str(forbidden): -100.0, str(wanted): 50.0}, logits_processor=given) == "Z" * 8
    assert given == [forbid], "the caller's list stays his"


# Seeds


def test_minus_one_is_a_new_seed_each_time(tiny_llama: Path, tiny_bundle: Path) -> None:
    """Of a call and of a model; any other seed gives its text again."""
    wild: dict[str, Any] = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 16}
    texts, first = [], []
    for _ in range(2):
        with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, seed=-1, **KWARGS)) as llm:
            first.append(text(llm, **wild))
            texts += [text(llm, seed=-1, **wild) for _ in range(3)]
            assert text(llm, seed=7, **wild) == text(llm, seed=7, **wild)
    assert len({*first, *texts}) == 8


# States and prompts


@pytest.mark.parametrize("logits_all", [False, True])
def test_a_restored_state_can_be_sampled_from(logits_all: bool, tiny_llama: Path, tiny_bundle: Path) -> None:
    """The row that belongs to it, adjusted as it was: not the row that was evaluated last."""
    kwargs = {**KWARGS, "logits_all": logits_all}
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, **kwargs)) as llm:
        tokens = {prompt: llm.tokenize(prompt.encode()) for prompt in (PROMPT, OTHER, "x", "12 * 12")}
        expected, states = {}, {}
        for prompt, ids in tokens.items():
            llm.reset()
            llm.eval(ids)
            states[prompt] = llm.save_state()
            expected[prompt] = llm.sample(temp=0.0)
        assert len(set(expected.values())) > 1
        for prompt, state in states.items():
            llm.load_state(state)
            assert llm.sample(temp=0.0) == expected[prompt]
            assert llm._input_ids.tolist() == tokens[prompt]
        llm.load_state(states[PROMPT])
        llm.strength = 2.0
        with pytest.raises(ProxyError, match="evaluate a token first"):
            llm.sample(temp=0.0)


def test_an_empty_prompt_is_refused_where_there_is_no_bos(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, llm: AntidistillationLlama
) -> None:
    path = tmp_path / "no-bos.gguf"
    path.write_bytes(tiny_llama.read_bytes())
    field = gguf.GGUFReader(path, "r+").get_field("tokenizer.ggml.add_bos_token")
    assert field is not None
    field.parts[field.data[0]][0] = False
    with closing(AntidistillationLlama(str(path), bundle=tiny_bundle, **KWARGS)) as without:
        with pytest.raises(InputError, match="the prompt is empty"):
            without.create_completion("")
        with pytest.raises(InputError, match="the prompt is empty"):
            list(without.create_completion("", stream=True))
        assert text(without)
    assert text(llm, "") is not None, "BOS is a token to go on from"
    with pytest.raises(InputError, match="the prompt is empty"):
        next(llm.generate([]))
