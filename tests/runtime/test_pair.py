"""The pair against two plain `llama_cpp.Llama` of its halves, and against a fresh pair wherever it jumps."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp._internals import LlamaBatch

from adlocal import BundleError, InputError, ModelError, ProxyError, ProxyPair
from adlocal.adjust import delta, expectation
from adlocal.bundle import MINUS_NAME, PLUS_NAME, Bundle
from adlocal.pair import context_params
from support import tiny
from support.faults import Faults
from support.loading import load_as

Rows = npt.NDArray[np.float32]

TEXT = [tiny.BOS, *b"Twelve apples less five are seven apples."]
# In logits, which are up to 2 here. Batched otherwise, sums run in another order and now and then a value of the f16
# cache rounds the other way: up to 9e-5 measured. Δ is off by that over 2ε: up to 0.02 allowed, of a typical Δ of 0.7.
ROUNDING = 5e-4


@pytest.fixture(scope="module")
def pair(tiny_bundle: Path) -> Iterator[ProxyPair]:
    """A pair that every test leaves in whatever state it likes."""
    with ProxyPair.open(tiny_bundle, n_threads=1) as pair:
        yield pair


@pytest.fixture(scope="module")
def halves(tiny_bundle: Path) -> tuple[Rows, Rows]:
    """(z₊, z₋) after each prefix of TEXT, by two plain models."""

    def scores(name: str) -> Rows:
        path = str(tiny_bundle / name)
        with closing(
            llama_cpp.Llama(path, n_ctx=0, logits_all=True, flash_attn=False, n_threads=1, verbose=False)
        ) as llm:
            llm.eval(TEXT)
            return np.array(llm.scores[: len(TEXT)])

    return scores(PLUS_NAME), scores(MINUS_NAME)


def step(pair: ProxyPair, token: int) -> Rows:
    """Decodes one token, as the lockstep does, and returns Δ for what follows it."""
    with closing(LlamaBatch(n_tokens=1, embd=0, n_seq_max=1, verbose=False)) as batch:
        batch.set_batch([token], len(pair.tokens), False)
        assert pair.decode(batch) == 1
    plus, minus = pair.rows()
    return delta(plus[0], minus[0], pair.bundle.epsilon)


def assert_delta(pair: ProxyPair, got: Rows, expected: Rows) -> None:
    """Equal to what ROUNDING in the logits allows."""
    np.testing.assert_allclose(got, expected, atol=ROUNDING / (2 * pair.bundle.epsilon), rtol=0)


# Δ


def test_delta_is_a_float32_row_for_every_prefix(pair: ProxyPair) -> None:
    got = pair.delta(TEXT)
    assert got.dtype == np.float32
    assert got.shape == (len(TEXT), tiny.N_VOCAB)
    assert pair.tokens == TEXT


def test_delta_is_the_central_difference_of_two_plain_models(pair: ProxyPair, halves: tuple[Rows, Rows]) -> None:
    """(z₊ − z₋) / (2ε), row by row, to ROUNDING / (2ε) where Δ is up to 3."""
    plus, minus = halves
    expected = (plus.astype(np.float64) - minus.astype(np.float64)) / (2 * pair.bundle.epsilon)
    assert np.abs(expected).max() > 1
    assert_delta(pair, pair.delta(TEXT), expected.astype(np.float32))


def test_logits_are_those_of_two_plain_models(pair: ProxyPair, halves: tuple[Rows, Rows]) -> None:
    chunks = [(plus.copy(), minus.copy()) for plus, minus in pair.logits(TEXT)]
    for got, expected in zip(map(np.concatenate, zip(*chunks, strict=True)), halves, strict=True):
        np.testing.assert_allclose(got, expected, atol=ROUNDING, rtol=0)


def test_delta_changes_sign_with_the_halves(tiny_bundle: Path, pair: ProxyPair) -> None:
    plus, minus = tiny_bundle / PLUS_NAME, tiny_bundle / MINUS_NAME
    with load_as(pair.bundle, minus, plus, context_params(n_threads=1)) as swapped:
        assert_delta(pair, swapped.delta(TEXT), -pair.delta(TEXT))


def test_delta_is_inverse_to_epsilon(tiny_bundle: Path, pair: ProxyPair) -> None:
    bundle = dataclasses.replace(pair.bundle, epsilon=2 * pair.bundle.epsilon)
    with load_as(bundle, *bundle.files, context_params(n_threads=1)) as halved:
        assert_delta(pair, 2 * halved.delta(TEXT), pair.delta(TEXT))


@pytest.mark.parametrize(("n_outputs", "n_batch"), [(1, 512), (7, 512), (64, 5), (3, 2), (100_000, 512)])
def test_chunks_do_not_matter(n_outputs: int, n_batch: int, tiny_bundle: Path, pair: ProxyPair) -> None:
    with ProxyPair.open(tiny_bundle, n_threads=1, n_outputs=n_outputs, n_batch=n_batch) as other:
        assert other.n_outputs == min(n_outputs, n_batch)
        assert max(len(plus) for plus, _ in other.logits(TEXT)) <= other.n_outputs
        assert_delta(pair, other.delta(TEXT), pair.delta(TEXT))


def test_the_dose_is_centred_on_the_proxys_expectation(pair: ProxyPair) -> None:
    """Σ_x p(x) dose(x) = 0 under softmax((z₊ + z₋) / 2), to 1e-5 of float32 sums; a token that has no Δ has no dose."""
    step(pair, TEXT[0])
    (plus,), (minus,) = pair.rows()
    p = np.exp((plus.astype(np.float64) + minus) / 2)
    doses = [pair.dose(0, token) for token in range(tiny.N_VOCAB)]
    assert np.dot(p / p.sum(), doses) == pytest.approx(0.0, abs=1e-5)
    assert np.std(doses) > 0.1
    assert pair.dose(0, tiny.N_VOCAB) == 0.0
    with pytest.raises(InputError, match="row 1 of 1"):
        pair.dose(1, 0)


def test_doses_of_a_text(tiny_bundle: Path, pair: ProxyPair) -> None:
    """Of each token given those before it, by the oracle, to rounding of Δ; in chunks of 7 rows."""
    logits = [(plus.copy(), minus.copy()) for plus, minus in pair.logits(TEXT[:-1])]
    plus, minus = map(np.concatenate, zip(*logits, strict=True))
    expected = [
        row[token] - expectation(p, m, row)
        for p, m, token in zip(plus, minus, TEXT[1:], strict=True)
        for row in [delta(p, m, pair.bundle.epsilon)]
    ]
    with ProxyPair.open(tiny_bundle, n_threads=1, n_outputs=7) as other:
        np.testing.assert_allclose(other.doses(TEXT), expected, atol=ROUNDING / (2 * pair.bundle.epsilon))


# Following the teacher


JUMPS: list[list[int]] = [
    TEXT[:10],
    TEXT[:10],  # again
    TEXT[:25],  # on
    TEXT[:4],  # rollback
    [*TEXT[:4], *b"other text"],  # on from there with other tokens
    [*TEXT[:4], *b"other"],
    [tiny.BOS, *b"nothing in common"],
    [],  # forget
    [*b"no BOS"],
    TEXT[:-1],
]


def test_sync_follows_any_jump(tiny_bundle: Path) -> None:
    """After each, Δ for the token after next is that of a fresh pair which evaluated the whole text at once."""
    with ProxyPair.open(tiny_bundle, n_threads=1) as jumping, ProxyPair.open(tiny_bundle, n_threads=1) as fresh:
        for tokens in JUMPS:
            jumping.sync(tokens)
            assert jumping.tokens == tokens
            row = step(jumping, ord("!"))
            assert jumping.tokens == [*tokens, ord("!")]
            assert_delta(fresh, row, fresh.delta([*tokens, ord("!")])[-1])


def test_sync_evaluates_only_what_is_new(pair: ProxyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = ProxyPair.decode

    def counting(self: ProxyPair, batch: LlamaBatch) -> int:
        decoded.append(batch.n_tokens())
        return decode(self, batch)

    pair.clear()
    monkeypatch.setattr(ProxyPair, "decode", counting)
    for tokens in (TEXT[:10], TEXT[:15], TEXT[:12], [*TEXT[:8], 65, 66, 67], []):
        pair.sync(tokens)
    assert decoded == [10, 5, 3]


def test_sync_takes_more_tokens_than_a_batch(tiny_bundle: Path, pair: ProxyPair) -> None:
    with ProxyPair.open(tiny_bundle, n_threads=1, n_batch=4) as small:
        small.sync(TEXT[:-1])
        assert_delta(pair, step(small, TEXT[-1]), pair.delta(TEXT)[-1])


def test_rows_belong_to_the_last_decode(pair: ProxyPair) -> None:
    pair.delta(TEXT)
    forgets: list[Callable[[], None]] = [lambda: pair.sync(TEXT[:3]), pair.clear]
    for forget in forgets:
        forget()
        with pytest.raises(ProxyError, match="no evaluated rows: decode a batch first"):
            pair.rows()


def test_a_refused_token_leaves_nothing_to_read(pair: ProxyPair) -> None:
    """Old rows may not be taken for its."""
    expected = pair.delta(TEXT)
    for bad in (tiny.N_VOCAB, -1):
        with pytest.raises(ProxyError, match=rf"token {bad} is none of the proxy's 264; no token was emitted"):
            pair.sync([*TEXT, bad])
        with pytest.raises(ProxyError, match="no evaluated rows"):
            pair.rows()
    pair.sync(TEXT[:-1])
    assert_delta(pair, step(pair, TEXT[-1]), expected[-1])


@pytest.mark.parametrize("half", [0, 1])
def test_one_failing_proxy_is_enough(half: int, tiny_bundle: Path, faults: Faults) -> None:
    """And the pair goes on when it works again."""
    with ProxyPair.open(tiny_bundle, n_threads=1) as pair:
        pair.sync(TEXT[:-1])
        expected = step(pair, TEXT[-1])
        with faults.failing(pair.contexts[half]), pytest.raises(ProxyError, match="llama_decode returned -3"):
            step(pair, 65)
        assert pair.tokens == []
        with pytest.raises(ProxyError, match="no evaluated rows"):
            pair.rows()
        pair.sync(TEXT[:-1])
        assert_delta(pair, step(pair, TEXT[-1]), expected)


# State


def test_a_saved_state_is_restored(pair: ProxyPair) -> None:
    """Evaluating on from it gives the same rows, bit for bit."""
    pair.sync(TEXT[:20])
    state = pair.save_state()
    rows = [step(pair, token) for token in TEXT[20:24]]
    pair.delta([tiny.BOS, *b"something else in between"])
    pair.load_state(state)
    assert pair.tokens == TEXT[:20]
    assert [step(pair, token).tobytes() for token in TEXT[20:24]] == [row.tobytes() for row in rows]


def test_rows_must_be_evaluated_after_a_state_is_loaded(pair: ProxyPair) -> None:
    pair.sync(TEXT[:20])
    pair.load_state(pair.save_state())
    with pytest.raises(ProxyError, match="no evaluated rows"):
        pair.rows()


def test_a_state_of_another_bundle_is_ignored(pair: ProxyPair) -> None:
    """It must not be mixed in; `sync` evaluates afresh."""
    pair.sync(TEXT[:20])
    foreign = dataclasses.replace(pair.save_state(), bundle_id="another")
    pair.load_state(foreign)
    assert pair.tokens == []
    pair.sync(TEXT[:-1])
    assert_delta(pair, step(pair, TEXT[-1]), pair.delta(TEXT)[-1])


# Limits and lifetime

COUNT_THREADS = """
import os, sys, llama_cpp, adlocal
options = dict(n_ctx=64, n_threads=2, n_threads_batch=2, verbose=False)
if sys.argv[2]:
    llm = adlocal.AntidistillationLlama(sys.argv[1], bundle=sys.argv[2], **options)
else:
    llm = llama_cpp.Llama(sys.argv[1], **options)
before = len(os.listdir("/proc/self/task"))
for _ in zip(range(8), llm.generate(llm.tokenize(b"3 + 4 ="))):
    pass
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_protection_starts_no_threads(tiny_llama: Path, tiny_bundle: Path) -> None:
    """Three contexts share the teacher's."""
    commands = ([sys.executable, "-c", COUNT_THREADS, tiny_llama, bundle] for bundle in ("", tiny_bundle))
    unlimited = {name: value for name, value in os.environ.items() if name != "OMP_THREAD_LIMIT"}
    plain, protected = (
        subprocess.run(command, capture_output=True, check=True, env=unlimited, timeout=60).stdout
        for command in commands
    )
    assert int(protected) == int(plain)
    assert int(plain) >= 1


def test_the_context_is_the_trained_length_by_default(pair: ProxyPair) -> None:
    assert (pair.n_ctx, pair.n_vocab) == (256, tiny.N_VOCAB)


def test_a_context_longer_than_trained_for_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(ModelError, match="n_ctx=512 exceeds the 256 tokens that the proxy was trained for; ask for"):
        ProxyPair.open(tiny_bundle, n_ctx=512)


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_sequences_share_the_context_evenly(n_parallel: int, tiny_bundle: Path) -> None:
    """Each may have as many tokens as the proxy was trained for; llama.cpp rounds shares up, to 256 at a time."""
    bundle = Bundle.open(tiny_bundle)
    params = context_params(n_parallel * 256, n_outputs=1, n_threads=1)
    params.n_seq_max = n_parallel
    with (
        ProxyPair.of(bundle, params) as pair,
        closing(LlamaBatch(n_tokens=1, embd=0, n_seq_max=1, verbose=False)) as batch,
    ):
        for seq_id in range(n_parallel):
            batch.set_batch([65], 255, False)
            batch.batch.seq_id[0][0] = seq_id
            assert pair.decode(batch) == 1
    params.n_ctx += 256
    with pytest.raises(
        ModelError,
        match=f"n_ctx={params.n_ctx // n_parallel} exceeds the 256 tokens that the proxy was trained for; ask for",
    ):
        ProxyPair.of(bundle, params)


@pytest.mark.parametrize("n", [0, 257])
def test_a_text_that_does_not_fit_is_refused(n: int, pair: ProxyPair) -> None:
    with pytest.raises(
        InputError, match=f"{n} tokens given, expected 1 to n_ctx=256; open the pair with a larger n_ctx"
    ):
        pair.delta([65] * n)
    assert pair.delta([65] * 256).shape == (256, tiny.N_VOCAB)


def test_syncing_beyond_the_context_fails_and_recovers(pair: ProxyPair) -> None:
    pair.sync([65] * 200)  # no batch may be longer than the context
    with pytest.raises(ProxyError, match="no room in its context of 256 tokens; ask for a larger n_ctx"):
        pair.sync([65] * 257)
    pair.sync(TEXT)
    assert pair.tokens == TEXT


def test_no_bundle_no_pair(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle directory"):
        ProxyPair.open(tmp_path / "nowhere")


def test_closing_twice_is_fine(tiny_bundle: Path) -> None:
    with ProxyPair.open(tiny_bundle, n_threads=1) as pair:
        pair.close()
        with pytest.raises(InputError, match="the pair is closed"):
            pair.sync(TEXT)
    pair.close()


def test_a_with_statement_closes_after_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(InputError), ProxyPair.open(tiny_bundle, n_threads=1) as pair:
        pair.delta([])
    with pytest.raises(InputError, match="the pair is closed"):
        pair.clear()
