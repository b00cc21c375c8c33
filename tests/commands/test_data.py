"""Data in through the commands: every verb reads every format, and says what of it has no place."""

from __future__ import annotations

import gzip
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet as pyarrow_parquet

from adlocal import Calibration
from adlocal.cli import main
from adlocal.traces import TraceEncoder, read_traces

Run = Callable[..., tuple[int, str, str]]
CopyBundle = Callable[[str], Path]

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "weather"}}
#: A row of each kind that a report has to tell of.
ROWS: list[dict[str, Any]] = [
    {"messages": [USER, {**ANSWER, "reasoning_content": "two and two make four"}]},
    {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "content": "four"}]},
    {"messages": [USER, ANSWER], "tools": [TOOL]},
    {"messages": [USER, {**ANSWER, "mood": "calm"}]},
]
NOTES = [
    "1 with reasoning",
    "1 with turns that are context only, by their weight",
    "1 with tools that the chat template has no place for",
    'keys that adlocal does not know: "mood"',
]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command in this process: (exit status, stdout, stderr)."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*argv: object) -> tuple[int, str, str]:
        status = main([str(part) for part in argv])
        return status, *capfd.readouterr()

    yield call
    signal.signal(signal.SIGTERM, before)


def lines_of(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Reports


def test_score_tells_what_it_read(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    path = lines_of(tmp_path / "t.jsonl", *ROWS, ROWS[0])
    status, out, _ = run("score", "--bundle", tiny_bundle, path, "-c", 256, "-t", 1)
    notes = ["1 duplicates, left out", *NOTES]
    assert status == 0
    assert out.rstrip().endswith("; ".join(["all 4 (0 cut, 0 skipped)", *notes]))
    report = json.loads(run("score", "--bundle", tiny_bundle, path, "-c", 256, "-t", 1, "--json", "--tokens")[1])
    assert (report["reasoning"], report["notes"]) == (1, notes)
    thought = report["scores"][0]
    learned = [text for text, dose in zip(thought["tokens"], thought["doses"], strict=True) if dose is not None]
    assert "".join(learned) == "<think>\ntwo and two make four\n</think>\n\n4</s>"


def test_convert_tells_what_it_read(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    path = lines_of(tmp_path / "t.jsonl", *ROWS, {"question": "1 + 1?", "answer": "2"})
    argv = ["convert", tiny_llama, "--traces", path, "--out", tmp_path / "bundle", "--carriers", 1, "-t", 1]
    status, out, err = run(*argv)
    assert status == 0, err
    n = len("<think>\ntwo and two make four\n</think>\n\n4.") + len("four.") + 2 * len("4.")  # the end is a token too
    assert (out + err).splitlines()[0] == "; ".join(
        [f"traces: 4 traces with {n} tokens to learn from, 1 held out", *NOTES]
    )


@pytest.mark.parametrize("content", ["csv", "sharegpt", "array", "mark", "gzip"])
def test_score_reads_every_format(content: str, run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    """And each gives the dose of the plain file."""
    pair = {"prompt": "2+2?", "completion": "4"}
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    files: dict[str, tuple[str, bytes]] = {
        "csv": ("t.csv", b"prompt,completion\n2+2?,4\n"),
        "sharegpt": ("t.jsonl", json.dumps({"conversations": turns}).encode()),
        "array": ("t.json", json.dumps([pair]).encode()),
        "mark": ("t.jsonl", b"\xef\xbb\xbf" + json.dumps(pair).encode()),
        "gzip": ("t.jsonl.gz", gzip.compress(json.dumps(pair).encode())),
    }
    name, data = files[content]
    (tmp_path / name).write_bytes(data)
    plain = lines_of(tmp_path / "plain.jsonl", pair)
    doses = []
    for path in (tmp_path / name, plain):
        status, out, err = run("score", "--bundle", tiny_bundle, path, "-c", 256, "-t", 1, "--json")
        assert status == 0, err
        doses.append(json.loads(out)["dose"])
    assert doses[0] == doses[1]


# Traces


def traces_of(run: Run, teacher: Path, prompts: object, out: Path, *argv: object) -> tuple[int, str, str]:
    return run("traces", "-m", teacher, "--prompts", prompts, "-o", out, "-n", 24, "-c", 256, "-t", 1, *argv)


SHAREGPT = [{"conversations": [{"from": "human", "value": f"{i} + {i}?"}], "id": i} for i in range(5)]
ALPACA = "instruction,input,output\n" + "".join(f'"Add {i}.",{i},\n' for i in range(5))
SOURCES: dict[str, tuple[str, bytes]] = {
    "ShareGPT": ("p.jsonl", "".join(json.dumps(row) + "\n" for row in SHAREGPT).encode()),
    "CSV": ("p.csv", ALPACA.encode()),
    "array": ("p.json", b"\xef\xbb\xbf" + json.dumps(SHAREGPT).encode()),
    "gzip": ("p.csv.gz", gzip.compress(ALPACA.encode())),
}


@pytest.mark.parametrize(("name", "content"), SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("half_line", [0, 30])
def test_traces_of_any_source_are_resumed(
    half_line: int, name: str, content: bytes, run: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    """To the byte, and the file is read as traces of what was asked."""
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "traces.jsonl"
    sampling = ["--temp", 1.5]  # greedy, the random teacher says little
    assert traces_of(run, tiny_llama, tmp_path / name, out, *sampling)[0] == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 5
    out.write_bytes(b"".join(lines[:2]) + lines[2][:half_line])
    status, report, err = traces_of(run, tiny_llama, tmp_path / name, out, *sampling, "--json")
    assert (status, out.read_bytes()) == (0, whole), err
    assert json.loads(report)["resumed"] == 2
    read = read_traces(out)
    assert (len(read.traces), read.n_empty) == (5, 0)
    for trace in read:
        assert trace.prompt is None or trace.prompt.startswith("Add ")
        assert trace.messages is None or (trace.n_given == 1 and trace.messages[0]["content"].endswith("?"))


def test_a_file_of_traces_that_an_editor_marked_is_resumed(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    prompts, out = lines_of(tmp_path / "p.jsonl", *SHAREGPT), tmp_path / "traces.jsonl"
    traces_of(run, tiny_llama, prompts, out)
    whole = b"\xef\xbb\xbf" + out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert traces_of(run, tiny_llama, prompts, out)[0] == 0
    assert out.read_bytes() == whole


def test_traces_tell_of_tools_and_keys_that_have_no_place(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "mood": "calm"}], "tools": [TOOL]}, {"prompt": "a"}]
    status, out, err = traces_of(run, tiny_llama, lines_of(tmp_path / "p.jsonl", *rows), tmp_path / "t.jsonl", "--json")
    assert status == 0
    assert json.loads(out)["notes"] == [NOTES[2], NOTES[3]]
    assert err.rstrip().endswith("; ".join(NOTES[2:]))


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.csv", "t.parquet", "t.txt"])
def test_traces_are_not_written_under_another_formats_name(
    name: str, run: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    prompts = lines_of(tmp_path / "p.jsonl", {"prompt": "a"})
    status, _, err = traces_of(run, tiny_llama, prompts, tmp_path / name)
    assert status == 2
    assert f"{name}: traces are written as JSON lines; give a name that ends in .jsonl" in err
    assert not (tmp_path / name).exists()


# Calibrate


PROMPTS: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"{i} + {i}?"}]} for i in range(2)]


@pytest.mark.parametrize("source", ["messages", "parquet", "dataset", "csv"])
def test_calibrate_takes_the_prompts_that_traces_takes(
    source: str, run: Run, tiny_llama: Path, copy_bundle: CopyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompts from anywhere give the same calibration; of a dataset the record is told by its rows."""
    plain = lines_of(tmp_path / "p.jsonl", *PROMPTS)
    given: object = plain
    if source == "parquet":
        given = tmp_path / "p.parquet"
        pyarrow_parquet.write_table(pyarrow.Table.from_pylist(PROMPTS), given)
    if source == "dataset":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: PROMPTS)
        given = "owner/name:test"
    if source == "csv":
        given = tmp_path / "p.csv"
        given.write_text("question,id\n0 + 0?,a\n1 + 1?,b\n")
    found = []
    for prompts, bundle in ((plain, copy_bundle("plain")), (given, copy_bundle("other"))):
        argv = ["calibrate", "-m", tiny_llama, "--bundle", bundle, "--prompts", prompts, "--kl", 0.1, "--guard", 0.05]
        status, _, err = run(*argv, "-n", 6, "-c", 256, "-t", 1)
        assert status == 0, err
        found.append(Calibration.open(bundle))
    first, second = found
    assert first is not None
    assert second is not None
    assert (first.strength, first.n_prompts) == (second.strength, 2)
    assert (first.prompts_sha256 == second.prompts_sha256) == (source == "messages")
    assert len(second.prompts_sha256) == 64


def test_calibrate_tells_of_tools_that_have_no_place(
    run: Run, tiny_llama: Path, copy_bundle: CopyBundle, tmp_path: Path
) -> None:
    prompts = lines_of(tmp_path / "p.jsonl", {"messages": [USER], "tools": [TOOL]})
    argv = ["calibrate", "-m", tiny_llama, "--bundle", copy_bundle("b"), "--prompts", prompts, "--kl", 0.1]
    status, _, err = run(*argv, "-n", 4, "-c", 256, "-t", 1, "--guard", 0.05, "--json")
    assert status == 0
    assert f"adlocal calibrate: prompts: {NOTES[2]}" in err


def test_calibrate_and_traces_give_tools_to_the_template(
    run: Run, tiny_llama: Path, copy_bundle: CopyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    encode = TraceEncoder.encode_prompt

    def spy(self: TraceEncoder, where: str, prompt: Any, tools: Any = ()) -> list[int]:
        given.append(tools)
        return encode(self, where, prompt, tools)

    monkeypatch.setattr(TraceEncoder, "encode_prompt", spy)
    prompts = lines_of(tmp_path / "p.jsonl", {"messages": [USER], "tools": [TOOL]})
    assert traces_of(run, tiny_llama, prompts, tmp_path / "t.jsonl")[0] == 0
    argv = ["calibrate", "-m", tiny_llama, "--bundle", copy_bundle("b"), "--prompts", prompts, "--kl", 0.1]
    assert run(*argv, "-n", 4, "-c", 256, "-t", 1, "--guard", 0.05)[0] == 0
    assert given == [(TOOL,), (TOOL,)]


def test_answers_come_from_any_format(run: Run, tiny_llama: Path, copy_bundle: CopyBundle, tmp_path: Path) -> None:
    prompts = lines_of(tmp_path / "p.jsonl", *({**row, "id": i} for i, row in enumerate(PROMPTS)))
    (tmp_path / "a.csv").write_text("id,answer\n1,2\n")
    argv = ["calibrate", "-m", tiny_llama, "--bundle", copy_bundle("b"), "--prompts", prompts, "--accuracy-drop", 5]
    status, _, err = run(*argv, "--answers", tmp_path / "a.csv", "-n", 4, "-c", 256, "-t", 1)
    assert status == 2
    assert "p.jsonl:1: id 0 has no answer in" in err
