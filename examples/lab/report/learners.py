"""Whom a defence protects against: students by what their bases can do before they see a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adlocal import plotting

from .intervals import Interval, over_seeds
from .plots import LOOKS
from .results import CHOSEN, CHOSEN_AT_RANDOM, CONSISTENT, CONSISTENT_AT_RANDOM, METHOD, OF_NUMBERS, Result
from .tables import interval, percent, table

ABLE = 2 / 3  # of unsaid steps right; set before any but the usual students were seen
# By label: what is compared at a cost of 10 points, and what is found to act at 2 or less.
_LOOKS = {
    "temperature, −10": LOOKS["temperature"],
    f"{METHOD}, −10": LOOKS[METHOD],
    "temperature, −2": ("#009e73", "d"),
    f"{OF_NUMBERS}, −2": ("#cc79a7", "P"),
    CHOSEN: LOOKS[CHOSEN],
    CHOSEN_AT_RANDOM: (plotting.GREY, "x"),
    CONSISTENT: ("#882255", "^"),
    CONSISTENT_AT_RANDOM: (plotting.GREY, "+"),
}
_FEWEST = 4


@dataclass(frozen=True)
class Learner:
    """A base, and the naive students that it became.

    Attributes:
        name: its seed, and what else is its own.
        unsaid: share of the steps without said operands that it got right before it saw a trace.
        clean: accuracy of its student of clean traces.
        lost: points of accuracy that its students of defended traces are under that, by label.
    """

    name: str
    unsaid: float
    clean: float
    lost: dict[str, float]

    @property
    def is_able(self) -> bool:
        return self.unsaid >= ABLE


def learners(results: Sequence[Result]) -> list[Learner]:
    """Those with clean traces and a defence, the least able first; none where there are few of them."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for r in results:
        if r.attack == "naive":
            groups.setdefault((r.variant, r.seed), []).append(r)
    found = []
    for (variant, seed), own in groups.items():
        students = {r.label: r.student for r in own}
        lost = {label: students["clean"] - students[label] for label in _LOOKS if {label, "clean"} <= students.keys()}
        if lost:
            name = f"seed {seed}, {variant}" if variant else f"seed {seed}"
            found.append(Learner(name, own[0].unsaid, students["clean"], lost))
    return sorted(found, key=lambda learner: learner.unsaid) if len(found) >= _FEWEST else []


def markdown(results: Sequence[Result]) -> str:
    """A row for every base, and what the two kinds of base lose."""
    found = learners(results)
    if not found:
        return ""
    text = (
        "How often a base gets a step's result right where the operands are not said (steps of + and −, which it "
        "knows), and the points of accuracy that a defence takes from its student, against one of clean traces."
    )
    defences = [name for name in _LOOKS if any(name in b.lost for b in found)]
    head = ["base", "unsaid steps right", "clean", *defences]
    rows = [[b.name, percent(b.unsaid), percent(b.clean), *(_lost(b, name) for name in defences)] for b in found]
    kinds = {"under": [b for b in found if not b.is_able], "at least": [b for b in found if b.is_able]}
    summary = [
        [f"{kind} two thirds", str(len(own)), *(interval(_mean(own, name)) for name in defences)]
        for kind, own in kinds.items()
    ]
    means = table(["unsaid steps right", "bases", *defences], summary)
    return f"## Whom it protects against\n\n{text}\n\n{table(head, rows)}\n\n{means}\n\n![by base](learners.png)"


def draw(results: Sequence[Result], path: Path) -> None:
    """What a base can do across, what its students lose up."""
    found = learners(results)
    fig, (axes,) = plotting.figure(1, 9.0, 5.0)
    axes.grid(axis="both", color=plotting.GREY, alpha=0.2)
    axes.axhline(0, color=plotting.GREY, linewidth=1)
    for name, (colour, marker) in _LOOKS.items():
        points = [(100 * b.unsaid, 100 * b.lost[name]) for b in found if name in b.lost]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, label=name, alpha=0.8)
    axes.set_xlabel("steps without said operands that the base gets right before fine-tuning, %")
    axes.set_ylabel("student under clean traces, points")
    fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    plotting.save(fig, path)


def _lost(learner: Learner, defence: str) -> str:
    return percent(learner.lost[defence]) if defence in learner.lost else "–"


def _mean(found: Sequence[Learner], defence: str) -> Interval | None:
    """Over bases; those of one seed share a teacher, so this is narrower than over teachers."""
    values = [b.lost[defence] for b in found if defence in b.lost]
    return over_seeds(values) if len(values) > 1 else None
