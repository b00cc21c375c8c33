"""What the laboratory has stored, and the comparisons that it allows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from adlocal.errors import InputError

from .intervals import Interval, over_seeds, paired, paired_with_mean, wilson

METHOD = "antidistillation, guarded"
FRESH_SEEDS = (4, 5, 6, 7)  # that no choice was made on
N_BEST = 8  # traces to choose among
CHOSEN, CHOSEN_AT_RANDOM = f"best of {N_BEST}", f"best of {N_BEST}, random 1"
CONSISTENT, CONSISTENT_AT_RANDOM = f"{CHOSEN}, consistent", f"{CHOSEN}, consistent, random 1"
OF_NUMBERS = "antidistillation of numbers, guarded"
OF_NUMBERS_UNTRAINED = "antidistillation of numbers, untrained proxy, guarded"
OF_NUMBERS_PERMUTED, AT_RANDOM_THERE = "numbers permuted, guarded", "a random direction there, guarded"  # same proxy
RANDOMS = "random directions, guarded"
_MATCHED = 0.02  # teacher accuracy that a matched point may be off


@dataclass(frozen=True)
class Result:
    """One student: a line of the results; what `plan` stores."""

    seed: int
    scale: str
    defence: str
    attack: str
    variant: str
    cost: float | None
    teacher: float
    teacher_n: int
    clean: float
    base: float
    unsaid: float
    student: float
    right: list[bool]
    strength: float
    guard: float
    temperature: float
    words: float
    hidden: float
    n_examples: int
    losses: list[float]
    cosine: dict[str, float] | None
    fidelity: float | None
    traces: str

    @property
    def is_matched(self) -> bool:
        """Whether the teacher is within 2 points of what was asked for."""
        return self.cost is None or abs(self.clean - self.cost - self.teacher) <= _MATCHED + 1e-9

    @property
    def label(self) -> str:
        """Defence and, where one was asked for, its cost."""
        return self.defence if self.cost is None else f"{self.defence}, −{100 * self.cost:.0f}"

    @property
    def family(self) -> str:
        """The defence; the guarded random directions are one."""
        return RANDOMS if self.defence.startswith("random ") and self.defence.endswith(", guarded") else self.defence


@dataclass(frozen=True)
class Comparison:
    """The method's students less those under a control, at one cost.

    Attributes:
        control: what the others were taught under.
        by_seed: difference in accuracy, of every seed that has both.
        interval: of its mean.
        is_matched: whether all teachers were within 2 points of what was asked for.
    """

    control: str
    by_seed: dict[int, float]
    interval: Interval
    is_matched: bool


def read(path: Path) -> list[Result]:
    """Raises InputError: the file is missing, empty or broken."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run the laboratory first") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file, expected JSON lines; run the laboratory again") from None
    names = [field.name for field in fields(Result)]
    results = []
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            results.append(Result(**{name: row[name] for name in names}))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{i}: no result ({error!r}); run the laboratory again") from None
    if not results:
        raise InputError(f"{path}: no results; run the laboratory first")
    return results


def of(results: Sequence[Result], defence: str, cost: float | None, attack: str = "naive") -> list[Result]:
    """The students of one defence, cost and attack."""
    return [r for r in results if (r.defence, r.cost, r.attack) == (defence, cost, attack)]


def costs(results: Sequence[Result]) -> list[float]:
    """What was asked for, the largest first."""
    return sorted({r.cost for r in results if r.cost is not None}, reverse=True)


def mean(results: Sequence[Result]) -> float:
    """Accuracy of the students."""
    return float(np.mean([r.student for r in results]))


def given(results: Sequence[Result], name: str) -> float:
    """A figure that belongs to the seed, `clean` or `base`: the mean over seeds of what the first row of each says."""
    by_seed: dict[int, float] = {}
    for r in results:
        by_seed.setdefault(r.seed, getattr(r, name))
    return float(np.mean(list(by_seed.values())))


def spent(results: Sequence[Result]) -> float:
    """What the teacher's accuracy lost, on average."""
    return float(np.mean([r.clean - r.teacher for r in results]))


def accuracy(results: Sequence[Result]) -> Interval:
    """Of the students of one defence and attack: over seeds, or of the only one."""
    if len(results) > 1:
        found = over_seeds([r.student for r in results])
        return Interval(found.value, max(0.0, found.low), min(1.0, found.high))  # the t interval knows no bounds
    return wilson(results[0].right)


def difference(ours: Sequence[Result], theirs: Sequence[Result]) -> Interval | None:
    """Student accuracy of ours less theirs, seed by seed; None where no seed has both."""
    pairs = [(a, b) for a in ours for b in theirs if a.seed == b.seed]
    if not pairs:
        return None
    if len(pairs) == 1:
        return paired(pairs[0][0].right, pairs[0][1].right)
    return over_seeds([a.student - b.student for a, b in pairs])


def comparisons(results: Sequence[Result], cost: float) -> list[Comparison]:
    """The method with its controls, at one cost."""
    ours = of(results, METHOD, cost)
    controls = [
        ("temperature", of(results, "temperature", cost)),
        ("permuted, same guard", of(results, "permuted, guarded", cost)),
        ("antidistillation without guard", of(results, "antidistillation", cost)),
    ]
    randoms = _complete([r for r in results if r.family == RANDOMS and (r.cost, r.attack) == (cost, "naive")])
    if len(randoms) > 1:
        best = min(randoms, key=lambda name: mean(randoms[name]))
        controls.append(("random directions, same guard: their mean", [r for own in randoms.values() for r in own]))
        controls.append((f"random directions, same guard: the best of {len(randoms)} ({_short(best)})", randoms[best]))
    else:
        controls += [(f"{_short(name)}, same guard", own) for name, own in randoms.items()]
    found = (compared(name, ours, theirs) for name, theirs in controls)
    return [comparison for comparison in found if comparison]


def choices(results: Sequence[Result]) -> list[Comparison]:
    """What choosing among the teacher's own traces does, and what is left of it without the gradient."""
    ours = of(results, CHOSEN, None)
    controls = {
        "clean traces": of(results, "clean", None),
        "a random direction's choice": of(results, CHOSEN_AT_RANDOM, None),
    }
    found = (compared(name, ours, theirs) for name, theirs in controls.items())
    return [comparison for comparison in found if comparison]


def _complete(randoms: Sequence[Result]) -> dict[str, list[Result]]:
    """Students by direction, of the directions with as many seeds as any: others would not be comparable."""
    groups: dict[str, list[Result]] = {}
    for r in randoms:
        groups.setdefault(r.defence, []).append(r)
    most = max(map(len, groups.values()), default=0)
    return {name: own for name, own in sorted(groups.items()) if len(own) == most}


def compared(control: str, ours: Sequence[Result], theirs: Sequence[Result]) -> Comparison | None:
    """Our students less theirs, seed by seed, against the mean of all that a seed has of theirs; None without pairs."""
    pairs = [(a, group) for a in ours if (group := [b for b in theirs if b.seed == a.seed])]
    if not pairs:
        return None
    by_seed = {a.seed: a.student - mean(group) for a, group in sorted(pairs, key=lambda pair: pair[0].seed)}
    if len(pairs) > 1:
        interval = over_seeds(list(by_seed.values()))
    else:
        ((a, group),) = pairs
        interval = paired_with_mean(a.right, [b.right for b in group])
    is_matched = all(r.is_matched for a, group in pairs for r in (a, *group))
    return Comparison(control, by_seed, interval, is_matched)


def _short(defence: str) -> str:
    return defence.partition(",")[0]
