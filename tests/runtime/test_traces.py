"""Trace files, and what of a trace counts in the loss, in text that is written out by hand."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import gguf
import huggingface_hub
import llama_cpp
import pyarrow
import pytest
from llama_cpp._internals import LlamaModel
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from pyarrow import parquet as pyarrow_parquet

from adlocal import AdlocalError, ModelError, TraceError
from adlocal.llamacpp.model import open_vocabulary
from adlocal.traces import EncodedTrace, Trace, TraceEncoder, encode_all, read_traces
from support import tiny

USER, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}
THANKS, WELCOME = {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Welcome!"}
SPECIAL = {"<s>": tiny.BOS, "</s>": tiny.EOS}

Write = Callable[..., Path]
Model = Callable[[str | None], LlamaModel]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a trace file, a line a row; rows that are no text are written as JSON."""

    def write(*rows: Any) -> Path:
        path = tmp_path / "traces.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Opens the vocabulary of a tiny model with the given chat template."""
    folder, weights = tmp_path_factory.mktemp("vocabularies"), tiny.tiny_model(num_hidden_layers=1)
    opened: dict[str | None, LlamaModel] = {}

    def open_with(template: str | None) -> LlamaModel:
        if template not in opened:
            path = tiny.write_gguf(weights, folder / f"{len(opened)}.gguf", template)
            opened[template] = open_vocabulary(path)
        return opened[template]

    return open_with


def one(row: Any, write: Write) -> Trace:
    (trace,) = read_traces(write(row))
    return trace


def ids(text: str) -> list[int]:
    """Token ids under tiny's vocabulary: a byte is a token, and so is each special one."""
    parts = re.split("(</?s>)", text)
    return [i for part in parts for i in ([SPECIAL[part]] if part in SPECIAL else part.encode())]


def encoded(*pieces: tuple[str, bool]) -> tuple[list[int], list[bool]]:
    """What pieces of (text, does it count) encode to."""
    marked = [(token, count) for text, count in pieces for token in ids(text)]
    return [token for token, _ in marked], [count for _, count in marked]


def encode(trace: Trace, model: LlamaModel, raw: bool = False) -> tuple[list[int], list[bool]]:
    result = TraceEncoder(model, raw=raw).encode(trace)
    assert result.n_targets == sum(result.targets)
    return result.tokens, result.targets


# Files


def test_the_three_conventions_of_trl(write: Write) -> None:
    path = write(
        {"prompt": "1 + 1?", "completion": " 2"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER], "source": "keys that nobody asked for are left alone"},
    )
    strings, pair, messages = read_traces(path)
    assert strings == Trace(f"{path}:1", prompt="1 + 1?", completion=" 2")
    assert pair == Trace(f"{path}:2", messages=(USER, ANSWER), n_given=1)
    assert messages == Trace(f"{path}:3", messages=(USER, ANSWER), n_given=0)


def test_blank_lines_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\r\n{"prompt": "a", "completion": "b"}\r\n  \r\n{"prompt": "c", "completion": "d"}')
    assert [trace.where for trace in read_traces(path)] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_unicode_separators_inside_a_string_end_no_line(separator: str, write: Write) -> None:
    text = f"before{separator}after"
    trace = one(json.dumps({"prompt": text, "completion": text}, ensure_ascii=False), write)
    assert (trace.prompt, trace.completion) == (text, text)


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"prompt": "a", "completion": ', r"broken JSON at column 31 .*mend or remove the line"),
        ('{"prompt": "a", "completion": "b"} x', r"broken JSON at column 36 "),
        ("[" * 100_000, "JSON that Python cannot hold"),
        ('{"prompt": "a", "completion": "b", "n": ' + "1" * 5000 + "}", "JSON that Python cannot hold"),
        ("[1, 2]", "expected a JSON object, found list"),
        ("null", "expected a JSON object, found NoneType"),
        ({"prompt": "a"}, r"has \['prompt'\], expected "),
        ({"question": "a", "text": "b"}, r"has \['question', 'text'\], expected .*or \"question\" and \"answer\""),
        ({"prompt": "a", "answer": "b"}, r"has \['answer', 'prompt'\], expected "),
        ({"question": "a", "answer": " "}, "the completion is empty"),
        ({"prompt": "a", "completion": 3}, r"has \['completion', 'prompt'\], expected .*both strings"),
        ({"prompt": "a", "completion": [ANSWER]}, ".*both strings or both lists of messages"),
        ({}, r"has \[\], expected "),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"prompt": "a", "completion": " \n"}, "the completion is empty"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "no assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "no assistant turn"),
        ({"prompt": [USER, ANSWER], "completion": [THANKS]}, "no assistant turn"),
        ({"messages": [USER, "2"]}, 'a message needs "role" and "content", found 2'),
        ({"messages": [{"role": "assistant"}]}, 'a message needs "role" and "content"'),
        ({"messages": [{"role": None, "content": "a"}]}, 'a message needs "role" and "content"'),
    ],
)
def test_a_line_that_is_no_trace_is_told_with_its_number(row: Any, problem: str, write: Write) -> None:
    path = write(GOOD, GOOD, row, GOOD)
    with pytest.raises(TraceError, match=f"^{re.escape(str(path))}:3: {problem}") as error:
        read_traces(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_a_file_without_traces_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"empty\.jsonl: no traces; give lines like"):
        read_traces(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin1.jsonl").write_bytes('{"prompt": "é", "completion": "b"}'.encode("latin-1"))
    for name in ("latin1.jsonl", "missing.jsonl", "."):
        with pytest.raises(TraceError, match=r"cannot be read as UTF-8 text .*give a JSON lines file"):
            read_traces(tmp_path / name)


def test_a_model_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(ModelError, match=r"text\.gguf"):
        open_vocabulary(tmp_path / "text.gguf")


def test_a_question_and_its_answer_are_a_pair(write: Write) -> None:
    """As in GSM8K; where a teacher answered, its completion is the answer to learn from."""
    path = write(
        {"question": "1 + 1?", "answer": "<<1+1=2>>2"},
        {"question": "1 + 2?", "answer": "3", "completion": "It is 3."},
        {"prompt": "1 + 3?", "completion": "4", "question": "?", "answer": "!"},
        {"messages": [USER], "completion": [ANSWER]},
        {"prompt": None, "question": None, "messages": [USER, ANSWER]},
    )
    assert list(read_traces(path)) == [
        Trace(f"{path}:1", prompt="1 + 1?", completion="<<1+1=2>>2"),
        Trace(f"{path}:2", prompt="1 + 2?", completion="It is 3."),
        Trace(f"{path}:3", prompt="1 + 3?", completion="4"),
        Trace(f"{path}:4", messages=(USER, ANSWER), n_given=1),
        Trace(f"{path}:5", messages=(USER, ANSWER)),
    ]


def test_duplicates_are_counted_and_the_first_is_kept(write: Write) -> None:
    """The same question with another answer is no duplicate, nor is one conversation of which more is given."""
    pair, longer = {"prompt": "a", "completion": "b"}, [USER, ANSWER, THANKS, WELCOME]
    different = [pair, {"prompt": "a", "completion": "c"}, {"messages": longer}]
    different += [{"prompt": longer[:n], "completion": longer[n:]} for n in (1, 3)]
    path = write(*different, {**pair, "id": 7}, {"question": "a", "answer": "b"}, {"messages": longer})
    found = read_traces(path)
    assert [trace.where for trace in found] == [f"{path}:{n}" for n in range(1, 6)]
    assert (found.n_duplicates, found.n_empty) == (3, 0)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_generated_rows_without_text_are_counted_and_left_out(write: Write) -> None:
    """Some teachers end their turn at once; a person's empty completion is a mistake and stays one."""
    silent = [{"role": "assistant", "content": ""}]
    empty: list[dict[str, Any]] = [{"completion": text} for text in (" \n", silent, None)]
    rows = [{"prompt": "a", **row, "finish_reason": "stop"} for row in empty]
    found = read_traces(write(*rows, {"messages": [USER, ANSWER], "finish_reason": "stop"}))
    assert (len(found.traces), found.n_duplicates, found.n_empty) == (1, 0, 3)


# Other sources

CALLED: list[dict[str, Any]] = [dict(USER, tool_calls=["f"]), {"role": "assistant", "content": None}, THANKS, WELCOME]
TABLE: list[dict[str, Any]] = [
    {"prompt": "1 + 1?", "completion": "2", "messages": None},
    {"messages": [USER, ANSWER]},
    {"messages": CALLED},
    {"prompt": "1 + 1?", "completion": "2"},
]


def table_traces(source: object) -> list[Trace]:
    """TABLE's traces. A column's nulls are keys that a row does not have; the content of a message is empty then."""
    return [
        Trace(f"{source}:1", prompt="1 + 1?", completion="2"),
        Trace(f"{source}:2", messages=(USER, ANSWER)),
        Trace(f"{source}:3", messages=(CALLED[0], {**CALLED[1], "content": ""}, *CALLED[2:])),
    ]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """TABLE in a Parquet file."""
    pyarrow_parquet.write_table(pyarrow.Table.from_pylist(TABLE), tmp_path / "traces.parquet")
    return tmp_path / "traces.parquet"


def test_parquet_is_read_by_the_row(parquet: Path) -> None:
    found = read_traces(parquet)
    assert list(found) == table_traces(parquet)
    assert found.n_duplicates == 1
    assert found.sha256 == hashlib.sha256(parquet.read_bytes()).hexdigest()


def test_parquet_that_cannot_be_read_is_refused(parquet: Path) -> None:
    whole = parquet.read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "text": b"no Parquet", "empty": b""}.items():
        path = parquet.with_name(f"{name}.parquet")
        path.write_bytes(content)
        with pytest.raises(TraceError, match=rf"{name}\.parquet: cannot be read as Parquet \(.+\); give a whole file"):
            read_traces(path)
    with pytest.raises(TraceError, match=r"missing\.parquet: cannot be read as Parquet \(.*No such file"):
        read_traces(parquet.with_name("missing.parquet"))
    pyarrow_parquet.write_table(pyarrow.table({"text": ["a"]}), parquet)
    with pytest.raises(TraceError, match=r"traces\.parquet:1: has \['text'\], expected"):
        read_traces(parquet)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("openai/gsm8k/main", ("openai/gsm8k", "main", "train")),
        ("openai/gsm8k/main:test", ("openai/gsm8k", "main", "test")),
    ],
)
def test_a_dataset_is_asked_for_by_its_id(
    source: str, wanted: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str, name: str | None, *, split: str) -> Any:
        assert (path, name, split) == wanted
        return pyarrow.Table.from_pylist(TABLE).to_pylist()

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_traces(Path(source))
    assert list(found) == table_traces(source)
    assert found.sha256 == read_traces(source).sha256


@pytest.fixture
def local_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory of data files, which `load_dataset` takes as it does an id."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    pair = {"question": "1 + 1?", "answer": "2"}
    for split in ("train", "test"):
        (tmp_path / "owner" / "name" / f"{split}.jsonl").write_text(json.dumps({**pair, "answer": split}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return "owner/name"


def test_a_dataset_is_loaded(local_dataset: str) -> None:
    for source, answer in ((local_dataset, "train"), (f"{local_dataset}:test", "test")):
        assert list(read_traces(source)) == [Trace(f"{source}:1", prompt="1 + 1?", completion=answer)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("owner/name:dev", 'datasets cannot load it (Unknown split "dev". Should be one of '),
        ("owner/name/main", "datasets cannot load it (BuilderConfig 'main' not found"),
        ("owner/none", "no such file, and the dataset cannot be fetched (Couldn't reach 'owner/none' on the Hub"),
    ],
    ids=["split", "config", "no network"],
)
def test_a_dataset_that_cannot_be_loaded_is_told_in_a_line(source: str, words: str, local_dataset: str) -> None:
    with pytest.raises(TraceError, match=f"^{re.escape(source)}: {re.escape(words)}") as error:
        read_traces(source)
    assert "\n" not in str(error.value)


def test_an_id_that_the_hub_does_not_know_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, *_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub.\nMore.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(TraceError) as error:
        read_traces("owner/none")
    assert str(error.value) == (
        "owner/none: no such file, and no dataset that you may read (Dataset 'owner/none' doesn't exist on the Hub.); "
        "check the name, or run `hf auth login`"
    )


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "traces.parquet"), ("datasets", "owner/name")])
def test_without_the_extra_its_name_is_told(
    module: str, source: str, parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parquet.parent)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AdlocalError) as error:
        read_traces(source)
    assert str(error.value) == (
        f"{source}: reading it needs {module}, which is not installed; run: pip install 'adlocal[datasets]'"
    )


def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(TraceError, match=r"^data/traces\.jsonl: cannot be read as UTF-8 text"):
        read_traces("data/traces.jsonl")


# Chat template


def test_a_pair_of_strings_is_one_question_and_one_answer(model: Model, write: Write) -> None:
    """The end-of-turn token counts: the model samples it. The newline that the template puts after it does not."""
    trace = one({"prompt": "1 + 1?", "completion": "It is 2."}, write)
    assert encode(trace, model(tiny.CHAT_TEMPLATE)) == encoded(
        ("<s>user\n1 + 1?</s>\n<s>assistant\n", False), ("It is 2.</s>", True), ("\n", False)
    )


def test_every_assistant_turn_counts_and_nothing_else(model: Model, write: Write) -> None:
    trace = one({"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, THANKS, WELCOME]}, write)
    assert encode(trace, model(tiny.CHAT_TEMPLATE)) == encoded(
        ("<s>system\nBe brief.</s>\n<s>user\n1 + 1?</s>\n<s>assistant\n", False),
        ("It is 2.</s>", True),
        ("\n<s>user\nThanks</s>\n<s>assistant\n", False),
        ("Welcome!</s>", True),
        ("\n", False),
    )


def test_assistant_turns_of_the_prompt_are_given(model: Model, write: Write) -> None:
    trace = one({"prompt": [USER, ANSWER, THANKS], "completion": [WELCOME]}, write)
    assert encode(trace, model(tiny.CHAT_TEMPLATE)) == encoded(
        ("<s>user\n1 + 1?</s>\n<s>assistant\nIt is 2.</s>\n<s>user\nThanks</s>\n<s>assistant\n", False),
        ("Welcome!</s>", True),
        ("\n", False),
    )


def test_turns_after_the_last_answer_are_left_out(model: Model, write: Write) -> None:
    trace = one({"messages": [USER, ANSWER, THANKS]}, write)
    assert encode(trace, model(tiny.CHAT_TEMPLATE)) == encoded(
        ("<s>user\n1 + 1?</s>\n<s>assistant\n", False), ("It is 2.</s>", True), ("\n", False)
    )


def test_the_three_conventions_encode_alike(model: Model, write: Write) -> None:
    rows = [
        {"prompt": USER["content"], "completion": ANSWER["content"]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER]},
    ]
    first, *others = (encode(trace, model(tiny.CHAT_TEMPLATE)) for trace in read_traces(write(*rows)))
    assert others == [first, first]


def test_rendering_is_that_of_llama_cpp_python(model: Model, write: Write, tiny_llama: Path) -> None:
    """Prompt as its chat handler renders it for inference, the rest as the closed conversation, with its tokenizer."""
    llm = llama_cpp.Llama(str(tiny_llama), vocab_only=True, verbose=False)

    def rendered(messages: list[Any], open_turn: bool) -> list[int]:
        render = Jinja2ChatFormatter(tiny.CHAT_TEMPLATE, "</s>", "<s>", add_generation_prompt=open_turn)
        return llm.tokenize(render(messages=messages).prompt.encode(), add_bos=False, special=True)

    accented = {"role": "assistant", "content": "Zwei – ½·4 = 2 ✓"}
    tokens, targets = encode(one({"messages": [USER, accented]}, write), model(tiny.CHAT_TEMPLATE))
    assert tokens == rendered([USER, accented], open_turn=False)
    assert tokens[: targets.index(True)] == rendered([USER], open_turn=True)
    llm.close()


def test_a_template_without_end_of_turn_counts_to_its_end(model: Model, write: Write) -> None:
    template = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    assert encode(one({"messages": [USER, ANSWER]}, write), model(template)) == encoded(
        ("u: 1 + 1?\na: ", False), ("It is 2.\n", True)
    )


def test_the_first_token_is_never_a_target(model: Model, write: Write) -> None:
    template = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    assert encode(one({"messages": [ANSWER]}, write), model(template)) == encoded(("I", False), ("t is 2.</s>", True))


# Completions that were cut short


def cut_short(completion: Any, write: Write, prompt: Any = "1 + 1?") -> Trace:
    return one({"prompt": prompt, "completion": completion, "finish_reason": "length"}, write)


@pytest.mark.parametrize("text", ["It is", " It is", "It is ", "It"])
def test_a_completion_that_was_cut_short_teaches_no_end(text: str, model: Model, write: Write) -> None:
    """Neither the end of the turn nor anything else that the template closes it with."""
    given = ("<s>user\n1 + 1?</s>\n<s>assistant\n", False)
    expected = encoded(given, (text, True))
    assert encode(cut_short(text, write), model(tiny.CHAT_TEMPLATE)) == expected
    as_message = cut_short([{"role": "assistant", "content": text}], write, [USER])
    assert encode(as_message, model(tiny.CHAT_TEMPLATE)) == expected
    ended = one({"prompt": "1 + 1?", "completion": text, "finish_reason": "stop"}, write)
    assert encode(ended, model(tiny.CHAT_TEMPLATE)) == encoded(given, (f"{text}</s>", True), ("\n", False))


def test_only_the_last_turn_was_cut_short(model: Model, write: Write) -> None:
    trace = cut_short([ANSWER, THANKS, {"role": "assistant", "content": "Wel"}], write, [USER])
    assert encode(trace, model(tiny.CHAT_TEMPLATE)) == encoded(
        ("<s>user\n1 + 1?</s>\n<s>assistant\n", False),
        ("It is 2.</s>", True),
        ("\n<s>user\nThanks</s>\n<s>assistant\n", False),
        ("Wel", True),
    )


def test_a_template_that_changes_the_answer_still_teaches_no_end(model: Model, write: Write) -> None:
    shouting = tiny.CHAT_TEMPLATE.replace("m['content']", "m['content'] | upper")
    assert encode(cut_short("It is", write), model(shouting)) == encoded(
        ("<s>user\n1 + 1?</s>\n<s>assistant\n", False), ("IT IS", True), ("</s>\n", False)
    )


def test_stripping_templates_strip_what_was_cut_short_too(model: Model, write: Write) -> None:
    stripping = tiny.CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
    assert encode(cut_short(" It is ", write), model(stripping)) == encoded(
        ("<s>user\n1 + 1?</s>\n<s>assistant\n", False), ("It is", True)
    )


def test_a_raw_completion_has_no_end_anyway(model: Model, write: Write) -> None:
    whole = one({"prompt": "1 + 1 =", "completion": " 2"}, write)
    assert encode(cut_short(" 2", write, "1 + 1 ="), model(None)) == encode(whole, model(None))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("prompt", ["1 + 1?", "</s>", [USER], [USER, ANSWER, THANKS]])
def test_a_prompt_alone_is_encoded_as_before_a_completion(prompt: Any, raw: bool, model: Model, write: Write) -> None:
    completion = "x" if isinstance(prompt, str) else [{"role": "assistant", "content": "x"}]
    encoder = TraceEncoder(model(tiny.CHAT_TEMPLATE), raw=raw)
    whole = encoder.encode(one({"prompt": prompt, "completion": completion}, write))
    assert encoder.encode_prompt("here", prompt) == whole.tokens[: whole.targets.index(True)]


# A template that shows only the last turn, as those do that drop an earlier turn's reasoning.
FORGETFUL = "{{ messages[-1]['content'] }}</s>{% if add_generation_prompt %}<s>{% endif %}"


def test_a_template_that_rewrites_earlier_turns_is_refused(model: Model, write: Write) -> None:
    trace = one({"messages": [USER, ANSWER]}, write)
    with pytest.raises(TraceError, match=r"traces\.jsonl:1: the chat template rewrites earlier turns, so turn 2 "):
        encode(trace, model(FORGETFUL))


def test_a_template_that_rewrites_only_the_given_turns_is_fine(model: Model, write: Write) -> None:
    """Reasoning models' templates strip the thoughts of earlier turns; one answer a line can still be told apart."""
    template = (
        "{% for m in messages %}<s>{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split(':')[-1] }}"
        "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    thought = {"role": "assistant", "content": "think:2"}
    trace = one({"prompt": [USER, thought, THANKS], "completion": [{"role": "assistant", "content": "hm:Bye"}]}, write)
    assert encode(trace, model(template)) == encoded(
        ("<s>1 + 1?</s><s>2</s><s>Thanks</s><s>", False), ("hm:Bye</s>", True)
    )
    with pytest.raises(TraceError, match="rewrites earlier turns, so turn 4"):
        encode(one({"messages": [USER, thought, THANKS, WELCOME]}, write), model(template))


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role here') }}", "{{ messages[7].content.x }}"])
def test_a_template_that_raises_is_told_with_the_line(template: str, model: Model, write: Write) -> None:
    with pytest.raises(TraceError, match=r"traces\.jsonl:1: the model's chat template refuses the messages: "):
        encode(one({"messages": [USER, ANSWER]}, write), model(template))


def test_a_template_that_drops_the_answer_leaves_nothing_to_learn(model: Model, write: Write) -> None:
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(TraceError, match=r"traces\.jsonl:1: no token of it counts"):
        encode(one({"messages": [USER, ANSWER]}, write), model(template))


def test_half_a_surrogate_pair_is_refused(model: Model, write: Write) -> None:
    trace = one('{"prompt": "a", "completion": "\\ud83d"}', write)
    for raw in (False, True):
        with pytest.raises(TraceError, match=r"traces\.jsonl:1: half a surrogate pair"):
            encode(trace, model(tiny.CHAT_TEMPLATE), raw)


# Raw


@pytest.mark.parametrize(("template", "raw"), [(None, False), (None, True), (tiny.CHAT_TEMPLATE, True)])
def test_raw_strings_are_joined_as_they_are(template: str | None, raw: bool, model: Model, write: Write) -> None:
    """BOS once, and what looks like a special token is text."""
    trace = one({"prompt": "1 + 1 =", "completion": " 2</s>"}, write)
    tokens, targets = encode(trace, model(template), raw)
    assert tokens == [tiny.BOS, *b"1 + 1 = 2</s>"]
    assert targets == [False] * len("B1 + 1 =") + [True] * len(" 2</s>")


def test_an_empty_prompt_leaves_bos_to_predict_from(model: Model, write: Write) -> None:
    tokens, targets = encode(one({"prompt": "", "completion": "ab"}, write), model(None))
    assert (tokens, targets) == ([tiny.BOS, *b"ab"], [False, True, True])


def test_bos_is_left_out_when_the_model_wants_none(tmp_path: Path, write: Write) -> None:
    path = tiny.write_gguf(tiny.tiny_model(num_hidden_layers=1), tmp_path / "no_bos.gguf")
    key = gguf.GGUFReader(path, "r+").get_field("tokenizer.ggml.add_bos_token")
    assert key is not None
    key.parts[key.data[0]][0] = False
    vocabulary = open_vocabulary(path)
    assert encode(one({"prompt": "1", "completion": "2"}, write), vocabulary) == ([*b"12"], [False, True])
    assert encode(one({"prompt": "", "completion": "ab"}, write), vocabulary) == ([*b"ab"], [False, True])
    with pytest.raises(TraceError, match="no token of it counts"):
        encode(one({"prompt": "", "completion": "a"}, write), vocabulary)


def test_messages_need_a_template(model: Model, write: Write) -> None:
    with pytest.raises(TraceError, match=r"traces\.jsonl:1: messages need a chat template and the model has none"):
        encode(one({"messages": [USER, ANSWER]}, write), model(None))


def test_raw_is_of_strings_and_leaves_messages_to_the_template(model: Model, write: Write) -> None:
    trace = one({"messages": [USER, ANSWER]}, write)
    assert encode(trace, model(tiny.CHAT_TEMPLATE), raw=True) == encode(trace, model(tiny.CHAT_TEMPLATE))


# Cutting


def test_cutting_keeps_the_beginning() -> None:
    trace = EncodedTrace("here", [5, 6, 7, 8], [False, False, True, True])
    assert trace.cut(3) == EncodedTrace("here", [5, 6, 7], [False, False, True])
    assert trace.cut(9) == trace


def test_long_traces_are_cut_and_those_with_nothing_left_are_skipped(model: Model, write: Write) -> None:
    rows = [{"prompt": "12345", "completion": "6" * n} for n in (1, 4, 5, 20)]  # with BOS, 6 tokens before the 6s
    rows.append({"prompt": "1" * 30, "completion": "2"})
    kept, n_cut, n_skipped = encode_all(read_traces(write(*rows)), TraceEncoder(model(None)), n_ctx=10)
    assert [(len(trace.tokens), trace.n_targets) for trace in kept] == [(7, 1), (10, 4), (10, 4), (10, 4)]
    assert (n_cut, n_skipped) == (2, 1)


def test_a_context_that_no_prompt_fits_is_refused(model: Model, write: Write) -> None:
    traces = read_traces(write(*[{"prompt": "12345", "completion": digit} for digit in "678"]))
    with pytest.raises(TraceError, match="all 3 prompts fill the context of 6 tokens; ask for a larger one"):
        encode_all(traces, TraceEncoder(model(None)), n_ctx=6)
