"""Limits: what is reserved and settled against a plain list of times and costs, and what a client is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adlocal.errors import AdlocalError, InputError
from adlocal.serve.events import Failed
from adlocal.serve.limits import LEASE, Limiter, Limits, Reservation, Subject
from adlocal.serve.rate_words import duration
from adlocal.serve.state import Charge, Claim, Kind, Level, Store
from support.stores import KINDS, Clock, Place, place

SECOND = 1_000_000


@pytest.fixture(params=KINDS, scope="module")
def there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A place for all tests of this module, which take subjects of their own."""
    with place(request.param, tmp_path_factory.mktemp("state")) as found:
        yield found


def subject(prefix: str = "key", **limits: int) -> Subject:
    return Subject(f"{prefix}:{uuid.uuid4().hex}", Limits(**limits))


def limited(there: Place, use: Callable[[Limiter, Store], Any], clock: Clock | None = None) -> None:
    async def given(store: Store) -> None:
        async with Limiter(store) as limits:
            await use(limits, store)

    there.run(given, clock)


async def refused(limits: Limiter, subjects: Sequence[Subject], tokens: int, status: int, words: str) -> Failed:
    with pytest.raises(Failed) as told:
        await limits.reserve(subjects, tokens)
    assert told.value.status == status
    assert words in told.value.message.replace(subjects[0].name.replace(":", " "), "WHO")
    return told.value


async def level(store: Store, who: Subject, kind: Kind) -> Level:
    return (await store.levels([Charge(who.name, kind, 0, 0)]))[0]


# Against an oracle.


@dataclass
class Account:
    """What really happened to a subject: when, in µs, and how much of each kind."""

    who: Subject
    requests: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)

    def check(self) -> None:
        """Never more than burst + rate * time, between any two moments; exactly."""
        limits, minute = self.who.limits, 60 * SECOND
        for happened, most, window in (
            (self.requests, limits.requests_per_minute or 10**18, minute),
            (self.tokens, limits.tokens_per_minute or 10**18, minute),
            (self.tokens, limits.tokens_per_day or 10**18, 24 * 60 * minute),
        ):
            for i, (start, _) in enumerate(happened):
                for (end, _), total in zip(happened[i:], accumulate(n for _, n in happened[i:]), strict=True):
                    assert total <= most + Fraction(most * (end - start), window)
        assert sum(n for _, n in self.tokens) <= (limits.budget_tokens or 10**18)


@dataclass
class World:
    """Requests over some subjects, with the time that has really passed."""

    clock: Clock
    limits: Limiter
    store: Store
    accounts: list[Account]
    running: list[tuple[Reservation, list[Account], int]] = field(default_factory=list)
    passed: int = 0

    async def reserve(self, over: Sequence[int], tokens: int) -> None:
        accounts = [self.accounts[i] for i in over]
        try:
            held = await self.limits.reserve([each.who for each in accounts], tokens)
        except Failed as failed:
            if failed.retry_after and not self.running:
                await self.waited(accounts, tokens, failed.retry_after)
            return
        for each in accounts:
            each.requests.append((self.passed, 1))
        self.running.append((held, accounts, tokens))

    async def waited(self, accounts: list[Account], tokens: int, seconds: float) -> None:
        """What was refused with nothing running is granted after that time."""
        self.step(seconds)
        held = await self.limits.reserve([each.who for each in accounts], tokens)
        for each in accounts:
            each.requests.append((self.passed, 1))
        self.running.append((held, accounts, tokens))

    async def settle(self, which: int, share: Fraction) -> None:
        if self.running:
            held, accounts, tokens = self.running.pop(which % len(self.running))
            used = int(tokens * share)
            await self.limits.settle(held, used)
            for each in accounts:
                each.tokens.append((self.passed, used))

    def step(self, seconds: float) -> None:
        """Time passes; where it is negative the clock is set back, and none does."""
        self.clock.pass_seconds(seconds)
        self.passed += max(0, round(seconds * SECOND))

    async def check(self) -> None:
        for each in self.accounts:
            each.check()
            parallel = sum(each in accounts for _, accounts, _ in self.running)
            assert parallel <= (each.who.limits.max_parallel or parallel)
            held = sum(tokens for _, accounts, tokens in self.running if each in accounts)
            budget = await level(self.store, each.who, "budget_tokens")
            assert budget == Level(sum(n for _, n in each.tokens), held)
            assert await level(self.store, each.who, "max_parallel") == Level(0, parallel)


OF_KEYS = st.builds(
    Limits,
    requests_per_minute=st.none() | st.integers(1, 7),
    tokens_per_minute=st.none() | st.integers(1, 1000),
    tokens_per_day=st.none() | st.integers(1, 5000),
    budget_tokens=st.none() | st.integers(1, 5000),
    max_parallel=st.none() | st.integers(1, 3),
)
STEPS = st.one_of(
    st.tuples(st.just("reserve"), st.sampled_from([[0], [1], [0, 1], [1, 2], [2, 0, 1]]), st.integers(0, 700)),
    st.tuples(st.just("settle"), st.integers(0, 5), st.fractions(0, 1)),
    st.tuples(st.just("step"), st.floats(-20, 29) | st.floats(0, 2), st.none()),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(limits=st.lists(OF_KEYS, min_size=3, max_size=3), steps=st.lists(STEPS, min_size=5, max_size=40))
def test_nobody_exceeds_burst_and_rate_and_everything_balances(
    there: Place, limits: list[Limits], steps: list[tuple[str, Any, Any]]
) -> None:
    """Whatever is asked for, in whatever order it ends, however the clock goes."""
    clock = Clock()

    async def use(limiter: Limiter, store: Store) -> None:
        accounts = [Account(Subject(f"key:{uuid.uuid4().hex}", each)) for each in limits]
        world = World(clock, limiter, store, accounts)
        for what, first, second in steps:
            if what == "reserve":
                await world.reserve(first, second)
            elif what == "settle":
                await world.settle(first, second)
            elif first < 0 or world.passed + first * SECOND < (LEASE - 1) * SECOND:  # nothing lapses
                world.step(first)
            await world.check()
        while world.running:
            await world.settle(0, Fraction(1))
        await world.check()

    limited(there, use, clock)


def test_a_rate_is_rounded_against_the_client_by_a_microsecond_a_request(there: Place) -> None:
    """A seventh of a minute is 8,571,428.6 µs: seven at once are one too many for 3 µs."""
    clock, key = Clock(), subject(requests_per_minute=7)

    async def use(limits: Limiter, store: Store) -> None:
        for _ in range(6):
            await limits.reserve([key], 0)
        for microseconds in (2, 8_571_428):
            clock.now += microseconds
            await refused(limits, [key], 0, 429, "WHO has used its 7 requests a minute; retry in 0.001 s")
            clock.now += 1
            await limits.reserve([key], 0)

    limited(there, use, clock)


def test_many_at_once_never_take_more_than_there_is(there: Place) -> None:
    key, owner = subject(tokens_per_day=100_000), subject("owner", max_parallel=13)

    async def use(limits: Limiter, store: Store) -> None:
        found = await asyncio.gather(
            *(limits.reserve([key, owner], 5000 + i) for i in range(50)), return_exceptions=True
        )
        held = [each for each in found if isinstance(each, Reservation)]
        assert len(held) == 13
        assert all(isinstance(each, Failed | Reservation) for each in found)
        assert (await level(store, owner, "max_parallel")).held == 13
        await asyncio.gather(*(limits.settle(each, 10) for each in held))
        assert await level(store, key, "budget_tokens") == Level(130, 0)

    limited(there, use)


def test_more_than_was_reserved_is_owed(there: Place) -> None:
    clock, key = Clock(), subject(tokens_per_minute=60)

    async def use(limits: Limiter, store: Store) -> None:
        await limits.settle(await limits.reserve([key], 10), 90)
        assert await level(store, key, "budget_tokens") == Level(90, 0)
        failed = await refused(limits, [key], 1, 429, "WHO has used its 60 tokens a minute; retry in 31 s")
        assert failed.retry_after == 31

    limited(there, use, clock)


# Exactly once.


def test_a_reservation_is_settled_once(there: Place) -> None:
    key = subject()

    async def use(limits: Limiter, store: Store) -> None:
        held = await limits.reserve([key], 100)
        await asyncio.gather(*(limits.settle(held, 30) for _ in range(5)))
        await limits.settle(held, 70)
        assert await level(store, key, "budget_tokens") == Level(30, 0)

    limited(there, use)


class Slow:
    """A store that takes its time, on the way there and back."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            await asyncio.sleep(0.02)
            found = await getattr(self._store, name)(*args)
            await asyncio.sleep(0.05)
            return found

        return call


@pytest.mark.parametrize("seconds", [0, 0.001, 0.05])
def test_a_request_that_is_cancelled_while_it_reserves_holds_nothing(there: Place, seconds: float) -> None:
    key = subject(max_parallel=1)

    async def use(store: Store) -> None:
        async with Limiter(Slow(store)) as limits:
            asking = asyncio.create_task(limits.reserve([key], 100))
            await asyncio.sleep(seconds)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        assert await level(store, key, "max_parallel") == Level(0, 0)
        assert await level(store, key, "budget_tokens") == Level(0, 0)

    there.run(use)


def test_a_request_that_is_cancelled_while_it_settles_is_settled(there: Place) -> None:
    key = subject()

    async def use(store: Store) -> None:
        async with Limiter(Slow(store)) as limits:
            held = await limits.reserve([key], 100)
            settling = asyncio.create_task(limits.settle(held, 30))
            await asyncio.sleep(0)
            settling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await settling
        assert await level(store, key, "budget_tokens") == Level(30, 0)

    there.run(use)


def test_a_long_request_keeps_what_it_holds(there: Place) -> None:
    key = subject(max_parallel=1)

    async def use(store: Store) -> None:
        async with Limiter(store, lease=1.5) as limits:
            held = await limits.reserve([key], 100)
            await asyncio.sleep(2.5)
            await refused(limits, [key], 1, 429, "WHO has used its 1 requests at once; retry in 1 s")
            await limits.settle(held, 5)
            assert await level(store, key, "budget_tokens") == Level(5, 0)

    there.run(use)


KILLED = """
import asyncio, sys
from adlocal.serve.limits import Limiter, Limits, Subject
from adlocal.serve.state import open_store

async def main():
    async with Limiter(await open_store(sys.argv[1]), lease=2.0) as limits:
        await limits.reserve([Subject(sys.argv[2], Limits(max_parallel=1))], 100)
        print("held", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_killed_request_is_charged_as_reserved_and_its_place_is_free_again(there: Place) -> None:
    key = subject(max_parallel=1)
    process = subprocess.Popen([sys.executable, "-c", KILLED, there.state, key.name], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"

    async def use(limits: Limiter, store: Store) -> None:
        await asyncio.sleep(2.5)
        await refused(limits, [key], 1, 429, "requests at once")  # it lives, and holds its place
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.communicate, timeout=30)
        await asyncio.sleep(2.3)
        await limits.settle(await limits.reserve([key], 7), 3)
        assert await level(store, key, "budget_tokens") == Level(103, 0)

    limited(there, use)


# What a client is told.


@pytest.mark.parametrize("kind", ["tokens_per_minute", "tokens_per_day", "budget_tokens"])
def test_what_no_limit_can_ever_hold_is_no_matter_of_time(there: Place, kind: str) -> None:
    async def use(limits: Limiter, store: Store) -> None:
        key = subject("key", **{kind: 50, "max_parallel": 1})
        held = await limits.reserve([key], 50)
        failed = await refused(limits, [key], 51, 400, "this request may take 51 tokens, and WHO has 50 tokens")
        assert "send a shorter prompt or a smaller max_tokens" in failed.message
        assert (failed.type, failed.param, failed.retry_after) == ("invalid_request_error", "max_tokens", None)
        await limits.settle(held, 0)

    limited(there, use)


def test_a_spent_budget_is_no_matter_of_time(there: Place) -> None:
    async def use(limits: Limiter, store: Store) -> None:
        key = subject(budget_tokens=100)
        await limits.settle(await limits.reserve([key], 80), 70)
        failed = await refused(
            limits, [key], 31, 403, "WHO has 30 left of 100 tokens in all, and this request may take 31"
        )
        assert (failed.type, failed.retry_after) == ("insufficient_quota", None)
        held = await limits.reserve([key], 20)
        failed = await refused(limits, [key], 30, 429, "WHO has used its 100 tokens in all; retry in 1 s")
        assert failed.type == "rate_limit_error"
        await limits.settle(held, 0)
        await limits.settle(await limits.reserve([key], 30), 30)
        await refused(limits, [key], 1, 403, "WHO has 0 left")

    limited(there, use)


def test_of_several_reasons_the_one_that_lasts_is_told(there: Place) -> None:
    clock = Clock()

    async def use(limits: Limiter, store: Store) -> None:
        key = subject(requests_per_minute=1, tokens_per_day=24, budget_tokens=1000)
        owner = subject("owner", requests_per_minute=2, tokens_per_minute=2000)
        await limits.settle(await limits.reserve([key, owner], 24), 24)
        failed = await refused(limits, [key, owner], 2, 429, "24 tokens a day")
        assert failed.retry_after == 7200
        await refused(limits, [key, owner], 25, 400, "24 tokens a day")
        await refused(limits, [key, owner], 3000, 400, "this request may take 3000")
        failed = await refused(limits, [key, owner], 0, 429, "1 requests a minute")
        assert failed.retry_after == 60

    limited(there, use, clock)


def test_subjects_of_one_name_are_a_mistake(there: Place) -> None:
    async def use(limits: Limiter, store: Store) -> None:
        with pytest.raises(ValueError, match="one of them twice"):
            await limits.reserve([subject(), Subject("key:a", Limits()), Subject("key:a", Limits())], 1)

    limited(there, use)


def test_headers_tell_the_limit_that_is_nearest_to_its_end(there: Place) -> None:
    clock = Clock()

    async def use(limits: Limiter, store: Store) -> None:
        key = subject(requests_per_minute=60, tokens_per_minute=6000, tokens_per_day=3000)
        owner = subject("owner", requests_per_minute=3)
        held = await limits.reserve([key, owner], 1000)
        assert held.headers == {
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": "2",
            "x-ratelimit-reset-requests": "20s",
            "x-ratelimit-limit-tokens": "3000",
            "x-ratelimit-remaining-tokens": "2000",
            "x-ratelimit-reset-tokens": "8h0m0s",
        }
        await limits.settle(held, 500)
        clock.pass_seconds(5.5)
        found = (await limits.reserve([key, owner], 0)).headers
        assert found["x-ratelimit-remaining-requests"] == "1"
        assert found["x-ratelimit-reset-requests"] == "34.5s"
        assert found["x-ratelimit-remaining-tokens"] == "2500"
        assert (await limits.reserve([subject()], 5)).headers == {}

    limited(there, use, clock)


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0, "0ms"),
        (1, "1ms"),
        (999_000, "999ms"),
        (1_500_000, "1.5s"),
        (59_999_001, "1m0s"),
        (3_605_250_000, "1h0m5.25s"),
    ],
)
def test_durations_are_written_as_openai_does(microseconds: int, text: str) -> None:
    assert duration(microseconds) == text


@pytest.mark.parametrize(("status", "calls"), [(400, 1), (403, 1), (429, 3), (503, 3)])
def test_the_openai_client_asks_again_only_where_that_may_help(status: int, calls: int) -> None:
    """Why a spent budget is 403 and not 429, whatever the error's type."""
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        error = {"error": {"message": "no", "type": "insufficient_quota", "code": "insufficient_quota"}}
        return httpx2.Response(status, json=error, headers={"retry-after-ms": "1"})

    transport = httpx2.MockTransport(answer)
    http = openai.DefaultHttpxClient(transport=transport)
    client = openai.OpenAI(api_key="x", base_url="http://gateway", http_client=http)
    with client, pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    assert len(asked) == calls


# What is given.


@pytest.mark.parametrize("value", [0, -1, 10**12 + 1, 1.5, True, "5"])
def test_limits_are_whole_numbers(value: Any) -> None:
    with pytest.raises(InputError, match=r"max_parallel .*: give a whole number from 1 to 1000000000000"):
        Limits(max_parallel=value)


def test_the_largest_limits_are_exact(there: Place) -> None:
    clock, most = Clock(), 10**12

    async def use(limits: Limiter, store: Store) -> None:
        key = subject(tokens_per_minute=most, tokens_per_day=most, budget_tokens=most, max_parallel=most)
        await limits.settle(await limits.reserve([key], most), most)
        assert await level(store, key, "budget_tokens") == Level(most, 0)
        assert await level(store, key, "tokens_per_day") == Level(86_400 * SECOND, 0)
        small = subject(tokens_per_day=1)
        await limits.settle(await limits.reserve([small], 1), most)
        assert await level(store, small, "tokens_per_day") == Level(365 * 86_400 * SECOND, 0)

    limited(there, use, clock)


class Broken:
    """A store that cannot be used."""

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            raise AdlocalError("state lies on the moon")

        return call


def test_without_a_store_nothing_is_granted(caplog: pytest.LogCaptureFixture) -> None:
    async def use() -> None:
        async with Limiter(Broken()) as limits:
            failed = await refused(limits, [subject(max_parallel=3)], 1, 503, "limits cannot be checked at the moment")
            assert failed.type == "unavailable_error"
            assert "moon" not in failed.message

    asyncio.run(use())
    assert "state lies on the moon" in caplog.text


def test_without_a_store_a_request_is_charged_what_it_reserved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(Slow):
        async def settle(self, claim: Claim, used: Sequence[int]) -> None:
            raise AdlocalError("state lies on the moon")

    async def use(store: Store) -> None:
        async with Limiter(Breaks(store)) as limits:
            await limits.settle(await limits.reserve([subject()], 1), 1)

    Place(str(tmp_path)).run(use)
    assert "is charged what it reserved: state lies on the moon" in caplog.text
