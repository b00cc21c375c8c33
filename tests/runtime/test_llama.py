"""The drop-in on the real model: strength 0 is plain llama.cpp, and nothing that a client asks for evades protection.

Two runs of llama.cpp over the same tokens differ by the sizes of their batches, which choose other kernels and another
order of sums, and Δ carries a logit's rounding over 2ε. So the reference is given the very batches of the run, and rows
agree to a rounding. Reported log-probabilities of a whole prompt are compared by their mean distance from those of a
reference in one batch: ROUNDING is the share allowed of what protection moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama import LogitsProcessorList, MinTokensLogitsProcessor
from llama_cpp.llama_cache import LlamaRAMCache
from llama_cpp.llama_grammar import LlamaGrammar
from llama_cpp.llama_speculative import LlamaDraftModel

from adlocal import AntidistillationLlama, ProxyPair
from adlocal.adjust import adjust
from adlocal.engine.llama_context import LockstepContext
from adlocal.llamacpp.tokens import end_tokens
from adlocal_convert.demo.word_problems import word_problems
from support.reference import Reference, Samples, last_row, log_softmax, sampling

pytestmark = pytest.mark.real

STRENGTH = 8.0
GUARD = 0.0  # every token moves, so no token at the edge of the guard can fall on the other side of it
ROUNDING = 0.4
PROMPTS = [problem["prompt"].partition(",")[0] for problem in word_problems(20, seed=1)]
PROMPT = "The quick brown fox jumps over the lazy dog. The quick brown"
KWARGS: dict[str, Any] = {"n_ctx": 512, "n_threads": 2, "n_threads_batch": 2, "logits_all": True, "verbose": False}


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Iterator[llama_cpp.Llama]:
    with closing(llama_cpp.Llama(str(smollm2), **KWARGS)) as llm:
        yield llm


@pytest.fixture(scope="module")
def protected(smollm2: Path, smollm2_bundle: Path) -> Iterator[AntidistillationLlama]:
    with closing(AntidistillationLlama(str(smollm2), bundle=smollm2_bundle, **KWARGS)) as llm:
        yield llm


@pytest.fixture
def llm(protected: AntidistillationLlama) -> AntidistillationLlama:
    protected.reset()
    protected.set_cache(None)
    protected.strength, protected.guard = STRENGTH, GUARD
    return protected


@pytest.fixture(scope="module")
def reference(plain: llama_cpp.Llama, smollm2_bundle: Path) -> Iterator[Reference]:
    with ProxyPair.open(smollm2_bundle, n_ctx=512, n_threads=2) as pair:
        yield Reference(plain, pair)


# Strength 0 is plain llama.cpp

MODES: dict[str, Callable[[llama_cpp.Llama, str], Any]] = {
    "greedy": lambda llm, prompt: llm.create_completion(prompt, max_tokens=16, temperature=0.0),
    "seeded": lambda llm, prompt: llm.create_completion(prompt, max_tokens=16, temperature=1.0, seed=7),
    "streamed": lambda llm, prompt: list(llm.create_completion(prompt, max_tokens=12, seed=8, stream=True)),
    "grammar": lambda llm, prompt: llm.create_completion(
        prompt, max_tokens=12, seed=9, grammar=LlamaGrammar.from_string('root ::= [a-z ]+ "."', verbose=False)
    ),
    "chat": lambda llm, prompt: llm.create_chat_completion(
        [{"role": "user", "content": prompt}], max_tokens=12, temperature=0.0
    ),
}


def choices(result: Any) -> list[Any]:
    """What a client gets to see, without ids and times."""
    return [part["choices"] for part in (result if isinstance(result, list) else [result])]


@pytest.mark.parametrize("mode", MODES)
def test_strength_0_is_plain_llama(mode: str, plain: llama_cpp.Llama, llm: AntidistillationLlama) -> None:
    llm.strength = 0.0
    plain.reset()
    for prompt in PROMPTS:
        assert choices(MODES[mode](llm, prompt)) == choices(MODES[mode](plain, prompt))
        assert llm.n_tokens == plain.n_tokens
        assert np.array_equal(llm.scores[: llm.n_tokens], plain.scores[: plain.n_tokens])  # to the bit


def test_strength_0_does_not_wait_for_the_proxies(llm: AntidistillationLlama) -> None:
    llm.create_completion(PROMPT, max_tokens=4, strength=0.0)
    assert llm.pair.tokens == []
    assert (llm.last_dose.total, llm.last_dose.mean_kl, llm.last_dose.n_tokens) == (None, 0.0, 4)


# The equation, in place


def test_adjusted_logits_are_the_equation_on_three_independent_contexts(
    smollm2: Path, smollm2_bundle: Path, llm: AntidistillationLlama
) -> None:
    """Same batches, so to a rounding: a prompt, then a token at a time."""
    llm.guard = 0.05
    llm._logits_all = False  # rows of a prompt are computed by other kernels than its last row alone
    tokens = llm.tokenize(b"Once upon a time there was a")  # much is plausible after it
    paths = (smollm2, smollm2_bundle / "proxy-plus.gguf", smollm2_bundle / "proxy-minus.gguf")
    contexts = [llama_cpp.Llama(str(path), **{**KWARGS, "logits_all": False}) for path in paths]
    epsilon, lam = llm.pair.bundle.epsilon, llm.pair.bundle.lam(STRENGTH)
    ends = end_tokens(llm._model.vocab)
    moved = []
    try:
        for step in ([*tokens], [253], [2644], [28]):
            rows = [last_row(context, step) for context in (*contexts, llm)]
            z, plus, minus, adjusted = rows
            expected = adjust(z, (plus - minus) / np.float32(2 * epsilon), lam=lam, guard=0.05, ends=ends).logits
            np.testing.assert_allclose(adjusted, expected, rtol=1e-6, atol=1e-6)
            moved.append(not np.array_equal(adjusted, z))
        assert any(moved)
    finally:
        llm._logits_all = True
        for context in contexts:
            context.close()


# Nothing that a client may ask for turns protection off

EVASIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature 0": {"temperature": 0.0},
    "top_k 1": {"top_k": 1},
    "seed": {"seed": 3, "temperature": 1.5},
    "logit_bias": {"logit_bias": {"28": 3.0}, "temperature": 0.0},
    "grammar": {"grammar": LlamaGrammar.from_string("root ::= [a-z ]+", verbose=False)},
    "logprobs": {"logprobs": 2},
    "echo": {"logprobs": 2, "echo": True},
    "stop": {"stop": ["\n", "."]},
    "suffix": {"suffix": " the end."},
    "min_tokens": {"logits_processor": LogitsProcessorList([MinTokensLogitsProcessor(4, 2)])},
    "penalties": {"repeat_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "mirostat": {"mirostat_mode": 2},
    "typical": {"typical_p": 0.5, "min_p": 0.0, "top_p": 1.0},
}


@pytest.mark.parametrize("name", EVASIONS)
def test_sampled_from_adjusted_logits(
    name: str, llm: AntidistillationLlama, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sampling(monkeypatch, llm) as samples:
        completion = llm.create_completion(PROMPT, max_tokens=6, **EVASIONS[name])
    check_rows(reference, samples)
    if "logprobs" in EVASIONS[name]:
        check_logprobs(completion["choices"][0], reference, samples.tokens, echo="echo" in EVASIONS[name])


@pytest.mark.parametrize("chat", [False, True])
def test_streams_are_sampled_from_adjusted_logits(
    chat: bool, llm: AntidistillationLlama, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the strength is given to the call and another call has been made before the stream is read."""
    llm.strength = 0.0
    kwargs: dict[str, Any] = {"max_tokens": 6, "stream": True, "strength": STRENGTH, "temperature": 0.0}
    if chat:
        stream = llm.create_chat_completion([{"role": "user", "content": PROMPT}], **kwargs)
    else:
        stream = llm.create_completion(PROMPT, **kwargs)
    assert llm.strength == 0.0
    llm.create_completion("Something else", max_tokens=1)
    with sampling(monkeypatch, llm) as samples:
        assert list(stream)
    check_rows(reference, samples)
    assert llm.last_dose.strength == STRENGTH


def test_json_mode_is_sampled_from_adjusted_logits(
    llm: AntidistillationLlama, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sampling(monkeypatch, llm) as samples:
        llm.create_chat_completion(
            [{"role": "user", "content": "Name a colour."}], max_tokens=8, response_format={"type": "json_object"}
        )
    check_rows(reference, samples)


@pytest.mark.parametrize("before", [0.0, 2.0])
def test_a_cached_prompt_is_adjusted_anew_when_the_strength_changes(
    before: float, llm: AntidistillationLlama, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-cpp-python samples at once from logits that are there for the very same prompt."""
    llm.create_completion(PROMPT, max_tokens=1, strength=before)
    with sampling(monkeypatch, llm) as samples:
        completion = llm.create_completion(PROMPT, max_tokens=4, logprobs=1, echo=True)
    check_rows(reference, samples)
    check_logprobs(completion["choices"][0], reference, samples.tokens, echo=True)


def test_a_cached_prompt_is_reused(llm: AntidistillationLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    first = llm.create_completion(PROMPT, max_tokens=1, temperature=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(LockstepContext, "decode", lambda *_: pytest.fail("the prompt was evaluated again"))
        assert choices(llm.create_completion(PROMPT, max_tokens=1, temperature=0.0)) == choices(first)


@pytest.mark.parametrize("before", [0.0, STRENGTH])
def test_a_prompt_cache_holds_no_plain_logits(
    before: float, llm: AntidistillationLlama, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.set_cache(LlamaRAMCache())
    with sampling(monkeypatch, llm) as cached:
        llm.create_completion(PROMPT, max_tokens=3, strength=before, temperature=0.0)
    llm.create_completion("Something else entirely", max_tokens=2, strength=before)
    with sampling(monkeypatch, llm) as samples:
        completion = llm.create_completion(PROMPT, max_tokens=4, logprobs=1, echo=True)
    samples.batches[:0] = cached.batches  # what it may go on from
    check_rows(reference, samples)
    check_logprobs(completion["choices"][0], reference, samples.tokens, echo=True)


class _Foretold(LlamaDraftModel):
    """Drafts the tokens that are going to be sampled, and after every third a wrong one."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
        drafted = np.array(self.tokens[len(input_ids) :][:4], dtype=np.intc)
        drafted[3:] += 1
        return drafted


def test_drafted_tokens_are_verified_against_adjusted_logits(
    llm: AntidistillationLlama,
    smollm2: Path,
    smollm2_bundle: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right drafts are taken, several tokens a batch; wrong ones are rolled back in all three contexts."""
    llm.create_completion(PROMPT, max_tokens=16, temperature=0.0)
    draft = _Foretold(llm._input_ids.tolist())
    kwargs = {**KWARGS, "logits_all": False, "n_batch": 64}
    with closing(
        AntidistillationLlama(
            str(smollm2), bundle=smollm2_bundle, strength=STRENGTH, guard=GUARD, draft_model=draft, **kwargs
        )
    ) as drafting:
        with sampling(monkeypatch, drafting) as samples:
            drafting.create_completion(PROMPT, max_tokens=16, temperature=0.0)
        assert any(len(tokens) > 1 for _, tokens in samples.batches[1:]), "no token was drafted"
        check_rows(reference, samples)
        assert drafting.last_dose.n_tokens == len(samples.tokens)


def test_a_prompt_longer_than_n_batch(
    smollm2: Path, smollm2_bundle: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = {**KWARGS, "logits_all": False, "n_batch": 5}
    with closing(
        AntidistillationLlama(str(smollm2), bundle=smollm2_bundle, strength=STRENGTH, guard=GUARD, **kwargs)
    ) as llm:
        with sampling(monkeypatch, llm) as samples:
            llm.create_completion(PROMPT, max_tokens=3)
        check_rows(reference, samples)


def check_rows(reference: Reference, samples: Samples) -> None:
    """Every token was sampled from adjusted logits: the reference's over the same batches, to a rounding."""
    assert samples.tokens
    rows = reference.replayed(samples.batches, STRENGTH, GUARD)
    for position, row in zip(samples.positions, samples.rows, strict=True):
        z, expected = rows[position]
        np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-6)
        assert np.abs(row - z).mean() > 1


def check_logprobs(choice: Any, reference: Reference, sampled: list[int], echo: bool) -> None:
    """Reported log-probabilities are those of the adjusted rows."""
    prompt = reference.teacher.tokenize(PROMPT.encode())
    tokens = prompt + sampled[:-1]
    adjusted = log_softmax(reference.adjusted(tokens, STRENGTH, GUARD))
    plain = log_softmax(reference.plain(tokens))
    reported = choice["logprobs"]["token_logprobs"]
    if echo:  # llama-cpp-python pairs token i with the row after it; the first is null
        shown, first = [*prompt, *sampled], 0
    else:
        shown, first = sampled, len(prompt) - 1
    got = np.array([value for value in reported if value is not None])
    skip = len(reported) - len(got)
    n = min(len(got), len(tokens) - first - skip)
    at = [(first + skip + i, shown[skip + i]) for i in range(n)]
    right = np.array([adjusted[row, token] for row, token in at])
    wrong = np.array([plain[row, token] for row, token in at])
    assert np.mean(np.abs(got[:n] - right)) < ROUNDING * np.mean(np.abs(got[:n] - wrong))
