"""The report on real models: JSON lines with every setting, Markdown and two pictures, from what the stages left."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adlocal import plotting
from adlocal.files import written_whole

from ..report.intervals import paired, wilson
from ..report.tables import table

_COLOURS = {"base": plotting.GREY, "clean": plotting.BLUE, "protected": plotting.ORANGE}
_EXCERPT = 600  # characters of an example
_CAVEAT = (
    "One teacher, one student, one seed. The intervals of accuracy (Wilson, 95%) cover the draw of the problems alone: "
    "other traces, other seeds and other models would move the figures too. A student that was not trained long enough "
    "shows nothing, protected or not: look at the base and at the loss first."
)


@dataclass(frozen=True)
class Taught:
    """The teacher's traces: "clean" or "protected"."""

    name: str
    rows: Sequence[dict[str, Any]]
    dose: float


@dataclass(frozen=True)
class Graded:
    """A student: "base", or by the name of the traces that it was fine-tuned on."""

    name: str
    right: Sequence[bool]
    n_examples: int
    losses: Sequence[float]


def results(taught: Sequence[Taught], graded: Sequence[Graded], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One object for each kind of traces and each student, each with all settings."""
    teachers = [
        {
            "kind": "teacher",
            "name": t.name,
            **_accuracy([row["right"] for row in t.rows]),
            "n_cut": sum(row["finish_reason"] == "length" for row in t.rows),
            "tokens_a_trace": sum(row["n_tokens"] for row in t.rows) / len(t.rows),
            "dose_per_token": t.dose,
        }
        for t in taught
    ]
    students = [
        {"kind": "student", "name": g.name, **_accuracy(g.right), "n_examples": g.n_examples, "losses": list(g.losses)}
        for g in graded
    ]
    return [{**row, "settings": settings} for row in [*teachers, *students]]


def write(found: Sequence[dict[str, Any]], taught: Sequence[Taught], out: Path) -> str:
    """Writes results.jsonl, report.md, losses.png and accuracies.png, and returns the report's text."""
    text = markdown(found, taught)
    with written_whole(out / "results.jsonl") as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    with written_whole(out / "report.md") as partial:
        partial.write_text(text, encoding="utf-8")
    students = [row for row in found if row["kind"] == "student"]
    _draw_losses([row for row in students if row["losses"]], out / "losses.png")
    _draw_accuracies([row for row in found if row["kind"] == "teacher"], students, out / "accuracies.png")
    return text


def markdown(found: Sequence[dict[str, Any]], taught: Sequence[Taught]) -> str:
    """The report, from `results` and the traces that its example is taken from."""
    settings = found[0]["settings"]
    teachers = [row for row in found if row["kind"] == "teacher"]
    students = {row["name"]: row for row in found if row["kind"] == "student"}
    parts = [
        f"# What {settings['student']} learns from {Path(settings['model']).name}",
        f"Strength {settings['strength']:g} nats at guard {settings['guard']:g}, temperature {settings['temp']:g}. "
        f"{_CAVEAT}",
        "## The teacher's traces",
        table(
            ["traces", "right", "95%", "n", "cut", "tokens a trace", "dose a token"],
            [_teacher_cells(row) for row in teachers],
        ),
        "## Students",
        table(
            ["student", "right", "95%", "n", "trained on", "steps", "first loss", "last loss"],
            [_student_cells(row) for row in students.values()],
        ),
        "Losses are in nats a token, over the first and the last tenth of the steps. " + _verdict(students),
        "![Accuracy](accuracies.png)",
        "![Loss of the students](losses.png)",
        "## One prompt, answered by the teacher",
        *_example(taught),
        "## Settings",
        table(["setting", "value"], [[name, f"`{value}`"] for name, value in settings.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy(right: Sequence[bool]) -> dict[str, Any]:
    at = wilson(right)
    return {"accuracy": at.value, "low": at.low, "high": at.high, "n": len(right), "right": list(right)}


def _teacher_cells(row: dict[str, Any]) -> list[str]:
    cut = f"{row['n_cut'] / row['n']:.0%}"
    return [row["name"], *_accuracy_cells(row), cut, f"{row['tokens_a_trace']:.0f}", f"{row['dose_per_token']:+.4f}"]


def _student_cells(row: dict[str, Any]) -> list[str]:
    losses = row["losses"]
    n = math.ceil(len(losses) / 10)
    ends = [f"{sum(part) / n:.3f}" for part in (losses[:n], losses[-n:])] if losses else ["", ""]
    steps = [str(row["n_examples"]), str(len(losses))] if losses else ["", ""]
    return [row["name"], *_accuracy_cells(row), *steps, *ends]


def _accuracy_cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['accuracy']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}", str(row["n"])]


def _verdict(students: dict[str, dict[str, Any]]) -> str:
    found = paired(students["protected"]["right"], students["clean"]["right"])
    mean, low, high = found.value, found.low, found.high
    verdict = "lower" if high < 0 else "higher" if low > 0 else "not told apart"
    return (
        f"The student of protected traces less that of clean ones, on the same problems: {100 * mean:+.1f} points "
        f"({100 * low:+.1f} to {100 * high:+.1f}): {verdict}."
    )


def _example(taught: Sequence[Taught]) -> list[str]:
    return [f"{t.name}:\n\n{_quoted(t.rows[0]['text'])}" for t in taught]


def _quoted(text: str) -> str:
    shown = text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]} …"
    return "\n".join(f"    {line}" for line in shown.strip().splitlines())


def _draw_losses(students: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    fig, (axes,) = plotting.figure(1, width=7.0, height=3.6)
    for row in students:
        colour, label = _COLOURS[row["name"]], f"on {row['name']} traces"
        losses = row["losses"]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _smoothed(losses), color=colour, linewidth=1.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    plotting.save(fig, path)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Centred means over a twentieth of the steps; less at the ends."""
    half = len(losses) // 40
    windows = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]


def _draw_accuracies(teachers: Sequence[dict[str, Any]], students: Sequence[dict[str, Any]], path: Path) -> None:
    fig, (axes,) = plotting.figure(1, width=7.0, height=3.6)
    bars = [(f"teacher,\n{row['name']} traces", row) for row in teachers]
    bars += [(f"student,\n{row['name']}", row) for row in students]
    for i, (_, row) in enumerate(bars):
        error = [[100 * (row["accuracy"] - row["low"])], [100 * (row["high"] - row["accuracy"])]]
        axes.bar(i, 100 * row["accuracy"], 0.6, color=_COLOURS[row["name"]], alpha=0.85)
        axes.errorbar(i, 100 * row["accuracy"], error, color="black", capsize=4, linewidth=1)
        axes.annotate(
            f"{100 * row['accuracy']:.1f}", (i, 100 * row["high"]), (0, 4), textcoords="offset points", ha="center"
        )
    axes.set_xticks(range(len(bars)), [label for label, _ in bars])
    axes.set_ylim(0, min(112, 100 * max(row["high"] for _, row in bars) + 8))
    axes.set_ylabel("right answers, %")
    plotting.save(fig, path)
