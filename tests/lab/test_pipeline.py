"""The whole laboratory on models too small to learn anything: training, GGUF, bundle, traces, students, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adlocal.errors import InputError
from examples.lab import __main__ as lab
from examples.lab import stages
from examples.lab.models import pretrained as models
from examples.lab.report import document as report
from examples.lab.report import results
from examples.lab.run import collected, plan, students
from examples.lab.run.entries import GUARD
from examples.lab.run.world import World
from examples.lab.traces import sampled as traces
from support.json_lines import write_lines

WANTED = {"clean", "guard alone", "temperature", "permuted, guarded", "random 1, guarded", "antidistillation, guarded"}
CHOICES = {"best of 8", "best of 8, random 1"}
CONSISTENT = {"best of 8, consistent", "best of 8, consistent, random 1"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("TEACHER", "STUDENT", "PROXY"):
        monkeypatch.setattr(f"examples.lab.run.world.{name}", models.Size(32, 1))
    monkeypatch.setattr(models, "_N_GRADED", 8)
    monkeypatch.setattr(models, "_MORE", 1)
    monkeypatch.setattr(students, "_N_TEST", 12)
    monkeypatch.setattr(traces, "_MOST_POINTS", 2)
    return World(0, n_steps=10, n_traces=40)


def test_from_nothing_to_the_report(small: World, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path / "stages"
    entries = [entry for entry in plan._compared(small) if entry.defence in WANTED]
    entries += [entry for entry in plan._chosen(small) if entry.attack == "naive"]
    agreed = [*plan._agreed(small), *plan._agreed_controls(small)]
    entries += [replace(e, variant="") for e in agreed if e.defence in CONSISTENT and e.attack == "naive"]
    for stage in stages.ordered(stage for entry in entries for stage in entry.stages):
        assert not stage.is_done(root)
        stages.run(stage, root)
    torch.set_num_threads(before)
    rows = [{"scale": "quick", **row} for row in collected.results(entries, root)]
    assert {row["defence"] for row in rows} == WANTED | CHOICES | CONSISTENT
    assert all(row["n_examples"] == 40 and row["n_test"] == 12 for row in rows)
    (method,) = [row for row in rows if row["defence"] == "antidistillation, guarded"]
    assert method["guard"] == GUARD
    assert 0.5 < method["fidelity"] <= 1, "a model that has learned nothing has a gradient of little but rounding"
    assert method["cosine"]["n"] > 0
    assert len(method["search"]) == 2
    source = tmp_path / "quick.jsonl"
    write_lines(source, *rows)
    report.write(source, tmp_path / "quick")
    text = (tmp_path / "quick" / "report.md").read_text()
    assert "| antidistillation, guarded |" in text
    assert "## Choosing among the teacher's own traces" in text
    assert "## The same prompts" in text


def test_results_are_of_what_is_done(small: World, tmp_path: Path) -> None:
    assert collected.results(list(plan._compared(small)), tmp_path) == []


def test_a_plan_names_each_student_once() -> None:
    for make in (plan.quick, plan.full, plan.students, plan.confirm, plan.consistent, plan.hypotheses):
        entries = make()
        names = [(e.world.seed, e.variant, e.defence, e.attack, e.cost) for e in entries]
        assert len(set(names)) == len(names)
    assert {e.student.key for e in plan.quick()} <= {e.student.key for e in plan.full()}, "full goes on where quick was"


def test_a_report_without_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lab", "report", "full", "--out", str(tmp_path)])
    assert lab.main() == 1
    assert "full.jsonl: No such file or directory; run the laboratory first" in capsys.readouterr().err
    with pytest.raises(InputError):
        results.read(tmp_path / "full.jsonl")
