"""The same prompt gives the same rows to the bit, whether the context is fresh or holds some of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaRAMCache
from llama_cpp.llama_grammar import LlamaGrammar

from adlocal import AntidistillationLlama
from adlocal.bundle import MINUS_NAME, PLUS_NAME, Bundle
from support import tiny
from support.adapters import Pairs
from support.reference import Samples, sampling

KWARGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q4_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
STRENGTHS = (1.0, 2.0, 6.0)
N = 12  # tokens to sample
Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def wide(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """A model with rows that every type's blocks divide, and a direction."""
    folder = tmp_path_factory.mktemp("wide")
    return Pairs.of(folder, "llama", Bundle.open(tiny_bundle), hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module", params=TYPES)
def files(request: pytest.FixtureRequest, wide: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Teacher and halves in one type."""
    folder, ftype = tmp_path_factory.mktemp(request.param), TYPES[request.param]
    halves = wide.write_halves(folder / "halves")
    bundle = folder / "bundle"
    bundle.mkdir()
    for name in (PLUS_NAME, MINUS_NAME):
        tiny.quantized(halves / name, bundle / name, ftype)
    return tiny.quantized(wide.base, folder / "teacher.gguf", ftype), bundle


@pytest.fixture
def open_llm(files: Files) -> Iterator[Callable[..., AntidistillationLlama]]:
    """Opens them, and closes them at the end of the test."""
    opened: list[AntidistillationLlama] = []

    def open_one(**kwargs: Any) -> AntidistillationLlama:
        opened.append(AntidistillationLlama(str(files[0]), bundle=files[1], **{**KWARGS, **kwargs}))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()


def prompt_of(n: int, n_shared: int, seed: int = 0) -> list[int]:
    """Tokens of which the first are the same for every seed."""
    rng = np.random.default_rng(seed)
    return [
        tiny.BOS,
        *[(37 * i + i * i) % 256 for i in range(n_shared - 1)],
        *rng.integers(0, 256, n - n_shared).tolist(),
    ]


PROMPT = prompt_of(70, 70)
# What comes before it, each with text that is sampled after it.
OTHERS: dict[str, list[int]] = {
    "itself": PROMPT,
    "nothing shared": [5, *prompt_of(50, 1, seed=1)],
    "5 tokens shared": prompt_of(60, 5, seed=2),
    "40 tokens shared": prompt_of(60, 40, seed=3),
    "40 tokens shared, longer": prompt_of(150, 40, seed=4),
    "all but the last shared": [*PROMPT[:-1], 9],
    "a part of it": PROMPT[:68],
    "more than it": [*PROMPT, *range(60)],
}


def said(
    patch: pytest.MonkeyPatch, llm: AntidistillationLlama, prompt: Sequence[int] = PROMPT, **settings: float
) -> Samples:
    """What is sampled, and from what."""
    with sampling(patch, llm) as samples:
        list(itertools.islice(llm.generate(prompt, temp=0.0, **settings), N))
    return samples


def assert_same(found: Samples, expected: Samples, what: str) -> None:
    assert found.tokens == expected.tokens, what
    assert [row.tobytes() for row in found.rows] == [row.tobytes() for row in expected.rows], what


@pytest.mark.parametrize(("n_batch", "guard"), [(512, 0.05), (512, 0.6), (40, 0.6)])  # a choice in every row or in some
def test_cold_and_cached(
    n_batch: int, guard: float, open_llm: Callable[..., AntidistillationLlama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, the second and the third time, and after another prompt, at strength 0 too."""
    llm = open_llm(guard=guard, n_batch=n_batch)
    for strength in STRENGTHS:
        llm.reset()
        cold = said(monkeypatch, llm, strength=strength)
        for what, other in OTHERS.items():
            for before in (strength, 0.0) if strength == 2 else (strength,):
                said(monkeypatch, llm, other, strength=before)
                assert_same(said(monkeypatch, llm, strength=strength), cold, f"{what}, strength {before}")
    stats = llm._lockstep.stats()
    assert stats["n_choices"] > stats["n_rows"] / 10


def test_every_prompt_is_what_it_is_alone(
    open_llm: Callable[..., AntidistillationLlama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, in turns; also where every token of a prompt has a row."""
    for logits_all in (False, True):
        llm = open_llm(guard=0.6, strength=2.0, logits_all=logits_all)
        cold = {}
        for what, prompt in OTHERS.items():
            llm.reset()
            cold[what] = said(monkeypatch, llm, prompt)
        for what, prompt in [*OTHERS.items(), *reversed(OTHERS.items())]:
            assert_same(said(monkeypatch, llm, prompt), cold[what], what)
        for what, prompt in OTHERS.items():
            said(monkeypatch, llm, PROMPT)
            said(monkeypatch, llm, prompt, strength=0.0)  # from there on, as plain llama.cpp does it
            assert_same(said(monkeypatch, llm, prompt), cold[what], f"{what}, unprotected before")


def test_a_restored_state_gives_the_rows_of_a_fresh_context(
    open_llm: Callable[..., AntidistillationLlama], monkeypatch: pytest.MonkeyPatch
) -> None:
    for guard in (0.05, 0.6, 1.0):
        llm = open_llm(guard=guard, strength=2.0)
        cold = said(monkeypatch, llm)
        states = [llm.save_state()]
        for other in OTHERS.values():
            said(monkeypatch, llm, other)
            states.append(llm.save_state())
        for state, what in zip(states, ["the prompt", *OTHERS], strict=True):
            llm.load_state(state)
            assert_same(said(monkeypatch, llm), cold, what)


def test_a_cache_of_states_gives_the_text_of_a_fresh_context(
    open_llm: Callable[..., AntidistillationLlama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`LlamaRAMCache`, which llama-cpp-python asks before every prompt."""
    asked: dict[str, Any] = {"max_tokens": N, "temperature": 0.0}
    asked["grammar"] = LlamaGrammar.from_string("root ::= [a-z]+", verbose=False)  # else it babbles bytes
    prompts = ["a prompt of some length, to be cached", "a prompt of some length, to be forgotten", "a prompt", "no"]
    for strength in STRENGTHS:
        llm = open_llm(strength=strength, guard=0.6)
        cold = []
        for prompt in prompts:
            llm.reset()
            with sampling(monkeypatch, llm) as samples:
                text = llm.create_completion(prompt, **asked)["choices"][0]["text"]
            cold.append((text, samples))
        llm.set_cache(LlamaRAMCache())
        for prompt, (text, expected) in [*zip(prompts, cold, strict=True)] * 3:
            with sampling(monkeypatch, llm) as samples:
                assert llm.create_completion(prompt, **asked)["choices"][0]["text"] == text
            assert_same(samples, expected, prompt)
