"""Word problems of two to four steps and worked solutions in many phrasings. The answer is a solution's last number.

Train and test problems are disjoint by construction: a hash of the arithmetic alone decides which side a problem is on,
so that no other name or thing carries a test problem into training.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
Kind = Literal["+", "-", "*2", "*3"]

LARGEST = 40
KINDS: tuple[Kind, ...] = ("+", "-", "*2", "*3")
_TEST_SHARE = 10  # one arithmetic in so many is for tests
_CHECKED = 0.1  # share of steps that are checked
_REMARKED = 0.5  # share of steps with a remark before them, where wording is free

NAMES = ("tom", "ann", "bob", "eve", "sam", "liz", "max", "zoe")
THINGS = ("cups", "pens", "eggs", "nuts", "hats", "keys", "figs", "toys")

_ASKED: dict[Kind, tuple[str, ...]] = {
    "+": ("gets {a} more", "finds {a}"),
    "-": ("loses {a}", "sells {a}"),
    "*2": ("doubles them",),
    "*3": ("triples them",),
}
# b: before the step, a: its operand, c: after it.
_WORKED: dict[Kind, tuple[str, ...]] = {
    "+": (
        "{b} plus {a} is {c}",
        "{b} and {a} make {c}",
        "adding {a} to {b} gives {c}",
        "now {c} , from {b} plus {a}",
        "{a} more leads to {c}",
        "that leads to {c}",
    ),
    "-": (
        "{b} minus {a} is {c}",
        "{b} without {a} make {c}",
        "taking {a} from {b} leaves {c}",
        "now {c} , from {b} minus {a}",
        "{a} less leads to {c}",
        "that leads to {c}",
    ),
    "*2": (
        "{b} times 2 is {c}",
        "{b} and {b} make {c}",
        "doubling {b} gives {c}",
        "now {c} , from {b} plus {b}",
        "twice that leads to {c}",
        "that leads to {c}",
    ),
    "*3": (
        "{b} times 3 is {c}",
        "{b} and {b} and {b} make {c}",
        "tripling {b} gives {c}",
        "now {c} , from {b} plus {b} plus {b}",
        "thrice that leads to {c}",
        "that leads to {c}",
    ),
}
# Where wording is free: as many phrasings again, of the same words, and a remark before every other step.
_FREELY: dict[Kind, tuple[str, ...]] = {
    "+": (
        "{c} is {b} plus {a}",
        "{a} and {b} make {c}",
        "{b} with {a} more is {c}",
        "with {a} more , {c}",
        "from {b} to {c} by {a} more",
        "adding {a} leads to {c}",
    ),
    "-": (
        "{c} is {b} minus {a}",
        "{b} minus {a} leaves {c}",
        "{b} with {a} less is {c}",
        "with {a} less , {c}",
        "from {b} to {c} by {a} less",
        "taking {a} leads to {c}",
    ),
    "*2": (
        "{c} is {b} times 2",
        "{b} plus {b} is {c}",
        "twice {b} is {c}",
        "with twice that , {c}",
        "from {b} to {c} by doubling",
        "doubling leads to {c}",
    ),
    "*3": (
        "{c} is {b} times 3",
        "{b} plus {b} plus {b} is {c}",
        "thrice {b} is {c}",
        "with thrice that , {c}",
        "from {b} to {c} by tripling",
        "tripling leads to {c}",
    ),
}
_REMARKS = ("well ,", "yes ,", "next", "now")
_HIDDEN = re.compile(r"(?<!twice )(?<!thrice )that leads to")
_OPENERS = ("", "let us see .", "well ,", "step by step :", "we start with {v} {things} .", "{name} has {v} .")
_LINKS = (".", ", then", "; next", ". so")
_CHECKS = ("check : {c}", "yes , {c}")
_CLOSERS = ("the answer is {v}", "so {name} has {v}", "answer : {v}", "that is {v} {things}", "{name} ends with {v}")


@dataclass(frozen=True)
class Step:
    """One operation; the operand of a doubling is 2."""

    kind: Kind
    operand: int

    def apply(self, value: int) -> int:
        if self.kind == "+":
            return value + self.operand
        return value - self.operand if self.kind == "-" else value * self.operand


@dataclass(frozen=True)
class Problem:
    """A start value and the steps from it; name and thing are decoration."""

    name: str
    things: str
    start: int
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def values(self) -> list[int]:
        """The value before the first step and after each."""
        values = [self.start]
        for step in self.steps:
            values.append(step.apply(values[-1]))
        return values

    @property
    def prompt(self) -> str:
        rng = random.Random(f"prompt {self}")
        asked = [rng.choice(_ASKED[s.kind]).format(a=s.operand) for s in self.steps]
        return _text(f"{self.name} has {self.start} {self.things} . {' . '.join(asked)} . how many ?")

    @property
    def split(self) -> Split:
        arithmetic = repr((self.start, [(s.kind, s.operand) for s in self.steps]))
        return "train" if hashlib.sha256(arithmetic.encode()).digest()[0] % _TEST_SHARE else "test"

    def solution(self, rng: random.Random, *, freely: bool = False) -> str:
        """A right solution in phrasings that `rng` picks, `freely` from twice as many."""
        fields = {"name": self.name, "things": self.things}
        parts = [rng.choice(_OPENERS).format(v=self.start, **fields)]
        for i, (step, before, after) in enumerate(zip(self.steps, self.values, self.values[1:], strict=False)):
            if i:
                parts.append(rng.choice(_LINKS))
            if freely and rng.random() < _REMARKED:
                parts.append(rng.choice(_REMARKS))
            phrasings = _WORKED[step.kind] + (_FREELY[step.kind] if freely else ())
            parts.append(rng.choice(phrasings).format(b=before, a=step.operand, c=after))
            if rng.random() < _CHECKED:
                parts.append(". " + rng.choice(_CHECKS).format(c=after))
        parts.append(". " + rng.choice(_CLOSERS).format(v=self.answer, **fields))
        return _text(" ".join(part for part in parts if part))


def problems(seed: str, split: Split, kinds: Sequence[Kind] = KINDS) -> Iterator[Problem]:
    """Endless problems of one side of the split with steps of the given kinds, each arithmetic as often as it falls."""
    rng = random.Random(seed)
    while True:
        problem = _problem(rng, kinds)
        if problem.split == split:
            yield problem


def distinct(seed: str, split: Split, n: int) -> list[Problem]:
    """`n` problems with different arithmetic."""
    seen: dict[tuple[int, tuple[Step, ...]], Problem] = {}
    for problem in problems(seed, split):
        seen.setdefault((problem.start, problem.steps), problem)
        if len(seen) == n:
            break
    return list(seen.values())


def answer_of(text: str) -> int | None:
    """The last number in a solution; None if there is none."""
    return next((int(word) for word in reversed(text.split()) if word.isdigit()), None)


def is_right(problem: Problem, completion: str) -> bool:
    """Whether a completion ends in the problem's answer."""
    return answer_of(completion) == problem.answer


def n_steps(prompt: str) -> int:
    """How many steps a problem asks for."""
    return prompt.count(" . ") - 1


def n_hidden(completion: str) -> int:
    """How many steps a solution tells by their result alone, saying neither operand nor operation."""
    return len(_HIDDEN.findall(completion))


def words() -> list[str]:
    """Every word that prompts and solutions are made of, numbers first. Free wording has no others."""
    templates = [*_OPENERS, *_LINKS, *_CHECKS, *_CLOSERS, "{name} has {v} {things} . how many ?"]
    templates += [t for table in (_ASKED, _WORKED) for options in table.values() for t in options]
    plain = {word for template in templates for word in template.split() if "{" not in word}
    numbers = [str(n) for n in range(LARGEST + 1)]
    return [*numbers, *sorted({*plain, *NAMES, *THINGS} - {*numbers})]


def _problem(rng: random.Random, kinds: Sequence[Kind]) -> Problem:
    start = value = rng.randint(2, 20)
    steps: list[Step] = []
    for _ in range(rng.randint(2, 4)):
        step = _step(rng, value, kinds)
        value = step.apply(value)
        steps.append(step)
    return Problem(rng.choice(NAMES), rng.choice(THINGS), start, tuple(steps))


def _step(rng: random.Random, value: int, kinds: Sequence[Kind]) -> Step:
    """A step that stays within 1 and LARGEST, all kinds alike."""
    most = {"+": LARGEST - value, "-": value - 1, "*2": LARGEST // 2 - value, "*3": LARGEST // 3 - value}
    kind = rng.choice([kind for kind in kinds if most[kind] > 0])
    if kind in ("*2", "*3"):
        return Step(kind, int(kind[1]))
    return Step(kind, rng.randint(1, min(9, most[kind])))


def _text(sentence: str) -> str:
    """As the tokenizer has it: every word begins with a space."""
    return " " + " ".join(sentence.split())
