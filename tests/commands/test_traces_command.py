"""`adlocal traces`: what the teacher says, against plain llama-cpp-python, and files that runs leave and find again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adlocal import AntidistillationLlama, Bundle
from adlocal.cli import main
from adlocal.commands import traces as harvest
from adlocal.commands.traces import derive_seed
from adlocal.llamacpp.model import open_vocabulary
from adlocal.traces import TraceEncoder, read_traces
from adlocal_convert.convert import convert
from adlocal_convert.options import Options
from support import tiny
from support.alone import alone

Done = tuple[int, str, str]
Traces = Callable[..., Done]


@pytest.fixture(scope="module")
def teacher(ending_teacher: Path) -> Path:
    return ending_teacher


@pytest.fixture
def traces(teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Traces]:
    """Runs `adlocal traces` on rows of prompts and gives exit status, stdout and the last line of stderr."""

    def call(rows: list[Any] | Path, *argv: object, model: Path = teacher) -> Done:
        prompts = rows if isinstance(rows, Path) else lines_of(tmp_path / "prompts.jsonl", *rows)
        done = main([str(part) for part in arguments(model, prompts, tmp_path / "traces.jsonl", *argv)])
        captured = capfd.readouterr()
        return done, captured.out, captured.err.rstrip().splitlines()[-1].rpartition("\r")[2]

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


def arguments(model: Path, prompts: Path, out: Path, *argv: object) -> list[object]:
    return ["traces", "-m", model, "--prompts", prompts, "-o", out, "-n", 16, "-c", 256, "-t", 1, *argv]


def lines_of(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


USER = {"role": "user", "content": "1 + 1?"}
ROWS: list[dict[str, Any]] = [{"id": i, "prompt": f"{i} + {i * i} = ?"} for i in range(9)]


def asked(question: str) -> str:
    return f"<s>user\n{question}</s>\n<s>assistant\n"


def test_a_row_is_that_of_its_prompt_and_what_the_teacher_said(traces: Traces, plain: Any, tmp_path: Path) -> None:
    """The chat template is written out here by hand."""
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER]
    rendered = f"<s>user\nHi</s>\n<s>assistant\nHello</s>\n{asked('1 + 1?')}"
    prompts: list[tuple[dict[str, Any], str]] = [
        *((row, asked(row["prompt"])) for row in ROWS),
        ({"prompt": history, "é": [1.5, None]}, rendered),
        ({"messages": history}, rendered),
        ({"question": "1 + 1?", "answer": "<<1+1=2>>2"}, asked("1 + 1?")),
    ]
    status, out, told = traces([row for row, _ in prompts], "--json", "-np", 3)
    assert status == 0, told
    found = rows_of(tmp_path / "traces.jsonl")
    for row, (prompt, text) in zip(found, prompts, strict=True):
        tokens, reason = alone(plain, plain.tokenize(text.encode(), add_bos=False, special=True), 16, temp=0.0)
        said = plain.detokenize(tokens).decode(errors="ignore")
        as_messages = "messages" in prompt or isinstance(prompt.get("prompt"), list)
        made_by = row["generated_by"]
        assert row == {
            **prompt,
            "generated_by": made_by,
            "completion": [{"role": "assistant", "content": said}] if as_messages else said,
            "finish_reason": reason,
            "n_tokens": len(tokens),
        }
        assert made_by == {**made_by, "ctx_size": 256, "n_predict": 16, "raw": False, "temp": 0.0}
    summary = json.loads(out)
    reasons = [row["finish_reason"] for row in found]
    said_all = [row["completion"] for row in found]
    empty = sum(not (said if isinstance(said, str) else said[0]["content"]).strip() for said in said_all)
    assert {"stop", "length"} == set(reasons)
    assert [summary[key] for key in ("traces", "stop", "length", "empty", "skipped", "resumed")] == [
        *(len(prompts), reasons.count("stop"), reasons.count("length"), empty, 0, 0)
    ]
    assert told.startswith(f"12 traces: {reasons.count('stop')} ended, {reasons.count('length')} cut at the length")


@pytest.mark.parametrize("raw", [False, True])
def test_traces_are_read_with_the_prompts_that_they_were_made_from(
    raw: bool, traces: Traces, plain: Any, teacher: Path, tmp_path: Path
) -> None:
    """Up to its first target, the encoded trace is what the teacher was given."""
    traces(ROWS, *(["--raw"] if raw else []))
    encoder = TraceEncoder(open_vocabulary(teacher), raw=raw)
    read = read_traces(tmp_path / "traces.jsonl")
    rows = [row for row in rows_of(tmp_path / "traces.jsonl") if row["completion"].strip()]
    assert read.n_empty == len(ROWS) - len(rows)
    for trace, row in zip(read, rows, strict=True):
        encoded = encoder.encode(trace)
        given = encoded.tokens[: encoded.targets.index(True)]
        said, reason = alone(plain, given, 16, temp=0.0)
        assert (row["completion"], row["n_tokens"]) == (plain.detokenize(said).decode(errors="ignore"), len(said))
        ends = [t for t, is_target in zip(encoded.tokens, encoded.targets, strict=True) if is_target and t == tiny.EOS]
        assert len(ends) == (reason == "stop" and not raw)


def test_sampled_text_depends_on_the_seed_and_the_prompt_alone(
    traces: Traces, plain: Any, teacher: Path, tmp_path: Path
) -> None:
    """Repeated prompts are sampled anew; neither order nor company changes what a row says."""
    sampling = ["--temp", 1.2, "--top-k", 0, "--top-p", 0.9, "--min-p", 0.02]
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "c"}]
    texts = {}
    for seed, order, n_parallel in ((7, 1, 1), (7, -1, 4), (8, 1, 4)):
        traces(rows[::order], *sampling, "-s", seed, "-np", n_parallel, "--overwrite")
        texts[seed, order] = [(row["prompt"], row["completion"]) for row in rows_of(tmp_path / "traces.jsonl")]
    assert len(set(texts[7, 1])) == 4
    assert sorted(texts[7, 1]) == sorted(texts[7, -1])
    assert not set(texts[7, 1]) & set(texts[8, 1])
    prompt = TraceEncoder(open_vocabulary(teacher)).encode_prompt("here", "a")
    for nth, (_, text) in enumerate([texts[7, 1][0], texts[7, 1][2]]):
        plain.set_seed(derive_seed(7, prompt, nth))
        said, _ = alone(plain, prompt, 16, temp=1.2, top_k=0, top_p=0.9, min_p=0.02)
        assert text == plain.detokenize(said).decode(errors="ignore")


# Going on


@pytest.mark.parametrize("rows_left", [0, 1, 4, 8])
@pytest.mark.parametrize("half_line", [0, 1, 30, -1])
def test_a_second_run_goes_on_after_the_last_complete_line(
    rows_left: int, half_line: int, traces: Traces, tmp_path: Path
) -> None:
    """A line without its end was cut short, even where only the end is missing."""
    out = tmp_path / "traces.jsonl"
    traces(ROWS)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:rows_left]) + lines[rows_left][:half_line])
    status, report, _ = traces(ROWS, "--json", "-np", 2)
    assert status == 0
    assert out.read_bytes() == whole
    assert json.loads(report)["resumed"] == rows_left
    assert json.loads(report)["traces"] == len(ROWS)


def test_a_finished_file_stays_and_more_prompts_make_it_longer(traces: Traces, tmp_path: Path) -> None:
    out = tmp_path / "traces.jsonl"
    traces(ROWS[:5])
    first = out.read_bytes()
    status, _, told = traces(ROWS[:5])
    assert (status, out.read_bytes()) == (0, first)
    assert "5 were there already; 0 tokens" in told
    traces(ROWS)
    assert out.read_bytes().startswith(first)
    assert [row["id"] for row in rows_of(out)] == list(range(9))


OTHER_SETTINGS: dict[str, tuple[list[object], str]] = {
    "length": (["-n", 17], "traces.jsonl:1: was made with n_predict 16, this run has 17"),
    "context": (["-c", 128], "traces.jsonl:1: was made with ctx_size 256, this run has 128"),
    "template": (["--raw"], "traces.jsonl:1: was made with raw False, this run has True"),
    "temperature": (["--temp", 0.5], "traces.jsonl:1: was made with temp 0.0, this run has 0.5"),
}


@pytest.mark.parametrize(("argv", "words"), OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_a_file_made_with_other_settings_is_refused(
    argv: list[object], words: str, traces: Traces, tmp_path: Path
) -> None:
    refused_and_kept(traces, tmp_path, ROWS, words, *argv)


OTHER_PROMPTS: dict[str, tuple[list[Any], str]] = {
    "another": ([*ROWS[:2], {"id": 2, "prompt": "?"}, *ROWS[3:]], "traces.jsonl:3: answers another prompt than "),
    "another field": ([*ROWS[:2], {**ROWS[2], "id": 7}, *ROWS[3:]], "traces.jsonl:3: answers another prompt than "),
    "fewer": (ROWS[:8], "traces.jsonl: has 9 rows for 8 prompts"),
}


@pytest.mark.parametrize(("rows", "words"), OTHER_PROMPTS.values(), ids=OTHER_PROMPTS)
def test_a_file_made_from_other_prompts_is_refused(rows: list[Any], words: str, traces: Traces, tmp_path: Path) -> None:
    refused_and_kept(traces, tmp_path, rows, words)


def test_a_file_made_by_another_teacher_is_refused(traces: Traces, tmp_path: Path) -> None:
    other = tiny.write_gguf(tiny.tiny_model(seed=1), tmp_path / "other.gguf", tiny.CHAT_TEMPLATE)
    refused_and_kept(traces, tmp_path, ROWS, "traces.jsonl:1: was made with another teacher", model=other)


def refused_and_kept(traces: Traces, tmp_path: Path, rows: list[Any], words: str, *argv: object, **how: Any) -> None:
    """Refused in words; --overwrite is the remedy, and it works."""
    out = tmp_path / "traces.jsonl"
    traces(ROWS)
    before = out.read_bytes()
    status, _, told = traces(rows, *argv, **how)
    assert status == 2
    assert words in told
    assert told.endswith("give another -o, or say --overwrite to start again")
    assert out.read_bytes() == before
    assert traces(rows, *argv, "--overwrite", **how)[0] == 0
    assert len(rows_of(out)) == len(rows)


FOREIGN: dict[str, tuple[bytes, str]] = {
    "traces": (b'{"prompt": "a", "completion": "b"}\n', ":1: was not written by adlocal traces; give another -o"),
    "a note": (b"remember the milk", ": its last line is none of this run; give another -o"),
    "text": (b"remember\nthe milk\n", ":1: broken JSON at column 1"),
    "a model": (b"GGUF\xff\xfe\n", ": no file of traces ("),
}


@pytest.mark.parametrize(("content", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_something_else_is_left_alone(content: bytes, words: str, traces: Traces, tmp_path: Path) -> None:
    out = tmp_path / "traces.jsonl"
    out.write_bytes(content)
    status, _, told = traces(ROWS)
    assert status == 2
    assert words in told
    assert out.read_bytes() == content


def test_the_file_of_prompts_is_not_written_over(traces: Traces, tmp_path: Path) -> None:
    prompts = lines_of(tmp_path / "traces.jsonl", *ROWS)
    status, _, told = traces(prompts, "--overwrite")
    assert (status, rows_of(prompts)) == (2, ROWS)
    assert told.endswith("is the file of prompts; give another -o")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_an_interrupted_run_leaves_whole_lines_and_the_next_one_goes_on(
    how: signal.Signals, teacher: Path, tmp_path: Path
) -> None:
    out, n = tmp_path / "traces.jsonl", 60
    rows = [{"prompt": f"{i} is " * 20} for i in range(n)]
    argv = arguments(teacher, lines_of(tmp_path / "prompts.jsonl", *rows), out, "-n", 100, "--temp", 2)
    process = command(argv)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    stderr = process.communicate(timeout=60)[1]
    told = [line.rpartition("\r")[2] for line in stderr.rstrip().splitlines()[-2:]]
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    found = rows_of(out)
    assert 5 <= len(found) < n, "it was to be interrupted in the middle"
    assert told == [
        f"{len(found)} of {n} traces are in {out}; the same command goes on",
        "adlocal traces: interrupted; nothing half-written is left",
    ]
    for path in (out, tmp_path / "uninterrupted.jsonl"):
        argv[6] = path
        assert main([str(part) for part in argv]) == 0
    assert out.read_bytes() == (tmp_path / "uninterrupted.jsonl").read_bytes()


def command(argv: list[object]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "adlocal", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background hand down that Ctrl-C is to be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


# Protected traces


def test_protected_traces_are_what_the_drop_in_says(
    traces: Traces, teacher: Path, tiny_bundle: Path, tmp_path: Path, exact_kernels: dict[str, Any]
) -> None:
    """And say so in every row; without a bundle nothing is said of one."""
    protection = ["--bundle", tiny_bundle, "--strength", 6, "--guard", 0]
    out = tmp_path / "traces.jsonl"
    traces(ROWS)
    clean = rows_of(out)
    status, _, told = traces(ROWS, *protection, "--overwrite", "-np", 3)
    assert status == 0, told
    found = rows_of(out)
    with closing(
        AntidistillationLlama(
            str(teacher), bundle=tiny_bundle, strength=6.0, guard=0.0, n_ctx=256, verbose=False, **exact_kernels
        )
    ) as llm:
        for row in found:
            tokens, reason = alone(llm, llm.tokenize(asked(row["prompt"]).encode(), add_bos=False, special=True), 16)
            said = llm.detokenize(tokens).decode(errors="ignore")
            assert (row["completion"], row["finish_reason"], row["n_tokens"]) == (said, reason, len(tokens))
    assert sum(a["completion"] != b["completion"] for a, b in zip(clean, found, strict=True)) > 4
    settings = {"bundle": Bundle.open(tiny_bundle).id, "strength": 6.0, "guard": 0.0}
    for row, other in zip(found, clean, strict=True):
        assert row["generated_by"] == {**other["generated_by"], **settings}


@pytest.mark.parametrize("protection", [["--strength", 6], ["--strength", 0, "--best-of", 3]], ids=["steer", "choose"])
@pytest.mark.parametrize("rows_left", [0, 4])
@pytest.mark.usefixtures("exact_kernels")
def test_protected_traces_are_resumed(
    rows_left: int, protection: list[object], traces: Traces, tiny_bundle: Path, tmp_path: Path
) -> None:
    """With the same text, whatever was sampled beside it the first time."""
    out, sampling = tmp_path / "traces.jsonl", ["--temp", 1.0, "--bundle", tiny_bundle, *protection]
    traces(ROWS, *sampling, "-np", 1)
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:rows_left]) + b'{"id"')
    status, report, _ = traces(ROWS, *sampling, "-np", 3, "--json")
    assert (status, out.read_bytes()) == (0, whole)
    assert json.loads(report)["resumed"] == rows_left
    status, _, told = traces(ROWS, *sampling, "--best-of", 2)
    assert (status, out.read_bytes()) == (2, whole)
    assert "best_of" in told, "another number of candidates makes other traces"


def test_consistent_traces_are_chosen_by_their_final_number(
    traces: Traces, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(harvest, "final_answer", asked.append)
    sampling = ["--temp", 1.0, "--bundle", tiny_bundle, "--strength", 0, "--best-of", 3]
    assert traces(ROWS, *sampling)[0] == 0
    assert not asked
    assert all("consistent" not in row["generated_by"] for row in rows_of(tmp_path / "traces.jsonl"))
    assert traces(ROWS, *sampling, "--consistent", "--overwrite")[0] == 0
    assert asked
    assert all(row["generated_by"]["consistent"] for row in rows_of(tmp_path / "traces.jsonl"))
    assert traces(ROWS, *sampling)[0] == 2, "neither goes on with the other"


OTHER_PROTECTION: dict[str, tuple[list[object], str]] = {
    "strength": (["--strength", 5], "was made with strength 6.0, this run has 5.0"),
    "guard": (["--guard", 0.1], "was made with guard 0.05, this run has 0.1"),
    "bundle": (["--bundle", "other_bundle"], "was made with bundle "),
}


@pytest.fixture(scope="module")
def other_bundle(tiny_llama: Path, tiny_traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same proxy and traces, with fewer carriers."""
    out = tmp_path_factory.mktemp("other") / "bundle"
    convert(Options(str(tiny_llama), {"traces": tiny_traces}, out, carriers=0.6, n_threads=1), lambda line: None)
    return out


@pytest.mark.parametrize(("argv", "words"), OTHER_PROTECTION.values(), ids=OTHER_PROTECTION)
def test_traces_of_another_protection_are_refused(
    argv: list[object], words: str, traces: Traces, tiny_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    """Neither continued nor overwritten; plain traces are no beginning of protected ones, nor the other way round."""
    out, protection = tmp_path / "traces.jsonl", ["--bundle", tiny_bundle, "--strength", 6]
    traces(ROWS, *protection)
    before = out.read_bytes()
    status, _, told = traces(ROWS, *protection, *(other_bundle if a == "other_bundle" else a for a in argv))
    assert (status, out.read_bytes()) == (2, before)
    assert f"traces.jsonl:1: {words}" in told
    status, _, told = traces(ROWS)
    assert (status, out.read_bytes()) == (2, before)
    assert "was made with bundle " in told
    traces(ROWS, "--overwrite")
    clean = out.read_bytes()
    assert traces(ROWS, *protection)[0] == 2
    assert out.read_bytes() == clean


PROTECTION_REFUSED: dict[str, tuple[list[object], str]] = {
    "strength alone": (["--strength", 6], "strength=6.0, guard=None: they act through a bundle; give one"),
    "guard alone": (["--guard", 0.1], "strength=None, guard=0.1: they act through a bundle; give one"),
    "strength": (["--bundle", "tiny_bundle", "--strength", -1], "strength=-1.0: give nats from 0 (the plain teacher)"),
    "guard": (["--bundle", "tiny_bundle", "--guard", 2], "guard=2.0: give a share of the top token's probability"),
    "no bundle": (["--bundle", "nowhere"], "nowhere: no such bundle directory"),
    "not calibrated": (["--bundle", "tiny_bundle", "--strength", "calibrated"], "has no calibration; run `adlocal"),
    "best of no bundle": (["--best-of", 2, "--temp", 1], "best_of=2: give a whole number from 1 up, and a bundle"),
    "greedy best of": (
        ["--bundle", "tiny_bundle", "--best-of", 2],
        "--best-of 2: greedy traces of a prompt are all al",
    ),
    "consistent alone": (
        ["--bundle", "tiny_bundle", "--consistent"],
        "best_of=1: no answer has a majority among so few",
    ),
    "context": (["--bundle", "tiny_bundle", "-c", 1024], "exceeds the 256 tokens that the proxy was trained for"),
}


@pytest.mark.parametrize(("argv", "words"), PROTECTION_REFUSED.values(), ids=PROTECTION_REFUSED)
def test_protection_that_cannot_be_had_is_told_in_a_line(
    argv: list[object],
    words: str,
    teacher: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nothing is written."""
    given = [tiny_bundle if a == "tiny_bundle" else a for a in argv]
    prompts, out = lines_of(tmp_path / "prompts.jsonl", *ROWS), tmp_path / "traces.jsonl"
    assert main([str(a) for a in arguments(teacher, prompts, out, *given)]) == 2
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith("adlocal traces: ")
    assert words in told
    assert not out.exists()


# What is refused, and what is skipped


def test_prompts_that_fill_the_context_are_skipped_and_counted(traces: Traces, tmp_path: Path) -> None:
    n_template = len("B1user\n") + len("E\nB1assistant\n") - 2  # B1, E: one token each
    rows = [ROWS[0], {"prompt": "x" * (256 - n_template)}, ROWS[1], {"prompt": "x" * (255 - n_template)}]
    status, out, told = traces(rows, "--json")
    found = rows_of(tmp_path / "traces.jsonl")
    assert status == 0
    assert json.loads(out)["skipped"] == 1
    assert "1 skipped, their prompts fill the context of 256 tokens" in told
    assert [row["prompt"][0] for row in found] == ["0", "1", "x"]
    assert (found[2]["finish_reason"], found[2]["n_tokens"]) in (("length", 1), ("stop", 0))
    status, _, told = traces([rows[1]] * 3, "--overwrite")
    assert (status, told) == (2, "adlocal traces: all 3 prompts fill the context of 256 tokens; ask for a larger one")


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "broken": ('{"prompt": "1', "broken JSON at column 12"),
    "no object": ("[1]", "expected a JSON object, found list"),
    "no prompt": ({"text": "a"}, "has ['text'], expected \"prompt\", a string or a list of messages"),
    "number": ({"prompt": 3}, "has ['prompt'], expected"),
    "blank": ({"prompt": " "}, "the prompt is empty; remove the line"),
    "no messages": ({"prompt": []}, "the prompt is empty; remove the line"),
    "no message": ({"messages": ["hello"]}, 'a message needs "role" and "content", found hello'),
    "answered": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        'the messages end with a turn of "assistant"; let them end with the user\'s',
    ),
    "completion": (
        {"prompt": "a", "completion": "b"},
        'has "completion" already, which is to be generated; rename it, to "answer" perhaps',
    ),
    "surrogate": ('{"prompt": "\\ud83d"}', "half a surrogate pair"),
}


@pytest.mark.parametrize(("row", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_without_a_prompt_is_told_with_its_line(row: Any, words: str, traces: Traces, tmp_path: Path) -> None:
    status, out, told = traces([ROWS[0], row])
    assert (status, out) == (2, "")
    assert f"prompts.jsonl:2: {words}" in told
    assert not (tmp_path / "traces.jsonl").exists()


def test_fields_that_utf_8_cannot_hold_are_carried_all_the_same(traces: Traces, tmp_path: Path) -> None:
    status, _, _ = traces([{"prompt": "é", "note": "\ud83d"}])
    (row,) = rows_of(tmp_path / "traces.jsonl")
    assert (status, row["prompt"], row["note"]) == (0, "é", "\ud83d")
    assert traces([{"prompt": "é", "note": "\ud83d"}])[2].count("1 were there already") == 1


@pytest.mark.parametrize(
    ("argv", "words", "status"),
    [
        (["-np", "300"], "n_seq_max must be <= 256", 2),
        (["-o", "nowhere/traces.jsonl"], "cannot write nowhere/traces.jsonl: No such file or directory", 1),
        (["-o", "."], ".: no file of traces (", 2),
        (["-m", "nowhere.gguf"], "nowhere.gguf: no such file", 2),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: cannot be read as UTF-8 text", 2),
    ],
    ids=["-np", "no directory", "a directory", "-m", "--prompts"],
)
def test_wrong_arguments_are_refused(argv: list[str], words: str, status: int, traces: Traces) -> None:
    done, out, told = traces(ROWS, *argv)
    assert (done, out) == (status, "")
    assert told.startswith("adlocal traces: ")
    assert words in told


def test_messages_for_a_teacher_without_a_template_are_refused(traces: Traces, tmp_path: Path) -> None:
    base = tiny.write_gguf(tiny.tiny_model(num_hidden_layers=1), tmp_path / "base.gguf")
    status, _, told = traces([ROWS[0], {"messages": [{"role": "user", "content": "a"}]}], model=base)
    assert status == 2
    assert "prompts.jsonl:2: messages need a chat template and the model has none" in told


def test_a_template_that_drops_the_prompt_is_refused(traces: Traces, tmp_path: Path) -> None:
    silent = tiny.write_gguf(tiny.tiny_model(num_hidden_layers=1), tmp_path / "silent.gguf", "{% if 0 %}{% endif %}")
    status, _, told = traces(ROWS, model=silent)
    assert status == 2
    assert "prompts.jsonl:1: the chat template makes no text of the prompt" in told
