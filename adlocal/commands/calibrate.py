"""`adlocal calibrate`: the strength and guard that spend a budget, measured on protected text, kept in the bundle."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..adjust import check_guard
from ..bundle.calibration import CALIBRATION_NAME, CALIBRATION_VERSION, Calibration, teacher_identity
from ..calibrate import plot as calibration_plot
from ..calibrate.curve import Curve, Point
from ..calibrate.search import (
    ACCURACY_DROP,
    GUARDS,
    KL,
    UNPROTECTED,
    Measurement,
    ProtectedWriter,
    accuracy_drop,
    choose_guard,
    spend_accuracy,
    spend_kl,
)
from ..errors import InputError
from ..settings import DEFAULT_GUARD
from ..statistics import paired_error
from ..traces import Prompt, check_answers, join_answers, read_prompts
from ..traces.records import digest
from .teacher import open_protected

_STRENGTHS = (0.0, *(2.0 ** (i / 2) for i in range(-6, 13)))
_TEMPERATURES = {KL: 0.8, ACCURACY_DROP: 0.0}


@dataclass(frozen=True)
class Budget:
    """What may be spent: "kl", in nats a token, or "accuracy-drop", in percentage points."""

    unit: str
    value: float


def run(args: argparse.Namespace) -> None:
    """Prints a table, or with --json one object, once the calibration lies in the bundle."""
    budget = _budget(args)
    if args.guard is not None:
        check_guard(args.guard)
    if args.plot is not None:
        calibration_plot.check(args.plot)
    prompts = _prompts(args, budget.unit)
    with closing(open_protected(args, UNPROTECTED, full=True)) as llm:
        writer = ProtectedWriter(
            llm,
            prompts,
            n_predict=args.n_predict,
            temperature=_TEMPERATURES[budget.unit] if args.temp is None else args.temp,
            seed=args.seed,
            raw=args.raw,
        )
        for note in writer.notes:
            print(f"adlocal calibrate: prompts: {note}", file=sys.stderr)
        calibration, guards = calibrate(writer, budget, args.guard, args.model, _digest(args.prompts, prompts))
    calibration.write(args.bundle)
    if args.plot is not None:
        calibration_plot.draw(calibration, args.plot)
    if args.json:
        print(json.dumps({**asdict(calibration), "guards": [{"guard": g, **asdict(p)} for g, p in guards]}))
        return
    print(table(calibration, guards))
    print(f"{calibration.summary()}; written to {args.bundle / CALIBRATION_NAME}")
    _warn(calibration)


def _budget(args: argparse.Namespace) -> Budget:
    unit, value, words = (
        (KL, args.kl, "nats a token") if args.kl is not None else (ACCURACY_DROP, args.accuracy_drop, "points")
    )
    if not (math.isfinite(value) and value > 0) or (unit == ACCURACY_DROP and value >= 100):
        raise InputError(
            f"--{unit} {value:g}: give a positive number of {words}, for example {'0.1' if unit == KL else '5'}"
        )
    return Budget(unit, value)


def _prompts(args: argparse.Namespace, unit: str) -> list[Prompt]:
    prompts = read_prompts(args.prompts)
    check_answers(prompts)
    if args.answers is not None:
        prompts = join_answers(prompts, args.answers)
    missing = next((prompt for prompt in prompts if prompt.answer is None), None)
    if unit == ACCURACY_DROP and missing is not None:
        raise InputError(
            f'{missing.where}: --accuracy-drop needs an "answer" in each line; give them here, or by --answers'
        )
    return prompts


def _digest(source: Path, prompts: Sequence[Prompt]) -> str:
    return digest(source, (json.dumps(prompt.record.fields, sort_keys=True, default=str) for prompt in prompts))


def calibrate(
    writer: ProtectedWriter, budget: Budget, guard: float | None, teacher: str, prompts_sha256: str
) -> tuple[Calibration, list[tuple[float, Point]]]:
    """Measures until the budget is spent.

    Args:
        writer: what writes the text.
        budget: how much may be spent.
        guard: None takes, for KL, the one of GUARDS with the largest dose for it, and else the default.
        teacher: its file, for the record.
        prompts_sha256: of the prompts, for the record.

    Returns:
        The calibration, and how the guards compare where they were compared.

    Raises:
        ConversionError: the budget cannot be reached.
    """
    curve, plain = writer.plain(min(GUARDS) if guard is None else guard)
    guards: list[tuple[float, Point]] = []
    if guard is None and budget.unit == KL:
        guard, guards = choose_guard(curve, budget.value)
    guard = DEFAULT_GUARD if guard is None else guard
    if budget.unit == KL:
        measured, chosen = spend_kl(writer, curve, budget.value, guard)
    else:
        measured, chosen = spend_accuracy(writer, plain, budget.value, guard)
    values = {
        "bundle_id": writer.llm.pair.bundle.id,
        "guard": guard,
        "teacher": teacher_identity(teacher),
        "prompts_sha256": prompts_sha256,
        "n_prompts": len(writer.prompts),
        "temperature": writer.temperature,
        **_spent(budget, plain, chosen),
        **_measured([plain, *measured]),
        **_along_plain_text(curve, guard),
    }
    return Calibration(version=CALIBRATION_VERSION, converter=f"adlocal {__version__}", **values), guards


def _spent(budget: Budget, plain: Measurement, chosen: Measurement) -> dict[str, Any]:
    """The fields of `Calibration` that tell of the budget and what was spent of it."""
    is_kl = budget.unit == KL
    return {
        "strength": chosen.strength,
        "budget_kind": budget.unit,
        "budget": budget.value,
        "reached": chosen.kl if is_kl else accuracy_drop(plain, chosen),
        "standard_error": chosen.kl_error if is_kl else 100 * paired_error(plain.right or (), chosen.right or ()),
        "n_tokens": chosen.n_tokens,
    }


def _measured(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """The fields of `Calibration` that tell of the protected text, by strength."""
    ordered = sorted(measurements, key=lambda measurement: measurement.strength)
    return {
        "measured_strength": [m.strength for m in ordered],
        "measured_kl": [m.kl for m in ordered],
        "measured_dose": [m.dose for m in ordered],
        "measured_accuracy": [m.accuracy for m in ordered if m.accuracy is not None],
    }


def _along_plain_text(curve: Curve, guard: float) -> dict[str, Any]:
    """The fields of `Calibration` that tell what each strength would do along the plain teacher's text."""
    points = [curve.at(strength, guard) for strength in _STRENGTHS]
    return {
        "curve_strength": [point.strength for point in points],
        "curve_kl": [point.kl for point in points],
        "curve_dose": [point.dose for point in points],
    }


def table(calibration: Calibration, guards: Sequence[tuple[float, Point]] = ()) -> str:
    """Guards, the curve along the plain text, and the rounds of protected text; `*` marks what was chosen."""
    c = calibration
    lines = []
    if guards:
        lines += ["along the plain teacher's text, the budget at each guard:", "   guard  strength  dose a token"]
        lines += [f"{_mark(g == c.guard)}{g:6g}  {p.strength:8.3f}  {p.dose:+12.4f}" for g, p in guards]
    lines += [f"along the plain teacher's text, at guard {c.guard:g}:", "  strength  KL, nats a token  dose a token"]
    curve = list(zip(c.curve_strength, c.curve_kl, c.curve_dose, strict=True))
    lines += [f"  {s:8.3f}  {kl:16.4f}  {dose:+12.4f}" for s, kl, dose in (curve[0], *curve[1::2])]
    accuracies = [f"  {a:8.1%}" for a in c.measured_accuracy] or [""] * len(c.measured_kl)
    lines += [f"protected text, at guard {c.guard:g} and temperature {c.temperature:g}:"]
    lines += ["  strength  KL, nats a token  dose a token" + ("  accuracy" if c.measured_accuracy else "")]
    rows = zip(c.measured_strength, c.measured_kl, c.measured_dose, accuracies, strict=True)
    lines += [f"{_mark(s == c.strength)}{s:8.3f}  {kl:16.4f}  {dose:+12.4f}{end}" for s, kl, dose, end in rows]
    return "\n".join(lines)


def _mark(is_chosen: bool) -> str:
    return "* " if is_chosen else "  "


def _warn(calibration: Calibration) -> None:
    """Says what limits the figure, on stderr."""
    c = calibration
    if c.budget_kind == KL and abs(c.reached - c.budget) > 0.05 * c.budget:
        print(
            "the nearest of 8 rounds is not within 5% of the budget; more prompts or tokens smooth it", file=sys.stderr
        )
    if c.budget_kind == ACCURACY_DROP and c.standard_error > c.budget:
        print("the standard error exceeds the budget: give more prompts before relying on it", file=sys.stderr)
