"""Rows of results, from what the stages of entries have written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adlocal import Bundle as Metadata

from ..task import word_problems
from ..traces.sampled import TracesStage, read
from .entries import Entry


def results(entries: Sequence[Entry], root: Path) -> list[dict[str, Any]]:
    """A row of results for every entry whose student is done; what `report` reads."""
    return [_row(entry, root) for entry in entries if entry.student.is_done(root) and entry.probe.is_done(root)]


def _row(entry: Entry, root: Path) -> dict[str, Any]:
    world, student = entry.world, entry.student
    graded, clean = student.read(root, "result.json"), world.clean.read(root, "summary.json")
    traces = student.traces[-1] if student.traces else world.clean
    summary = traces.read(root, "summary.json")
    bundle, exact = traces.bundle, entry.exact
    return {
        "seed": world.seed,
        "defence": entry.defence,
        "attack": entry.attack,
        "variant": entry.variant,
        "cost": entry.cost,
        "teacher": summary["accuracy"],
        "teacher_n": summary["n"],
        "clean": clean["accuracy"],
        "base": world.base.read(root, "accuracy.json")["accuracy"],
        "unsaid": entry.probe.read(root, "probe.json")["unsaid"],
        "student": graded["accuracy"],
        "n_test": graded["n"],
        "right": graded["right"],
        "hidden": _hidden(traces, root),
        **{name: summary[name] for name in ("strength", "guard", "temperature", "search", "words", "ended")},
        "n_examples": graded["n_examples"],
        "n_steps": graded["n_steps"],
        "losses": student.read(root, "losses.json"),
        "cosine": exact.read(root, "exact.json") if exact and exact.is_done(root) else None,
        "fidelity": Metadata.open(bundle.path(root) / "bundle").fidelity_median if bundle else None,
        "traces": f"stages/{traces.key}/traces.jsonl",
        "key": student.key,
        "settings": repr(student),
    }


def _hidden(traces: TracesStage, root: Path) -> float:
    """The share of steps that the traces tell by their result alone."""
    rows = read(traces, root)
    n = sum(word_problems.n_steps(row["prompt"]) for row in rows)
    return sum(word_problems.n_hidden(row["completion"]) for row in rows) / n
