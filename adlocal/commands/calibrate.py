"""`adlocal calibrate`: the strength and guard that spend a budget, measured on protected text, kept in the bundle."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

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
    Round,
    Work,
    accuracy_drop,
    choose_guard,
    spend_accuracy,
    spend_kl,
)
from ..errors import InputError
from ..settings import DEFAULT_GUARD
from ..traces import Prompt, check_answers, join_answers, read_prompts
from ..traces.records import digest
from .teacher import open_protected

_STRENGTHS = (0.0, *(2.0 ** (i / 2) for i in range(-6, 13)))
_TEMPERATURES = {KL: 0.8, ACCURACY_DROP: 0.0}


def run(args: argparse.Namespace) -> None:
    """Prints a table, or with --json one object, once the calibration lies in the bundle."""
    kind, budget = _budget(args)
    if args.guard is not None:
        check_guard(args.guard)
    if args.plot is not None:
        calibration_plot.check(args.plot)
    prompts = _prompts(args, kind)
    with closing(open_protected(argparse.Namespace(**{**vars(args), **UNPROTECTED}))) as llm:
        work = Work(
            llm,
            prompts,
            n_predict=args.n_predict,
            temperature=_TEMPERATURES[kind] if args.temp is None else args.temp,
            seed=args.seed,
            raw=args.raw,
        )
        for note in work.notes:
            print(f"adlocal calibrate: prompts: {note}", file=sys.stderr)
        calibration, guards = calibrate(work, kind, budget, args.guard, args.model, _digest(args.prompts, prompts))
    calibration.write(args.bundle)
    if args.plot is not None:
        calibration_plot.draw(calibration, args.plot)
    if args.json:
        print(json.dumps({**asdict(calibration), "guards": [{"guard": g, **asdict(p)} for g, p in guards]}))
        return
    print(table(calibration, guards))
    print(f"{calibration.summary()}; written to {args.bundle / CALIBRATION_NAME}")
    _warn(calibration)


def _budget(args: argparse.Namespace) -> tuple[str, float]:
    kind, value, unit = (
        (KL, args.kl, "nats a token") if args.kl is not None else (ACCURACY_DROP, args.accuracy_drop, "points")
    )
    if not (math.isfinite(value) and value > 0) or (kind == ACCURACY_DROP and value >= 100):
        raise InputError(
            f"--{kind} {value:g}: give a positive number of {unit}, for example {'0.1' if kind == KL else '5'}"
        )
    return kind, value


def _prompts(args: argparse.Namespace, kind: str) -> list[Prompt]:
    prompts = read_prompts(args.prompts)
    check_answers(prompts)
    if args.answers is not None:
        prompts = join_answers(prompts, args.answers)
    missing = next((prompt for prompt in prompts if prompt.answer is None), None)
    if kind == ACCURACY_DROP and missing is not None:
        raise InputError(
            f'{missing.where}: --accuracy-drop needs an "answer" in each line; give them here, or by --answers'
        )
    return prompts


def _digest(source: Path, prompts: Sequence[Prompt]) -> str:
    return digest(source, (json.dumps(prompt.record.fields, sort_keys=True, default=str) for prompt in prompts))


def calibrate(
    work: Work, kind: str, budget: float, guard: float | None, teacher: str, prompts_sha256: str
) -> tuple[Calibration, list[tuple[float, Point]]]:
    """Measures until the budget is spent.

    Args:
        work: what writes the text.
        kind: "kl", in nats a token, or "accuracy-drop", in percentage points.
        budget: in that unit.
        guard: None takes, for KL, the one of GUARDS with the largest dose for it, and else the default.
        teacher: its file, for the record.
        prompts_sha256: of the prompts, for the record.

    Returns:
        The calibration, and how the guards compare where they were compared.

    Raises:
        ConversionError: the budget cannot be reached.
    """
    curve, plain = work.plain(min(GUARDS) if guard is None else guard)
    guards: list[tuple[float, Point]] = []
    if guard is None and kind == KL:
        guard, guards = choose_guard(curve, budget)
    guard = DEFAULT_GUARD if guard is None else guard
    spend = spend_kl(work, curve, budget, guard) if kind == KL else spend_accuracy(work, plain, budget, guard)
    return _record(work, kind, budget, guard, curve, [plain, *spend[0]], spend[1], teacher, prompts_sha256), guards


def _record(
    work: Work,
    kind: str,
    budget: float,
    guard: float,
    curve: Curve,
    rounds: Sequence[Round],
    chosen: Round,
    teacher: str,
    prompts_sha256: str,
) -> Calibration:
    plain, rounds = rounds[0], sorted(rounds, key=lambda r: r.strength)
    points = [curve.at(strength, guard) for strength in _STRENGTHS]
    n = len(work.prompts)
    return Calibration(
        version=CALIBRATION_VERSION,
        bundle_id=work.llm.pair.bundle.id,
        converter=f"adlocal {__version__}",
        strength=chosen.strength,
        guard=guard,
        budget_kind=kind,
        budget=budget,
        reached=chosen.kl if kind == KL else accuracy_drop(plain, chosen),
        standard_error=chosen.kl_error if kind == KL else _accuracy_error(plain, chosen, n),
        teacher=teacher_identity(teacher),
        prompts_sha256=prompts_sha256,
        n_prompts=n,
        n_tokens=chosen.n_tokens,
        temperature=work.temperature,
        measured_strength=[r.strength for r in rounds],
        measured_kl=[r.kl for r in rounds],
        measured_dose=[r.dose for r in rounds],
        measured_accuracy=[r.accuracy for r in rounds if r.accuracy is not None],
        curve_strength=[point.strength for point in points],
        curve_kl=[point.kl for point in points],
        curve_dose=[point.dose for point in points],
    )


def _accuracy_error(plain: Round, chosen: Round, n: int) -> float:
    """Standard error of a drop between two accuracies over n prompts each, in points, as if they were independent."""
    return 100 * math.sqrt(sum((r.accuracy or 0.0) * (1 - (r.accuracy or 0.0)) for r in (plain, chosen)) / n)


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
