"""The watch as the gateway uses it: who is raised, and who is not."""

from __future__ import annotations

import asyncio
import math
import time
import tracemalloc
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from adlocal.serve.watch import (
    AcrossKeys,
    Actions,
    Capacity,
    Level,
    Observation,
    Outcome,
    Ramp,
    Row,
    Watch,
    WatchSettings,
)
from adlocal.serve.watch.across import excess_variation
from adlocal.serve.watch.buckets import Buckets

T = TypeVar("T")
START = 1_800_000_000.0
THINGS = ("apples", "boats", "cards", "dogs", "eggs", "forks", "games", "hats", "inks", "jars", "keys", "lamps", "maps")
VERBS = ("buys", "sells", "finds", "loses", "gives", "takes", "paints", "counts", "breaks", "hides", "sends", "keeps")


def run(use: Callable[[Watch], Coroutine[Any, Any, T]], settings: WatchSettings | None = None) -> T:
    return asyncio.run(use(Watch(settings)))


def problem(rng: np.random.Generator) -> str:
    """A made-up word problem."""
    words = [f"{rng.choice(VERBS)} {rng.integers(2, 99)} {rng.choice(THINGS)}" for _ in range(6)]
    return f"Mary {', then '.join(words)}. How many are left?"


def harvested(rng: np.random.Generator, now: float, key: str = "h", **others: Any) -> Observation:
    prompt = f"Solve this problem step by step and explain all of your reasoning: {problem(rng)}"
    return Observation(now, key, key, reasoning=True, temperature=0.0, prompt=prompt, prompt_tokens=80, **others)


async def answered(watch: Watch, observation: Observation, tokens: int = 600) -> Level:
    level = await watch.admit(observation)
    each = Outcome(
        observation.time + 5, observation.key, observation.owner, observation.user, tokens, tokens, tokens // 2, 100.0
    )
    await watch.finished(each)
    return level


async def harvest(watch: Watch, n: int, key: str = "h", gap: float = 15.0, **others: Any) -> list[Level]:
    """One request each `gap` seconds."""
    rng = np.random.default_rng(0)
    return [await answered(watch, harvested(rng, START + gap * i, key, **others)) for i in range(n)]


def test_a_harvest_is_raised_along_the_ramp_and_never_refused_by_default() -> None:
    found = run(lambda watch: harvest(watch, 200))
    assert found[0] == Level(0.0, "none", found[0].score, found[0].signals, found[0].subject)
    first = next(i for i, level in enumerate(found) if level.position)
    assert 5 < first < 60
    positions = [level.position for level in found]
    assert max(np.diff(positions)) <= 0.5 * 15 / 60 + 1e-9
    assert positions[-1] == 1
    assert {level.action for level in found} == {"none", "raise"}
    assert "thought" in found[-1].signals
    assert len(found[-1].signals) >= 3


def test_a_person_who_chats_is_not() -> None:
    async def chat(watch: Watch) -> list[Level]:
        rng, now, levels = np.random.default_rng(1), START, []
        for i in range(60):
            now += float(rng.lognormal(math.log(120), 1.2))
            prompt = " ".join(rng.choice((*THINGS, *VERBS), int(rng.integers(3, 30))))
            levels.append(await answered(watch, Observation(now, "me", "me", prompt=prompt, reasoning=i % 4 == 0), 200))
        return levels

    assert all(level == replace(level, position=0.0, action="none") for level in run(chat))


@pytest.mark.parametrize("reasoning", [False, True])
def test_the_same_question_again_and_again_is_no_harvest(reasoning: bool) -> None:
    async def monitor(watch: Watch) -> list[Level]:
        each = Observation(START, "m", "m", prompt="Are you alive? Answer yes or no.", reasoning=reasoning)
        return [await answered(watch, replace(each, time=START + 60 * i), 3) for i in range(200)]

    assert not any(level.position for level in run(monitor))


def test_a_declared_evaluation_is_scored_and_shown_and_not_raised() -> None:
    async def evaluate(watch: Watch) -> tuple[list[Level], list[Row]]:
        return await harvest(watch, 200, declared="evaluation"), watch.table(START + 3000)

    levels, rows = run(evaluate)
    assert max(level.score for level in levels) > Ramp().start
    assert {(level.position, level.action) for level in levels} == {(0.0, "none")}
    row = next(row for row in rows if row.subject == "key:h")
    assert row.evaluation
    assert row.requests == 200
    assert "owner:h" not in {row.subject for row in rows}  # another key of its owner does not pay for it

    settings = WatchSettings(actions=Actions(raise_evaluation=True))
    assert run(evaluate, settings)[0][-1].position == 1


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        (Actions(), "raise"),
        (Actions(raise_strength=False), "none"),
        (Actions(throttle=True, throttle_at=0.5, block_at=1.0), "throttle"),
        (Actions(block=True, throttle_at=0.5, block_at=0.5), "block"),
        (Actions(block=True, block_at=1.0), "raise"),
        (Actions(raise_strength=False, block=True, throttle_at=0.5, block_at=0.5), "block"),
    ],
)
def test_a_step_is_taken_where_it_is_allowed(actions: Actions, expected: str) -> None:
    level = run(lambda watch: harvest(watch, 150), WatchSettings(actions=actions))[-1]
    assert level.action == expected
    assert level.position == (1.0 if actions.raise_strength else 0.0)


def test_an_end_user_pays_alone_for_what_it_does() -> None:
    async def front_end(watch: Watch) -> tuple[Level, Level]:
        await harvest(watch, 150, user="eve")
        rng = np.random.default_rng(5)
        return (
            await watch.admit(harvested(rng, START + 2300, user="eve")),
            await watch.admit(Observation(START + 2300, "h", "h", user="bob", prompt="Is it warm in Rome in May?")),
        )

    eve, bob = run(front_end)
    assert eve.position == 1
    assert eve.subject == "user:h/eve"
    assert (bob.position, bob.action) == (0.0, "none")


def test_an_owner_who_spreads_over_few_keys_is_seen() -> None:
    async def spread(watch: Watch) -> Level:
        rng, level = np.random.default_rng(2), Level()
        for i in range(240):
            level = await answered(watch, replace(harvested(rng, START + 10 * i, f"k{i % 6}"), owner="o"))
        return level

    level = run(spread, WatchSettings(across=AcrossKeys(keys=100, requests=100)))
    assert level.position > 0.5
    assert level.subject == "owner:o" or level.subject.startswith("key:")


def test_it_is_let_down_again_when_it_stops() -> None:
    async def stop(watch: Watch) -> list[float]:
        await harvest(watch, 150)
        prompts = ["Is it warm in Rome?", "Thank you", "What shall we cook tonight?", "Tell me a joke", "Who was Cato?"]
        later = START + 2 * 86_400
        return [
            (await watch.admit(Observation(later + 3600 * i, "h", "h", prompt=p))).position
            for i, p in enumerate(prompts)
        ]

    found = run(stop)
    assert found[-1] == 0
    assert found == sorted(found, reverse=True)


def test_one_request_costs_under_two_milliseconds() -> None:
    async def cost(watch: Watch) -> float:
        await harvest(watch, 150)
        rng, times = np.random.default_rng(3), []
        for i in range(50):
            each = replace(harvested(rng, START + 3000 + i), prompt=problem(rng) * 40)
            began = time.thread_time()
            await watch.admit(each)
            times.append(time.thread_time() - began)
        return min(times)  # what it takes where nobody else wants the processor

    assert run(cost) < 0.002


# The view across keys.


def shared_template(rng: np.random.Generator, people: Sequence[Iterable[float]]) -> list[Observation]:
    """Requests of one template; of each person the times."""
    found = [harvested(rng, START + when, f"k{i}") for i, times in enumerate(people) for when in times]
    return sorted(found, key=lambda each: each.time)


async def across(watch: Watch, many: Sequence[Observation]) -> tuple[list[Level], list[Row]]:
    levels = [await answered(watch, each) for each in many]
    return levels, [row for row in watch.table(many[-1].time) if row.parties]


def test_many_accounts_of_one_program_are_one_harvest() -> None:
    """30 keys, an hour's gap of random arrivals each: none of them stands out alone."""
    rng = np.random.default_rng(6)
    many = shared_template(rng, [np.cumsum(rng.exponential(900, 24)) for _ in range(30)])
    levels, rows = run(lambda watch: across(watch, many))
    assert levels[-1].position == 1
    assert levels[-1].subject.startswith("template:")
    assert (rows[0].subject, rows[0].parties) == (levels[-1].subject, 30)
    assert {"even volume", "steady timing", "reasoning"} <= set(rows[0].signals)


def test_the_honest_users_of_one_app_are_not() -> None:
    """The same template and the same texts; but people ask in sessions, some much and most little."""
    rng = np.random.default_rng(7)
    people = []
    for _ in range(60):
        starts = rng.uniform(0, 36_000, 1 + rng.poisson(2))
        n = int(rng.geometric(1 / (1 + 4 * float(rng.lognormal(0, 0.8)))))
        people.append(np.concatenate([start + np.cumsum(rng.lognormal(4.5, 1, n)) for start in starts]))
    levels, rows = run(lambda watch: across(watch, shared_template(rng, people)))
    assert rows[0].parties == 60
    assert not any(level.position for level in levels if level.subject.startswith("template:"))
    assert "even volume" not in rows[0].signals


def test_a_class_with_one_exercise_is_not() -> None:
    rng = np.random.default_rng(8)
    people = [np.cumsum(rng.exponential(250, 20)) for _ in range(30)]
    levels, _ = run(lambda watch: across(watch, shared_template(rng, people)))
    assert not any(level.position for level in levels if level.subject.startswith("template:"))


def test_only_requests_of_the_template_are_raised() -> None:
    async def use(watch: Watch) -> Level:
        rng = np.random.default_rng(6)
        many = shared_template(rng, [np.cumsum(rng.exponential(900, 24)) for _ in range(30)])
        await across(watch, many)
        return await watch.admit(Observation(many[-1].time + 1, "k3", "k3", prompt="Is it warm in Rome in May?"))

    settings = WatchSettings(ramp=Ramp(signals=4))  # so that no key is raised for itself
    assert run(use, settings).position == 0


def test_more_variation_than_chance() -> None:
    rng = np.random.default_rng(9)
    assert excess_variation([float(each) for each in rng.poisson(20, 2000)]) == pytest.approx(0, abs=0.01)
    assert excess_variation([4.0] * 10) == 0
    assert excess_variation([1.0] * 9 + [91.0]) > 5


# Bounds.


def test_windows_forget() -> None:
    buckets = Buckets()
    buckets.add(START, requests=1)
    for seconds, expected in ((0, (1, 1, 1)), (601, (0, 1, 1)), (3601, (0, 0, 1)), (86_401, (0, 0, 0))):
        found = tuple(int(buckets.total(START + seconds, window)["requests"]) for window in (600, 3600, 86_400))
        assert found == expected


def test_what_comes_too_late_does_not_count_twice() -> None:
    buckets = Buckets()
    buckets.add(START, requests=1)
    buckets.add(START - 7200, requests=1)  # its minute's place is another's by now; its hour is there
    assert buckets.total(START, 3600)["requests"] == 1
    assert buckets.total(START, 86_400)["requests"] == 2


def test_memory_is_bounded_whatever_comes() -> None:
    async def fill(watch: Watch, first: int, n: int) -> None:
        for i in range(first, first + n):
            await watch.admit(
                Observation(START + i, f"k{i}", f"o{i}", prompt=f"{i * 7919} {THINGS[i % 13]} " * (i % 9))
            )

    async def grown(watch: Watch) -> int:
        await fill(watch, 0, 400)
        tracemalloc.start()
        await fill(watch, 400, 400)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len([row for row in watch.table(START + 800) if not row.parties]) <= 32
        return size

    small = Capacity(subjects=32, sketches=16, templates=16, parties=16, records=16)
    assert run(grown, WatchSettings(capacity=small)) < 1_500_000


def test_a_sketch_is_kept_and_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    async def look(watch: Watch) -> str:
        await watch.admit(Observation(START, "k", "o", prompt="the unmistakable xyzzyplugh"))
        return repr(watch._state.__dict__) + repr([vars(each) for each in watch._state.subjects.values()])

    assert "xyzzyplugh" not in run(look)
