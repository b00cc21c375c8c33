"""`adlocal status`: what the programs under `adlocal run` are doing, from their control files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from ..errors import InputError
from ..plugin import Control, Counters, InForce, control_directory, controls

_CLEAR = "\033[H\033[J"
_TITLES = ("pid", "program", "sequence", "strength", "guard", "rows", "with a choice", "KL/row", "dose/token", "closed")
Line = tuple[str, ...]


def run(args: argparse.Namespace) -> None:
    """Prints what there is, once or until it is interrupted."""
    directory = control_directory(args.control)
    while True:
        found = _chosen(controls(directory), args.pid)
        if args.watch and not args.json and sys.stdout.isatty():
            print(_CLEAR, end="")
        print(json.dumps([as_json(each) for each in found]) if args.json else describe(found), flush=True)
        if not args.watch:
            return
        time.sleep(args.watch)


def _chosen(found: list[Control], pids: list[int]) -> list[Control]:
    missing = set(pids) - {each.pid for each in found}
    if missing:
        raise InputError(f"{min(missing)}: no program under adlocal run has this number; see adlocal status")
    return [each for each in found if not pids or each.pid in pids]


def as_json(control: Control) -> dict[str, Any]:
    """Everything that the file says, sums over the sequences and each of them."""
    return {
        "pid": control.pid,
        "program": control.program,
        "bundle": str(control.bundle),
        "started": control.started,
        "control": str(control.path),
        "floor": asdict(control.floor),
        "decodes": asdict(control.decodes()),
        "total": asdict(control.counters()),
        "sequences": {
            str(seq_id): {"in_force": asdict(control.in_force(seq_id)), **asdict(control.counters(seq_id))}
            for seq_id in control.begun()
        },
    }


def describe(found: list[Control]) -> str:
    """A table: a line for each program, and one for each of its sequences."""
    if not found:
        return "no program runs under adlocal run"
    lines: list[Line] = [_TITLES]
    for control in found:
        lines.append((str(control.pid), control.program, "all", *_figures(control.floor, control.counters())))
        for seq_id in control.begun():
            lines.append(("", "", str(seq_id), *_figures(control.in_force(seq_id), control.counters(seq_id))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def _figures(given: InForce, counters: Counters) -> Line:
    strength = f"{given.strength:g}" if given.mode == "protect" else given.mode
    return (
        strength,
        f"{given.guard:g}",
        f"{counters.n_rows:,}",
        _per(counters.n_choices, counters.n_rows, ".1%"),
        _per(counters.kl, counters.n_rows, ".4f"),
        _per(counters.dose, counters.n_dosed, "+.4f"),
        f"{counters.n_closed:,}",
    )


def _per(total: float, n: int, style: str) -> str:
    return format(total / n, style) if n else "-"
