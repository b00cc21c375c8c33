"""Failing closed, following the teacher's memory, and telemetry, on a tiny model as its own proxy."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp._internals import LlamaSampler
from llama_cpp.llama_chat_format import Llava15ChatHandler
from llama_cpp.llama_speculative import LlamaDraftModel

from adlocal import AntidistillationLlama, BundleError, InputError, ModelError, ProxyError, ProxyPair
from adlocal.score import score_trace
from adlocal.traces import EncodedTrace
from support import tiny
from support.faults import Faults
from support.reference import last_row

KWARGS: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
PROMPT = "3 + 4 ="
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}


@pytest.fixture
def llm(tiny_llama: Path, tiny_bundle: Path, faults: Faults) -> Iterator[AntidistillationLlama]:
    """Its proxies can be broken with `faults`."""
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=3.0, **KWARGS)) as llm:
        yield llm


def greedy(llm: AntidistillationLlama, prompt: str = PROMPT, n: int = 8, temp: float = 0.0, **kwargs: Any) -> list[int]:
    """Sampled ids: the tiny model babbles bytes that are no text."""
    return list(itertools.islice(llm.generate(llm.tokenize(prompt.encode()), temp=temp, **kwargs), n))


# Lazy


@pytest.mark.parametrize("temp", [0.0, 1.0], ids=["greedy", "sampled"])
def test_lazy_is_eager(temp: float, tiny_llama: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens and rows within 1e-4, which is what F32 kernels round by in batches of other shapes, over 200
    prompts at a guard that leaves the teacher a choice in some rows and none in others; and fewer batches of the pair.

    Flash attention rounds to F16 in between, by 4e-4 here: it is off.
    """
    load = ProxyPair.load

    def load_exact(first: Path, second: Path, *, params: Any, **rest: Any) -> ProxyPair:
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return load(first, second, params=params, **rest)

    monkeypatch.setattr(ProxyPair, "load", load_exact)
    f32 = dict.fromkeys(("type_k", "type_v", "proxy_type_k", "proxy_type_v"), llama_cpp.GGML_TYPE_F32)
    kwargs = {**KWARGS, "bundle": tiny_bundle, "strength": 2.0, "guard": 0.9, "logits_all": True, **f32}
    rng = np.random.default_rng(3)
    with (
        closing(AntidistillationLlama(str(tiny_llama), **kwargs)) as lazy,
        closing(AntidistillationLlama(str(tiny_llama), full=True, **kwargs)) as eager,
    ):
        for seed in range(200):
            prompt, said = [tiny.BOS, *rng.integers(32, 127, rng.integers(1, 12)).tolist()], []
            for llm in (lazy, eager):
                llm.set_seed(seed)
                said.append(list(itertools.islice(llm.generate(prompt, temp=temp), 8)))
            assert said[0] == said[1]
            np.testing.assert_allclose(lazy._scores, eager._scores, atol=1e-4, rtol=0)
            assert lazy.last_dose.n_steerable == eager.last_dose.n_steerable == lazy.last_dose.n_dosed
            assert eager.last_dose.n_dosed == eager.last_dose.n_tokens
        stats, all_of_it = lazy._lockstep.stats(), eager._lockstep.stats()
    assert stats["n_rows"] == all_of_it["n_rows"] == all_of_it["n_evaluated"]
    assert 0.05 < stats["n_choices"] / stats["n_rows"] < 0.95
    assert stats["n_evaluated"] == stats["n_choices"] == all_of_it["n_choices"]
    assert stats["n_pair_decodes"] < all_of_it["n_pair_decodes"]


def test_a_row_without_a_choice_is_the_teachers_and_costs_no_proxy(tiny_llama: Path, tiny_bundle: Path) -> None:
    """At guard 1 one token passes in every row: to the bit, and the pair is never evaluated."""
    prompt = [tiny.BOS, *PROMPT.encode()]
    with (
        closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, guard=1.0, strength=9.0, **KWARGS)) as llm,
        closing(llama_cpp.Llama(str(tiny_llama), **KWARGS)) as plain,
    ):
        np.testing.assert_array_equal(last_row(llm, prompt), last_row(plain, prompt))
        assert llm._lockstep.stats()["n_pair_decodes"] == 0
        assert llm._lockstep.n_held == 0


def test_every_row_may_be_asked_for_and_no_more(tiny_llama: Path, tiny_bundle: Path) -> None:
    """`full` holds from the next decode on."""
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, guard=1.0, **KWARGS)) as llm:
        for full, n_evaluated in ((False, 0), (True, 8), (False, 8)):
            llm._lockstep.full = full
            llm.reset()
            greedy(llm)
            assert llm._lockstep.stats()["n_evaluated"] == n_evaluated


# Failing closed


@pytest.mark.parametrize(("half", "name"), [(0, "+ε"), (1, "−ε")])
def test_a_proxy_that_fails_ends_the_generation(
    half: int, name: str, llm: AntidistillationLlama, faults: Faults
) -> None:
    """Not one token more for as long as it fails, and after reset() all is as before."""
    expected = greedy(llm)
    llm.reset()
    stream = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
    emitted = list(itertools.islice(stream, 3))
    with faults.failing(llm.pair.contexts[half]):
        with pytest.raises(ProxyError, match=rf"{re.escape(name)} .*llama_decode returned -3.*no token was emitted"):
            next(stream)
        with pytest.raises(ProxyError, match="evaluate a token first"):
            llm.sample()
        with pytest.raises(ProxyError, match="llama_decode returned -3"):
            llm.create_completion(PROMPT + "!", **GREEDY)
    assert emitted == expected[:3]
    llm.reset()
    assert greedy(llm) == expected


def test_a_row_that_a_proxy_failed_is_closed(llm: AntidistillationLlama, faults: Faults) -> None:
    """The teacher has decoded by then; nothing of its row is left."""
    with faults.failing(llm.pair.contexts[0]), pytest.raises(ProxyError):
        llm.create_completion(PROMPT, **GREEDY)
    row = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), (llm.n_vocab(),))
    assert row[tiny.EOS] == 0
    assert set(np.delete(row, tiny.EOS)) == {np.float32(-1e9)}


def test_the_same_prompt_again_after_a_failure(llm: AntidistillationLlama, faults: Faults) -> None:
    """It is cached to the last token, and needs no reset()."""
    expected = greedy(llm, n=3)
    llm.reset()
    stream = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
    next(stream)
    with faults.failing(llm.pair.contexts[1]), pytest.raises(ProxyError):
        next(stream)
    assert greedy(llm, n=3) == expected


def test_a_teacher_that_fails_leaves_nothing_to_sample(llm: AntidistillationLlama, faults: Faults) -> None:
    expected = greedy(llm)
    with faults.failing(int(llm.ctx)):
        with pytest.raises(RuntimeError, match="llama_decode returned -3"):
            llm.eval([65])
        with pytest.raises(ProxyError, match="evaluate a token first"):
            llm.sample()
    assert len(llm._lockstep.tokens) == llm.n_tokens
    assert greedy(llm) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("half", [0, 1])
def test_a_proxy_that_computes_nonsense_fails_closed(
    value: float, half: int, llm: AntidistillationLlama, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaSampler, "sample", lambda *_: pytest.fail("a token was sampled"))
    with (
        faults.computing(llm.pair.contexts[half], value),
        pytest.raises(ProxyError, match=r"not numbers \(NaN or inf\); nothing emitted"),
    ):
        llm.create_completion(PROMPT, **GREEDY)


def test_a_failed_adjustment_leaves_only_the_end(llm: AntidistillationLlama, faults: Faults) -> None:
    """Also for a caller who catches the error and reads the teacher's logits behind our back."""
    with faults.computing(llm.pair.contexts[0], np.nan), pytest.raises(ProxyError):
        llm.eval(llm.tokenize(PROMPT.encode()))
    row = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), (llm.n_vocab(),))
    assert row[tiny.EOS] == 0
    assert set(np.delete(row, tiny.EOS)) == {np.float32(-1e9)}


def test_using_the_pair_in_between_is_made_up_for(llm: AntidistillationLlama) -> None:
    """`llm.pair` is public: scoring a text with it must neither spoil the next token nor its dose."""
    expected = greedy(llm)
    total = llm.last_dose.total
    stream = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
    sampled = list(itertools.islice(stream, 4))
    llm.pair.delta([tiny.BOS, *b"something else"])
    sampled += itertools.islice(stream, 4)
    assert sampled == expected
    assert llm.last_dose.total == pytest.approx(total, rel=0.02)


def test_the_same_prompt_again_after_the_pair_was_used(llm: AntidistillationLlama) -> None:
    """Its row is adjusted already, and keeps its dose."""
    expected = greedy(llm, n=1)
    llm.reset()
    assert greedy(llm, n=1) == expected
    total = llm.last_dose.total
    llm.pair.clear()
    assert [llm.sample(temp=0.0)] == expected
    assert llm.last_dose.total == pytest.approx(2 * (total or 0))
    assert greedy(llm, n=1) == expected


def test_logits_of_other_settings_are_not_sampled(llm: AntidistillationLlama) -> None:
    llm.eval(llm.tokenize(PROMPT.encode()))
    llm.strength = 5.0
    with pytest.raises(ProxyError, match="present strength"):
        llm.sample()


def test_evaluating_around_the_pair_is_noticed(llm: AntidistillationLlama) -> None:
    """As multimodal helpers do, which move on n_tokens by themselves."""
    llm.eval(llm.tokenize(PROMPT.encode()))
    llm.n_tokens += 3
    with pytest.raises(ProxyError, match="around adlocal"):
        llm.eval([65])


@pytest.mark.parametrize("name", ["kv_cache_seq_shift", "kv_cache_seq_cp", "kv_cache_seq_keep", "encode"])
def test_context_operations_that_the_pair_cannot_follow_are_not_there(name: str, llm: AntidistillationLlama) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(llm._ctx, name)


def test_a_hole_in_the_context_is_refused(llm: AntidistillationLlama) -> None:
    llm.eval(llm.tokenize(PROMPT.encode()))
    with pytest.raises(ProxyError, match="shift the context"):
        llm._ctx.kv_cache_seq_rm(0, 1, 3)


# What cannot be protected is refused before anything is loaded


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"embedding": True}, "embedding=True"),
        ({"vocab_only": True}, "vocab_only=True"),
        ({"chat_handler": Llava15ChatHandler.__new__(Llava15ChatHandler)}, "multimodal"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"guard": 1.5}, "guard=1.5"),
    ],
)
def test_refused_arguments(kwargs: dict[str, Any], words: str, tiny_llama: Path, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=words):
        AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, **{**KWARGS, **kwargs})


def test_a_context_beyond_the_proxy_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    teacher = tiny.write_gguf(tiny.tiny_model(max_position_embeddings=1024), tmp_path / "teacher.gguf")
    with pytest.raises(ModelError, match="n_ctx=512 exceeds the 256 tokens"):
        AntidistillationLlama(str(teacher), bundle=tiny_bundle, **{**KWARGS, "n_ctx": 512})


def test_an_encoder_is_refused(tiny_llama: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "llama_model_has_encoder", lambda _: True)
    with pytest.raises(ModelError, match="an embedding or encoder model writes no text"):
        AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, **KWARGS)


def test_a_prompt_beyond_the_context_is_llamas_own_error(llm: AntidistillationLlama) -> None:
    with pytest.raises(ValueError, match="exceed context window"):
        llm.create_completion("x" * 200)


def test_missing_teacher_and_missing_bundle(tiny_llama: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        AntidistillationLlama(str(tmp_path / "none.gguf"), bundle=tiny_bundle, **KWARGS)
    with pytest.raises(BundleError, match="no such bundle"):
        AntidistillationLlama(str(tiny_llama), bundle=tmp_path / "none", **KWARGS)


# Memory: whatever the teacher keeps, the pair keeps


def test_the_pair_holds_what_the_teacher_holds(llm: AntidistillationLlama) -> None:
    for prompt in ("abcdef", "abcxyz", "abc", "zzz"):
        greedy(llm, prompt)
        assert llm._lockstep.tokens == llm._input_ids.tolist()
        memories = map(llama_cpp.llama_get_memory, llm.pair.contexts)
        n_held = [llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1 for memory in memories]
        assert n_held == [llm._lockstep.n_held] * 2 == [len(llm._lockstep.tokens)] * 2


def test_following_costs_nothing_a_token(llm: AntidistillationLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Llama.eval` truncates before every token, to the length that the memory has: that is no reason to compare it."""
    monkeypatch.setattr(ProxyPair, "sync", lambda *_: pytest.fail("the pair's tokens were compared with the teacher's"))
    assert len(greedy(llm)) == 8


def test_rows_of_forgotten_tokens_are_not_sampled(llm: AntidistillationLlama) -> None:
    """After a rollback the rows at hand belong to other positions."""
    llm.eval(llm.tokenize(PROMPT.encode()))
    llm._ctx.kv_cache_seq_rm(-1, 3, -1)
    llm.n_tokens = 3
    with pytest.raises(ProxyError, match="evaluate a token first"):
        llm.sample()


def test_strength_0_for_a_while_and_back(llm: AntidistillationLlama) -> None:
    """The pair catches up on what it did not see."""
    expected = greedy(llm, PROMPT + " then more")
    llm.reset()
    greedy(llm, strength=0.0)
    assert greedy(llm, PROMPT + " then more") == expected


def test_saved_state_goes_on_as_if_nothing_had_happened(llm: AntidistillationLlama) -> None:
    llm.eval(llm.tokenize(PROMPT.encode()))
    state = llm.save_state()
    expected = [llm.last_dose.n_tokens, continuation(llm)]
    greedy(llm, "another thing")
    llm.load_state(state)
    assert [0, continuation(llm)] == expected


def continuation(llm: AntidistillationLlama, n: int = 6) -> list[int]:
    """Greedy tokens after the context as it is."""
    stream = llm.generate([65], temp=0.0, reset=False)
    return [next(stream) for _ in range(n)]


@pytest.mark.parametrize("logits_all", [False, True])
def test_a_plain_llamas_state_goes_on_under_protection(
    logits_all: bool, tiny_llama: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    kwargs = {**KWARGS, "logits_all": logits_all}
    with (
        closing(llama_cpp.Llama(str(tiny_llama), **kwargs)) as plain,
        closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=3.0, **kwargs)) as llm,
    ):
        tokens = plain.tokenize(PROMPT.encode())
        llm.eval(tokens)
        scores, expected = llm._scores.copy(), continuation(llm)
        plain.eval(tokens)
        llm.load_state(plain.save_state())
        if logits_all:
            assert np.allclose(llm._scores, scores, atol=1e-3)  # adjusted rows, not the plain ones of the state
            assert not np.allclose(llm._scores, plain._scores, atol=1e-2)
        with pytest.raises(ProxyError):
            llm.sample() if not logits_all else llm._lockstep.kv_cache_seq_rm(0, 0, 1)
        assert continuation(llm) == expected


def test_a_new_strength_in_a_kept_context(tiny_llama: Path, tiny_bundle: Path) -> None:
    """reset=False goes on from the rows at hand; those that may be reported are evaluated anew."""
    kwargs = {**KWARGS, "logits_all": True, "guard": 0.0}
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=3.0, **kwargs)) as llm:
        tokens = llm.tokenize(PROMPT.encode())
        llm.eval(tokens)
        expected = llm._scores.copy()
        llm.reset()
        llm.strength = 0.0
        llm.eval(tokens)
        assert not np.allclose(llm._scores, expected, atol=1e-2)
        next(llm.generate([65], temp=0.0, reset=False, strength=3.0))
        assert np.allclose(llm.scores[: len(tokens)], expected, atol=1e-3)


# Settings and telemetry


def test_a_calls_settings_are_its_own(llm: AntidistillationLlama) -> None:
    greedy(llm, strength=7.0, guard=0.5)
    assert (llm.last_dose.strength, llm.last_dose.guard) == (7.0, 0.5)
    assert (llm.strength, llm.guard) == (3.0, 0.05)
    llm(PROMPT, strength=5.0, max_tokens=1)
    assert llm.last_dose.strength == 5.0
    llm(PROMPT, max_tokens=1)
    assert llm.last_dose.strength == 3.0
    with pytest.raises(InputError, match="strength=-2"):
        llm.create_completion(PROMPT, strength=-2)


def test_dose_is_the_score_of_what_was_sampled(llm: AntidistillationLlama) -> None:
    """Two ways to the same sum: as sampled, and over the finished text. F32 weights: rounding only."""
    prompt = llm.tokenize(PROMPT.encode())
    stream = llm.generate(prompt, temp=0.0)
    sampled = [next(stream) for _ in range(10)]
    trace = EncodedTrace("sampled", prompt + sampled, [False] * len(prompt) + [True] * len(sampled))
    dose = llm.last_dose
    assert dose.n_tokens == 10
    assert dose.total == pytest.approx(score_trace(llm.pair, trace).dose, rel=0.02, abs=1e-3)
    assert dose.per_token == pytest.approx((dose.total or 0) / 10)
    assert 0 < dose.n_steerable <= 10
    assert dose.mean_kl > 0


class Foresight(LlamaDraftModel):
    """Drafts what will be sampled, four tokens at a time."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        return np.array(self.tokens[len(input_ids) :][:4], dtype=np.intc)


def test_dose_of_drafted_tokens(llm: AntidistillationLlama, tiny_llama: Path, tiny_bundle: Path) -> None:
    """Several rows a decode, each with its own token."""
    prompt = llm.tokenize(PROMPT.encode())
    llm.set_seed(5)
    sampled = greedy(llm, n=12, temp=1.0)  # greedy, the model repeats itself and one row is like another
    draft = Foresight([*prompt, *sampled])
    with closing(
        AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=3.0, draft_model=draft, **KWARGS)
    ) as drafted:
        drafted.set_seed(5)
        assert greedy(drafted, n=12, temp=1.0) == sampled
        assert len(drafted._lockstep.rows) > 1
        assert drafted.last_dose.total == pytest.approx(llm.last_dose.total, rel=0.02, abs=1e-3)


def test_more_strength_more_dose_and_more_kl(llm: AntidistillationLlama) -> None:
    doses = []
    for strength in (0.1, 2.0, 20.0):
        greedy(llm, n=24, strength=strength)
        doses.append(llm.last_dose)
    totals, kls = [d.total or 0.0 for d in doses], [d.mean_kl for d in doses]
    assert totals == sorted(totals)
    assert kls == sorted(kls)
    assert totals[2] > totals[0]


def test_a_row_that_was_not_asked_for_is_refused(llm: AntidistillationLlama) -> None:
    """llama.cpp would abort the process."""
    llm.eval(llm.tokenize(PROMPT.encode()))
    with pytest.raises(ProxyError, match="no logits for position 2"):
        llm.sample(idx=2)


def test_pickled_and_back(llm: AntidistillationLlama) -> None:
    expected = greedy(llm)
    with closing(pickle.loads(pickle.dumps(llm))) as copy:
        assert (copy.strength, copy.guard) == (3.0, 0.05)
        assert greedy(copy) == expected
