"""The scheduler: each request is answered as if it were alone, whoever comes, goes, fails or is read beside it.

In F32, and against the drop-in or llama-cpp-python, which answer one request after another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp._internals import LlamaSampler

from adlocal import AdlocalError, AntidistillationLlama, Bundle, InputError, ProxyError, ProxyPair
from adlocal.engine.parallel import ParallelLlama
from adlocal.engine.prefix import BLOCK
from adlocal.engine.runner import Chunk, Evaluated, Row, Runner
from adlocal.engine.scheduler import N_CHUNK, Scheduler
from adlocal.engine.sequences import Completion, Ended, Event, Failed, Request, Sampled, Sampling
from adlocal.errors import BusyError
from adlocal.pair import context_params
from adlocal.settings import Settings
from adlocal_convert.source.export import export_directory
from support import families, tiny
from support.adapters import Pairs
from support.alone import N_CTX, N_CTX_PROXY, Said, answered_alone, gap, prompt
from support.faults import Faults
from support.recurrent import write_mamba

GREEDY, UNSURE = Sampling(), Sampling(1.5, top_k=50, top_p=0.98, min_p=0.01)
OFF, STEERED, CHOOSY = Settings(0.0, 0.0), Settings(6.0, 0.0), Settings(3.0, 0.9)
SURE = Settings(6.0, 1.0)  # a guard that leaves no choice, so that no row needs the pair
Open = Callable[..., ParallelLlama]


@pytest.fixture(scope="module")
def teacher(ending_teacher: Path) -> Path:
    return ending_teacher


@pytest.fixture
def opened(teacher: Path, tiny_bundle: Path, exact_kernels: dict[str, Any]) -> Iterator[Open]:
    """Opens models with proxies that are closed at the end; `bundle=None` for plain ones."""
    with ExitStack() as stack:

        def open_it(**how: Any) -> ParallelLlama:
            defaults = {"n_ctx": N_CTX_PROXY, "n_parallel": 3, "n_threads": 1, "bundle": tiny_bundle}
            return stack.enter_context(closing(ParallelLlama(how.pop("path", teacher), **{**defaults, **how})))

        yield open_it


@dataclass
class Oracle:
    """What each request is answered alone."""

    llm: Any

    def said(self, asked: Request) -> Said:
        return answered_alone(self.llm, asked, asked.sampling or GREEDY, asked.settings)

    def check(self, asked: Request, done: Completion) -> None:
        """The same tokens, or others where two were as close as kernels round; see `gap`."""
        tokens, reason = self.said(asked)
        assert done.index == asked.index
        if done.tokens != tokens:
            assert gap(self.llm, asked.tokens, done.tokens, tokens) < 1e-4, (asked, done, tokens)
        else:
            assert done.finish_reason == reason


@pytest.fixture
def oracle(teacher: Path, tiny_bundle: Path, exact_kernels: dict[str, Any]) -> Iterator[Oracle]:
    """The drop-in."""
    how = {"bundle": tiny_bundle, "strength": 1.0, "n_ctx": N_CTX_PROXY, "verbose": False, **exact_kernels}
    with closing(AntidistillationLlama(str(teacher), **how)) as llm:
        yield Oracle(llm)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[list[Chunk]]:
    """The chunks of each decode."""
    seen: list[list[Chunk]] = []
    decode = Runner.decode

    def watching(self: Runner, chunks: Sequence[Chunk]) -> list[Row]:
        seen.append(list(chunks))
        return decode(self, chunks)

    monkeypatch.setattr(Runner, "decode", watching)
    return seen


def first(decoded: Sequence[Sequence[Chunk]]) -> Chunk:
    return decoded[0][0]


def n_tokens(decoded: Sequence[Sequence[Chunk]]) -> int:
    return sum(len(chunk.tokens) for chunks in decoded for chunk in chunks)


@dataclass
class Run:
    """Steps of a scheduler, and what it told of each request."""

    scheduler: Scheduler
    sampled: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, Completion] = field(default_factory=dict)
    failed: dict[int, AdlocalError] = field(default_factory=dict)

    def submit(self, request: Request) -> int:
        id = self.scheduler.submit(request)
        self.sampled[id] = []
        return id

    def step(self) -> list[Event]:
        events = self.scheduler.step()
        for event in events:
            assert event.id not in self.ended.keys() | self.failed.keys(), "told of after its end"
            if isinstance(event, Sampled):
                self.sampled[event.id].append(event.token)
            elif isinstance(event, Ended):
                self.ended[event.id] = event.completion
                assert event.completion.tokens == self.sampled[event.id], "tokens are told as they come"
            else:
                self.failed[event.id] = event.error
        return events

    def finish(self) -> None:
        while not self.scheduler.is_idle:
            self.step()

    def answer(self, request: Request) -> Completion:
        """To a request that comes when all others have ended, or are waited for."""
        id = self.submit(request)
        self.finish()
        return self.ended[id]


# Each as if it were alone

MIXED = [
    Request(0, prompt(3), 24, seed=1, sampling=UNSURE, settings=STEERED),
    Request(1, prompt(200), 9, seed=2, sampling=GREEDY, settings=OFF),
    Request(2, prompt(40), 17, seed=3, sampling=Sampling(0.7), settings=Settings(2.0, 0.5)),
    Request(3, prompt(1), 30, seed=4, sampling=UNSURE, settings=OFF),
    Request(4, prompt(90), 15, seed=5, sampling=GREEDY, settings=STEERED),
    Request(5, prompt(7), 21, seed=5, sampling=UNSURE, settings=CHOOSY),
    Request(6, prompt(33), 12, seed=7, sampling=Sampling(1.0, top_k=0, min_p=0.0), settings=Settings(6.0, 0.3)),
    Request(7, prompt(40), 17, seed=3, sampling=GREEDY, settings=CHOOSY),
    Request(8, prompt(40), 17, seed=9, sampling=GREEDY, settings=Settings(6.0, 1.0)),
]


@pytest.mark.parametrize("n_parallel", [1, 2, 5])
def test_each_request_is_answered_as_if_it_were_alone(n_parallel: int, opened: Open, oracle: Oracle) -> None:
    """Whatever their strengths, guards, samplings and seeds, and whenever they come."""
    run = Run(opened(n_parallel=n_parallel).scheduler)
    ids = {}
    for i, asked in enumerate(MIXED):
        ids[run.submit(asked)] = asked
        for _ in range(i % 3):
            run.step()
    run.finish()
    assert run.ended.keys() == ids.keys()
    for id, asked in ids.items():
        oracle.check(asked, run.ended[id])
    unprotected = [oracle.said(replace(asked, settings=OFF)) for asked in MIXED]
    assert sum(oracle.said(asked) != said for asked, said in zip(MIXED, unprotected, strict=True)) > 3


def test_where_the_teacher_has_no_choice_the_pair_is_never_evaluated(opened: Open, oracle: Oracle) -> None:
    llm = opened()
    run = Run(llm.scheduler)
    ids = {
        run.submit(replace(asked, settings=SURE)): asked for asked in MIXED[:7]
    }  # no two begin alike: copies are read
    run.finish()
    stats = llm.stats()
    assert stats["n_rows"] > 100
    assert (stats["n_choices"], stats["n_evaluated"], stats["n_pair_decodes"]) == (0, 0, 0)
    for id, asked in ids.items():
        oracle.check(replace(asked, settings=OFF), run.ended[id])


def test_the_pair_waits_for_a_choice(opened: Open, decoded: list[list[Chunk]]) -> None:
    llm = opened()
    run = Run(llm.scheduler)
    for asked in MIXED:
        run.submit(replace(asked, settings=CHOOSY))
    run.finish()
    stats = llm.stats()
    assert 0 < stats["n_choices"] < stats["n_rows"] / 2
    assert stats["n_evaluated"] == stats["n_choices"]
    assert stats["n_pair_decodes"] < len(decoded)
    assert 0 < stats["n_pair_tokens"] < n_tokens(decoded)


def test_requests_without_settings_have_those_of_when_they_came(opened: Open, oracle: Oracle) -> None:
    llm = opened(n_parallel=1)
    run = Run(llm.scheduler)
    llm.settings, llm.scheduler.sampling = STEERED, UNSURE
    asked = Request(0, prompt(40), 20, seed=3)
    ids = [run.submit(asked), run.submit(asked)]
    llm.settings, llm.scheduler.sampling = OFF, GREEDY
    ids.append(run.submit(asked))
    run.finish()
    for id, (settings, sampling) in zip(ids, [(STEERED, UNSURE), (STEERED, UNSURE), (OFF, GREEDY)], strict=True):
        oracle.check(replace(asked, settings=settings, sampling=sampling), run.ended[id])


REFUSED: dict[str, tuple[Request, str]] = {
    "no prompt": (Request(0, [], 5), "a prompt of 0 tokens and n_predict=5"),
    "no token": (Request(0, prompt(3), 0), "n_predict=0: give at least one"),
    "a full context": (Request(0, [1] * N_CTX_PROXY, 5), "shorter than the context of 256"),
    "another vocabulary": (Request(0, [1, tiny.N_VOCAB], 5), "token 264: the vocabulary has 0 to 263"),
    "a negative token": (Request(0, [-1], 5), "token -1: the vocabulary"),
    "protection": (Request(0, prompt(3), 5, settings=STEERED), "strength=6, dosed=False: they act through a bundle"),
    "a dose": (Request(0, prompt(3), 5, dosed=True), "strength=0, dosed=True: they act through a bundle"),
}


@pytest.mark.parametrize(("asked", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_answered_is_refused_before_it_harms_others(asked: Request, words: str, opened: Open) -> None:
    scheduler = opened(bundle=None).scheduler
    with pytest.raises(InputError, match=words):
        scheduler.submit(asked)
    assert scheduler.is_idle
    assert scheduler.step() == []


def test_a_batch_without_room_for_prompts_is_refused(opened: Open) -> None:
    llm = opened(bundle=None)
    runner = Runner(llm._runner.context, 34)
    with closing(runner), pytest.raises(InputError, match=r"n_batch=34, n_parallel=3: .* give n_batch=35 or more"):
        Scheduler(runner, 3, N_CTX_PROXY, OFF)


# Cancelling

FIRST, SECOND = (Request(i, prompt(n), 30, settings=STEERED) for i, n in enumerate((20, 50)))


@pytest.mark.parametrize("n_steps", [0, 1, 2, 3, 9])
def test_a_request_that_is_cancelled_leaves_the_others_alone(n_steps: int, opened: Open, oracle: Oracle) -> None:
    """While it waits, while its prompt is read, and among its tokens, all of which are told."""
    run = Run(opened().scheduler)
    others = {run.submit(asked): asked for asked in (FIRST, SECOND)}
    run.step()
    long = Request(7, prompt(220), 30, settings=STEERED)
    gone = run.submit(long)
    for _ in range(n_steps):
        run.step()
    before = list(run.sampled[gone])
    n_free = run.scheduler.n_free
    run.scheduler.cancel(gone)
    assert run.scheduler.n_free == n_free + (n_steps > 0)
    assert run.scheduler.n_waiting == 0
    run.scheduler.cancel(gone)
    run.scheduler.cancel(12345)
    events = run.step()
    assert events[0] == Ended(gone, Completion(7, before, "cancelled"))
    assert [event.id for event in events].count(gone) == 1
    assert len(before) == max(0, n_steps - 2), "two steps read the prompt"
    assert before == oracle.said(long)[0][: len(before)]
    run.scheduler.cancel(gone)
    run.finish()
    assert run.ended.keys() == {*others, gone}
    for id, asked in others.items():
        oracle.check(asked, run.ended[id])


def test_the_sequence_of_a_cancelled_request_is_given_to_the_next(opened: Open, oracle: Oracle) -> None:
    run = Run(opened(n_parallel=1).scheduler)
    gone, waiting = run.submit(replace(FIRST, tokens=prompt(240))), run.submit(SECOND)
    run.step()
    assert (run.scheduler.n_running, run.scheduler.n_waiting) == (1, 1)
    run.scheduler.cancel(gone)
    run.step()
    assert (run.scheduler.n_running, run.scheduler.n_waiting) == (1, 0)
    run.finish()
    oracle.check(SECOND, run.ended[waiting])


def test_one_that_has_ended_is_not_cancelled(opened: Open) -> None:
    run = Run(opened().scheduler)
    id = run.submit(FIRST)
    run.finish()
    run.scheduler.cancel(id)
    assert run.scheduler.is_idle
    assert run.step() == []


def test_a_cancelled_request_is_told_of_after_a_step_that_failed(opened: Open, faults: Faults) -> None:
    llm = opened()
    run = Run(llm.scheduler)
    gone = run.submit(FIRST)
    run.step()
    run.submit(SECOND)
    run.scheduler.cancel(gone)
    with faults.failing(llm._runner.context.ctx), pytest.raises(AdlocalError):
        run.step()
    assert Ended(gone, Completion(0, [], "cancelled")) in run.step()


# Back-pressure


def test_more_than_may_wait_are_told_to_come_again(opened: Open) -> None:
    llm = opened(n_parallel=2)
    llm.scheduler.max_waiting = 3
    run = Run(llm.scheduler)
    ids = [run.submit(replace(FIRST, index=i, settings=OFF)) for i in range(3)]
    with pytest.raises(BusyError, match="3 requests wait already, max_waiting=3; try again later"):
        run.submit(FIRST)
    run.step()
    ids += [run.submit(FIRST) for _ in range(3 - run.scheduler.n_waiting)]
    with pytest.raises(BusyError):
        run.submit(FIRST)
    run.scheduler.cancel(ids[-1])
    ids.append(run.submit(FIRST))
    run.finish()
    assert sorted(run.ended) == ids


# Reading prompts


def test_long_prompts_are_read_beside_running_sequences(
    opened: Open, plain: llama_cpp.Llama, decoded: list[list[Chunk]]
) -> None:
    """These have a token in every step, and the prompt that came first is read first, from a later sequence too."""
    run = Run(opened(bundle=None, n_ctx=N_CTX, n_parallel=4).scheduler)
    asked = [Request(i, prompt(n), p) for i, (n, p) in enumerate([(5, 2), (9, 60), (600, 8), (470, 8)])]
    ids = [run.submit(each) for each in asked[:2]]
    run.step()
    ids += [run.submit(each) for each in asked[2:]]  # into sequences 2 and 3, and when 0 is free
    while ids[0] not in run.ended:
        run.step()
    late = run.submit(Request(4, prompt(300), 3))
    decoded.clear()
    while not run.sampled[late]:
        n_before = len(run.sampled[ids[1]])
        run.step()
        assert len(run.sampled[ids[1]]) == n_before + 1, "one that runs has a token in every step"
    parts = [chunk for chunks in decoded for chunk in chunks if len(chunk.tokens) > 1]
    in_order = [chunk.seq_id for chunk in parts if chunk.n_past + len(chunk.tokens) in (600, 470, 300)]
    assert in_order == [2, 3, 0]
    for chunks in decoded:
        assert sum(len(chunk.tokens) for chunk in chunks if len(chunk.tokens) > 1) <= N_CHUNK
        assert [chunk.seq_id for chunk in chunks] == sorted(chunk.seq_id for chunk in chunks)
    assert all(chunk.n_past % BLOCK == 0 for chunk in parts)
    run.finish()
    for id, each in zip([*ids, late], [*asked, Request(4, prompt(300), 3)], strict=True):
        Oracle(plain).check(each, run.ended[id])


def test_alone_a_prompt_is_read_in_whole_batches(
    opened: Open, plain: llama_cpp.Llama, decoded: list[list[Chunk]]
) -> None:
    """Two that nobody runs beside share them."""
    run = Run(opened(bundle=None, n_ctx=N_CTX).scheduler)
    asked = Request(0, prompt(700), 2)
    Oracle(plain).check(asked, run.answer(asked))
    assert [[len(chunk.tokens) for chunk in chunks] for chunks in decoded] == [[512], [188], [1], [1]]
    decoded.clear()
    for n in (330, 331):
        run.submit(Request(0, [65, *prompt(n)], 1))
    run.finish()
    assert [[len(chunk.tokens) for chunk in chunks] for chunks in decoded] == [[331, 160], [1, 128], [44], [1]]


# What is in memory already


def test_the_same_prompt_again_is_decoded_from_its_last_token_on(
    opened: Open, oracle: Oracle, decoded: list[list[Chunk]]
) -> None:
    run = Run(opened(n_parallel=1).scheduler)
    asked = Request(0, prompt(100), 10, settings=STEERED)
    for n in (101, 1, 1):
        decoded.clear()
        done = run.answer(asked)
        oracle.check(asked, done)
        assert n_tokens(decoded) == n + len(done.tokens) - (done.finish_reason == "length")


def test_a_prompt_that_shares_its_beginning_is_decoded_from_a_whole_block_on(
    opened: Open, oracle: Oracle, decoded: list[list[Chunk]]
) -> None:
    run = Run(opened(n_parallel=1).scheduler)
    run.answer(Request(0, prompt(100), 10, settings=STEERED))
    asked = Request(1, [*prompt(100)[:40], *b"another end"], 1, settings=STEERED)
    decoded.clear()
    oracle.check(asked, run.answer(asked))
    assert first(decoded).n_past == 32
    assert n_tokens(decoded) == len(asked.tokens) - 32


def conversation(run: Run, oracle: Oracle, index: int, start: Sequence[int]) -> list[int]:
    """A first turn with an answer of 60 tokens; returns what the next one begins with."""
    asked = Request(index, start, 60, seed=1, sampling=UNSURE, settings=STEERED)
    done = run.answer(asked)
    oracle.check(asked, done)
    assert len(done.tokens) == 60
    return [*start, *done.tokens]


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_the_next_turn_decodes_what_is_new(
    n_parallel: int, opened: Open, oracle: Oracle, decoded: list[list[Chunk]]
) -> None:
    run = Run(opened(n_parallel=n_parallel).scheduler)
    held = conversation(run, oracle, 0, prompt(10))
    asked = Request(1, [*held, *b" and then?"], 1, settings=CHOOSY)
    decoded.clear()
    oracle.check(asked, run.answer(asked))
    assert n_tokens(decoded) == 1 + len(b" and then?"), "the last token of an answer was not decoded"
    assert first(decoded).n_past == len(held) - 1


def test_an_answer_that_was_gone_on_from_is_still_one(opened: Open, oracle: Oracle, decoded: list[list[Chunk]]) -> None:
    """A fresh context would read it in blocks: who begins with some of it uses the blocks of the prompt, or all."""
    run = Run(opened(n_parallel=1).scheduler)
    held = conversation(run, oracle, 0, prompt(41))
    run.answer(Request(1, [*held, *b" and then?"], 1, settings=STEERED))
    for n, n_past in ((80, 80), (60, 32)):
        decoded.clear()
        asked = Request(2, [*held[:n], 65], 1, settings=STEERED)
        oracle.check(asked, run.answer(asked))
        assert first(decoded).n_past == n_past


def test_a_prompt_is_copied_from_a_running_sequence(opened: Open, oracle: Oracle, decoded: list[list[Chunk]]) -> None:
    """Which goes on as if nothing were."""
    run = Run(opened().scheduler)
    running = Request(0, prompt(100), 30, settings=STEERED)
    ids = {run.submit(running): running}
    for _ in range(5):
        run.step()
    decoded.clear()
    again, ending = replace(running, index=1, settings=CHOOSY), Request(2, [*prompt(100)[:70], 65], 9, settings=OFF)
    ids |= {run.submit(each): each for each in (again, ending)}
    run.step()
    assert [(chunk.n_past, len(chunk.tokens)) for chunk in decoded[0][1:]] == [(100, 1), (64, 6)]
    run.finish()
    for id, asked in ids.items():
        oracle.check(asked, run.ended[id])


def test_a_prompt_that_is_being_read_is_waited_for_while_others_pass(
    opened: Open, plain: llama_cpp.Llama, decoded: list[list[Chunk]]
) -> None:
    run = Run(opened(bundle=None, n_ctx=N_CTX).scheduler)
    asked = [Request(0, prompt(9), 40), *(Request(i, prompt(500), 4) for i in (1, 2)), Request(3, prompt(5), 4)]
    ids = [run.submit(asked[0])]
    run.step()
    ids += [run.submit(each) for each in asked[1:]]
    run.step()
    assert (run.scheduler.n_running, run.scheduler.n_waiting) == (3, 1)
    decoded.clear()
    run.finish()
    assert n_tokens(decoded) < 500 + 100
    assert run.ended.keys() == set(ids)
    for id, each in zip(ids, asked, strict=True):
        Oracle(plain).check(each, run.ended[id])


def test_a_shared_beginning_is_copied_so_that_a_conversation_stays(
    opened: Open, oracle: Oracle, decoded: list[list[Chunk]]
) -> None:
    """Into a sequence that holds nothing, and where all hold something into the one that was used longest ago."""
    system = prompt(64)
    run = Run(opened(n_parallel=2).scheduler)
    one = conversation(run, oracle, 0, [*system, *b"one"])
    decoded.clear()
    other = conversation(run, oracle, 1, [*system, *b"two"])
    assert (first(decoded).seq_id, first(decoded).n_past) == (1, 64)
    for held, seq_id in ((one, 0), (other, 1)):
        decoded.clear()
        asked = Request(2, [*held, 66], 1, settings=STEERED)
        oracle.check(asked, run.answer(asked))
        assert [(chunk.seq_id, chunk.n_past) for chunks in decoded for chunk in chunks] == [
            (seq_id, len(held) - 1),
            (seq_id, len(held)),
        ]


def test_the_sequence_that_was_used_longest_ago_is_given_up(
    opened: Open, oracle: Oracle, decoded: list[list[Chunk]]
) -> None:
    """Used until its request ended, not when it began."""
    run = Run(opened(n_parallel=3).scheduler)
    asked = [Request(i, prompt(n), p, settings=OFF) for i, (n, p) in enumerate([(61, 30), (62, 3), (63, 9)])]
    for each in asked:
        run.submit(each)
    run.finish()
    for n, gone in ((70, 1), (71, 2), (72, 0), (73, 1)):
        decoded.clear()
        new = Request(9, prompt(n), 2, settings=OFF)
        oracle.check(new, run.answer(new))
        assert {chunk.seq_id for chunks in decoded for chunk in chunks} == {gone}
    decoded.clear()
    again = Request(9, prompt(71), 1, settings=OFF)
    oracle.check(again, run.answer(again))
    assert n_tokens(decoded) == 1, "what was not given up is there"


def test_a_prompt_that_uses_half_of_what_a_sequence_holds_takes_it_over(
    opened: Open, decoded: list[list[Chunk]]
) -> None:
    """Rather than that another one is given up, as long as none is empty."""
    run = Run(opened(n_parallel=2).scheduler)
    for n in (61, 100):
        run.answer(Request(0, [n, *prompt(n)], 2, settings=OFF))
    for n_shared, seq_id in ((64, 1), (40, 0)):
        decoded.clear()
        run.answer(Request(1, [*[100, *prompt(100)][:n_shared], *b"otherwise"], 60 if n_shared == 64 else 2))
        assert (first(decoded).seq_id, first(decoded).n_past) == (seq_id, n_shared // BLOCK * BLOCK)


# Memory that forgets


def forgetful(family: str, teacher: Path, folder: Path) -> Path:
    """A model whose window is shorter than the prompts, or that has a state in place of a window."""
    path = folder / f"{family}.gguf"
    if family == "mamba":
        return write_mamba(path, n_ctx=N_CTX_PROXY)
    directory = families.save(families.family_model(family), folder / family)
    export_directory(directory, teacher, path)
    return path


@pytest.fixture(scope="module", params=["gemma3", "mamba"])
def forgetting(request: pytest.FixtureRequest, teacher: Path, tiny_bundle: Path, tmp_path_factory: Any) -> Any:
    """Such a model, and a bundle of it."""
    folder = tmp_path_factory.mktemp(request.param)
    path = forgetful(request.param, teacher, folder)
    pairs = Pairs.over(path, request.param, Bundle.open(tiny_bundle), tied=request.param == "gemma3")
    return path, pairs.write_halves(folder / "bundle", epsilon=0.1)


TURNS = [
    Request(0, prompt(70), 30, seed=1, sampling=UNSURE),
    Request(1, prompt(70), 12, seed=2, sampling=UNSURE),
    Request(2, [*prompt(70)[:50], *b"another end"], 12),
    Request(3, prompt(33), 12, seed=3, sampling=UNSURE),
    Request(4, prompt(9), 20, seed=4, sampling=UNSURE),
]
PAIRED = ["teacher", "proxies", "both"]


@pytest.mark.parametrize("paired", PAIRED)
@pytest.mark.parametrize("n_parallel", [1, 3])
def test_what_forgets_is_gone_on_from_only(
    n_parallel: int,
    paired: str,
    forgetting: tuple[Path, Path],
    teacher: Path,
    tiny_bundle: Path,
    opened: Open,
    exact_kernels: dict[str, Any],
    decoded: list[list[Chunk]],
) -> None:
    """Of teachers, of proxies and of both, and all that is sampled is what it is alone; doses too."""
    path, bundle = forgetting
    model, bundle = (path if paired != "proxies" else teacher), (bundle if paired != "teacher" else tiny_bundle)
    llm = opened(path=model, bundle=bundle, n_parallel=n_parallel)
    assert not llm.scheduler.slots.shares
    run = Run(llm.scheduler)
    how: dict[str, Any] = {"bundle": bundle, "strength": 1.0, "n_ctx": N_CTX_PROXY, "verbose": False, **exact_kernels}
    with closing(AntidistillationLlama(str(model), **how)) as alone:
        oracle = Oracle(alone)
        for settings in (STEERED, Settings(3.0, 0.5), OFF):
            asked = [replace(each, settings=settings) for each in TURNS]
            ids = [run.submit(each) for each in asked]
            run.finish()
            for id, each in zip(ids, asked, strict=True):
                oracle.check(each, run.ended[id])
        held = [*TURNS[4].tokens, *run.ended[ids[4]].tokens]
        more = [Request(5, [*held, *b" and more"], 8, settings=STEERED), Request(6, held[:-2], 8, settings=STEERED)]
        for each, n_past in zip(more, (len(held) - 1, 0), strict=True):
            decoded.clear()
            oracle.check(each, run.answer(each))
            assert first(decoded).n_past == n_past


@pytest.mark.parametrize("settings", [OFF, STEERED], ids=["off", "steered"])
def test_doses_of_what_forgets(settings: Settings, forgetting: tuple[Path, Path], opened: Open) -> None:
    path, bundle = forgetting
    run = Run(opened(path=path, bundle=bundle).scheduler)
    ids = {run.submit(replace(each, settings=settings, dosed=True)): each for each in TURNS}
    run.finish()
    with closing(ProxyPair.open(bundle, n_threads=1, type_k=0, type_v=0)) as pair:
        for id, asked in ids.items():
            assert run.ended[id].dose == pytest.approx(dose_of(pair, asked, run.ended[id]), rel=1e-2, abs=1e-2)


def test_proxies_with_a_sliding_window_keep_it_whole() -> None:
    """So that they follow a teacher which goes back."""
    assert context_params().swa_full


# Anything, in any order


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_each_is_answered_as_if_it_were_alone(seed: int, opened: Open, oracle: Oracle) -> None:
    rng = random.Random(seed)
    run = Run(opened(n_parallel=rng.choice([1, 2, 3, 5, 8])).scheduler)
    asked: dict[int, Request] = {}
    cancelled = set[int]()
    for i in range(300):
        action = rng.random()
        if action < 0.2:
            request = random_request(rng, i, [done.tokens for done in run.ended.values()])
            asked[run.submit(request)] = request
        elif action < 0.25 and (open_ids := sorted(asked.keys() - run.ended.keys() - cancelled)):
            cancelled.add(rng.choice(open_ids))
            run.scheduler.cancel(max(cancelled, key=list(asked).index))
        else:
            run.step()
    run.finish()
    assert run.ended.keys() == asked.keys()
    assert len(asked) > 30
    for id, request in asked.items():
        done = run.ended[id]
        if done.finish_reason == "cancelled":
            said = oracle.said(request)[0][: len(done.tokens)]
            assert done.tokens == said or gap(oracle.llm, request.tokens, done.tokens, said) < 1e-4
        else:
            oracle.check(request, done)


def random_request(rng: random.Random, index: int, said: Sequence[Sequence[int]]) -> Request:
    """With a beginning that others have, or what was said; of up to 200 tokens."""
    shared = prompt(rng.choice([100, 150]))[: rng.choice([1, 31, 32, 40, 64, 100, 150])]
    tokens = [*shared, *(rng.choice(said) if said and rng.random() < 0.3 else []), *rng.choices(range(256), k=3)]
    settings = Settings(rng.choice([0.0, 1.0, 3.0, 6.0]), rng.choice([0.0, 0.5, 0.9, 1.0]))
    sampling = rng.choice([GREEDY, UNSURE, Sampling(0.8, top_k=20)])
    return Request(index, tokens, rng.randrange(1, 25), rng.randrange(1000), sampling, settings, rng.random() < 0.1)


# What fails


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("fault", ["failing", "computing nonsense"])
def test_a_proxy_that_fails_ends_the_requests_that_needed_it(
    fault: str, half: int, opened: Open, oracle: Oracle, faults: Faults
) -> None:
    llm = opened(n_parallel=4)
    assert llm.pair is not None
    context = llm.pair.contexts[half]
    run = Run(llm.scheduler)
    asked = [replace(FIRST, index=i, settings=s) for i, s in enumerate((OFF, STEERED, SURE, CHOOSY))]
    asked = [replace(each, tokens=prompt(20 + each.index)) for each in asked]
    ids = [run.submit(each) for each in asked]
    for _ in range(4):
        run.step()
    assert not run.failed
    with faults.failing(context) if fault == "failing" else faults.computing(context, float("nan")):
        events = run.step()
        assert {event.id for event in events if isinstance(event, Failed)} == {ids[1]} | (run.failed.keys() & {ids[3]})
        waiting = run.submit(replace(FIRST, settings=STEERED))
        run.step()
        run.step()
        assert waiting in run.failed
        assert not run.sampled[waiting]
    assert all(isinstance(error, ProxyError) for error in run.failed.values())
    later = {run.submit(each): each for each in asked}
    run.finish()
    assert {ids[0], ids[2]} <= run.ended.keys()
    for id, each in [*zip(ids, asked, strict=True), *later.items()]:
        if id in run.ended:
            oracle.check(each, run.ended[id])
    assert later.keys() <= run.ended.keys(), "all is as before"
    assert run.sampled[ids[1]] == oracle.said(asked[1])[0][: len(run.sampled[ids[1]])], "and what was told was right"


@pytest.fixture
def open_samplers(monkeypatch: pytest.MonkeyPatch) -> list[LlamaSampler]:
    """Those that were not closed."""
    samplers: list[LlamaSampler] = []
    make, close = Sampling.chain, LlamaSampler.close

    def noting(self: Sampling, seed: int) -> LlamaSampler:
        samplers.append(make(self, seed))
        return samplers[-1]

    def crossing_out(self: LlamaSampler) -> None:
        samplers[:] = [each for each in samplers if each is not self]
        close(self)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(Sampling, "chain", noting)
    monkeypatch.setattr(LlamaSampler, "close", crossing_out)
    return samplers


@pytest.mark.parametrize("code", [1, 2, -1, -3])
def test_a_teacher_that_fails_loses_what_runs_and_nothing_that_waits(
    code: int, opened: Open, oracle: Oracle, faults: Faults, open_samplers: list[LlamaSampler]
) -> None:
    llm = opened(n_parallel=2)
    run = Run(llm.scheduler)
    asked = [FIRST, SECOND, replace(FIRST, index=2), replace(SECOND, index=3)]
    ids = [run.submit(each) for each in asked]
    for _ in range(3):
        run.step()
    assert len(open_samplers) == 2
    with faults.failing(llm._runner.context.ctx, code), pytest.raises(AdlocalError, match=f"returned {code}"):
        run.step()
    assert not open_samplers
    assert (run.scheduler.n_running, run.scheduler.n_waiting) == (0, 2)
    run.finish()
    assert run.ended.keys() == {*ids[2:]}
    assert run.failed.keys() == {*ids[:2]}
    assert all(f"returned {code}" in str(error) for error in run.failed.values())
    for id, each in zip(ids[2:], asked[2:], strict=True):
        oracle.check(each, run.ended[id])
    assert not open_samplers


def test_a_plain_teacher_that_fails(
    opened: Open, plain: llama_cpp.Llama, open_samplers: list[LlamaSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(opened(bundle=None, n_parallel=1).scheduler)
    asked = [replace(each, settings=OFF) for each in (FIRST, SECOND)]
    ids = [run.submit(each) for each in asked]
    run.step()
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", lambda *args: -3)
        with pytest.raises(AdlocalError, match="1 sequences: llama_decode returned -3; try fewer"):
            run.step()
    assert not open_samplers
    run.finish()
    assert (list(run.ended), list(run.failed)) == ([ids[1]], [ids[0]])
    Oracle(plain).check(replace(asked[1], settings=None), run.ended[ids[1]])


# Doses


def dose_of(pair: ProxyPair, asked: Request, done: Completion) -> float:
    """The mean that `ProxyPair.doses` has of the sampled tokens, the end among them."""
    said = [*done.tokens, *([tiny.EOS] if done.finish_reason == "stop" else [])]
    return float(np.mean(pair.doses([*asked.tokens, *said])[-len(said) :]))


@pytest.mark.parametrize("settings", [OFF, STEERED, CHOOSY], ids=["off", "steered", "choosy"])
def test_doses_are_those_of_the_finished_text(settings: Settings, opened: Open, tiny_bundle: Path) -> None:
    """At strength 0 the pair is evaluated when a trace has ended, and in one batch."""
    llm = opened(n_parallel=4)
    run = Run(llm.scheduler)
    asked = [replace(each, settings=settings, dosed=each.index % 2 == 0) for each in MIXED]
    ids = {run.submit(each): each for each in asked}
    while not run.scheduler.is_idle:
        run.step()
        n_dosed = sum(ids[id].dosed for id in run.ended)
        n_read_apart = sum(ids[id].dosed and len(ids[id].tokens) > 1 for id in run.ended)  # the prompt, and its rows
        assert settings.protects or llm.stats()["n_pair_decodes"] <= n_dosed + n_read_apart
        assert settings.protects or n_dosed or llm.stats()["n_pair_decodes"] == 0
    with closing(ProxyPair.open(tiny_bundle, n_threads=1, type_k=0, type_v=0)) as pair:
        for id, each in ids.items():
            done = run.ended[id]
            assert (done.dose is not None) == each.dosed
            assert done.dose is None or done.dose == pytest.approx(dose_of(pair, each, done), abs=1e-3)


def test_tokens_have_doses_where_they_were_steered(opened: Open, tiny_bundle: Path) -> None:
    run = Run(opened().scheduler)
    doses: dict[int, list[float | None]] = {}
    ids = {run.submit(each): each for each in (FIRST, replace(SECOND, settings=OFF), replace(FIRST, settings=SURE))}
    while not run.scheduler.is_idle:
        for event in run.step():
            if isinstance(event, Sampled):
                doses.setdefault(event.id, []).append(event.dose)
    steered, off, sure = ids
    assert set(doses[off]) == set(doses[sure]) == {None}
    with closing(ProxyPair.open(tiny_bundle, n_threads=1, type_k=0, type_v=0)) as pair:
        said = run.ended[steered].tokens
        assert doses[steered] == pytest.approx(pair.doses([*FIRST.tokens, *said])[-len(said) :], abs=1e-3)


# Adjusters


def test_an_adjuster_is_given_teacher_and_proxies_of_every_row(opened: Open, oracle: Oracle, tiny_bundle: Path) -> None:
    """Of those too whose teacher has no choice, or that are not protected. What it writes is sampled from."""
    seen: list[tuple[np.ndarray[Any, Any], ...]] = []

    def adjuster(rows: Evaluated) -> None:
        ((plus, minus),) = rows.proxies
        seen.append((rows.teacher.copy(), plus, minus))
        rows.teacher[:, 65] = 1e9

    llm = opened(adjuster=adjuster)
    run = Run(llm.scheduler)
    asked = [Request(i, prompt(20 + i), 5, settings=s) for i, s in enumerate((STEERED, SURE, OFF))]
    ids = [run.submit(each) for each in asked]
    run.finish()
    assert [run.ended[id].tokens for id in ids] == [[65] * 5] * 3
    assert sum(len(teacher) for teacher, _, _ in seen) == llm.stats()["n_rows"] == 15
    texts = [[*each.tokens, *[65] * 4] for each in asked]
    with closing(ProxyPair.open(tiny_bundle, n_threads=1, type_k=0, type_v=0, n_outputs=64)) as pair:
        for i, tokens in enumerate(texts):
            oracle.llm.strength = 0.0
            for n, (teacher, plus, minus) in enumerate(seen):
                oracle.llm.reset()
                oracle.llm.eval(tokens[: len(asked[i].tokens) + n])
                row = np.ctypeslib.as_array(llama_cpp.llama_get_logits(oracle.llm.ctx), (tiny.N_VOCAB,))
                np.testing.assert_allclose(teacher[i], row, atol=1e-4)
                pair.sync(tokens[: len(asked[i].tokens) + n])
                for ours, theirs in zip((plus, minus), pair.rows(), strict=True):
                    np.testing.assert_allclose(ours[i], theirs[-1], atol=1e-4)


def test_an_adjuster_without_a_proxy_samples_nothing(
    opened: Open, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not called, and no row is sampled from."""
    calls: list[int] = []
    sampled: list[int] = []
    llm = opened(adjuster=lambda rows: calls.append(len(rows.teacher)))
    assert llm.pair is not None
    run = Run(llm.scheduler)
    ids = [run.submit(each) for each in (FIRST, SECOND)]
    sample = LlamaSampler.sample

    def counting(self: LlamaSampler, ctx: Any, idx: int = -1) -> int:
        sampled.append(idx)
        return sample(self, ctx, idx)

    monkeypatch.setattr(LlamaSampler, "sample", counting)
    with faults.computing(llm.pair.contexts[0], float("nan")):
        run.finish()
    assert run.failed.keys() == set(ids)
    assert not calls
    assert not sampled
