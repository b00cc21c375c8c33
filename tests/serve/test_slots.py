"""Who gets which slot, who waits, and who gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adlocal.serve.events import Failed
from adlocal.serve.slots import Slot, Slots


def slots(n: int = 2, *, queue: int = 8, queue_per_key: int = 4, queue_seconds: float = 5.0) -> Slots:
    return Slots(n, queue=queue, queue_per_key=queue_per_key, queue_seconds=queue_seconds)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


def test_the_lowest_idle_slot_comes_first() -> None:
    async def work() -> None:
        found = slots(3)
        assert [(await found.acquire("a", "x")).number for _ in range(3)] == [0, 1, 2]

    run(work)


def test_a_conversation_goes_back_to_its_slot() -> None:
    async def work() -> None:
        found = slots(3)
        for text in ("one", "two and more", "three"):
            found.release(await found.acquire("a", text), "a", text)
        assert (await found.acquire("a", "two and more, again")).text == "two and more"

    run(work)


def test_a_conversation_is_not_lost_for_a_few_words_that_are_the_same() -> None:
    async def work() -> None:
        found = slots(2)
        found.release(await found.acquire("a", "system: be kind. one"), "a", "system: be kind. one, and much more")
        slot = await found.acquire("a", "system: be kind. two")
        assert (slot.number, slot.text) == (1, "")

    run(work)


def test_nothing_of_another_key_counts() -> None:
    slot = Slot(0, key="a", text="the same words")
    assert slot.common("a", "the same words") == 14
    assert slot.common("b", "the same words") == 0


@given(st.text(), st.text(), st.text())
def test_common_is_the_length_of_the_longest_common_prefix(prefix: str, one: str, other: str) -> None:
    length = 0
    for a, b in zip(prefix + one, prefix + other, strict=False):
        if a != b:
            break
        length += 1
    expected = length if 2 * length >= len(prefix + one) else 0
    assert Slot(0, "k", prefix + one).common("k", prefix + other) == expected


def test_a_slot_that_holds_nothing_is_taken_before_one_that_does() -> None:
    async def work() -> None:
        found = slots(2)
        slot = await found.acquire("a", "x")
        assert slot.number == 0
        found.release(slot, "a", "x")
        assert (await found.acquire("b", "y")).number == 1

    run(work)


def test_keys_take_turns() -> None:
    async def work() -> None:
        found = slots(1)
        held = await found.acquire("a", "")
        order: list[str] = []

        async def ask(key: str) -> None:
            slot = await found.acquire(key, "")
            order.append(key)
            found.release(slot, key, "")

        tasks = [asyncio.create_task(ask(key)) for key in ("a", "a", "a", "b", "c")]
        await asyncio.sleep(0)
        found.release(held, "a", "")
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "c", "a", "a"]

    run(work)


@pytest.mark.parametrize(("queue", "queue_per_key", "waits"), [(2, 9, 2), (9, 3, 3)])
def test_a_full_queue_refuses(queue: int, queue_per_key: int, waits: int) -> None:
    async def work() -> None:
        found = slots(1, queue=queue, queue_per_key=queue_per_key)
        await found.acquire("a", "")
        waiting = [asyncio.create_task(found.acquire("a", "")) for _ in range(waits)]
        await asyncio.sleep(0)
        with pytest.raises(Failed) as error:
            await found.acquire("a", "")
        assert (error.value.status, found.n_waiting) == (429, waits)
        assert error.value.retry_after is not None
        assert error.value.retry_after >= 1
        for task in waiting:
            task.cancel()

    run(work)


def test_who_waits_too_long_is_refused_and_leaves_the_queue() -> None:
    async def work() -> None:
        found = slots(1, queue_seconds=0.05)
        held = await found.acquire("a", "")
        with pytest.raises(Failed) as error:
            await found.acquire("b", "")
        assert (error.value.status, found.n_waiting) == (429, 0)
        found.release(held, "a", "")
        assert (await found.acquire("b", "")).number == 0

    run(work)


def test_who_is_cancelled_leaves_the_queue_and_loses_no_slot() -> None:
    async def work() -> None:
        found = slots(1)
        held = await found.acquire("a", "")
        waiting = asyncio.create_task(found.acquire("b", ""))
        await asyncio.sleep(0)
        found.release(held, "a", "")  # the slot is b's now, who does not know yet
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (found.n_idle, found.n_waiting) == (1, 0)

    run(work)


def test_without_an_engine_nothing_is_handed_out_and_a_new_one_holds_nothing() -> None:
    async def work() -> None:
        found = slots(1)
        found.release(await found.acquire("a", "x"), "a", "x")
        found.close()
        waiting = asyncio.create_task(found.acquire("a", "x"))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        found.open()
        slot = await waiting
        assert (slot.key, slot.text) == (None, "")

    run(work)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40), st.integers(1, 3))
def test_no_slot_is_lost_or_given_twice(steps: list[tuple[str, bool]], n: int) -> None:
    """Over any order of requests, of which some give up."""

    async def work() -> None:
        found = slots(n, queue=100, queue_per_key=100)
        given_now: set[int] = set()

        async def ask(key: str) -> None:
            slot = await found.acquire(key, key)
            assert slot.number not in given_now
            given_now.add(slot.number)
            try:
                await asyncio.sleep(0)
            finally:
                given_now.discard(slot.number)
                found.release(slot, key, key)

        tasks = []
        for key, gives_up in steps:
            task = asyncio.create_task(ask(key))
            tasks.append(task)
            await asyncio.sleep(0)
            if gives_up:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (found.n_idle, found.n_waiting) == (n, 0)

    run(work)
