"""Traces of a teacher under a defence, at a strength that costs the teacher a given share of its right answers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from adlocal.engine.sequences import Request
from adlocal.traces import final_answer

from ..models.pretrained import N_PREDICT, Pretrained
from ..stages import Stage
from ..task import word_problems
from ..task.vocabulary import BOS, encode
from .bundles import BundleStage
from .defences import Defended, Kind, Setting

Row = dict[str, Any]
Point = tuple[float, float]  # strength or temperature, and teacher accuracy

N_TRACES = 2000
LARGEST: dict[Kind, float] = {**dict.fromkeys(get_args(Kind), 64.0), "plain": 4.0, "experts": 1.0}
_SEARCHED = 400  # traces at each point of the bisection; the first of those that are kept
_CLOSE = 0.008  # in teacher accuracy; half a standard error of the search
_FAR = 0.01  # from the target, over all traces: worth sampling them once more
_MOST_POINTS = 7
_ASIDE = 1.5  # times the strength, for a second point


@dataclass(frozen=True)
class TracesStage(Stage):
    """Sampled solutions of training problems.

    Attributes:
        teacher: whose text it is.
        prompts: seed of the problems.
        kind, strength, guard, temperature: see `Setting`; where `cost` is given, strength (temperature, of a plain
            teacher) is where the search starts.
        bundle: what the defence follows.
        cost: by how much the teacher's accuracy is to fall under that of `clean`, or None to take the setting as it is.
        clean: the plain teacher's traces, where `cost` is given.
        like: traces whose setting is taken over, whatever strength and temperature say here.
        others: bundles that are followed at the same time, each with an equal part of the strength.
        n: problems.
        k: samples of each.
    """

    teacher: Pretrained
    prompts: str
    kind: Kind = "plain"
    strength: float = 0.0
    guard: float = 0.0
    temperature: float = 0.5
    bundle: BundleStage | None = None
    cost: float | None = None
    clean: TracesStage | None = None
    like: TracesStage | None = None
    others: tuple[BundleStage, ...] = ()
    n: int = N_TRACES
    k: int = 1

    @property
    def seconds(self) -> float:
        return self.n * self.k * (0.01 if self.bundle else 0.005) + (25 if self.cost is not None else 0)

    @property
    def candidates(self) -> int:
        """Completions that each trace is chosen among."""
        return 1

    @property
    def answer(self) -> Callable[[str], Hashable] | None:
        """By what these have to agree, if they have to."""
        return None

    def _setting(self, root: Path) -> Setting:
        found = self.like.read(root, "summary.json") if self.like else dataclasses.asdict(self)
        return Setting(**{field.name: found[field.name] for field in dataclasses.fields(Setting)})

    def run(self, root: Path, out: Path) -> None:
        bundle = self.bundle.path(root) / "bundle" if self.bundle else None
        others = [other.path(root) / "bundle" for other in self.others]
        asked = [p for p in word_problems.distinct(self.prompts, "train", self.n) for _ in range(self.k)]
        teacher = self.teacher.path(root) / "model.gguf"
        with closing(Defended(teacher, bundle, others, self.candidates, self.answer)) as llm:
            setting, search = self._setting(root), list[Point]()
            if self.cost is not None and self.clean is not None:
                target = self.clean.read(root, "summary.json")["accuracy"] - self.cost
                setting, rows, search = _matched(llm, setting, asked, target)
            else:
                rows = sample(llm, setting, asked)
        with open(out / "traces.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        found = {**summary(rows), **dataclasses.asdict(setting), "search": search}
        (out / "summary.json").write_text(json.dumps(found))


@dataclass(frozen=True)
class Chosen(TracesStage):
    """Of several sampled solutions of each problem the one with the highest dose.

    Attributes:
        best_of: how many.
        consistent: whether only those count that have the most frequent answer.
    """

    best_of: int = 8
    consistent: bool = False

    @property
    def candidates(self) -> int:
        return self.best_of

    @property
    def answer(self) -> Callable[[str], Hashable] | None:
        return final_answer if self.consistent else None

    @property
    def seconds(self) -> float:
        return super().seconds * self.best_of


def _matched(
    llm: Defended, setting: Setting, asked: Sequence[word_problems.Problem], target: float
) -> tuple[Setting, list[Row], list[Point]]:
    """Traces at the strength, or temperature, at which the teacher's accuracy is `target`, and what was tried."""

    def at(value: float) -> Setting:
        if setting.kind == "plain":
            return dataclasses.replace(setting, temperature=value)
        return dataclasses.replace(setting, strength=value)

    tried: dict[float, list[Row]] = {}

    def accuracy(value: float) -> float:
        tried[value] = sample(llm, at(value), asked[:_SEARCHED])
        return float(summary(tried[value])["accuracy"])

    def every(value: float) -> list[Row]:
        first = tried.get(value, [])
        return first + sample(llm, at(value), asked[len(first) :], len(first))

    start = setting.temperature if setting.kind == "plain" else setting.strength
    value, search = bisect(accuracy, target, start, LARGEST[setting.kind])
    rows = every(value)
    off = summary(rows)["accuracy"] - target
    if abs(off) > _FAR and len(search) == 1:  # it hit at once: a line needs a second point, on the side to go to
        aside = min(LARGEST[setting.kind], value * _ASIDE) if off > 0 else value / _ASIDE
        search.append((aside, accuracy(aside)))
    again = corrected(value, search, off, LARGEST[setting.kind]) if abs(off) > _FAR else None
    if again is not None and again != value:  # at the largest strength there is nowhere to go
        other = every(again)
        if abs(summary(other)["accuracy"] - target) < abs(off):
            return at(again), other, search
    return at(value), rows, search


def sample(llm: Defended, setting: Setting, asked: Sequence[word_problems.Problem], seed: int = 0) -> list[Row]:
    """A row for each problem: prompt, completion, whether it is right, whether it ended.

    The first problem is sampled with `seed`, each other with the next one.
    """
    sampling = llm.set(setting)
    requests = [Request(i, [BOS, *encode(p.prompt)], N_PREDICT, seed=seed + i) for i, p in enumerate(asked)]
    rows: list[Row] = [{}] * len(asked)
    for done in llm.generate(requests, sampling):
        problem, text = asked[done.index], llm.text(done.tokens)
        rows[done.index] = {
            "prompt": problem.prompt,
            "completion": text,
            "right": word_problems.is_right(problem, text),
            "answer": problem.answer,
            "finish_reason": done.finish_reason,
        }
    return rows


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What all rows say together."""
    n = len(rows)
    return {
        "n": n,
        "accuracy": sum(row["right"] for row in rows) / n,
        "ended": sum(row["finish_reason"] == "stop" for row in rows) / n,
        "words": sum(len(row["completion"].split()) for row in rows) / n,
    }


def bisect(
    accuracy: Callable[[float], float], target: float, start: float, largest: float
) -> tuple[float, list[Point]]:
    """Where a falling function comes closest to `target`: first a bracket by doubling from `start`, then bisection.

    Returns:
        The value that came closest, and (value, accuracy) of all that were tried. Where even `largest` stays above the
        target, the closest is as near as it gets.
    """
    tried: list[Point] = []
    low, high, value = 0.0, None, start
    while len(tried) < _MOST_POINTS:
        tried.append((value, accuracy(value)))
        if abs(tried[-1][1] - target) <= _CLOSE:
            break
        if tried[-1][1] > target:
            low = value
            if value >= largest:
                break
        else:
            high = value
        value = min(largest, 2 * value) if high is None else (low * high) ** 0.5 if low else high / 2
    return min(tried, key=lambda point: abs(point[1] - target))[0], tried


def corrected(value: float, search: Sequence[Point], off: float, largest: float = math.inf) -> float | None:
    """A value whose accuracy is lower by `off`, by a line in log(value) through what was tried nearby.

    None where too little was tried, or what was tried does not fall.
    """
    near = [(math.log(v), a) for v, a in search if v > 0 and 0.4 < v / value < 2.5]
    if len(near) < 2:
        return None
    logs, accuracies = np.array(near).T
    slope = float(np.polyfit(logs, accuracies, 1)[0])
    return min(largest, value * math.exp(min(0.5, max(-0.5, -off / slope)))) if slope < 0 else None


def read(stage: Stage, root: Path) -> list[Row]:
    """The rows of a stage that wrote traces.jsonl."""
    return [json.loads(line) for line in (stage.path(root) / "traces.jsonl").read_text().splitlines()]
