"""The laboratory on real models: on tiny ones in full, its figures recomputed, and once on SmolLM2."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from adlocal.engine.sequences import Completion
from adlocal.errors import InputError
from adlocal.traces import TraceWriter
from adlocal_convert.demo.word_problems import word_problems
from examples.lab.real import command as real
from examples.lab.real.lora import Lesson, Student, Tuning
from examples.lab.real.stages import Problem, Runtime, Teaching, Tuned, read_problems
from support import tiny
from support.json_lines import read_lines, write_lines

PROBLEMS = [{"question": f"What is {i} + {i + 4}?", "answer": f"{i} + {i + 4}\n#### {2 * i + 4}"} for i in range(9)]
Run = Callable[..., Path]


def byte_tokenizer() -> Any:
    """transformers' tokenizer with the ids of the tiny GGUFs."""
    vocabulary = {piece: i for i, piece in enumerate([*tiny.BYTES, "<s>", "</s>"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = tiny.CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random student."""
    directory = tmp_path_factory.mktemp("student")
    tiny.tiny_model("llama", seed=5).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def run(tiny_llama: Path, tiny_bundle: Path, student: Path, tmp_path: Path) -> Run:
    """Runs the command on tiny models, with `options` last, and returns its --out."""
    prompts, test = (
        write_lines(tmp_path / "prompts.jsonl", *PROBLEMS[:6]),
        write_lines(tmp_path / "test.jsonl", *PROBLEMS[6:]),
    )

    def go(*options: object, status: int = 0) -> Path:
        argv = ["-m", tiny_llama, "--bundle", tiny_bundle, "--prompts", prompts, "--test", test, "--student", student]
        argv += ["--out", tmp_path / "out", "-n", 12, "-t", 1, "-np", 3, "--epochs", 6, "--lr", 0.01]
        argv += ["--batch-size", 6, "--device", "cpu", "--strength", 6]
        assert real.main([str(word) for word in [*argv, *options]]) == status
        return tmp_path / "out"

    return go


def results(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    rows = read_lines(out / "results.jsonl")
    return {(row["kind"], row["name"]): row for row in rows}


def stages(out: Path) -> dict[str, int]:
    """When each was made."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "stages").iterdir()}


def test_the_whole_of_it(run: Run) -> None:
    out = run()
    found = results(out)
    assert list(found) == [
        ("teacher", "clean"),
        ("teacher", "protected"),
        ("student", "base"),
        ("student", "clean"),
        ("student", "protected"),
    ]
    clean, protected = (found["student", name] for name in ("clean", "protected"))
    for tuned in (clean, protected):
        assert tuned["n_examples"] == len(PROBLEMS[:6])
        assert len(tuned["losses"]) == 6  # a batch is an epoch
        assert tuned["losses"][-1] < tuned["losses"][0] - 0.05
    assert clean["losses"] != protected["losses"]
    assert found["teacher", "protected"]["dose_per_token"] > found["teacher", "clean"]["dose_per_token"]
    settings = clean["settings"]
    assert (settings["strength"], settings["guard"], settings["lora_rank"]) == (6, 0.05, 16)
    assert settings["generated_by"]["bundle"] == settings["bundle_id"]
    report = (out / "report.md").read_text()
    assert f"{clean['losses'][0]:.3f} | {clean['losses'][-1]:.3f}" in report
    for name in ("losses", "accuracies"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_takes_everything_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stages(run())
    monkeypatch.delattr(Student, "tune")
    monkeypatch.delattr(Student, "answer")
    assert stages(run()) == before


def test_other_settings_take_over_what_they_share(run: Run) -> None:
    before = stages(run())
    after = stages(run("--strength", 3))
    assert before.items() < after.items()
    made = sorted(name.partition("-")[0] for name in after.keys() - before.keys())
    assert made == ["dose", "grade", "teaching", "tuned"]  # of the protected half alone


def test_a_run_that_was_stopped_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> list[float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Student, "tune", stopped)
        before = stages(run(status=130))
    assert len(before) == 5  # traces, doses and the base's grade, and nothing half done
    assert before.items() < stages(run()).items()


def test_traces_that_were_stopped_go_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[int] = []

    def add(output: TraceWriter, completion: Completion, text: str) -> int:
        if sum(written) >= 2:
            raise KeyboardInterrupt
        written.append(real_add(output, completion, text))
        return written[-1]

    real_add = TraceWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(TraceWriter, "add", add)
        run(status=130)
    capsys.readouterr()
    found = results(run())
    assert f"{sum(written)} were there already" in capsys.readouterr().err
    assert found["teacher", "clean"]["n"] == len(PROBLEMS[:6])


def test_only_right_traces(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("--only-right", status=1)
    assert "none of the teacher's 6 traces are right; leave out --only-right" in capsys.readouterr().err


@pytest.mark.parametrize(("only_right", "expected"), [(False, ["#### 7", "8", "6"]), (True, ["#### 7", "8"])])
def test_what_a_student_is_trained_on(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_right: bool, expected: list[str]
) -> None:
    """Two right answers, a wrong one that was cut, and one without text."""
    said = [("#### 7", "#### 7", "stop"), ("8", "#### 8", "stop"), ("6", "#### 5", "length"), (" ", "#### 5", "stop")]
    rows = [{"question": "?", "answer": a, "completion": c, "finish_reason": why} for c, a, why in said]
    teaching = Teaching("teacher", "problems", 0.0, 8, 64, 0, (), Runtime("", Path(), 1, 1, 0))
    teaching.path(tmp_path).mkdir()
    write_lines(teaching.path(tmp_path) / "traces.jsonl", *rows)
    seen: list[Lesson] = []

    def tune(_student: Student, traces: list[Lesson], *_: object) -> list[float]:
        seen.extend(traces)
        return [1.0]

    monkeypatch.setattr(Student, "tune", tune)
    stage = Tuned("student", teaching, TUNING, only_right, Student(str(student), "cpu"))
    stage.run(tmp_path, tmp_path)
    assert [trace.completion for trace in seen] == expected
    assert [trace.ended for trace in seen] == [True, True, False][: len(expected)]
    assert stage.key != dataclasses.replace(stage, only_right=not only_right).key


TUNING = Tuning(epochs=1, batch_size=8, lr=1e-3, rank=4, n_ctx=64, seed=0)


def test_the_first_loss_is_the_bases_over_completions_alone(student: Path, tmp_path: Path) -> None:
    """LoRA begins at zero. The sequences are put together by hand; the cut one teaches no end, the long one is cut."""
    traces = [Lesson("a?", "yes"), Lesson("another?", "no", ended=False), Lesson("b?", "m" * 99)]
    losses = Student(str(student), "cpu").tune(traces, TUNING, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    total, n = 0.0, 0
    for trace, end in zip(traces, ([tiny.EOS], [], [tiny.EOS]), strict=True):
        user = [tiny.BOS, *f"user\n{trace.prompt}".encode(), tiny.EOS, ord("\n")]
        prompt = [*user, tiny.BOS, *b"assistant\n"]
        ids = torch.tensor([*prompt, *trace.completion.encode(), *end][: TUNING.n_ctx])
        rows = torch.log_softmax(model(ids[None]).logits[0].detach(), -1)
        total -= sum(float(rows[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
        n += len(ids) - len(prompt)
    assert losses == [pytest.approx(total / n, rel=1e-5)]  # float32 against float64


def test_prompts_that_fill_the_context_leave_nothing_to_learn(student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="all prompts fill 64 tokens"):
        Student(str(student), "cpu").tune([Lesson("x" * 64, "yes")], TUNING, tmp_path)


def test_answers_are_greedy_whatever_they_are_batched_with(student: Path, tmp_path: Path) -> None:
    subject = Student(str(student), "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(student)
    prompts = ["a?", "a much longer question?"]
    expected = []
    for prompt in prompts:
        ids = start = subject._prompt_ids(prompt)
        for _ in range(8):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == tiny.EOS:
                break
        expected.append(subject._tokenizer.decode(ids[len(start) :], skip_special_tokens=True))
    assert subject.answer(prompts, None, 8) == expected
    subject.tune([Lesson(prompt, "zzzzzzzz") for prompt in prompts], Tuning(40, 2, 0.02, 8, 64, 0), tmp_path)
    assert [set(text) for text in subject.answer(prompts, tmp_path, 8)] == [{"z"}] * 2  # the adapter is in force
    assert subject.answer(prompts, None, 8) == expected  # and leaves no trace in the base


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("48 + 24 = 72\n#### 72", True),
        ("so she sold 72 clips.", True),
        ("that makes $72.00", True),
        ("first 72, then 24", False),
        ("#### 1,072", False),
        ("#### 72\nor 5", False),  # of what follows the mark, the last number
        ("it's seventy-two", False),
        ("", False),
    ],
)
def test_final_answers(text: str, is_right: bool) -> None:
    assert Problem(json.dumps({"question": "?", "answer": "48+24\n#### 72"})).is_right(text) is is_right


def test_large_answers_with_commas() -> None:
    assert Problem(json.dumps({"question": "?", "answer": "#### 1,072"})).is_right("She has $1072 left.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "--device tpu: no device of PyTorch's; give auto, cpu, cuda"),
        (["--student", "no/such/model"], "--student no/such/model: transformers cannot open it"),
        (["--student", "missing.gguf"], "--student missing.gguf: transformers cannot open it"),
        (["--bundle", "missing"], "missing"),
        (["--model", "missing.gguf", "--strength", "calibrated"], "calibrat"),
        (["--strength", "-1"], "strength"),
        (["--n-traces", "7"], "has 6 problems, fewer than the 7 asked for"),
        (["--test", "prompts.jsonl"], "6 of its problems are among --prompts"),
        (["--prompts", "unanswered.jsonl"], 'unanswered.jsonl:1: no "answer" with a number to grade by'),
        (["--test", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    write_lines(tmp_path / "unanswered.jsonl", *[{"question": "why?", "answer": "because"}])
    monkeypatch.chdir(tmp_path)
    run(*options, status=2)
    error = capsys.readouterr().err
    assert error.startswith("real: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_peft(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    run(status=1)
    assert capsys.readouterr().err == (
        "real: fine-tuning needs peft, which is not installed; run: pip install 'adlocal[lab]'\n"
    )


def test_problems_of_other_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2?", "answer": "4", "id": "x"}, {"prompt": "3+3?", "answer": "none"}]
    problems = read_problems(
        "--test", str(write_lines(tmp_path / "rows.jsonl", *rows)), 1
    )  # the second is not asked for
    assert [problem.prompt for problem in problems] == ["2+2?"]


@pytest.fixture
def first_layers(smollm2: Path, pytestconfig: pytest.Config) -> Path:
    """SmolLM2's first two layers as a Hugging Face directory: enough to see a loss fall.

    transformers takes half a minute to open a GGUF: they are kept between runs.
    """
    cache = pytestconfig.cache
    assert cache is not None
    kept = Path(cache.mkdir("smollm2-layers")) / str(transformers.__version__)
    if kept.exists():
        return kept
    place = {"pretrained_model_name_or_path": smollm2.parent, "gguf_file": smollm2.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.hf_quantizer = None  # they are plain weights by now, which save_pretrained doesn't see
    del model.config.quantization_config
    partial = kept.with_suffix(".partial")
    model.save_pretrained(partial)
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(partial)
    return partial.rename(kept)


@pytest.mark.real
def test_smollm2(smollm2: Path, smollm2_bundle: Path, first_layers: Path, tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in word_problems(6, seed=1)]
    prompts, test = write_lines(tmp_path / "prompts.jsonl", *rows[:4]), write_lines(tmp_path / "test.jsonl", *rows[4:])
    argv = ["-m", smollm2, "--bundle", smollm2_bundle, "--prompts", prompts, "--test", test, "--student", first_layers]
    argv += ["--out", tmp_path / "out", "-n", 24, "-t", 1, "-np", 4, "--epochs", 5, "--lr", 2e-3, "--batch-size", 4]
    command = [str(word) for word in [*argv, "--device", "cpu", "--strength", 4, "-c", 256]]
    assert real.main(command) == 0
    found = results(tmp_path / "out")
    for name in ("clean", "protected"):
        losses = found["student", name]["losses"]
        assert losses[-1] < losses[0] - 0.5
        assert found["teacher", name]["tokens_a_trace"] > 8
    assert found["teacher", "protected"]["dose_per_token"] > found["teacher", "clean"]["dose_per_token"] + 0.1
    before = stages(tmp_path / "out")
    assert real.main(command) == 0
    assert stages(tmp_path / "out") == before
