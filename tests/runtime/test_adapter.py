"""Adapter bundles against halves written in full: one direction, two ways to run it."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from adlocal import (
    AntidistillationLlama,
    Bundle,
    BundleError,
    ConversionError,
    InputError,
    ModelError,
    ProxyError,
    ProxyPair,
)
from adlocal.bundle import ADAPTER, ADAPTER_NAME, BASE_NAME, MINUS_NAME, NAMES, PLUS_NAME
from adlocal.bundle.verify import verify
from adlocal.llamacpp import native
from adlocal.llamacpp.gguf import GGUFHeader
from adlocal.pair import context_params
from adlocal_convert.bundle.adapter import adapter_sha256, write_adapter
from adlocal_convert.direction.lowrank import LowRank
from adlocal_convert.source.quantize import quantize
from support import tiny
from support.adapters import EPSILON, RANK, Pairs
from support.cli import Cli
from support.faults import Faults
from support.loading import load_as
from support.spoiled import drop, flip, problem, read_natively, rewrite

Rows = npt.NDArray[np.float32]

TEXT = [tiny.BOS, *b"Twelve apples less five are seven apples."]
# In logits, which are up to 3 here. Both ways compute in float32, but (W + εBA)x and Wx + ε(B(Ax)) round otherwise, and
# now and then a value of the f16 cache the other way: up to 7e-4 measured, where z₊ and z₋ are 0.5 to 2 apart.
ROUNDING = 2e-3
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
}


@pytest.fixture(scope="module", params=CASES)
def pairs(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    architecture, overrides = CASES[request.param]
    return Pairs.of(tmp_path_factory.mktemp("pairs"), architecture, Bundle.open(tiny_bundle), **overrides)


def logits(pair: ProxyPair) -> tuple[Rows, Rows]:
    """(z₊, z₋) after each prefix of TEXT."""
    chunks = [(plus.copy(), minus.copy()) for plus, minus in pair.logits(TEXT)]
    plus, minus = map(np.concatenate, zip(*chunks, strict=True))
    return plus, minus


def assert_same_logits(ours: ProxyPair, theirs: ProxyPair) -> None:
    for got, expected in zip(logits(ours), logits(theirs), strict=True):
        np.testing.assert_allclose(got, expected, atol=ROUNDING, rtol=0)


# The file


def test_what_is_stored_gives_the_halves_weights(pairs: Pairs, tmp_path: Path) -> None:
    """θ + step · b @ a from the two files, +ε and −ε, to two roundings of float32. A table's factors are the other way
    round: its lora_a has a row a token.
    """
    bundle = pairs.write_adapter_bundle(tmp_path / "adapter")
    halves = pairs.write_halves(tmp_path / "halves")
    base = {t.name: t.data for t in gguf.GGUFReader(bundle / BASE_NAME).tensors}
    stored = {t.name: t.data for t in gguf.GGUFReader(bundle / ADAPTER_NAME).tensors}
    assert {name.rpartition(".lora_")[0] for name in stored} == {d.name for d in pairs.directions}
    for name, step in ((PLUS_NAME, EPSILON), (MINUS_NAME, -EPSILON)):
        for tensor in gguf.GGUFReader(halves / name).tensors:
            expected = base[tensor.name]
            if (a := stored.get(f"{tensor.name}.lora_a")) is not None:
                b = stored[f"{tensor.name}.lora_b"].astype(np.float64)
                product = a @ b.T if tensor.name == "token_embd.weight" else b @ a
                expected = expected + step * product
                assert np.abs(product).max() > 1e-3
            np.testing.assert_allclose(tensor.data, expected, rtol=0, atol=2 * 2.0**-24)


def test_the_file_is_an_adapter_for_its_owner_alone(tiny_pairs: Pairs, adapter_bundle: Path) -> None:
    path = adapter_bundle / ADAPTER_NAME
    header, bundle = GGUFHeader(path), Bundle.open(adapter_bundle)
    assert path.stat().st_mode & 0o777 == 0o600
    keys = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert {key: header.get(key) for key in keys} == keys
    assert (header.get("adapter.lora.alpha"), header.get("adlocal.sign")) == (0.0, 1)
    assert (bundle.format, bundle.adapter_rank) == ("adapter", RANK)
    assert bundle.carriers_sha256 == [adapter_sha256(tiny_pairs.directions)]
    verify(adapter_bundle)


@pytest.mark.parametrize(
    ("name", "a", "b", "tied", "words"),
    [
        ("token_embd.weight", (1, 4), (8, 1), True, "is the output head too"),
        ("output.weight", (2, 4), (8, 3), False, r"\(8, 3\) and \(2, 4\), expected"),
        ("output.weight", (5, 4), (8, 5), False, "rank from 1 to the matrix's smaller"),
        ("output.weight", (0, 4), (8, 0), False, "rank from 1 to the matrix's smaller"),
        ("a matrix of NaN", (1, 4), (8, 1), False, "NaN or infinite"),
    ],
)
def test_what_no_adapter_can_hold(
    name: str, a: tuple[int, int], b: tuple[int, int], tied: bool, words: str, tmp_path: Path
) -> None:
    value = np.nan if "NaN" in name else 1.0
    pair = LowRank(name, np.full(a, value, np.float32), np.ones(b, np.float32))
    with pytest.raises(ConversionError, match=words):
        write_adapter(tmp_path / "adapter.gguf", "llama", [pair], [], tied=tied)
    assert not (tmp_path / "adapter.gguf").exists()


# Δ


@pytest.mark.parametrize("epsilon", [EPSILON, 5 * EPSILON])
def test_delta_is_that_of_the_halves_at_any_epsilon(epsilon: float, pairs: Pairs, tmp_path: Path) -> None:
    """Both proxies' logits to ROUNDING, the negative scale's included, and Δ to that over 2ε. An ε that is asked for is
    that of halves written at it.
    """
    bundle = pairs.write_adapter_bundle(tmp_path / "adapter")
    halves = pairs.write_halves(tmp_path / "halves", epsilon)
    with ProxyPair.open(bundle, n_threads=1, epsilon=epsilon) as ours, ProxyPair.open(halves, n_threads=1) as theirs:
        assert ours.epsilon == theirs.epsilon == epsilon
        assert_same_logits(ours, theirs)
        expected = theirs.delta(TEXT)
        assert np.abs(expected).max() > 50 * ROUNDING
        np.testing.assert_allclose(ours.delta(TEXT), expected, atol=2 * ROUNDING / (2 * epsilon), rtol=0)
        plus, minus = logits(ours)
        assert np.abs(plus - minus).max() > 20 * ROUNDING, "the two signs would not tell"
        doses = np.array(theirs.doses(TEXT))
        np.testing.assert_allclose(ours.doses(TEXT), doses, atol=4 * ROUNDING / (2 * epsilon), rtol=0)


def test_epsilon_of_an_open_pair(adapter_bundle: Path, tiny_pairs: Pairs, tmp_path: Path) -> None:
    """Set twice without a decode between, and back: to ROUNDING of halves written at each, and to the bit of before."""
    five = tiny_pairs.write_halves(tmp_path / "five", 5 * EPSILON)
    with ProxyPair.open(adapter_bundle, n_threads=1) as pair, ProxyPair.open(five, n_threads=1) as theirs:
        before, serial = logits(pair), pair.serial
        pair.set_epsilon(3 * EPSILON)
        pair.set_epsilon(5 * EPSILON)
        assert pair.serial != serial
        assert (pair.tokens, pair.epsilon, pair.bundle.epsilon) == ([], 5 * EPSILON, EPSILON)
        with pytest.raises(ProxyError, match="no evaluated rows"):
            pair.rows()
        assert_same_logits(pair, theirs)
        pair.set_epsilon(EPSILON)
        for got, expected in zip(logits(pair), before, strict=True):
            np.testing.assert_array_equal(got, expected)
        for value in (0.0, -1.0, float("nan"), 1e300):
            with pytest.raises(InputError, match="epsilon="):
                pair.set_epsilon(value)
            assert (pair.epsilon, pair.tokens) == (EPSILON, TEXT)
        with pytest.raises(InputError, match="which cannot be changed; convert to an adapter bundle"):
            theirs.set_epsilon(1.0)
    for value, words in ((0.0, "give a positive number"), (-1.0, "give a positive number"), (1e300, "float32")):
        with pytest.raises(InputError, match=words):
            ProxyPair.open(adapter_bundle, n_threads=1, epsilon=value)
    with pytest.raises(InputError, match=r"epsilon=1: these halves were written at 1\.5"):
        ProxyPair.open(five, n_threads=1, epsilon=1.0)


def test_a_state_of_another_epsilon_is_not_restored(adapter_bundle: Path) -> None:
    with ProxyPair.open(adapter_bundle, n_threads=1) as pair:
        pair.sync(TEXT)
        state = pair.save_state()
        pair.set_epsilon(2 * EPSILON)
        pair.load_state(state)
        assert pair.tokens == []
        pair.set_epsilon(EPSILON)
        pair.load_state(state)
        assert pair.tokens == TEXT


def test_a_quantized_base_follows_the_same_direction(tiny_pairs: Pairs, tmp_path: Path) -> None:
    """Q8_0: its kernel rounds activations to 8 bits, which differ between the two signs. Cosine with Δ of F32 halves
    along the same direction, a position: 0.97 at the median (measured 0.99).
    """
    quantize(tiny_pairs.base, tmp_path / "q8.gguf", "Q8_0", 1)
    halves = tiny_pairs.write_halves(tmp_path / "halves", 5 * EPSILON)
    bundle, params = dataclasses.replace(Bundle.open(halves), format=ADAPTER), context_params(n_threads=1)
    adapter = tmp_path / "adapter.gguf"
    write_adapter(adapter, "llama", tiny_pairs.directions, [], tied=False)
    with (
        load_as(bundle, tmp_path / "q8.gguf", adapter, params) as ours,
        ProxyPair.open(halves, n_threads=1) as theirs,
    ):
        got, expected = (d - d.mean(axis=1, keepdims=True) for d in (ours.delta(TEXT), theirs.delta(TEXT)))
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.median(np.sum(got * expected, axis=1) / norms) > 0.97


# Memory and threads


class Calls:
    """Counts calls of llama_model_load_from_file, slipped under the native core."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        address_of, real = native.address_of, llama_cpp.llama_model_load_from_file

        def load(path: bytes, params: Any) -> int | None:
            self.paths.append(Path(os.fsdecode(path)).name)
            return ctypes.cast(real(path, params), ctypes.c_void_p).value

        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, llama_cpp.llama_model_params)
        self._callback = prototype(load)
        ours = {"llama_model_load_from_file": ctypes.cast(self._callback, ctypes.c_void_p).value}
        monkeypatch.setattr(native, "address_of", lambda name: ours.get(name) or address_of(name))


def test_one_model_is_loaded(adapter_bundle: Path, equal_halves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    with ProxyPair.open(adapter_bundle, n_threads=1) as pair:
        assert len(set(pair.contexts)) == 2
        models = {llama_cpp.llama_get_model(ctypes.c_void_p(context)) for context in pair.contexts}
        assert len(models) == 1
    assert calls.paths == [BASE_NAME]
    with ProxyPair.open(equal_halves, n_threads=1):
        assert calls.paths == [BASE_NAME, PLUS_NAME, MINUS_NAME]


def test_two_threads_over_one_model_compute_what_one_computes(adapter_bundle: Path) -> None:
    """ADL_CONCURRENCY_BOTH, to the bit: each context has one thread in both modes."""
    bundle, lib = Bundle.open(adapter_bundle), native.library()
    table = native.llama_table(lib)
    found = []
    for mode, n_threads in ((1, 1), (2, 2)):
        contexts = context_params(n_ctx=64, n_threads=n_threads)
        params = native.sized(native.PairParams, llama_cpp.llama_model_default_params(), contexts, mode)
        paths = (os.fsencode(adapter_bundle / name) for name in NAMES["adapter"])
        handle = lib.adl_pair_init_from_adapter(
            ctypes.byref(table), *paths, bundle.epsilon, bundle.delta_scale, None, params
        )
        with ProxyPair(handle, 64, 64, bundle) as pair:
            found.append([logits(pair) for _ in range(5)])
    np.testing.assert_array_equal(np.array(found[0]), np.array(found[1]))


# Bundles: both readers refuse the same


def swap(directory: Path) -> None:
    first, second = (directory / name for name in NAMES["adapter"])
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


VECTORS: dict[str, Callable[[Path], object]] = {
    **{f"no {name}": lambda d, name=name: (d / name).unlink() for name in NAMES["adapter"]},  # type: ignore[misc]
    **{f"a half beside it: {name}": lambda d, name=name: (d / name).touch() for name in NAMES["halves"]},  # type: ignore[misc]
    "swapped": swap,
    "the names of halves": lambda d: [
        (d / a).rename(d / b) for a, b in zip(NAMES["adapter"], NAMES["halves"], strict=True)
    ],
    "base twice": lambda d: shutil.copy(d / BASE_NAME, d / ADAPTER_NAME),
    "adapter twice": lambda d: shutil.copy(d / ADAPTER_NAME, d / BASE_NAME),
    "another ε": lambda d: rewrite(d / ADAPTER_NAME, "adlocal.epsilon", 1.0),
    "a sign of −1": lambda d: rewrite(d / ADAPTER_NAME, "adlocal.sign", -1),
    "alpha": lambda d: rewrite(d / ADAPTER_NAME, "adapter.lora.alpha", 16.0),
    "no alpha": lambda d: drop(d / ADAPTER_NAME, "adapter.lora.alpha"),
    "no rank": lambda d: drop(d / BASE_NAME, "adlocal.adapter.rank"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_what_one_reader_refuses_the_other_refuses(name: str, adapter_bundle: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(adapter_bundle, tmp_path / "bundle"))
    assert read_natively(directory).is_adapter
    VECTORS[name](directory)
    for opened in (Bundle.open, read_natively):
        assert problem(directory, opened)


def test_lists_must_be_as_long_as_there_are_capabilities(tiny_pairs: Pairs, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "capability_weights": [],
        "capability_traces": [1, 2],
        "capability_sha256": ["a", "b"],
        "capability_cosines": [1.0] * 4,
    }
    for i, (field, value) in enumerate(changes.items()):
        template = dataclasses.replace(tiny_pairs.template, **{field: value})
        directory = dataclasses.replace(tiny_pairs, template=template).write_adapter_bundle(tmp_path / str(i))
        for opened in (Bundle.open, read_natively):
            assert "entries, expected 1; convert again" in problem(directory, opened)


def test_empty_lists_are_read_by_both(tiny_pairs: Pairs, tmp_path: Path) -> None:
    empty: dict[str, Any] = {
        f.name: [] for f in dataclasses.fields(Bundle) if f.name.startswith(("capability_", "sweep_"))
    }
    template = dataclasses.replace(tiny_pairs.template, params_excluded=[], **empty)
    directory = dataclasses.replace(tiny_pairs, template=template).write_adapter_bundle(tmp_path / "bundle")
    assert Bundle.open(directory).capability_traces == []
    assert read_natively(directory).epsilon == EPSILON


def test_an_altered_adapter_is_found(adapter_bundle: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(adapter_bundle, tmp_path / "bundle"))
    flip(directory / ADAPTER_NAME, GGUFHeader(directory / ADAPTER_NAME).tensors[-1])
    Bundle.open(directory)
    assert f"{directory / ADAPTER_NAME}: its carriers were altered" in problem(directory, verify)


def test_the_proxys_own_file(adapter_bundle: Path, equal_halves: Path, tmp_path: Path) -> None:
    assert Bundle.open(adapter_bundle).proxy == adapter_bundle / BASE_NAME
    assert Bundle.open(equal_halves).proxy == equal_halves / PLUS_NAME
    with pytest.raises(BundleError, match="no such bundle directory"):
        Bundle.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", NAMES["adapter"])
def test_a_file_that_llama_cpp_refuses_is_named(name: str, adapter_bundle: Path, tmp_path: Path) -> None:
    """An adapter of another model's shapes, or no adapter at all; a base that is an adapter."""
    other = NAMES["adapter"][name == BASE_NAME]
    bundle, params = Bundle.open(adapter_bundle), context_params(n_threads=1)
    first, second = (adapter_bundle / (other if n == name else n) for n in NAMES["adapter"])
    with pytest.raises(ModelError, match=rf"{other}: llama\.cpp cannot load this"):
        load_as(bundle, first, second, params)


# Commands


def test_inspect_and_score_of_an_adapter_bundle(adapter_bundle: Path, tiny_traces: Path, cli: Cli) -> None:
    status, page, _ = cli("inspect", adapter_bundle)
    assert status == 0
    for part in ("(adapter, custom, format 2", f"an adapter of rank {RANK} or less", "traces", "parameters    all"):
        assert part in page
    assert set(json.loads(cli("inspect", adapter_bundle, "--json").out)["bytes"]) == set(NAMES["adapter"])
    assert json.loads(cli("score", "--bundle", adapter_bundle, tiny_traces, "-t", 1, "--json").out)["traces"] == 10


# The drop-in


def generated(model: Path, bundle: Path | None, n: int = 24, strength: float = 6.0, **kwargs: Any) -> list[int]:
    """Greedy tokens after a prompt; of the plain teacher without a bundle."""
    common: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llm = (
        llama_cpp.Llama(str(model), **common)
        if bundle is None
        else AntidistillationLlama(str(model), bundle=bundle, strength=strength, **common, **kwargs)
    )
    with closing(llm):
        stream = llm.generate(llm.tokenize(b"3 + 4 ="), temp=0.0)
        return [next(stream) for _ in range(n)]


def test_the_drop_in_samples_what_it_samples_with_the_halves(
    tiny_llama: Path, adapter_bundle: Path, equal_halves: Path, tiny_pairs: Pairs, tmp_path: Path
) -> None:
    plain = generated(tiny_llama, None)
    protected = generated(tiny_llama, adapter_bundle)
    assert protected == generated(tiny_llama, equal_halves)
    assert protected != plain, "protection would not tell"
    assert generated(tiny_llama, adapter_bundle, strength=0.0) == plain
    ten = tiny_pairs.write_halves(tmp_path / "ten", 10 * EPSILON)
    assert generated(tiny_llama, adapter_bundle, epsilon=10 * EPSILON) == generated(tiny_llama, ten)


@pytest.mark.parametrize("logits_all", [False, True])
def test_rows_of_another_epsilon_are_not_sampled(logits_all: bool, tiny_llama: Path, adapter_bundle: Path) -> None:
    """A prompt that is cached, a saved state: after a change of ε what is sampled and reported is as if afresh."""
    kwargs: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    kwargs |= {"bundle": adapter_bundle, "strength": 6.0, "logits_all": logits_all}

    def answer(llm: AntidistillationLlama) -> Any:
        more: dict[str, Any] = (
            {"logprobs": 3, "echo": True} if logits_all else {}
        )  # the prompt's rows are looked at too
        return llm.create_completion("3 + 4 =", max_tokens=8, temperature=0.0, **more)["choices"]

    with closing(AntidistillationLlama(str(tiny_llama), **kwargs)) as llm:
        before = answer(llm)
        state = llm.save_state()
        llm.pair.set_epsilon(10 * EPSILON)
        with pytest.raises(ProxyError):
            llm.sample(temp=0.0)
        changed = answer(llm)
        llm.load_state(state)
        restored = answer(llm)
    with closing(AntidistillationLlama(str(tiny_llama), epsilon=10 * EPSILON, **kwargs)) as llm:
        expected = answer(llm)
    assert [c["text"] for c in restored] == [c["text"] for c in changed] == [c["text"] for c in expected]
    if logits_all:
        # The state's rows were evaluated again, and stand: the answer after it reads the prompt from the cache.
        cached, fresh = (c[0]["logprobs"]["token_logprobs"] for c in (restored, changed))
        assert cached[1:] == pytest.approx(fresh[1:], abs=1e-4)
        got, want = (c[0]["logprobs"]["token_logprobs"] for c in (changed, expected))
        assert got[1:] == pytest.approx(want[1:], abs=1e-3)
        assert got[1:3] != pytest.approx(before[0]["logprobs"]["token_logprobs"][1:3], abs=1e-2), "ε would not tell"


@pytest.mark.parametrize("which", [0, 1])
def test_a_proxy_that_fails_leaves_nothing_to_sample(
    which: int, tiny_llama: Path, adapter_bundle: Path, faults: Faults
) -> None:
    with closing(
        AntidistillationLlama(
            str(tiny_llama), bundle=adapter_bundle, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False
        )
    ) as llm:
        context = llm.pair.contexts[which]
        with faults.failing(context), pytest.raises(ProxyError, match=r"\+ε" if which == 0 else "−ε"):
            llm.create_completion("3 + 4 =", max_tokens=4)
        with faults.computing(context, float("nan")), pytest.raises(ProxyError):
            llm.create_completion("3 + 4 =", max_tokens=4)
        assert llm.create_completion("3 + 4 =", max_tokens=4)["usage"]["completion_tokens"] > 0
