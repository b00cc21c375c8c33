"""The report, from stored results alone: tables in Markdown, and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adlocal import plotting
from adlocal.files import written_whole

from . import claims, learners, plots
from .results import METHOD, Result, accuracy, choices, comparisons, costs, difference, given, mean, of, read, spent
from .tables import by_seed, interval, percent, table, verdict

_BUDGETS = (0.02, 0.05, 0.10)  # of teacher accuracy
_OVER = 0.01  # let pass: what the search for a strength leaves
_SHOWN = 3  # prompts side by side


def write(source: Path, out: Path) -> None:
    """Writes report.md and its pictures into `out`.

    Args:
        source: JSON lines of results; traces are looked for beside it.
        out: a directory, made if need be.

    Raises:
        InputError: `source` is missing, empty or broken.
        AdlocalError: matplotlib is not installed, or a file cannot be written.
    """
    plotting.require("the report")
    results = read(source)
    usual = _usual(results)
    out.mkdir(parents=True, exist_ok=True)
    plots.tradeoff(usual, out / "tradeoff.png")
    plots.defences(usual, out / "defences.png")
    plots.losses(usual, out / "losses.png")
    if learners.learners(results):
        learners.draw(results, out / "learners.png")
    if _attacked(usual):
        plots.attackers(usual, out / "attackers.png")
    with written_whole(out / "report.md") as partial:
        partial.write_text(markdown(results, source.parent), encoding="utf-8")


def markdown(results: Sequence[Result], root: Path) -> str:
    """The whole text."""
    usual = _usual(results)
    parts = (_defences, _decisive, claims.markdown, _choices, _attackers)
    sections = [_setting(usual), *(part(usual) for part in parts), _seeds(usual)]
    for variant in dict.fromkeys(r.variant for r in results if r.variant != usual[0].variant):
        own = [r for r in results if r.variant == variant]
        sections += [part(own, f", {variant}") for part in parts]
    sections += [
        learners.markdown(results),
        _best(usual),
        _proxies(usual),
        _side_by_side(usual, root),
        _pictures(usual),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _usual(results: Sequence[Result]) -> list[Result]:
    """What is in the laboratory's usual setting; of a plan that has nothing there, in its first one."""
    variants = {r.variant for r in results}
    return [r for r in results if r.variant == ("" if "" in variants else results[0].variant)]


def _setting(results: Sequence[Result]) -> str:
    seeds = sorted({r.seed for r in results})
    clean, base = (given(results, name) for name in ("clean", "base"))
    covers = (
        "Intervals are 95%, by Student's t over seeds, each with models, data and students of its own; what has one "
        "seed only has an interval for the draw of the test problems."
        if len(seeds) > 1
        else "One seed: intervals are 95% and cover the draw of the test problems, not that of models and data."
    )
    return (
        f"# Laboratory, {', '.join(filter(None, (results[0].scale, results[0].variant)))}\n\n"
        f"Seeds {', '.join(map(str, seeds))}; {results[0].teacher_n} traces a defence, "
        f"{len(results[0].right)} test problems. The teacher without protection is right in {percent(clean)}% of its "
        f"sampled traces, the student before fine-tuning in {percent(base)}% of the test problems. {covers}"
    )


def _defences(results: Sequence[Result], variant: str = "") -> str:
    naive = _naive(results)
    rows = []
    for cost in sorted({r.cost for r in naive}, key=lambda c: -1.0 if c is None else c):
        for defence in dict.fromkeys(r.defence for r in naive if r.cost == cost):
            rows.append(_defence_row(results, of(naive, defence, cost)))
    if not rows:
        return ""
    head = ["asked cost", "defence", "knob", "teacher", "student", "less than clean", "less than temperature"]
    head += ["steps told by their result alone", "seeds"]
    off = "" if all(r.is_matched for r in naive) else f"{_OFF}\n\n"
    return f"## Defences, naive student{variant}\n\n{off}{table(head, rows)}"


def _defence_row(results: Sequence[Result], own: Sequence[Result]) -> list[str]:
    first = own[0]
    clean = None if first.defence == "clean" else difference(of(results, "clean", None), own)
    is_temperature = first.defence == "temperature" or first.cost is None
    temperature = None if is_temperature else difference(of(results, "temperature", first.cost), own)
    return [
        "–" if first.cost is None else f"{100 * first.cost:.0f}",
        first.defence,
        _knob(own),
        _teacher(own),
        interval(accuracy(own)),
        interval(clean),
        interval(temperature),
        _share([r.hidden for r in own]),
        str(len(own)),
    ]


def _teacher(own: Sequence[Result]) -> str:
    values = [100 * r.teacher for r in own]
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}{'' if all(r.is_matched for r in own) else ' (off)'}"


def _share(values: Sequence[float]) -> str:
    low, high = f"{100 * min(values):.0f}", f"{100 * max(values):.0f}"
    return f"{low}%" if low == high else f"{low} to {high}%"


def _knob(own: Sequence[Result]) -> str:
    guard = f", guard {own[0].guard:g}" if own[0].guard else ""
    name = "strength" if own[0].strength and own[0].defence != "temperature" else "temperature"
    values = [r.temperature if name == "temperature" else r.strength for r in own]
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return f"{name} {low}{'' if low == high else f' to {high}'}{guard}"


_OFF = "(off): a teacher that is more than 2 points from the accuracy that was asked for."


def _decisive(results: Sequence[Result], variant: str = "") -> str:
    """The method against its controls, at the same teacher accuracy."""
    found = [(cost, c) for cost in costs(results) for c in comparisons(results, cost)]
    if not found:
        return ""
    rows = [
        [
            f"{100 * cost:.0f}",
            c.control,
            interval(c.interval),
            verdict(c.interval) + ("" if c.is_matched else " (off)"),
            str(len(c.by_seed)),
        ]
        for cost, c in found
    ]
    text = (
        "Student accuracy under guarded antidistillation less that under the control, a naive student. The best of the "
        "random directions is the one whose students are worst over all seeds, picked after the fact: it is a hard "
        "comparison, the mean of all a fair one. The mean's interval covers the draw of the directions."
    )
    text += "" if all(c.is_matched for _, c in found) else f" {_OFF}"
    head = ["cost", "less", "difference", "the student is", "seeds"]
    return f"## What decides{variant}\n\n{text}\n\n{table(head, rows)}"


def _choices(results: Sequence[Result], variant: str = "") -> str:
    rows = [[c.control, interval(c.interval), verdict(c.interval), by_seed(c)] for c in choices(results)]
    if not rows:
        return ""
    text = (
        "Student accuracy, naive, where of several of the teacher's own traces of a problem the one with the highest "
        "dose is kept, less that under the control. Δ is of the loss on numbers at a proxy that was trained on clean "
        "traces. There is nothing to match: no token's odds are changed."
    )
    head = ["less", "difference", "the student is", "by seed"]
    return f"## Choosing among the teacher's own traces{variant}\n\n{text}\n\n{table(head, rows)}"


def _seeds(results: Sequence[Result]) -> str:
    """Seeds that do not go with the mean."""
    lines = []
    for cost in costs(results):
        for c in comparisons(results, cost):
            against = [f"seed {seed} ({100 * d:+.1f})" for seed, d in c.by_seed.items() if d >= 0]
            if len(c.by_seed) > 1 and against:
                lines.append(f"- At cost {100 * cost:.0f}, against {c.control}: {', '.join(against)}.")
    if not lines:
        return ""
    return "## Seeds where the method's student is not the worse one\n\n" + "\n".join(lines)


def _attackers(results: Sequence[Result], variant: str = "") -> str:
    attacked = _attacked(results)
    if not attacked:
        return ""
    groups = dict.fromkeys((r.attack, r.defence, r.cost) for r in attacked)
    rows = [_attack_row(results, of(results, defence, cost, attack)) for attack, defence, cost in groups]
    text = (
        "Taken back: of what the defence takes from a naive student, the share that the attacker has again; – where "
        "that loss itself is not told apart from 0. Undone: the student is not told apart from one of clean traces."
    )
    tried = {r.label: r for r in attacked if r.defence == METHOD and of(results, "clean", None)}
    told = [f"- {label}: {_undone(results, [r])}" for label, r in tried.items()]
    head = ["attacker", "traces", "student", "more than naive", "taken back", "less than clean"]
    return "\n\n".join([f"## Attackers{variant}", text, table(head, rows), *(["\n".join(told)] if told else [])])


def _attack_row(results: Sequence[Result], own: Sequence[Result]) -> list[str]:
    naive, clean = of(results, own[0].defence, own[0].cost), of(results, "clean", None)
    more, less, lost = difference(own, naive), difference(clean, own), difference(clean, naive)
    is_protected = more and lost and lost.low > 0
    back = f"{100 * more.value / lost.value:.0f}%" if more and lost and is_protected else "–"
    return [own[0].attack, own[0].label, interval(accuracy(own)), interval(more), back, interval(less)]


def _best(results: Sequence[Result]) -> str:
    """The lowest student among defences whose teacher really kept what it was to keep."""
    groups: dict[str, list[Result]] = {}
    for r in _naive(results):
        if r.defence != "clean":
            groups.setdefault(r.label, []).append(r)
    n_seeds = max(map(len, groups.values()), default=0)
    lines = []
    for most in _BUDGETS:
        fit = [own for own in groups.values() if len(own) == n_seeds and spent(own) <= most + _OVER]
        if fit:
            lines.append(
                f"- At most {100 * most:.0f} points of teacher accuracy: {_praise(results, min(fit, key=mean))}"
            )
    if not lines:
        return ""
    text = f"Picked after the fact, for a naive student; up to {100 * _OVER:.0f} point over is let pass."
    return f"## The best found\n\n{text}\n\n" + "\n".join(lines)


def _praise(results: Sequence[Result], own: Sequence[Result]) -> str:
    """What a defence gives, and who undoes it."""
    clean = of(results, "clean", None)
    less = difference(clean, own)
    text = f"**{own[0].label}** (spent {100 * spent(own):.1f}), student {interval(accuracy(own))}"
    if less is None:
        return f"{text}."
    text += f", {interval(less)} points under clean"
    if less.low <= 0:
        return f"{text}: not told apart from no protection."
    return f"{text}. {_undone(results, own)}"


def _undone(results: Sequence[Result], own: Sequence[Result]) -> str:
    """Which attackers a defence gives nothing against."""
    clean, (defence, cost) = of(results, "clean", None), (own[0].defence, own[0].cost)
    attacks = dict.fromkeys(r.attack for r in _attacked(results) if (r.defence, r.cost) == (defence, cost))
    under = {attack: difference(clean, of(results, defence, cost, attack)) for attack in attacks}
    undone = [attack for attack, found in under.items() if found and found.low <= 0]
    if not under:
        return "No attacker was tried on it."
    if not undone:
        return f"None of the {len(under)} attackers tried undoes it."
    return f"Undone by {len(undone)} of the {len(under)} attackers tried: {'; '.join(undone)}."


def _proxies(results: Sequence[Result]) -> str:
    rows = [
        [r.defence, str(r.seed), f"{r.cosine['median']:.4f}", f"{r.cosine['p10']:.4f}", percent(r.student)]
        for r in results
        if r.cosine
    ]
    if not rows:
        return ""
    text = (
        "Cosine of Δ through llama.cpp with the directional derivative of the unquantized proxy in float64, a position."
    )
    head = ["proxy", "seed", "median", "10th percentile", "student"]
    return f"## Δ against float64\n\n{text}\n\n{table(head, rows)}"


def _side_by_side(results: Sequence[Result], root: Path) -> str:
    """What the first seed's defences make of the same prompts, at the highest cost."""
    top = max(costs(results), default=None)
    wanted = [("clean", None), ("temperature", top), (METHOD, top)]
    found = [own for name, cost in wanted if (own := of(results, name, cost)) and (root / own[0].traces).exists()]
    if len(found) < 2:
        return ""
    rows = {own[0].label: (root / own[0].traces).read_text(encoding="utf-8").splitlines()[:_SHOWN] for own in found}
    blocks = []
    for lines in zip(*rows.values(), strict=False):
        traces = dict(zip(rows, map(json.loads, lines), strict=True))
        told = [
            f"- {label}{'' if t['right'] else ' (wrong)'}: {t['completion'].strip()}" for label, t in traces.items()
        ]
        blocks.append(f"**{next(iter(traces.values()))['prompt'].strip()}**\n\n" + "\n".join(told))
    return "## The same prompts\n\n" + "\n\n".join(blocks)


def _pictures(results: Sequence[Result]) -> str:
    names = {
        "tradeoff": "what the teacher pays, and what the student is left with",
        "defences": "every defence",
        "losses": "loss of the students",
    }
    if _attacked(results):
        names["attackers"] = "what attackers get back"
    return "## Pictures\n\n" + "\n\n".join(f"![{text}]({name}.png)" for name, text in names.items())


def _naive(results: Sequence[Result]) -> list[Result]:
    return [r for r in results if r.attack == "naive"]


def _attacked(results: Sequence[Result]) -> list[Result]:
    return [r for r in results if r.attack != "naive"]
