"""Entries of a plan: one student each, and what its traces are made by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..models.probe import Probe
from ..report.results import N_BEST
from ..stages import Stage
from ..traces.bundles import BundleStage, Numbers
from ..traces.defences import Kind
from ..traces.exact import Exact
from ..traces.sampled import Chosen, TracesStage
from .students import Attack, Student
from .world import World

GUARD = 0.05
COST = 0.10
ATTACKS: tuple[tuple[str, Attack, float], ...] = (
    ("right answers", "right answers", 0.0),
    ("perplexity", "perplexity", 0.0),
    ("answer only", "answer only", 0.0),
    ("10% clean", "naive", 0.10),
    ("25% clean", "naive", 0.25),
    ("50% clean", "naive", 0.50),
    ("reweighted, 10% clean", "reweighted", 0.10),
    ("majority of 3", "majority", 0.0),
)


@dataclass(frozen=True)
class Entry:
    """One student, and what it is called in the report.

    Attributes:
        world: whose models and data it is of.
        defence: what the traces were made with.
        attack: what the attacker did with them.
        student: the stage.
        cost: teacher accuracy that the defence was to give up, or None.
        exact: where Δ of the proxies is compared with float64, or None.
        variant: what is otherwise than in the laboratory's usual setting; the report has a table for each.
    """

    world: World
    defence: str
    attack: str
    student: Student
    cost: float | None = None
    exact: Exact | None = None
    variant: str = ""

    @property
    def stages(self) -> list[Stage]:
        """What has to be done for it."""
        return [self.student, self.probe, *([self.exact] if self.exact else [])]

    @property
    def probe(self) -> Probe:
        """What its base can do before it sees a trace."""
        return Probe(self.world.base)


def clean(world: World) -> Entry:
    """A student of the plain teacher."""
    return Entry(world, "clean", "naive", Student(world.base, (world.clean,)))


def matched(
    world: World,
    kind: Kind,
    bundle: BundleStage | None = None,
    guard: float = 0.0,
    cost: float = COST,
    strength: float | None = None,
) -> TracesStage:
    """Traces of a defence at the strength, or temperature, that costs the teacher `cost` of its accuracy."""
    start = strength or (2.0 if guard else 0.5)
    temperature = 0.8 if kind == "plain" else 0.5
    plain = world.clean
    return TracesStage(
        world.teacher, plain.prompts, kind, start, guard, temperature, bundle, cost, plain, n=world.n_traces
    )


def naive(world: World, defence: str, traces: TracesStage, cost: float | None = COST) -> Entry:
    """A student who takes the traces as they are."""
    return Entry(world, defence, "naive", Student(world.base, (traces,)), cost)


def attacked(
    world: World, defence: str, traces: TracesStage, attacks: Sequence[tuple[str, Attack, float]]
) -> Iterator[Entry]:
    """Students of attackers who do something with them."""
    for name, attack, share in attacks:
        added = world.clean if share else None
        again = dataclasses.replace(traces, cost=None, clean=None, like=traces, k=3)
        student = Student(world.base, (again if attack == "majority" else traces,), attack, added, share)
        yield Entry(world, defence, name, student, traces.cost)


def trained(world: World) -> Student:
    """The proxy, trained on clean traces as a student would be."""
    return Student(world.proxy, (own_traces(world),), n_epochs=4)


def own_traces(world: World) -> TracesStage:
    """Clean traces of whoever prepares a bundle."""
    return TracesStage(world.teacher, f"{world.seed} own", n=world.n_traces)


def best_of(world: World, name: str, at_random: str, *, consistent: bool = False) -> dict[str, TracesStage]:
    """Whole traces chosen by Δ of the loss on numbers at a trained proxy, and by a random direction there."""
    proxy = trained(world)
    directions = {name: Numbers(proxy, world.holdout), at_random: BundleStage(proxy, world.holdout, random=0)}
    asked, n = world.clean.prompts, world.n_traces
    return {
        key: Chosen(world.teacher, asked, "bundle", bundle=bundle, n=n, best_of=N_BEST, consistent=consistent)
        for key, bundle in directions.items()
    }
