"""The models of one seed: teacher, the attacker's base, and proxies, each with weights and data of its own."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.pretrained import LARGER, PROXY, SMALLER, STUDENT, TEACHER, FreelyWorded, Pretrained, Size
from ..traces.sampled import N_TRACES, TracesStage


@dataclass(frozen=True)
class World:
    """Everything is redrawn with another seed, but for the test problems.

    Attributes:
        seed: of everything.
        easy: share of the problems with + and − alone that a base and the proxies learned from; at 1 they have never
            seen a doubling or a tripling.
        n_steps: of a base or a proxy; a teacher takes more.
        n_traces: that an attacker collects.
        student: size of the base.
        student_steps: that the base was trained for, if not `n_steps`.
        number: which of several bases of this seed; all else is the same.
        freely: whether solutions have twice as many phrasings.
    """

    seed: int
    easy: float = 1.0
    n_steps: int = 2000
    n_traces: int = N_TRACES
    student: Size = STUDENT
    student_steps: int | None = None
    number: int = 0
    freely: bool = False

    @property
    def teacher(self) -> Pretrained:
        return self._trained(TEACHER, "teacher", easy=0.0, n_steps=self.n_steps * 13 // 10, least=0.97)

    @property
    def base(self) -> Pretrained:
        name = f"student {self.number}" if self.number else "student"
        return self._trained(self.student, name, self.easy, self.student_steps or self.n_steps)

    @property
    def proxy(self) -> Pretrained:
        return self._trained(PROXY, "proxy", self.easy, self.n_steps)

    @property
    def smaller(self) -> Pretrained:
        return self._trained(SMALLER, "smaller", self.easy, self.n_steps)

    @property
    def larger(self) -> Pretrained:
        return self._trained(LARGER, "larger", self.easy, self.n_steps)

    @property
    def clean(self) -> TracesStage:
        return TracesStage(self.teacher, f"{self.seed} prompts", n=self.n_traces)

    @property
    def holdout(self) -> TracesStage:
        return TracesStage(self.teacher, f"{self.seed} holdout", n=self.n_traces // 5)

    def _trained(self, size: Size, name: str, easy: float, n_steps: int, least: float = 0.0) -> Pretrained:
        kind = FreelyWorded if self.freely else Pretrained
        return kind(size, f"{self.seed} {name}", easy, n_steps, least)
