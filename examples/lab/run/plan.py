"""What is run: defences at matched teacher accuracy, attackers, and the hypotheses of docs/evidence/hypotheses.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ..models.pretrained import LARGE_STUDENT
from ..report.results import (
    AT_RANDOM_THERE,
    CHOSEN,
    CHOSEN_AT_RANDOM,
    CONSISTENT,
    CONSISTENT_AT_RANDOM,
    FRESH_SEEDS,
    METHOD,
    OF_NUMBERS,
    OF_NUMBERS_PERMUTED,
    OF_NUMBERS_UNTRAINED,
)
from ..traces.bundles import BundleStage, Numbers
from ..traces.defences import Kind
from ..traces.exact import Exact
from ..traces.sampled import TracesStage
from .entries import ATTACKS, COST, GUARD, Entry, attacked, best_of, clean, matched, naive, own_traces, trained
from .students import Student
from .world import World

N_RANDOM = 5
QUICK_SEEDS, HYPOTHESES_SEEDS, FULL_SEEDS, CHOSEN_SEEDS = (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)


def quick() -> list[Entry]:
    """One seed: every control beside the method, at one cost, for a naive attacker."""
    return [entry for seed in QUICK_SEEDS for entry in _compared(World(seed))]


def full() -> list[Entry]:
    """Three seeds at one cost: more directions and proxies, without the guard too, and the attackers."""
    parts = (_compared, _attacked, _varied)
    return [entry for part in parts for seed in FULL_SEEDS for entry in part(World(seed))]


def students() -> list[Entry]:
    """Whom it protects against, and at what cost: lower ones, whole traces, and other bases, some of them less able."""
    parts = (_compared, _cheaper, _chosen, _of_numbers, _others)
    asked = [entry for part in parts for seed in FULL_SEEDS for entry in part(World(seed))]
    return asked + [entry for seed in CHOSEN_SEEDS for entry in _weaker(World(seed))]


def confirm() -> list[Entry]:
    """What acts at a small cost on less able bases, on the seeds it was found on and on as many that were not."""
    return [entry for seed in (*FRESH_SEEDS, *CHOSEN_SEEDS) for entry in _confirmed(World(seed))]


def consistent() -> list[Entry]:
    """Whole traces, chosen among those that agree on the answer: eight seeds of bases trained half as long."""
    worlds = [_half(World(seed)) for seed in (*CHOSEN_SEEDS, *FRESH_SEEDS)]
    return [entry for part in (_agreed, _agreed_controls) for world in worlds for entry in part(world)]


def hypotheses() -> list[Entry]:
    """What `hypotheses.md` asks, beside what it is compared with: two seeds, more where they seem to differ."""
    asked = [entry for seed in HYPOTHESES_SEEDS for part in (_compared, _asked) for entry in part(World(seed))]
    for seed in CHOSEN_SEEDS:
        world = World(seed)
        asked += [clean(world)] if seed not in HYPOTHESES_SEEDS else []
        asked += [*_chosen(world)]
    return asked


def _compared(world: World) -> Iterator[Entry]:
    """The method among its controls, in the same guard."""
    gradient = BundleStage(world.proxy, world.holdout)
    yield clean(world)
    alone = TracesStage(world.teacher, world.clean.prompts, "guarded", guard=GUARD, n=world.n_traces)
    yield Entry(world, "guard alone", "naive", Student(world.base, (alone,)))
    yield naive(world, "temperature", matched(world, "plain"))
    guarded = naive(world, "antidistillation, guarded", matched(world, "bundle", gradient, GUARD))
    yield dataclasses.replace(guarded, exact=Exact(gradient, world.proxy, world.clean))
    yield naive(world, "permuted, guarded", matched(world, "permuted", gradient, GUARD))
    for i in range(N_RANDOM):
        direction = BundleStage(world.proxy, world.holdout, random=i)
        yield naive(world, f"random {i + 1}, guarded", matched(world, "bundle", direction, GUARD))


def _varied(world: World) -> Iterator[Entry]:
    """The same without guard, and other directions and proxies."""
    gradient = BundleStage(world.proxy, world.holdout)
    random = BundleStage(world.proxy, world.holdout, random=0)
    yield naive(world, "antidistillation", matched(world, "bundle", gradient))
    yield naive(world, "random 1", matched(world, "bundle", random))
    yield naive(world, "permuted", matched(world, "permuted", gradient))
    others = {
        "linear, guarded": BundleStage(world.proxy, world.holdout, params="linear"),
        "own proxy, guarded": BundleStage(world.base, world.holdout),
        "smaller proxy, guarded": BundleStage(world.smaller, world.holdout),
        "larger proxy, guarded": BundleStage(world.larger, world.holdout),
        "F16 proxy, guarded": BundleStage(world.proxy, world.holdout, quant="F16"),
        "Q8_0 proxy, guarded": BundleStage(world.proxy, world.holdout, quant="Q8_0"),
    }
    for name, bundle in others.items():
        exact = Exact(bundle, world.proxy, world.clean) if bundle.quant else None
        yield dataclasses.replace(naive(world, name, matched(world, "bundle", bundle, GUARD)), exact=exact)
    yield naive(world, "experts", matched(world, "experts", gradient, strength=0.5))


def _cheaper(world: World) -> Iterator[Entry]:
    """The method and its controls at lower costs."""
    gradient = BundleStage(world.proxy, world.holdout)
    random = BundleStage(world.proxy, world.holdout, random=0)
    for cost in (0.05, 0.02):
        yield naive(world, "temperature", matched(world, "plain", cost=cost), cost)
        yield naive(world, METHOD, matched(world, "bundle", gradient, GUARD, cost=cost), cost)
        yield naive(world, "random 1, guarded", matched(world, "bundle", random, GUARD, cost=cost), cost)
        yield naive(world, "permuted, guarded", matched(world, "permuted", gradient, GUARD, cost=cost), cost)


def _attacked(world: World) -> Iterator[Entry]:
    """Attackers who do something with the traces, and what they would have without any protected trace."""
    gradient = BundleStage(world.proxy, world.holdout)
    defended = {
        "temperature": matched(world, "plain"),
        "antidistillation": matched(world, "bundle", gradient),
        "antidistillation, guarded": matched(world, "bundle", gradient, GUARD),
        "random 1, guarded": matched(world, "bundle", BundleStage(world.proxy, world.holdout, random=0), GUARD),
    }
    for name, traces in defended.items():
        yield from attacked(world, name, traces, ATTACKS if name == "antidistillation, guarded" else ATTACKS[:1])
    for share in (0.10, 0.25, 0.50):
        student = Student(world.base, (), clean=world.clean, share=share)
        yield Entry(world, "no protected traces", f"{share:.0%} clean alone", student)


_HALF = "bases trained half as long"
VARIANTS: dict[str, dict[str, Any]] = {
    "the base saw everything": {"easy": 0.9},
    "a larger student": {"student": LARGE_STUDENT},
    "freer wording": {"freely": True},
}


def _chosen(world: World) -> Iterator[Entry]:
    """Of several of the teacher's own traces the one that teaches worst: a defence that has no strength to match."""
    for name, traces in best_of(world, CHOSEN, CHOSEN_AT_RANDOM).items():
        yield naive(world, name, traces, cost=None)
        if name == CHOSEN and world.seed in FULL_SEEDS:
            yield Entry(world, name, "right answers", Student(world.base, (traces,), "right answers"))
            yield Entry(world, name, "perplexity", Student(world.base, (traces,), "perplexity"))
            yield Entry(world, name, "25% clean", Student(world.base, (traces,), "naive", world.clean, 0.25))


def _of_numbers(world: World) -> Iterator[Entry]:
    """Token by token along the direction that `_chosen` chooses by, at several costs."""
    bundle = Numbers(trained(world), world.holdout)
    for cost in (COST, 0.05, 0.02):
        traces = matched(world, "bundle", bundle, GUARD, cost=cost)
        yield naive(world, OF_NUMBERS, traces, cost)
        yield from attacked(world, OF_NUMBERS, traces, ATTACKS[:1] if cost < COST else ())


def _asked(world: World) -> Iterator[Entry]:
    """Beyond the paper, one run a seed."""
    gradient = BundleStage(world.proxy, world.holdout)
    for guard, start in ((0.2, None), (0.5, 8.0), (0.01, None)):
        yield naive(world, f"guard {guard}", matched(world, "bundle", gradient, guard, strength=start))
    short, whole = (Student(world.proxy, (own_traces(world),), n_epochs=n) for n in (1, 4))
    aimed = {
        "gradient along a path": BundleStage(world.proxy, world.holdout, along=(short, whole)),
        "gradient at the end": BundleStage(whole, world.holdout),
        "gradient of numbers at the end": Numbers(whole, world.holdout),
    }
    for name, bundle in aimed.items():  # inside this guard a large strength costs about 4 points whatever the direction
        traces = TracesStage(world.teacher, world.clean.prompts, "bundle", 16.0, 0.2, bundle=bundle, n=world.n_traces)
        yield Entry(world, f"{name}, guard 0.2", "naive", Student(world.base, (traces,)))
    other = BundleStage(world.larger, world.holdout)
    several = dataclasses.replace(matched(world, "mixed", gradient, GUARD), others=(other,))
    yield naive(world, "two proxies, guarded", several)
    kinds: tuple[tuple[Kind, float], ...] = (("entropy", 2.0), ("sparse", 4.0), ("capped", 0.2))
    for kind, strength in kinds:
        yield naive(world, f"{kind}, guarded", matched(world, kind, gradient, GUARD, strength=strength))
    yield Entry(world, "re-aimed, guarded", "naive", _re_aimed(world, gradient), COST)
    for variant, changes in VARIANTS.items():
        yield from _variant(dataclasses.replace(world, **changes), variant, ("clean", "temperature", METHOD))


def _variant(world: World, name: str, defences: Sequence[str]) -> Iterator[Entry]:
    """The naive students of some defences in another world."""
    for entry in (*_compared(world), *_chosen(world)):
        if entry.attack == "naive" and entry.defence in defences:
            yield dataclasses.replace(entry, variant=name, exact=None)


def _weaker(world: World) -> Iterator[Entry]:
    """The same traces, for students whose bases were trained half as long."""
    half = _half(world)
    filtered = attacked(
        half, METHOD, matched(half, "bundle", BundleStage(half.proxy, half.holdout), GUARD), ATTACKS[:1]
    )
    for entry in (*_compared(half), *filtered, *_cheaper(half), *_chosen(half), *_of_numbers(half)):
        yield dataclasses.replace(entry, variant=_HALF, exact=None)


def _confirmed(world: World) -> Iterator[Entry]:
    """What acts on such students for 2 points or less, beside its controls, naive and with right answers only."""
    half, cost = _half(world), 0.02
    numbers = Numbers(trained(half), half.holdout)
    there = BundleStage(trained(half), half.holdout, random=0)
    defended = {
        "temperature": matched(half, "plain", cost=cost),
        OF_NUMBERS: matched(half, "bundle", numbers, GUARD, cost=cost),
        OF_NUMBERS_PERMUTED: matched(half, "permuted", numbers, GUARD, cost=cost),
        AT_RANDOM_THERE: matched(half, "bundle", there, GUARD, cost=cost),
    }
    entries = [clean(half)]
    for name, traces in defended.items():
        entries += [naive(half, name, traces, cost), *attacked(half, name, traces, ATTACKS[:1])]
    for entry in _chosen(half):
        if entry.attack == "naive":
            filtered = attacked(half, entry.defence, entry.student.traces[0], ATTACKS[:1])
            entries += [entry, *(filtered if entry.defence == CHOSEN else ())]
    untrained = matched(half, "bundle", Numbers(half.proxy, half.holdout), GUARD, cost=cost)
    entries.append(naive(half, OF_NUMBERS_UNTRAINED, untrained, cost))
    for entry in entries:
        yield dataclasses.replace(entry, variant=_HALF)


def _agreed(world: World) -> Iterator[Entry]:
    """The choice among those that agree."""
    chosen = best_of(world, CONSISTENT, CONSISTENT_AT_RANDOM, consistent=True)[CONSISTENT]
    for entry in (clean(world), naive(world, CONSISTENT, chosen, cost=None)):
        yield dataclasses.replace(entry, variant=_HALF)


def _agreed_controls(world: World) -> Iterator[Entry]:
    """What it has to beat, what it gives up, and an attacker who keeps right answers."""
    agreed = best_of(world, CONSISTENT, CONSISTENT_AT_RANDOM, consistent=True)
    among_all = best_of(world, CHOSEN, CHOSEN_AT_RANDOM)[CHOSEN]
    entries = (
        naive(world, CONSISTENT_AT_RANDOM, agreed[CONSISTENT_AT_RANDOM], cost=None),
        naive(world, "temperature", matched(world, "plain", cost=0.02), 0.02),
        naive(world, CHOSEN, among_all, cost=None),
        *attacked(world, CONSISTENT, agreed[CONSISTENT], ATTACKS[:1]),
    )
    for entry in entries:
        yield dataclasses.replace(entry, variant=_HALF)


def _half(world: World) -> World:
    return dataclasses.replace(world, student_steps=world.n_steps // 2)


def _others(world: World) -> Iterator[Entry]:
    """Other students of the same traces: does it depend on the traces, or on who learns from them?"""
    other = dataclasses.replace(world, number=1)
    yield from _variant(other, "another base", ("clean", "temperature", METHOD, CHOSEN, CHOSEN_AT_RANDOM))


def _re_aimed(world: World, gradient: BundleStage) -> Student:
    """The second half of the traces follows the gradient at a proxy that was trained on the first half."""
    first = dataclasses.replace(matched(world, "bundle", gradient, GUARD), n=world.n_traces // 2)
    aimed = BundleStage(Student(world.proxy, (first,)), world.holdout)
    second = dataclasses.replace(
        matched(world, "bundle", aimed, GUARD), n=world.n_traces // 2, prompts=f"{world.seed} second half"
    )
    return Student(world.base, (first, second))
