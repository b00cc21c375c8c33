"""What an adjuster is given in place of the product's adjustment, and what of it is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adlocal.engine.parallel import ParallelLlama
from adlocal.engine.runner import Evaluated
from adlocal.engine.sequences import Ended, Request, Sampling
from adlocal.errors import InputError
from adlocal.pair import Rows
from adlocal.settings import Settings
from support import tiny

REQUESTS = [Request(i, [tiny.BOS, *range(40 + i, 60 + 3 * i)], n_predict=6, seed=i) for i in range(5)]
OFF, ON = Settings(0.0, 0.0), Settings(1.0, 0.0)
FAVOURITE = 97


@pytest.fixture
def llm(tiny_llama: Path, tiny_bundle: Path) -> Iterator[ParallelLlama]:
    """Under a bundle, with the same once more beside it."""
    how: dict[str, Any] = {"n_ctx": 64, "n_parallel": 3, "n_threads": 1}
    with closing(ParallelLlama(tiny_llama, **how, bundle=tiny_bundle, strength=0.0, beside=[tiny_bundle])) as found:
        yield found


def favour(rows: Evaluated) -> None:
    rows.teacher[:, FAVOURITE] = 1e6


def texts(llm: ParallelLlama, requests: list[Request]) -> dict[int, list[int]]:
    return {done.index: done.tokens for done in llm.generate(requests, Sampling())}


def test_what_an_adjuster_writes_is_sampled(llm: ParallelLlama) -> None:
    """From one call to the next, and no longer."""
    before = texts(llm, REQUESTS)
    llm.adjuster = favour
    assert texts(llm, REQUESTS) == {i: [FAVOURITE] * 6 for i in range(5)} != before
    llm.adjuster = None
    assert texts(llm, REQUESTS) == before


def test_a_plain_model_has_an_adjuster_too(tiny_llama: Path) -> None:
    with closing(ParallelLlama(tiny_llama, n_ctx=64, n_parallel=3, n_threads=1, adjuster=favour)) as llm:
        assert texts(llm, REQUESTS) == {i: [FAVOURITE] * 6 for i in range(5)}


@pytest.mark.parametrize(("on", "expected"), [((), {0}), ((1,), {0, 2}), ((0, 4), {2}), (range(5), {2})])
def test_proxies_are_there_for_all_rows_or_none(on: Sequence[int], expected: set[int], llm: ParallelLlama) -> None:
    """They are evaluated for all rows of a decode as soon as one request is protected: three are answered together."""
    found = []

    def look(rows: Evaluated) -> None:
        assert all(half.shape == rows.teacher.shape for pair in rows.proxies for half in pair)
        assert len(rows.pairs) == 2
        found.append(len(rows.proxies))

    llm.adjuster = look
    mixed = [replace(each, settings=ON if each.index in on else OFF) for each in REQUESTS]
    plain = texts(llm, mixed)
    assert set(found) == expected
    llm.adjuster = None
    assert texts(llm, [replace(each, settings=OFF) for each in REQUESTS]) == plain


def test_a_bundle_beside_another_has_no_part_in_the_products_adjustment(
    llm: ParallelLlama, tiny_llama: Path, tiny_bundle: Path
) -> None:
    """The text of a few tokens would tell: at strength 3 the bundle twice is the bundle at 6."""
    llm.settings = Settings(3.0, 0.0)
    found = texts(llm, REQUESTS)
    with closing(ParallelLlama(tiny_llama, n_ctx=64, n_parallel=3, n_threads=1, bundle=tiny_bundle)) as one:
        one.settings = Settings(3.0, 0.0)
        assert texts(one, REQUESTS) == found
        one.settings = Settings(6.0, 0.0)
        assert texts(one, REQUESTS) != found


def test_a_cleared_scheduler_begins_as_a_new_one(llm: ParallelLlama) -> None:
    """A call that leaves the sequences in another order is forgotten: an adjuster sees the same rows again."""
    seen: list[list[Rows]] = []
    llm.adjuster = lambda rows: seen[-1].append(rows.teacher.copy())
    for _ in range(2):
        llm.scheduler.clear()
        seen.append([])
        texts(llm, REQUESTS)
    for first, again in zip(*seen, strict=True):
        np.testing.assert_array_equal(first, again)


def test_a_scheduler_is_not_cleared_while_it_answers(llm: ParallelLlama) -> None:
    expected = texts(llm, REQUESTS[:1])
    llm.scheduler.submit(REQUESTS[0])
    llm.scheduler.clear()  # it has no sequence yet
    llm.scheduler.step()
    with pytest.raises(InputError, match="n_running=1"):
        llm.scheduler.clear()
    ended = [event for _ in range(8) for event in llm.scheduler.step() if isinstance(event, Ended)]
    assert [event.completion.tokens for event in ended] == [expected[0]]
