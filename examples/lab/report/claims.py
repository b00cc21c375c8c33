"""What acts at a small cost, against every control, and on the seeds that it was not found on."""

from __future__ import annotations

from collections.abc import Sequence

from .results import (
    AT_RANDOM_THERE,
    CHOSEN,
    CHOSEN_AT_RANDOM,
    CONSISTENT,
    CONSISTENT_AT_RANDOM,
    FRESH_SEEDS,
    OF_NUMBERS,
    OF_NUMBERS_PERMUTED,
    Comparison,
    Result,
    compared,
    of,
)
from .tables import by_seed, interval, table, verdict

_COST = 0.02
_ATTACKS = ("naive", "right answers")
_OURS = ((OF_NUMBERS, _COST), (CHOSEN, None), (CONSISTENT, None))
_CONTROLS = (
    ("temperature", _COST, (OF_NUMBERS, CHOSEN, CONSISTENT)),
    (OF_NUMBERS_PERMUTED, _COST, (OF_NUMBERS,)),
    (AT_RANDOM_THERE, _COST, (OF_NUMBERS,)),
    (CHOSEN_AT_RANDOM, None, (CHOSEN,)),
    (CHOSEN, None, (CONSISTENT,)),
    (CONSISTENT_AT_RANDOM, None, (CONSISTENT,)),
)


def markdown(results: Sequence[Result], variant: str = "") -> str:
    """A row for every control that ours was run beside; nothing where there is none on fresh seeds."""
    rows = [row for name, cost in _OURS for attack in _ATTACKS for row in _rows(results, name, cost, attack)]
    if not rows:
        return ""
    text = (
        f"Student accuracy less that under the control, both at {100 * _COST:.0f} points of teacher accuracy where a "
        f"cost can be set, and both students treating their traces alike. Seeds {_fresh()} were drawn after ours was "
        "found on the others. Clean traces are those of a naive student."
    )
    head = ["traces", "attacker", "less", "all seeds", f"seeds {_fresh()} alone", "all: the student is", "by seed"]
    return f"## What acts for 2 points or less{variant}\n\n{text}\n\n{table(head, rows)}"


def _rows(results: Sequence[Result], name: str, cost: float | None, attack: str) -> list[list[str]]:
    ours = of(results, name, cost, attack)
    controls = [("clean", of(results, "clean", None))]
    controls += [(control, of(results, control, at, attack)) for control, at, whose in _CONTROLS if name in whose]
    rows = []
    for control, theirs in controls:
        found, fresh = compared(control, ours, theirs), compared(control, _on_fresh(ours), theirs)
        if found and fresh:
            rows.append([name, attack, control, *_cells(found, fresh)])
    return rows


def _cells(found: Comparison, fresh: Comparison) -> list[str]:
    off = "" if found.is_matched else " (off)"
    return [interval(found.interval), interval(fresh.interval), verdict(found.interval) + off, by_seed(found)]


def _on_fresh(results: Sequence[Result]) -> list[Result]:
    return [r for r in results if r.seed in FRESH_SEEDS]


def _fresh() -> str:
    return f"{min(FRESH_SEEDS)} to {max(FRESH_SEEDS)}"
