"""Files in every format that people's data has, each with what has to come out of it."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet as pyarrow_parquet

from adlocal import AdlocalError, TraceError
from adlocal.traces import Record, Trace, join_answers, read_prompts, read_records, read_traces
from adlocal.traces.prompts import read_prompt

PAIR = {"prompt": "What is 2+2?", "completion": "It is 4."}
LINE = json.dumps(PAIR).encode()
MARK = b"\xef\xbb\xbf"
TABLE = b'prompt,completion\n"What is 2+2?",It is 4.\n'

Put = Callable[[str, bytes], Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a file."""

    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


# What is read

FORMATS: dict[str, tuple[str, bytes]] = {
    "lines": ("a.jsonl", LINE + b"\n"),
    "lines with a mark": ("a.jsonl", MARK + LINE + b"\r\n"),
    "lines without an ending": ("data", LINE),
    "one object": ("a.json", LINE),
    "array": ("a.json", b"[" + LINE + b"]"),
    "array with a mark": ("a.json", MARK + b"\n [\n" + LINE + b"\n]\n"),
    "array named as lines": ("a.jsonl", b"[" + LINE + b"]"),
    "gzip": ("a.jsonl.gz", gzip.compress(LINE)),
    "gzip with a mark": ("a.jsonl.gz", gzip.compress(MARK + LINE)),
    "gzip in two members": ("a.jsonl.gz", gzip.compress(LINE[:9]) + gzip.compress(LINE[9:])),
    "gzip of an array": ("a.json.gz", gzip.compress(b"[" + LINE + b"]")),
    "gzip without its ending": ("a.jsonl", gzip.compress(LINE)),
    "capitals": ("A.JSONL.GZ", gzip.compress(LINE)),
    "csv": ("a.csv", TABLE),
    "csv with a mark": ("a.csv", MARK + TABLE.replace(b"\n", b"\r\n")),
    "tsv": ("a.tsv", b"prompt\tcompletion\nWhat is 2+2?\tIt is 4.\n"),
    "gzip of csv": ("a.csv.gz", gzip.compress(TABLE)),
}


@pytest.mark.parametrize(("name", "content"), FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_record(name: str, content: bytes, put: Put) -> None:
    path = put(name, content)
    assert read_records(path) == [Record(f"{path}:1", PAIR)]
    assert list(read_traces(path)) == [Trace(f"{path}:1", prompt="What is 2+2?", completion="It is 4.")]


def test_every_verbs_reader_is_the_same(put: Put) -> None:
    """Prompts with a mark in a table, answers in a gzipped array."""
    prompts = read_prompts(put("p.csv", MARK + b"id,question\na,1 + 1?\nb,2 + 2?\n"))
    assert [(each.prompt, each.id) for each in prompts] == [("1 + 1?", "a"), ("2 + 2?", "b")]
    answers = b'[{"id": "b", "answer": 4}, {"id": "a", "answer": "2"}]'
    for path in (put("a.json.gz", gzip.compress(answers)), put("a.tsv", b"answer\tid\n4\tb\n2\ta\n")):
        assert [each.answer for each in join_answers(prompts, path)] == ["2", "4"]


def test_files_that_were_joined_have_a_mark_each(put: Put) -> None:
    path = put("joined.jsonl", MARK + LINE + b"\n" + MARK + LINE + b"\n" + MARK + b"\n")
    assert [record.where for record in read_records(path)] == [f"{path}:1", f"{path}:2"]


def test_a_mark_inside_a_text_is_text(put: Put) -> None:
    path = put("a.jsonl", '{"prompt": "\ufeffa", "completion": "b\ufeff"}'.encode())
    assert read_records(path)[0].fields == {"prompt": "\ufeffa", "completion": "b\ufeff"}


def test_rows_of_an_array_are_counted(put: Put) -> None:
    path = put("a.json", b'[\n{"prompt": "a", "completion": "b"},\n\n{"prompt": "c"}]')
    assert [record.where for record in read_records(path)] == [f"{path}:1", f"{path}:2"]
    with pytest.raises(TraceError, match=rf"^{re.escape(str(path))}:2: has \['prompt'\], expected"):
        read_traces(path)


# Tables


def test_a_cell_is_text_and_an_empty_one_is_a_key_less(put: Put) -> None:
    """As with Parquet's nulls. What a table library takes for "not available", or for a number, is text like other."""
    path = put(
        "a.csv", b'id,instruction,input,output\n007,Add.,2 2,4\n1.0,"Say ""NA"".",,NA\n3,"two\nlines"\n\n,x, ,null'
    )
    assert [record.fields for record in read_records(path)] == [
        {"id": "007", "instruction": "Add.", "input": "2 2", "output": "4"},
        {"id": "1.0", "instruction": 'Say "NA".', "output": "NA"},
        {"id": "3", "instruction": "two\nlines"},
        {"instruction": "x", "input": " ", "output": "null"},
    ]


def test_messages_in_a_table_are_json(put: Put) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    cell = json.dumps(messages).replace('"', '""')
    (trace,) = read_traces(put("a.csv", f'messages,n\n"{cell}",1\n'.encode()))
    assert trace.messages == tuple(messages)


TABLES_REFUSED: dict[str, tuple[bytes, str]] = {
    "too many cells": (b"prompt,completion\na,b,c\n", r"a\.csv: cannot be read as a table \(.*line 2, saw 3\); mend"),
    "all too many": (b"prompt,completion\na,b,c\nd,e,f\n", r"cannot be read as a table"),
    "an open quote": (b'prompt,completion\na,"b\n', r"cannot be read as a table \(.*inside string"),
    "a name twice": (b"prompt,completion,prompt\na,b,c\n", r"its header is \['prompt', 'completion', 'prompt'\]; give"),
    "no name": (b"prompt,\na,b\n", r"its header is \['prompt', ''\]; give each column a name of its own"),
    "no header": (b"a,b\nc,d\n", r"a\.csv:1: has \['a', 'b'\], expected"),
    "only a header": (b"prompt,completion\n", "no traces; give lines like"),
    "nothing": (b"\n", "no traces; give lines like"),
    "latin-1": ("prompt,completion\né,b\n".encode("latin-1"), r"cannot be read as UTF-8 text .*save it as UTF-8"),
}


@pytest.mark.parametrize(("content", "words"), TABLES_REFUSED.values(), ids=TABLES_REFUSED)
def test_what_is_no_table_is_refused_in_a_line(content: bytes, words: str, put: Put) -> None:
    with pytest.raises(TraceError, match=words) as error:
        read_traces(put("a.csv", content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_without_pandas_the_extra_is_named(name: str, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(name, gzip.compress(TABLE) if name.endswith("gz") else TABLE)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(AdlocalError) as error:
        read_records(path)
    assert str(error.value) == (
        f"{path}: reading it needs pandas, which is not installed; run: pip install 'adlocal[datasets]'"
    )


def test_parquet_of_any_shape(tmp_path: Path) -> None:
    """A column of messages fills every message with the keys of all, and every row with the columns of all."""
    turns: list[dict[str, Any]] = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    turns += [{"from": "human", "value": "e"}, {"from": "gpt", "value": "f"}]
    rows = [{"conversations": turns, "instruction": None, "output": None}, {"instruction": "c", "output": "d"}]
    pyarrow_parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_traces(tmp_path / "a.parquet")
    assert first.messages is not None
    assert [message["content"] for message in first.messages] == ["a", "b", "e", "f"]
    assert (first.unlearned, first.unused) == ((1,), ())
    assert (second.prompt, second.completion) == ("c", "d")


def test_nulls_within_a_tables_cells_are_no_part_of_them(tmp_path: Path) -> None:
    """Parquet gives each tool the parameters of all."""
    names = ("city", "day")
    of = [{"name": name, "parameters": {"properties": {name: {"type": "string"}}}} for name in names]
    tools = [{"type": "function", "function": function} for function in of]
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": tools}
    pyarrow_parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (trace,) = read_traces(tmp_path / "a.parquet")
    assert trace.tools == tuple(tools)


# What is refused

WHOLE = gzip.compress(LINE * 20)
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "a gzip that was cut": ("a.jsonl.gz", WHOLE[:-9], r"a\.jsonl\.gz: broken gzip \(.+\); give a whole file"),
    "a gzip that was spoiled": ("a.jsonl.gz", WHOLE[:-6] + b"??????", r"broken gzip \(.+\); give a whole file"),
    "a gzip with more behind": ("a.jsonl.gz", WHOLE + b"more", r"broken gzip \(.+\); give a whole file"),
    "no gzip": ("a.jsonl.gz", LINE, r"is no gzip, whatever its name; unpack or rename it"),
    "an empty gzip": ("a.jsonl.gz", b"", r"is no gzip, whatever its name"),
    "gzip of no text": ("a.jsonl.gz", gzip.compress(b"\xff\xfe"), r"cannot be read as UTF-8 text"),
    "UTF-16": ("a.jsonl", LINE.decode().encode("utf-16"), r"cannot be read as UTF-8 text .*save it as UTF-8"),
    "an array with a number": ("a.json", b'[{"prompt": "a"}, 3]', r"a\.json:2: expected a JSON object, found int"),
    "an array in an array": ("a.json", b"[[1]]", r"a\.json:1: expected a JSON object, found list"),
    "an array that was cut": ("a.json", b"[" + LINE + b",", r"a\.json: broken JSON at column \d+ .*give the whole arr"),
    "an array cut in line 3": (
        "a.json",
        b"[\n" + LINE + b",\n{",
        r"broken JSON at column 2 of line 3 .*give the whole",
    ),
    "an array and more": ("a.json", b"[" + LINE + b"]\n[]", r"broken JSON at column 1 of line 2 .*give the whole"),
    "an array too deep": ("a.json", b"[" * 100_000, "JSON that Python cannot hold"),
    "an empty array": ("a.json", b"[]", "no traces; give lines like"),
}


@pytest.mark.parametrize(("name", "content", "words"), REFUSED.values(), ids=REFUSED)
def test_a_broken_file_is_told_in_a_line(name: str, content: bytes, words: str, put: Put) -> None:
    with pytest.raises(TraceError, match=words) as error:
        read_traces(put(name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt", "a.txt.gz", "a.xlsx", "a.zip", "a.tar.gz", "a.gguf", "A.TXT"])
def test_an_ending_that_adlocal_does_not_read_is_refused(name: str, put: Put) -> None:
    ending = Path(name.lower().removesuffix(".gz")).suffix
    with pytest.raises(TraceError, match=rf"{name}: \{ending} is no format that adlocal reads; give JSON lines .*CSV"):
        read_records(put(name, LINE))


def test_a_missing_table_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(TraceError, match=r"^data/traces\.tsv: cannot be read as UTF-8 text"):
        read_records("data/traces.tsv")


def test_a_prompt_of_a_record_is_read_alone() -> None:
    assert read_prompt(Record("here", {"question": "1 + 1?", "answer": 2})).answer == "2"
