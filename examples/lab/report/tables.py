"""Tables of the reports, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .intervals import Interval
from .results import Comparison


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with no line end after its last row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def percent(value: float) -> str:
    """A share, with a decimal."""
    return f"{100 * value:.1f}"


def interval(found: Interval | None) -> str:
    """An interval of a share, in percent; a dash for none."""
    return f"{percent(found.value)} [{percent(found.low)}, {percent(found.high)}]" if found else "–"


def verdict(found: Interval) -> str:
    """What an interval of a difference in the students' accuracy says of ours."""
    if not found.excludes_zero:
        return "not told apart"
    return "worse" if found.value < 0 else "better"


def by_seed(found: Comparison) -> str:
    """The difference of every seed, in points."""
    return ", ".join(f"{100 * d:+.1f}" for d in found.by_seed.values())
