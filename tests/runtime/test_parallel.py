"""`ParallelLlama`: many requests through one context, against llama-cpp-python and the drop-in, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import multimode
from typing import Any, cast

import pytest
from llama_cpp._internals import LlamaSampler

from adlocal import AdlocalError, AntidistillationLlama, InputError, ProxyError, ProxyPair
from adlocal.engine.parallel import ParallelLlama
from adlocal.engine.runner import Chunk, Row, Runner
from adlocal.engine.sequences import Completion, Request, Sampling
from adlocal.settings import Settings
from adlocal_convert.source.export import export_directory
from support import families, tiny
from support.alone import N_CTX, N_CTX_PROXY, Said, alone, answered_alone, gap, prompt
from support.faults import Faults


@pytest.fixture(scope="module")
def teacher(ending_teacher: Path) -> Path:
    return ending_teacher


# Decoding together

LENGTHS = [3, 600, 40, 1, 90, 7, 33]  # one longer than the batch of 512
REQUESTS = [Request(i, prompt(n), n_predict=24, seed=100 + i) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=[0.0, 1.5], ids=["greedy", "sampled"])
def sampled_alone(request: pytest.FixtureRequest, plain: Any) -> tuple[Sampling, dict[int, Said]]:
    """How the requests are to be sampled, and what plain llama-cpp-python makes of each."""
    sampling = Sampling(request.param, top_k=50, top_p=0.98, min_p=0.01)
    return sampling, {asked.index: answered_alone(plain, asked, sampling) for asked in REQUESTS}


@pytest.mark.parametrize("n_parallel", [1, 2, 4])
def test_sequences_decoded_together_are_those_of_plain_llama(
    n_parallel: int, sampled_alone: tuple[Sampling, dict[int, Said]], teacher: Path
) -> None:
    """Token by token: in F32, the kernels for one row and for several differ by less than what decides any choice."""
    sampling, expected = sampled_alone
    n_sampled: list[int] = []
    with closing(ParallelLlama(teacher, n_ctx=N_CTX, n_parallel=n_parallel, n_threads=1)) as llm:
        done = list(llm.generate(REQUESTS, sampling, n_sampled.append))
    assert {each.index: (each.tokens, each.finish_reason) for each in done} == expected
    assert {reason for _, reason in expected.values()} == {"stop", "length"}
    assert max(n_sampled) == n_parallel
    assert sum(n_sampled) == sum(len(tokens) + (reason == "stop") for tokens, reason in expected.values())


# Under protection

SHORT = [
    Request(i, prompt(n), n_predict=n_predict, seed=100 + i)
    for i, (n, n_predict) in enumerate([(3, 24), (200, 9), (40, 17), (1, 30), (90, 5), (7, 21), (33, 12)])
]
STRENGTH = 6.0


@pytest.mark.parametrize("guard", [0.0, 0.5])  # the tiny teacher is so unsure that all its tokens pass 0.05
@pytest.mark.parametrize("temp", [0.0, 1.5], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["tiny_bundle", "adapter_bundle"], ids=["halves", "adapter"])
def test_protected_sequences_are_those_of_the_drop_in(
    kind: str, temp: float, guard: float, teacher: Path, exact_kernels: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Token by token, also where three slots take seven requests: proxies that kept the tokens of a sequence that
    ended, or took another's, would say otherwise. Where texts part it is between tokens that are as close as kernels
    round; see `gap`.
    """
    bundle, sampling = request.getfixturevalue(kind), Sampling(temp, top_k=50, top_p=0.98, min_p=0.01)
    protection = {"bundle": bundle, "strength": STRENGTH, "guard": guard, "n_ctx": N_CTX_PROXY, "n_threads": 1}
    expected: dict[int, Any] = {}
    unprotected: dict[int, Any] = {}
    with closing(AntidistillationLlama(str(teacher), verbose=False, **{**protection, **exact_kernels})) as llm:
        for asked, strength, said in [(a, s, d) for a in SHORT for s, d in ((STRENGTH, expected), (0.0, unprotected))]:
            said[asked.index] = answered_alone(llm, asked, sampling, Settings(strength, guard))
        assert sum(expected[i] != unprotected[i] for i in expected) > 3, "protection has to show"
        llm.strength = STRENGTH
        for n_parallel in (1, 3):
            with closing(ParallelLlama(teacher, n_parallel=n_parallel, **protection)) as many:
                assert many.settings == Settings(STRENGTH, guard)
                for _ in range(2):  # the second time over what the first left
                    done = {each.index: (each.tokens, each.finish_reason) for each in many.generate(SHORT, sampling)}
                    assert done.keys() == expected.keys()
                    parted = [asked for asked in SHORT if done[asked.index] != expected[asked.index]]
                    assert all(gap(llm, a.tokens, done[a.index][0], expected[a.index][0]) < 1e-4 for a in parted)
                    assert not parted or (n_parallel > 1 and temp)


# Float32 throughout, so a dose is off by rounding over 2ε alone: 1e-3 of doses that differ by some 0.1.
CHOOSING: dict[str, Any] = {"n_ctx": N_CTX_PROXY, "n_threads": 1}
UNSURE = Sampling(1.5, top_k=50)


def candidates_of(teacher: Path, n: int) -> dict[int, list[Completion]]:
    """What plain contexts sample for each request with the seeds of its candidates."""
    candidates: dict[int, list[Completion]] = {asked.index: [] for asked in SHORT}
    with closing(ParallelLlama(teacher, **CHOOSING)) as llm:
        for i in range(n):
            again = [replace(asked, seed=(asked.seed + i * 0x9E3779B1) % 0xFFFFFFFF) for asked in SHORT]
            for each in llm.generate(again, UNSURE):
                assert each.dose is None
                candidates[each.index].append(each)
    return candidates


def doses_of(bundle: Path, candidates: dict[int, list[Completion]]) -> dict[int, list[float]]:
    """The mean dose of each by `ProxyPair.doses`, one text at a time."""
    doses: dict[int, list[float]] = {}
    with closing(ProxyPair.open(bundle, n_threads=1, type_k=0, type_v=0)) as pair:
        for asked in SHORT:
            ended = [[*c.tokens, *([tiny.EOS] if c.finish_reason == "stop" else [])] for c in candidates[asked.index]]
            found = [pair.doses([*asked.tokens, *tokens])[-len(tokens) :] for tokens in ended]
            doses[asked.index] = [sum(each) / len(each) for each in found]
    return doses


@pytest.mark.usefixtures("exact_kernels")
def test_the_best_of_several_is_the_one_with_the_highest_dose(teacher: Path, tiny_bundle: Path) -> None:
    candidates = candidates_of(teacher, 3)
    doses = doses_of(tiny_bundle, candidates)
    protection: dict[str, Any] = {"bundle": tiny_bundle, "strength": 0.0, "best_of": 3}
    chosen = []
    with closing(ParallelLlama(teacher, n_parallel=4, **CHOOSING, **protection)) as llm:
        for each in llm.generate(SHORT, UNSURE):
            own = doses[each.index]
            best = own.index(max(own))
            assert each.tokens == candidates[each.index][best].tokens
            assert each.dose == pytest.approx(max(own), abs=1e-3)
            chosen.append(best)
    assert len(chosen) == len(SHORT)
    assert set(chosen) == {0, 1, 2}, "choices have to differ"


@pytest.mark.usefixtures("exact_kernels")
def test_the_best_of_those_that_agree(teacher: Path, tiny_bundle: Path) -> None:
    """`statistics.multimode` says which answers are the most frequent. What was cut has none, an empty text neither."""

    def answer(text: str) -> int | None:
        return len(text) % 3 if text else None

    candidates = candidates_of(teacher, 16)
    doses = doses_of(tiny_bundle, candidates)
    protection: dict[str, Any] = {"bundle": tiny_bundle, "strength": 0.0, "best_of": 16, "answer": answer}
    best_of_all, answered = 0, 0
    with closing(ParallelLlama(teacher, n_parallel=4, **CHOOSING, **protection)) as llm:
        for each in llm.generate(SHORT, UNSURE):
            own = candidates[each.index]
            answers = [answer(llm.text(c.tokens)) if c.finish_reason == "stop" else None for c in own]
            most = multimode(a for a in answers if a is not None)
            agreeing = [i for i, a in enumerate(answers) if a in most] or list(range(len(own)))
            best = max(agreeing, key=lambda i: doses[each.index][i])
            assert each.tokens == own[best].tokens
            best_of_all += doses[each.index][best] == max(doses[each.index])
            answered += bool(most)
    assert best_of_all < len(SHORT), "agreement has to decide somewhere"
    assert 0 < answered < len(SHORT), "there have to be requests with an answer and without"


@pytest.mark.parametrize("kind", ["tiny_bundle", "adapter_bundle"], ids=["halves", "adapter"])
@pytest.mark.usefixtures("exact_kernels")
def test_a_prompt_is_read_once(
    kind: str, teacher: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Others with the same prompt decode its last token, for its logits, and what they sample."""
    decoded: list[int] = []
    decode = Runner.decode

    def counting(self: Runner, chunks: Sequence[Chunk]) -> list[Row]:
        decoded.extend(token for chunk in chunks for token in chunk.tokens)
        return decode(self, chunks)

    monkeypatch.setattr(Runner, "decode", counting)
    protection: dict[str, Any] = {"bundle": request.getfixturevalue(kind), "strength": STRENGTH}
    asked = [replace(SHORT[1], index=i) for i in range(3)]
    with closing(ParallelLlama(teacher, n_parallel=3, **CHOOSING, **protection)) as llm:
        found = {each.index: each.tokens for each in llm.generate(asked, Sampling())}
        n_fed = sum(len(tokens) - (len(tokens) == asked[0].n_predict) for tokens in found.values())
        assert len(decoded) == len(asked[0].tokens) + 2 + n_fed
        decoded.clear()
        llm.scheduler.slots.shares = False
        assert {each.index: each.tokens for each in llm.generate(asked, Sampling())} == found
        assert len(decoded) == 3 * len(asked[0].tokens) + n_fed


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_forgets_is_not_shared(family: str, teacher: Path, tmp_path: Path) -> None:
    """A sliding window may have lost the prompt that it is to be copied from."""
    path = tmp_path / f"{family}.gguf"
    export_directory(families.save(families.family_model(family), tmp_path / family), teacher, path)
    with closing(ParallelLlama(path, n_ctx=N_CTX_PROXY, n_parallel=2, n_threads=1)) as llm:
        assert llm.scheduler.slots.shares == (family == "llama")
        again = [replace(SHORT[1], index=i) for i in range(2)]
        one, other = llm.generate(again, Sampling())
        assert one.tokens == other.tokens


def test_strength_0_is_the_plain_teacher(teacher: Path, plain: Any, tiny_bundle: Path) -> None:
    """And costs nothing: the proxies are not evaluated."""
    with closing(
        ParallelLlama(teacher, n_ctx=N_CTX_PROXY, n_parallel=3, n_threads=1, bundle=tiny_bundle, strength=0.0)
    ) as llm:
        done = {each.index: (each.tokens, each.finish_reason) for each in llm.generate(SHORT, Sampling())}
        with pytest.raises(ProxyError, match="no evaluated rows"):
            cast(ProxyPair, llm.pair).rows()
    assert done == {a.index: alone(plain, a.tokens, a.n_predict) for a in SHORT}


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("fault", ["failing", "computing nonsense"])
def test_a_proxy_that_fails_has_nothing_sampled(
    fault: str, half: int, teacher: Path, tiny_bundle: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when it works again, so does everything."""
    decoded: list[int] = []
    sampled: list[int] = []
    sample = LlamaSampler.sample

    def counting(self: LlamaSampler, ctx: Any, idx: int = -1) -> int:
        sampled.append(idx)
        return sample(self, ctx, idx)

    monkeypatch.setattr(LlamaSampler, "sample", counting)
    with closing(
        ParallelLlama(teacher, n_ctx=N_CTX_PROXY, n_parallel=2, n_threads=1, bundle=tiny_bundle, strength=STRENGTH)
    ) as llm:
        before = list(llm.generate(SHORT, Sampling()))
        completions = llm.generate(SHORT, Sampling(), decoded.append)
        assert next(completions) == before[0]
        context = cast(ProxyPair, llm.pair).contexts[half]
        breaking = faults.failing(context) if fault == "failing" else faults.computing(context, float("nan"))
        n_decoded = sum(decoded)
        sampled.clear()
        with breaking, pytest.raises(AdlocalError, match="emitted"):
            list(completions)
        assert sum(decoded) == n_decoded, "rows were handed out"
        assert len(sampled) <= 1, "the other row of the last good decode, and no more"
        assert list(llm.generate(SHORT, Sampling())) == before


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("fault", ["failing", "computing nonsense"])
def test_a_proxy_that_fails_has_nothing_chosen(
    fault: str, half: int, teacher: Path, tiny_bundle: Path, faults: Faults
) -> None:
    """A choice that cannot be made is not made at random."""
    protection: dict[str, Any] = {"bundle": tiny_bundle, "strength": 0.0, "best_of": 2}
    with closing(ParallelLlama(teacher, n_ctx=N_CTX_PROXY, n_parallel=3, n_threads=1, **protection)) as llm:
        sampling = Sampling(1.5)
        before = list(llm.generate(SHORT, sampling))
        completions = llm.generate(SHORT, sampling)
        assert is_same(next(completions), before[0])
        context = cast(ProxyPair, llm.pair).contexts[half]
        breaking = faults.failing(context) if fault == "failing" else faults.computing(context, float("nan"))
        with breaking, pytest.raises(ProxyError, match="emitted"):
            next(completions)
        assert all(map(is_same, llm.generate(SHORT, sampling), before))


def is_same(ours: Completion, theirs: Completion) -> bool:
    """The same text, and the same dose to what the order rounds by in which sequences lie in the pair's memory."""
    return replace(ours, dose=None) == replace(theirs, dose=None) and ours.dose == pytest.approx(theirs.dose, abs=1e-3)


def test_the_context_ends_a_sequence(teacher: Path) -> None:
    """As in llama-cpp-python, whose prompt and completion may have `n_ctx` tokens together."""
    asked = Request(0, REQUESTS[2].tokens, n_predict=99)
    with closing(ParallelLlama(teacher, n_ctx=44, n_parallel=2, n_threads=1)) as llm:
        (done,) = llm.generate([asked], Sampling(temp=2.0))
    assert (len(done.tokens), done.finish_reason) == (44 - 41, "length")


def test_a_token_of_any_length_has_its_text(tmp_path: Path) -> None:
    """Vocabularies have runs of 128 spaces."""
    pieces = list(tiny.BYTES)
    pieces[65] = "Ġ" * 128
    path = tiny.write_gguf(tiny.tiny_model(num_hidden_layers=1), tmp_path / "spaces.gguf", pieces=pieces)
    with closing(ParallelLlama(path, n_threads=1)) as llm:
        assert llm.text([66, 65, 67, tiny.EOS]) == "B" + " " * 128 + "C"
        assert llm.text([*"é".encode(), *"é".encode()[:1]]) == "é", "half a character is left out"


# Reading completions one by one


def test_a_call_that_is_closed_early_cancels_its_requests(teacher: Path, plain: Any) -> None:
    with closing(ParallelLlama(teacher, n_ctx=N_CTX_PROXY, n_parallel=2, n_threads=1)) as llm:
        completions = llm.generate(SHORT, Sampling())
        next(completions)
        assert llm.scheduler.n_running
        cast(Any, completions).close()
        assert llm.scheduler.is_idle
        done = {each.index: (each.tokens, each.finish_reason) for each in llm.generate(SHORT, Sampling())}
    assert done == {a.index: alone(plain, a.tokens, a.n_predict) for a in SHORT}


@pytest.mark.parametrize("n_requests", [1, 3])
def test_a_second_call_waits_for_the_first_to_be_read(n_requests: int, teacher: Path) -> None:
    """Also where the first one has nothing under way at the moment: more may come of it."""
    with closing(ParallelLlama(teacher, n_ctx=N_CTX_PROXY, n_parallel=1, n_threads=1)) as llm:
        completions = llm.generate(SHORT[:n_requests], Sampling())
        done = [next(completions)]
        with pytest.raises(InputError, match="another call's completions are still being read"):
            next(llm.generate(SHORT, Sampling()))
        done += completions
        assert [each.index for each in done] == list(range(n_requests))
        assert len(list(llm.generate(SHORT, Sampling()))) == len(SHORT)


def test_a_call_waits_for_what_was_submitted_apart(teacher: Path) -> None:
    with closing(ParallelLlama(teacher, n_ctx=N_CTX_PROXY, n_parallel=2, n_threads=1)) as llm:
        id = llm.scheduler.submit(SHORT[0])
        with pytest.raises(InputError, match="another call's"):
            next(llm.generate(SHORT, Sampling()))
        llm.scheduler.cancel(id)
        llm.scheduler.step()
        assert len(list(llm.generate(SHORT, Sampling()))) == len(SHORT)


def test_a_request_may_have_a_sampling_of_its_own(teacher: Path, plain: Any) -> None:
    """And the scheduler's is what it was."""
    unsure = Sampling(1.5, top_k=50)
    asked = [replace(SHORT[0], sampling=unsure), replace(SHORT[0], index=1)]
    with closing(ParallelLlama(teacher, n_ctx=N_CTX_PROXY, n_parallel=2, n_threads=1)) as llm:
        found = {each.index: (each.tokens, each.finish_reason) for each in llm.generate(asked, Sampling(0.7))}
        assert llm.scheduler.sampling == Sampling()
    expected = [answered_alone(plain, each, how) for each, how in zip(asked, (unsure, Sampling(0.7)), strict=True)]
    assert list(map(found.get, (0, 1))) == expected
    assert expected[0] != expected[1]


def test_a_request_that_cannot_be_answered_ends_the_call(teacher: Path) -> None:
    with closing(ParallelLlama(teacher, n_ctx=N_CTX_PROXY, n_parallel=2, n_threads=1)) as llm:
        with pytest.raises(InputError, match="a prompt of 257 tokens"):
            list(llm.generate([SHORT[0], replace(SHORT[1], tokens=prompt(256))], Sampling()))
        assert llm.scheduler.is_idle
        assert len(list(llm.generate(SHORT, Sampling()))) == len(SHORT)


@pytest.mark.parametrize("where", ["decode", "share", "sample"])
@pytest.mark.usefixtures("exact_kernels")
def test_an_interrupt_leaves_the_model_usable(
    where: str, teacher: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C inside a step, which is where nearly all the time goes."""
    calls: list[int] = []
    owner: Any = LlamaSampler if where == "sample" else Runner
    original = getattr(owner, where)

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if where == "share" else 6):
            raise KeyboardInterrupt
        return original(*args)

    asked = [*SHORT, replace(SHORT[0], index=7, tokens=[*SHORT[1].tokens[:64], 65])]
    protection: dict[str, Any] = {"bundle": tiny_bundle, "strength": STRENGTH}
    with closing(ParallelLlama(teacher, n_ctx=N_CTX_PROXY, n_parallel=8, n_threads=1, **protection)) as llm:
        before = {each.index: each for each in llm.generate(asked, Sampling())}
        monkeypatch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(llm.generate(asked, Sampling()))
        monkeypatch.undo()
        assert llm.scheduler.is_idle
        assert {each.index: each for each in llm.generate(asked, Sampling())} == before
