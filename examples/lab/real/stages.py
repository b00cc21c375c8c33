"""Stages with real models: traces of the teacher, their dose, students fine-tuned on them, grades.

Fields without a repr are what a stage works with and no settings: they don't enter its key.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adlocal import cli
from adlocal.errors import AdlocalError, InputError
from adlocal.traces import Record, final_answer, read_prompts, read_records
from adlocal.traces.prompts import read_prompt
from adlocal.traces.shapes import is_empty

from ..stages import Stage, ordered, run
from .lora import Lesson, Student, Tuning
from .report import Graded, Taught


@dataclass(frozen=True)
class Problem:
    """A row of a file of prompts, as JSON; its "answer" ends in the right number."""

    row: str

    @property
    def prompt(self) -> Any:
        """A string, or messages."""
        return _prompt_of(json.loads(self.row))

    def is_right(self, text: str) -> bool:
        """Whether the final number of a text (after "####" if it has that, else its last) is the answer's."""
        return final_answer(text) == final_answer(str(json.loads(self.row)["answer"]))


def _prompt_of(fields: dict[str, Any]) -> Any:
    prompt = read_prompt(Record("problem", fields)).prompt
    return prompt if isinstance(prompt, str) else list(prompt)


def read_problems(option: str, source: str, n: int | None) -> tuple[Problem, ...]:
    """The first `n` problems, or all: JSON lines, Parquet or a datasets id, with "prompt" or "question" and "answer".

    Raises:
        InputError: the source cannot be read, has fewer than `n`, or a row has no prompt or no number in its answer.
    """
    prompts = read_prompts(source)
    if n is not None and len(prompts) < n:
        raise InputError(f"{option} {source}: has {len(prompts)} problems, fewer than the {n} asked for")
    records = [prompt.record for prompt in prompts[:n]]
    for where, fields in records:
        if final_answer(str(fields.get("answer", ""))) is None:
            raise InputError(f'{where}: no "answer" with a number to grade by; give one, as in GSM8K: "... #### 72"')
    return tuple(Problem(json.dumps(fields, ensure_ascii=False, default=str)) for _, fields in records)


@dataclass(frozen=True)
class Runtime:
    """Where the teacher and the bundle lie, and how llama.cpp runs them."""

    model: str
    bundle: Path
    n_parallel: int
    n_threads: int
    n_gpu_layers: int

    @property
    def argv(self) -> list[str]:
        return ["-t", str(self.n_threads), "-ngl", str(self.n_gpu_layers)]


@dataclass(frozen=True)
class Teaching(Stage):
    """Traces of the teacher by `adlocal traces`, protected where a bundle is named; traces.jsonl.

    Attributes:
        teacher: identity of the GGUF.
        problems: hash of the prompts.
        bundle: identity of the bundle, None for clean traces.
    """

    teacher: str
    problems: str
    temp: float
    n_predict: int
    n_ctx: int
    seed: int
    rows: tuple[Problem, ...] = field(repr=False, compare=False)
    runtime: Runtime = field(repr=False, compare=False)
    bundle: str | None = None
    strength: float = 0.0
    guard: float = 0.0

    def run(self, root: Path, out: Path) -> None:
        prompts = out / "prompts.jsonl"
        prompts.write_text("".join(f"{problem.row}\n" for problem in self.rows), encoding="utf-8")
        growing = root / f"{self.key}.jsonl"  # outside of `out`, which a run that stops takes with it
        r = self.runtime
        argv = ["traces", "-m", r.model, "--prompts", str(prompts), "-o", str(growing), "-n", str(self.n_predict)]
        argv += ["-c", str(self.n_ctx), "-s", str(self.seed), "--temp", str(self.temp), "-np", str(r.n_parallel)]
        if self.bundle is not None:
            argv += ["--bundle", str(r.bundle), "--strength", str(self.strength), "--guard", str(self.guard)]
        _adlocal([*argv, *r.argv])
        os.replace(growing, out / "traces.jsonl")

    def traces(self, root: Path) -> list[dict[str, Any]]:
        """The rows of traces.jsonl, each with whether it is "right" and its completion's "text"."""
        return [_graded(row.fields) for row in read_records(self.path(root) / "traces.jsonl")]


def _graded(row: dict[str, Any]) -> dict[str, Any]:
    said = row["completion"]
    text = said if isinstance(said, str) else said[-1]["content"]
    return {**row, "text": text, "right": Problem(json.dumps(row)).is_right(text)}


@dataclass(frozen=True)
class Dose(Stage):
    """What `adlocal score` says of traces; dose.json."""

    teaching: Teaching
    bundle: str
    runtime: Runtime = field(repr=False, compare=False)

    def run(self, root: Path, out: Path) -> None:
        traces = self.teaching.path(root) / "traces.jsonl"
        with contextlib.redirect_stdout(io.StringIO()) as said:
            argv = ["score", str(traces), "--bundle", str(self.runtime.bundle), "--json"]
            _adlocal([*argv, "-c", str(self.teaching.n_ctx), *self.runtime.argv])
        scored = json.loads(said.getvalue())
        (out / "dose.json").write_text(json.dumps({k: scored[k] for k in ("n_tokens", "dose", "dose_per_token")}))


@dataclass(frozen=True)
class Tuned(Stage):
    """A student fine-tuned on traces: a LoRA adapter, and losses.json.

    Attributes:
        student: its identity.
        only_right: leave out traces that end in a wrong answer.
    """

    student: str
    teaching: Teaching
    tuning: Tuning
    only_right: bool
    model: Student = field(repr=False, compare=False)

    def run(self, root: Path, out: Path) -> None:
        rows = [row for row in self.teaching.traces(root) if not is_empty(row)]
        kept = [row for row in rows if row["right"] or not self.only_right]
        if not kept:
            reason = "are right; leave out --only-right" if rows else "have text; is the teacher a model for chats?"
            raise AdlocalError(f"none of the teacher's {len(self.teaching.rows)} traces {reason}")
        traces = [Lesson(_prompt_of(row), row["text"], row["finish_reason"] != "length") for row in kept]
        losses = self.model.tune(traces, self.tuning, out)
        (out / "losses.json").write_text(json.dumps({"n_examples": len(traces), "losses": losses}))


@dataclass(frozen=True)
class Grade(Stage):
    """A student's greedy answers to test problems; answers.jsonl.

    Attributes:
        student: its identity.
        tuned: its fine-tuning, None for the base.
        problems: hash of the test problems.
    """

    student: str
    problems: str
    n_predict: int
    rows: tuple[Problem, ...] = field(repr=False, compare=False)
    model: Student = field(repr=False, compare=False)
    tuned: Tuned | None = None

    def run(self, root: Path, out: Path) -> None:
        adapter = self.tuned.path(root) if self.tuned else None
        texts = self.model.answer([problem.prompt for problem in self.rows], adapter, self.n_predict)
        lines = [
            json.dumps({**json.loads(problem.row), "text": text, "right": problem.is_right(text)}, ensure_ascii=False)
            for problem, text in zip(self.rows, texts, strict=True)
        ]
        (out / "answers.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def right(self, root: Path) -> list[bool]:
        """Whether each answer is right."""
        return [row.fields["right"] for row in read_records(self.path(root) / "answers.jsonl")]


@dataclass(frozen=True)
class Plan:
    """All stages of a run, by "clean" and "protected", the grades by "base" too."""

    teachings: dict[str, Teaching]
    doses: dict[str, Dose]
    grades: dict[str, Grade]

    def execute(self, root: Path) -> None:
        """Runs, one after the other, the stages that are not there yet."""
        root.mkdir(parents=True, exist_ok=True)
        for stray in root.glob(".*.partial"):  # of a run that was killed
            shutil.rmtree(stray)
        stages = ordered([*self.doses.values(), *self.grades.values()])
        labels = self._labels()
        for i, stage in enumerate(stages, 1):
            done = stage.is_done(root)
            print(f"{i} of {len(stages)}: {labels[stage]}{', there already' if done else ''}", file=sys.stderr)
            if not done:
                run(stage, root)

    def _labels(self) -> dict[Stage, str]:
        labels: dict[Stage, str] = {}
        for name, teaching in self.teachings.items():
            labels |= {teaching: f"{name} traces", self.doses[name]: f"dose of {name} traces"}
        for name, grade in self.grades.items():
            labels[grade] = f"answers of the {name} student"
            if grade.tuned:
                labels[grade.tuned] = f"fine-tuning on {name} traces"
        return labels

    def taught(self, root: Path) -> list[Taught]:
        """The teacher's traces, of a plan that was executed."""
        doses = {name: dose.read(root, "dose.json")["dose_per_token"] for name, dose in self.doses.items()}
        return [Taught(name, stage.traces(root), doses[name]) for name, stage in self.teachings.items()]

    def graded(self, root: Path) -> list[Graded]:
        """The students, of a plan that was executed."""
        return [_student(name, grade, root) for name, grade in self.grades.items()]


def _student(name: str, grade: Grade, root: Path) -> Graded:
    tuned = grade.tuned.read(root, "losses.json") if grade.tuned else {"n_examples": 0, "losses": []}
    return Graded(name, grade.right(root), **tuned)


def _adlocal(argv: Sequence[str]) -> None:
    """Runs a command of adlocal, which tells its own errors."""
    if status := cli.main(argv):
        raise SystemExit(status)
