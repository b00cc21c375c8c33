"""The sampler in a host's own loop: llama-cpp-python's chain object, a plain teacher, and llama.cpp as it is.

Tokens are compared exactly with AntidistillationLlama, which evaluates batches of the same sizes. Where sizes differ,
sums run in another order: `rounding` is what test_pair.ROUNDING in a proxy's logits may do to an adjusted logit.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp._internals import LlamaSampler
from llama_cpp.llama import LogitsProcessorList
from llama_cpp.llama_grammar import LlamaGrammar

from adlocal import AntidistillationLlama, InputError, ProxyPair
from adlocal.adjust import adjust, delta
from adlocal.llamacpp import native
from adlocal_convert.demo.word_problems import word_problems
from support import tiny
from support.faults import Faults
from support.reference import last_row

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Part = Callable[[LlamaSampler], object]

KWARGS: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
PROMPTS = [f"{i} + {7 * i} = " + "so " * (i % 3) for i in range(20)]
STRENGTH, GUARD = 3.0, 0.05
N_PADDED = tiny.N_VOCAB + 8  # of a teacher that is padded further than its proxies


# A host


@pytest.fixture(scope="module")
def teacher(tiny_llama: Path) -> Iterator[llama_cpp.Llama]:
    with closing(llama_cpp.Llama(str(tiny_llama), **KWARGS)) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm(tiny_llama: Path, tiny_bundle: Path) -> Iterator[AntidistillationLlama]:
    """What the sampler is to equal."""
    with closing(
        AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=STRENGTH, guard=GUARD, **KWARGS)
    ) as llm:
        yield llm


def open_pair(bundle: Path, teacher: llama_cpp.Llama) -> ProxyPair:
    return ProxyPair.open(bundle, teacher=teacher._model, n_ctx=128, n_outputs=1, n_threads=1)


@pytest.fixture(scope="module")
def shared_pair(tiny_bundle: Path, teacher: llama_cpp.Llama) -> Iterator[ProxyPair]:
    with open_pair(tiny_bundle, teacher) as pair:
        yield pair


@pytest.fixture
def pair(shared_pair: ProxyPair) -> ProxyPair:
    shared_pair.clear()
    return shared_pair


@pytest.fixture
def breakable(tiny_bundle: Path, teacher: llama_cpp.Llama, faults: Faults) -> Iterator[ProxyPair]:
    """A pair whose proxies can be broken with `faults`."""
    with open_pair(tiny_bundle, teacher) as pair:
        yield pair


def init(pair: ProxyPair, strength: float = STRENGTH, guard: float = GUARD) -> Any:
    """adl_sampler_init, as llama_cpp's pointer to a sampler."""
    address = native.library().adl_sampler_init(pair.handle, strength, guard)
    if address is None:
        raise native.error()
    return ctypes.cast(address, ctypes.POINTER(llama_cpp.llama_sampler))


def set_prefix(sampler: Any, tokens: Sequence[int]) -> None:
    lib, n = native.library(), len(tokens)
    native.check(lib.adl_sampler_set_prefix(sampler, (ctypes.c_int32 * n)(*tokens), n))


def error(sampler: Any) -> str | None:
    words: bytes | None = native.library().adl_sampler_error(sampler)
    return words.decode() if words else None


def chain_of(*parts: Part) -> LlamaSampler:
    chain = LlamaSampler()
    for part in parts:
        part(chain)
    return chain


def greedy(chain: LlamaSampler) -> None:
    chain.add_greedy()


def top_k(k: int) -> Part:
    return lambda chain: chain.add_top_k(k)


def as_llama_builds(llm: llama_cpp.Llama, **sampling: Any) -> Part:
    """The samplers of `Llama.generate`, taken out of its own chain."""

    def add(chain: LlamaSampler) -> None:
        with closing(llm._init_sampler(**sampling)) as built:
            while llama_cpp.llama_sampler_chain_n(built.sampler):
                part = llama_cpp.llama_sampler_chain_remove(built.sampler, 0)
                llama_cpp.llama_sampler_chain_add(chain.sampler, part)

    return add


class Host:
    """A program that owns its loop: `teacher` evaluates, a chain with adlocal's sampler in it samples."""

    def __init__(
        self, teacher: llama_cpp.Llama, pair: ProxyPair, *after: Part, before: Sequence[Part] = (), **settings: float
    ) -> None:
        self.teacher = teacher
        self.own = init(pair, **settings)
        self.chain = chain_of(*before, lambda chain: llama_cpp.llama_sampler_chain_add(chain.sampler, self.own), *after)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc: object) -> None:
        self.chain.close()

    def start(self, prompt: Sequence[int]) -> None:
        set_prefix(self.own, prompt)
        evaluate(self.teacher, prompt)

    def step(self) -> int:
        token = int(self.chain.sample(self.teacher._ctx))
        self.teacher.eval([token])
        return token

    def run(self, prompt: Sequence[int], n: int) -> list[int]:
        self.start(prompt)
        return [self.step() for _ in range(n)]

    @property
    def dose(self) -> native.DoseStruct:
        found: native.DoseStruct = native.library().adl_sampler_get_dose(self.own)
        return found


def evaluate(teacher: llama_cpp.Llama, tokens: Sequence[int]) -> Row:
    """The teacher's logits after `tokens`, evaluated afresh."""
    teacher.reset()
    return last_row(teacher, tokens)


def encode(llm: llama_cpp.Llama, prompt: str = PROMPTS[3]) -> list[int]:
    return list(llm.tokenize(prompt.encode()))


def applied(chain: LlamaSampler, logits: Row, ids: Ids | None = None) -> tuple[Ids, Row]:
    """Which candidates a chain leaves of a row, and their logits."""
    ids = np.arange(len(logits), dtype=np.int32) if ids is None else ids
    n = len(ids)
    data = (llama_cpp.llama_token_data * n)()
    data[:] = [llama_cpp.llama_token_data(i, z, 0.0) for i, z in zip(ids.tolist(), logits.tolist(), strict=True)]
    array = llama_cpp.llama_token_data_array(data=data, size=n, selected=-1, sorted=False)
    llama_cpp.llama_sampler_apply(chain.sampler, ctypes.byref(array))
    left = array.data[: array.size]
    logits = np.array([d.logit for d in left], dtype=np.float32)
    assert not array.sorted or (np.diff(logits) <= 0).all()  # top-k sorts, and adjusted logits are in another order
    return np.array([d.id for d in left], dtype=np.int32), logits


def last_delta(pair: ProxyPair, tokens: Sequence[int]) -> Row:
    """Δ after a prompt, evaluated as the sampler does: afresh, the last token by itself."""
    pair.clear()
    pair.sync(tokens[:-1])
    pair.sync(tokens)
    (plus,), (minus,) = pair.rows()
    return delta(plus, minus, pair.bundle.epsilon)


def rounding(pair: ProxyPair) -> float:
    return 2 * pair.bundle.lam(STRENGTH) * 5e-4 / (2 * pair.bundle.epsilon)


# Token for token what AntidistillationLlama samples


def grammar(text: str = "root ::= [a-z ]+") -> LlamaGrammar:
    return LlamaGrammar.from_string(text, verbose=False)


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temp": 0.0},
    "dist": {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "default": {},
    "top_k 40, top_p, hot": {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temp": 1.7},
    "grammar": {"grammar": grammar(), "temp": 1.0},
    "penalties": {"repeat_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.5, "temp": 0.0},
    "mirostat": {"mirostat_mode": 2},
    "typical": {"typical_p": 0.6},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_token_for_token_the_drop_in(
    name: str, teacher: llama_cpp.Llama, llm: AntidistillationLlama, pair: ProxyPair
) -> None:
    """Twenty prompts, each with a seed of its own; and their dose, in double from the same floats: to 1e-12."""
    for seed, prompt in enumerate(PROMPTS):
        expected = drop_in(llm, prompt, seed, 12, **SAMPLING[name])
        pair.clear()
        teacher.set_seed(seed)
        with Host(teacher, pair, as_llama_builds(teacher, **SAMPLING[name])) as host:
            assert host.run(encode(teacher, prompt), 12) == expected
            assert (host.dose.n_tokens, host.dose.n_steerable) == (12, llm.last_dose.n_steerable)
            assert host.dose.total == pytest.approx(llm.last_dose.total, rel=1e-12)
            assert host.dose.kl == pytest.approx(llm.last_dose.kl, rel=1e-12)


def test_token_for_token_the_drop_in_where_tokens_wait(
    tiny_llama: Path, tiny_bundle: Path, teacher: llama_cpp.Llama, pair: ProxyPair
) -> None:
    """A guard at which four positions of ten have no choice: what waits is decoded in the same batches."""
    with closing(
        AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=STRENGTH, guard=0.9, **KWARGS)
    ) as llm:
        n_dosed = 0
        for seed, prompt in enumerate(PROMPTS):
            expected = drop_in(llm, prompt, seed, 12)
            pair.clear()
            teacher.set_seed(seed)
            with Host(teacher, pair, as_llama_builds(teacher), guard=0.9) as host:
                assert host.run(encode(teacher, prompt), 12) == expected
                assert (host.dose.n_tokens, host.dose.n_dosed) == (12, llm.last_dose.n_dosed)
                assert host.dose.total == pytest.approx(llm.last_dose.total or 0.0, rel=1e-12)
                n_dosed += host.dose.n_dosed
    assert 12 * len(PROMPTS) / 4 < n_dosed < 12 * len(PROMPTS) * 3 / 4


def drop_in(llm: AntidistillationLlama, prompt: str, seed: int, n: int, **sampling: Any) -> list[int]:
    llm.reset()
    llm.set_seed(seed)
    return list(itertools.islice(llm.generate(encode(llm, prompt), **sampling), n))


def test_the_plain_teacher_samples_something_else(
    teacher: llama_cpp.Llama, llm: AntidistillationLlama, pair: ProxyPair
) -> None:
    """Otherwise the test above would say nothing. Strength 0 is the teacher."""
    expected = drop_in(llm, PROMPTS[0], 0, 12, temp=0.0)
    with Host(teacher, pair, greedy, strength=0.0) as host:
        plain = host.run(encode(teacher), 12)
        assert (host.dose.n_tokens, host.dose.kl) == (12, 0.0)
    teacher.reset()
    assert plain == list(itertools.islice(teacher.generate(encode(teacher), temp=0.0), 12))
    assert plain != expected


def test_logit_bias(teacher: llama_cpp.Llama, llm: AntidistillationLlama, pair: ProxyPair) -> None:
    """llama.cpp's sampler of that name, against a processor that adds the same floats."""
    bias = {101: 2.5, 32: -100.0, 116: 1.5}

    def processor(_tokens: Any, scores: Any) -> Any:
        for token, value in bias.items():
            scores[token] += np.float32(value)
        return scores

    sampling = {"temp": 1.0, "top_p": 1.0}
    for seed, prompt in enumerate(PROMPTS[:5]):
        expected = drop_in(llm, prompt, seed, 12, logits_processor=LogitsProcessorList([processor]), **sampling)
        pair.clear()
        teacher.set_seed(seed)
        biased: Part = lambda chain: chain.add_logit_bias(teacher.n_vocab(), bias)  # noqa: E731
        with Host(teacher, pair, biased, as_llama_builds(teacher, **sampling)) as host:
            assert host.run(encode(teacher, prompt), 12) == expected


def test_a_prompt_that_the_pair_knows_in_part(teacher: llama_cpp.Llama, pair: ProxyPair) -> None:
    """The common prefix is kept: adjusted logits to rounding, which is a tenth of how far they moved, or less."""
    tokens = encode(teacher)
    z = evaluate(teacher, tokens)
    with Host(teacher, pair) as host:
        set_prefix(host.own, tokens)
        _, expected = applied(host.chain, z)
        set_prefix(host.own, [*tokens[:-2], 65, 66, 67])
        applied(host.chain, z)
        set_prefix(host.own, tokens)
        _, got = applied(host.chain, z)
    assert rounding(pair) < np.abs(expected - z).max() / 10
    np.testing.assert_allclose(got, expected, atol=rounding(pair), rtol=0)


@pytest.mark.parametrize("settings", [{"strength": -1.0}, {"strength": np.nan}, {"guard": 1.5}, {"guard": np.nan}])
def test_wrong_settings_are_refused(settings: dict[str, float], pair: ProxyPair) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(settings))}=.*: give "):
        init(pair, **settings)


def test_a_pair_without_teacher_and_a_foreign_sampler_are_refused(tiny_bundle: Path) -> None:
    with ProxyPair.open(tiny_bundle, n_threads=1) as pair, pytest.raises(InputError, match="made with a teacher"):
        init(pair)
    with closing(chain_of(greedy)) as chain:
        foreign = llama_cpp.llama_sampler_chain_get(chain.sampler, 0)
        with pytest.raises(InputError, match="no sampler of adlocal's; llama_sampler_chain_get gives"):
            set_prefix(foreign, [1])
        assert "no sampler of adlocal's" in (error(foreign) or "")


# Candidates that were dropped or sorted before


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama_cpp.Llama]:
    """A teacher whose vocabulary goes on beyond the proxy's."""
    model = tiny.tiny_model(vocab_size=N_PADDED)
    path = tiny.write_gguf(model, tmp_path_factory.mktemp("padded") / "llama.gguf")
    with closing(llama_cpp.Llama(str(path), **KWARGS)) as llm:
        yield llm


@pytest.mark.parametrize("guard", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("k", [1, 2, 40, 0])
def test_top_k_before_it(k: int, guard: float, padded: llama_cpp.Llama, tiny_bundle: Path) -> None:
    """Guard and centring over what is left, as the oracle has it, to a rounding."""
    with open_pair(tiny_bundle, padded) as pair, Host(padded, pair, before=[top_k(k)], guard=guard) as host:
        for prompt in PROMPTS[:5]:
            tokens = encode(padded, prompt)
            z = evaluate(padded, tokens)
            z[260:] += 1  # some of the padding is among the largest
            d = last_delta(pair, tokens)
            pair.clear()
            set_prefix(host.own, tokens)
            ids, got = applied(host.chain, z)
            assert len(ids) == (k or N_PADDED)
            order = np.argsort(ids >= tiny.N_VOCAB, kind="stable")  # the oracle's: those with a Δ come first
            kept = ids[order]
            at, ends = d[kept[kept < tiny.N_VOCAB]], np.flatnonzero(kept == tiny.EOS)
            expected = adjust(z[kept], at, lam=pair.bundle.lam(STRENGTH), guard=guard, ends=ends)
            np.testing.assert_allclose(got[order], expected.logits, rtol=1e-6, atol=3e-6)


def test_candidates_are_told_by_their_id(teacher: llama_cpp.Llama, pair: ProxyPair) -> None:
    """In any order; centring sums in another one, which float64 rounds away."""
    tokens = encode(teacher)
    z = evaluate(teacher, tokens)
    ids = np.random.default_rng(0).permutation(tiny.N_VOCAB).astype(np.int32)
    with Host(teacher, pair) as host:
        set_prefix(host.own, tokens)
        _, in_order = applied(host.chain, z)
        got_ids, got = applied(host.chain, z[ids], ids)
    assert got_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(got, in_order[ids], rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("text", ["root ::= [a-f] [a-z]+", "root ::= [0-9]+", 'root ::= "x" [a-z]*'])
def test_a_grammar_before_it(text: str, teacher: llama_cpp.Llama, pair: ProxyPair) -> None:
    """Guard and centring over the allowed tokens, as the oracle has it of a row with −inf elsewhere, to a rounding."""
    constrain: Part = lambda chain: chain.add_grammar(teacher._model, grammar(text))  # noqa: E731
    tokens = encode(teacher)
    z, d = evaluate(teacher, tokens), last_delta(pair, tokens)
    pair.clear()
    with closing(chain_of(constrain)) as alone:
        _, masked = applied(alone, z)
    assert np.isinf(masked).any()
    with Host(teacher, pair, before=[constrain]) as host:
        set_prefix(host.own, tokens)
        _, got = applied(host.chain, z)
    expected = adjust(masked, d, lam=pair.bundle.lam(STRENGTH), guard=GUARD, ends=np.array([tiny.EOS])).logits
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=3e-6)


def test_candidates_of_another_model_fail_closed(teacher: llama_cpp.Llama, pair: ProxyPair) -> None:
    tokens = encode(teacher)
    z = evaluate(teacher, tokens)
    with Host(teacher, pair) as host:
        set_prefix(host.own, tokens)
        ids = np.array([5, tiny.N_VOCAB, 6], dtype=np.int32)
        left, _ = applied(host.chain, z[:3], ids)
        assert left.tolist() == [tiny.EOS]
        assert "candidate 264 is none of the teacher's 264 tokens" in (error(host.own) or "")


# Once a position


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that pairs opened after it decode, of both halves."""
    sizes: list[int] = []
    address_of = native.address_of

    def decode(context: int, batch: Any) -> int:
        sizes.append(batch.n_tokens)
        return int(llama_cpp.llama_decode(ctypes.c_void_p(context), batch))

    callback = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, llama_cpp.llama_batch)(decode)

    def ours(name: str) -> int | None:  # and keeps the callback alive
        return ctypes.cast(callback, ctypes.c_void_p).value if name == "llama_decode" else address_of(name)

    monkeypatch.setattr(native, "address_of", ours)
    return sizes


def test_applied_again_it_does_not_evaluate_again(
    teacher: llama_cpp.Llama, tiny_bundle: Path, decoded: list[int]
) -> None:
    """As grammar resampling does. Then a token at a time, and after a jump only what is new, from a block's begin on.

    The last token of a prompt goes by itself.
    """
    tokens = encode(teacher, "so " * 15)
    z = evaluate(teacher, tokens)
    with open_pair(tiny_bundle, teacher) as pair, Host(teacher, pair) as host:
        set_prefix(host.own, tokens)
        (_, first), (_, second) = (applied(host.chain, z) for _ in range(2))
        _, few = applied(host.chain, z[:9])
        assert decoded == [len(tokens) - 1, len(tokens) - 1, 1, 1]
        assert first.tobytes() == second.tobytes()
        assert len(few) == 9
        for token in b"ab":
            host.chain.accept(token)
            applied(host.chain, z)
        assert decoded[4:] == [1, 1, 1, 1]
        set_prefix(host.own, [*tokens, *b"acd"])
        applied(host.chain, z)
        assert decoded[8:] == [len(tokens) + 2 - 32, len(tokens) + 2 - 32, 1, 1]
        assert host.dose.n_tokens == 0


def test_a_row_without_a_choice_asks_no_proxy(teacher: llama_cpp.Llama, tiny_bundle: Path, decoded: list[int]) -> None:
    """Only the top passes a guard of 1: greedy is the teacher's own text. What waited is decoded together in the end.

    The last token of the prompt is in it, and those before it are not.
    """
    tokens = encode(teacher)
    teacher.reset()
    teacher.eval(tokens[:-1])
    plain = list(itertools.islice(teacher.generate(tokens[-1:], temp=0.0, reset=False), 8))
    with open_pair(tiny_bundle, teacher) as pair, Host(teacher, pair, greedy, guard=1.0) as host:
        assert host.run(tokens, 8) == plain
        assert decoded == []
        dose = host.dose
        assert (dose.n_tokens, dose.n_steerable, dose.n_dosed, dose.total, dose.kl) == (8, 0, 0, 0.0, 0.0)
        z = evaluate(teacher, [*tokens, *plain])
        z[65:70] = z.max() + 1
        _, row = applied(host.chain, z)
        assert decoded == [len(tokens) - 1, len(tokens) - 1, 9, 9]
        assert (row[65:70] != z[65:70]).all()


def test_accepted_tokens_count_where_they_were_sampled(teacher: llama_cpp.Llama, pair: ProxyPair) -> None:
    """A host that accepts its prompt needs no prefix, and the prompt has no dose."""
    tokens = encode(teacher)
    with Host(teacher, pair, greedy) as host:
        expected = host.run(tokens, 8)
        pair.clear()
        host.chain.reset()
        for token in tokens:
            host.chain.accept(token)
        evaluate(teacher, tokens)
        assert [host.step() for _ in range(8)] == expected
        assert host.dose.n_tokens == 8


def test_reset_forgets_everything(teacher: llama_cpp.Llama, pair: ProxyPair) -> None:
    """Prefix, tokens, dose; what it then is applied to without a prefix is closed."""
    tokens = encode(teacher)
    with Host(teacher, pair, greedy) as host:
        expected, dose = host.run(tokens, 8), host.dose.total
        host.chain.reset()
        assert (host.dose.n_tokens, host.dose.total, host.dose.kl) == (0, 0.0, 0.0)
        assert host.step() == tiny.EOS
        assert "tell the sampler the prompt with adl_sampler_set_prefix" in (error(host.own) or "")
        pair.clear()
        assert host.run(tokens, 8) == expected
        assert (host.dose.total, error(host.own)) == (dose, None)


# Clones


def test_clones_go_on_by_themselves(teacher: llama_cpp.Llama, pair: ProxyPair) -> None:
    """Two branches in turns, each like a sampler that is told its tokens; logits to rounding, doses likewise.

    Far from each other, so neither has the other's logits.
    """
    tokens = encode(teacher)
    with Host(teacher, pair, greedy) as host, Host(teacher, pair) as fresh:
        tokens += host.run(tokens, 3)
        with closing(host.chain.clone()) as clone:
            branches = [(host.chain, [*tokens, 65], iter(b"pples")), (clone, [*tokens, 122], iter(b"ebras"))]
            assert doses(host.chain) == doses(clone)
            for chain, branch, _ in branches:
                chain.accept(branch[-1])
            for _ in range(5):
                rows = []
                for chain, branch, text in branches:
                    z = evaluate(teacher, branch)
                    _, row = applied(chain, z)
                    set_prefix(fresh.own, branch)
                    _, expected = applied(fresh.chain, z)
                    np.testing.assert_allclose(row, expected, atol=rounding(pair), rtol=0)
                    rows.append(row - z)
                    branch.append(next(text))
                    chain.accept(branch[-1])
                assert np.abs(rows[0] - rows[1]).max() > 3 * rounding(pair)


def doses(chain: LlamaSampler) -> list[float]:
    """What the chain's first sampler counted."""
    found = native.library().adl_sampler_get_dose(llama_cpp.llama_sampler_chain_get(chain.sampler, 0))
    return [getattr(found, name) for name, _ in found._fields_]


# Failing closed


def penalties(chain: LlamaSampler) -> None:
    chain.add_penalties(tiny.N_VOCAB, 64, 1.3, 0.5, 0.5)


def sampled(temp: float = 1.0) -> Part:
    def add(chain: LlamaSampler) -> None:
        chain.add_temp(temp)
        chain.add_dist(1)

    return add


def default(chain: LlamaSampler) -> None:
    chain.add_top_k(40)
    chain.add_top_p(0.95)
    chain.add_min_p(0.05)
    sampled(temp=0.8)(chain)


CHAINS: dict[str, tuple[list[Part], list[Part]]] = {
    "greedy": ([], [greedy]),
    "dist": ([], [sampled()]),
    "hot": ([], [sampled(temp=100.0)]),
    "top_k": ([], [top_k(40), sampled()]),
    "top_k before": ([top_k(5)], [greedy]),
    "top_k 2 before": ([top_k(2)], [sampled()]),
    "penalties": ([], [penalties, sampled()]),
    "penalties before": ([penalties], [greedy]),
    "default": ([], [penalties, default]),
    "typical": ([], [lambda c: c.add_typical(0.5), sampled()]),
    "xtc": ([], [lambda c: c.add_xtc(1.0, 0.1, 1, 1), sampled()]),
    "top_n_sigma": ([], [lambda c: c.add_top_n_sigma(1.0), sampled()]),
    "mirostat": ([], [lambda c: c.add_mirostat(tiny.N_VOCAB, 1, 5.0, 0.1, 100)]),
    "mirostat 2": ([], [lambda c: c.add_mirostat_v2(1, 5.0, 0.1)]),
}


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("name", CHAINS)
def test_a_proxy_that_fails_ends_the_generation(
    name: str, half: int, teacher: llama_cpp.Llama, breakable: ProxyPair, faults: Faults
) -> None:
    """End-of-generation, for as long as nobody resets: also when the proxy is well again."""
    before, after = CHAINS[name]
    tokens = encode(teacher)
    with Host(teacher, breakable, *after, before=before) as host:
        host.run(tokens, 3)
        assert error(host.own) is None
        with faults.failing(breakable.contexts[half]):
            assert host.step() == tiny.EOS
        which = "+−"[half]
        words = f"the proxy at {which}ε could not be evaluated: llama_decode returned -3; no token was emitted"
        assert error(host.own) == words
        assert [host.step(), host.step()] == [tiny.EOS] * 2
        assert host.dose.n_tokens == 3
        with closing(host.chain.clone()) as clone:
            assert clone.sample(teacher._ctx) == tiny.EOS
        breakable.clear()
        host.chain.reset()
        assert error(host.own) is None
        again = host.run(tokens, 3)
    breakable.clear()
    with Host(teacher, breakable, *after, before=before) as host:
        assert again == host.run(tokens, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_proxy_that_computes_nonsense_ends_the_generation(
    value: float, teacher: llama_cpp.Llama, breakable: ProxyPair, faults: Faults
) -> None:
    with Host(teacher, breakable, greedy) as host, faults.computing(breakable.contexts[0], value):
        assert host.run(encode(teacher), 1) == [tiny.EOS]
        assert "not numbers (NaN or inf); nothing emitted" in (error(host.own) or "")
        host.start(encode(teacher))
        assert error(host.own) is None


def test_a_context_that_is_full_ends_the_generation(teacher: llama_cpp.Llama, pair: ProxyPair) -> None:
    with Host(teacher, pair, greedy) as host:
        evaluate(teacher, encode(teacher))
        set_prefix(host.own, [65] * (pair.n_ctx + 1))
        assert host.step() == tiny.EOS
        assert f"no room in its context of {pair.n_ctx} tokens; ask for a larger n_ctx" in (error(host.own) or "")


def test_nothing_of_the_teacher_is_left(teacher: llama_cpp.Llama, breakable: ProxyPair, faults: Faults) -> None:
    z = evaluate(teacher, encode(teacher))
    with Host(teacher, breakable) as host, faults.failing(breakable.contexts[0]):
        set_prefix(host.own, encode(teacher))
        ids, left = applied(host.chain, z)
    assert left[tiny.EOS] == 0
    assert set(np.delete(left, tiny.EOS)) == {np.float32(-1e9)}
    assert ids.tolist() == list(range(tiny.N_VOCAB))


@pytest.mark.parametrize("tail", [greedy, sampled(), default], ids=["greedy", "dist", "default"])
@pytest.mark.parametrize("first", ["grammar", "adlocal"])
def test_a_grammar_that_may_not_end_is_kept(
    first: str, tail: Part, teacher: llama_cpp.Llama, breakable: ProxyPair, faults: Faults
) -> None:
    """llama.cpp would end this process for a token that the grammar forbids. At its end there is only the end."""
    constrain: Part = lambda chain: chain.add_grammar(teacher._model, grammar('root ::= [a-f] [a-f] "."'))  # noqa: E731
    before, after = ([constrain], [tail]) if first == "grammar" else ([], [constrain, tail])
    with Host(teacher, breakable, *after, before=before) as host, faults.failing(breakable.contexts[1]):
        found = host.run(encode(teacher), 4)
        assert "llama_decode returned -3" in (error(host.own) or "")
    assert set(found[:2]) <= set(b"abcdef")
    assert found[2:] == [ord("."), tiny.EOS]


@pytest.mark.parametrize("first", ["grammar", "adlocal"])
def test_tokens_that_a_grammar_allows_are_equally_likely(
    first: str, teacher: llama_cpp.Llama, breakable: ProxyPair, faults: Faults
) -> None:
    constrain: Part = lambda chain: chain.add_grammar(teacher._model, grammar("root ::= [a-f]+"))  # noqa: E731
    before, after = ([constrain], []) if first == "grammar" else ([], [constrain])
    z = evaluate(teacher, encode(teacher))
    with Host(teacher, breakable, *after, before=before) as host, faults.failing(breakable.contexts[1]):
        set_prefix(host.own, encode(teacher))
        _, left = applied(host.chain, z)
    assert np.flatnonzero(left > -np.inf).tolist() == [*b"abcdef"]
    assert len({*left[97:103]}) == 1


def test_samplers_are_freed_before_their_pair(teacher: llama_cpp.Llama, tiny_bundle: Path) -> None:
    """Chains free them; a sampler that is in none, llama_sampler_free."""
    with open_pair(tiny_bundle, teacher) as pair:
        with Host(teacher, pair, greedy) as host, closing(host.chain.clone()) as clone:
            host.run(encode(teacher), 2)
            clone.accept(65)
        llama_cpp.llama_sampler_free(init(pair))
        with Host(teacher, pair, greedy) as host:
            assert len(host.run(encode(teacher), 2)) == 2


# The real model


@pytest.mark.real
def test_token_for_token_the_drop_in_on_the_real_model(smollm2: Path, smollm2_bundle: Path) -> None:
    """Twenty prompts, each with a seed of its own, through the default chain."""
    compare_on_the_real_model(smollm2, smollm2_bundle)


def compare_on_the_real_model(model: Path, bundle: Path) -> None:
    kwargs = {**KWARGS, "n_ctx": 512, "n_threads": 2, "n_threads_batch": 2}
    with (
        closing(llama_cpp.Llama(str(model), **kwargs)) as teacher,
        closing(AntidistillationLlama(str(model), bundle=bundle, strength=8.0, **kwargs)) as llm,
        ProxyPair.open(bundle, teacher=teacher._model, n_ctx=512, n_outputs=1, n_threads=2) as pair,
    ):
        for seed, problem in enumerate(word_problems(20, seed=1)):
            prompt = problem["prompt"].partition(",")[0]
            expected = drop_in(llm, prompt, seed, 12)
            pair.clear()
            teacher.set_seed(seed)
            with Host(teacher, pair, as_llama_builds(teacher), strength=8.0) as host:
                assert host.run(encode(teacher, prompt), 12) == expected
                assert host.dose.total == pytest.approx(llm.last_dose.total, rel=1e-12)
