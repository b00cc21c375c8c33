"""Teacher and pair on a GPU, with the real model: plain llama.cpp at strength 0, the equation, the fidelity of Δ.

They skip where llama.cpp was built without a GPU backend. Where two runs decode the same batches they run the same
kernels in the same order, so equality is to the bit; a GPU against a CPU is compared by the cosine of Δ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch

from adlocal import AntidistillationLlama, ProxyPair
from adlocal.adjust import adjust
from adlocal.bundle import MINUS_NAME, PLUS_NAME, Bundle
from adlocal.engine.parallel import ParallelLlama
from adlocal.engine.sequences import Request, Sampling
from adlocal.llamacpp.tokens import end_tokens
from adlocal.traces import EncodedTrace
from adlocal_convert.convert import convert
from adlocal_convert.demo.word_problems import word_problems
from adlocal_convert.direction.gradient import Settings, compute_gradient
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.options import Options
from support import tiny
from support.reference import last_row

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not llama_cpp.llama_supports_gpu_offload(), reason="llama.cpp has no GPU here"),
]
PROMPTS = [problem["prompt"].partition(",")[0] for problem in word_problems(8, seed=1)]
STRENGTH = 4.0
KWARGS: dict[str, Any] = {"n_ctx": 512, "n_gpu_layers": -1, "verbose": False}


@pytest.fixture(scope="module")
def gpu_bundle(smollm2: Path, smollm2_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose ε was swept on the GPU, from the traces of the one that was swept on the CPU."""
    out = tmp_path_factory.mktemp("gpu") / "bundle"
    traces = {"traces": smollm2_bundle.parent / "traces.jsonl"}
    convert(Options(str(smollm2), traces, out, n_gpu_layers=-1), print)
    return out


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Iterator[llama_cpp.Llama]:
    with closing(llama_cpp.Llama(str(smollm2), **KWARGS)) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm(smollm2: Path, gpu_bundle: Path) -> Iterator[AntidistillationLlama]:
    with closing(AntidistillationLlama(str(smollm2), bundle=gpu_bundle, strength=STRENGTH, **KWARGS)) as llm:
        yield llm


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_strength_0_is_plain_llama(temperature: float, plain: llama_cpp.Llama, llm: AntidistillationLlama) -> None:
    for prompt in PROMPTS:
        plain.reset()
        llm.reset()
        asked: dict[str, Any] = {"max_tokens": 24, "temperature": temperature, "seed": 7}
        expected: Any = plain.create_completion(prompt, **asked)
        assert llm.create_completion(prompt, strength=0.0, **asked)["choices"] == expected["choices"]


def test_adjusted_logits_are_the_equation_on_three_independent_contexts(
    smollm2: Path, gpu_bundle: Path, llm: AntidistillationLlama
) -> None:
    """A prompt, then a token at a time, to a rounding: whichever way the pair is evaluated."""
    llm.reset()
    bundle, moved, ends = Bundle.open(gpu_bundle), 0, end_tokens(llm._model.vocab)
    paths = (smollm2, gpu_bundle / PLUS_NAME, gpu_bundle / MINUS_NAME)
    contexts = [llama_cpp.Llama(str(path), flash_attn=path != smollm2, **KWARGS) for path in paths]
    prompt = llm.tokenize(b"Once upon a time there was a")
    try:
        for step in (prompt, *[[token] for token in llm.tokenize(b" little girl who lived by the sea and", False)] * 4):
            z, plus, minus, adjusted = (last_row(context, step) for context in (*contexts, llm))
            delta = (plus - minus) / np.float32(2 * bundle.epsilon)
            expected = adjust(z, delta, lam=bundle.lam(STRENGTH), guard=llm.guard, ends=ends).logits
            np.testing.assert_allclose(adjusted, expected, rtol=1e-6, atol=1e-6)
            moved += not np.array_equal(adjusted, z)
    finally:
        for context in contexts:
            context.close()
    assert moved > 10


def test_a_bundle_that_was_swept_on_the_gpu_is_faithful(gpu_bundle: Path) -> None:
    """Against the exact derivative: 0.959 was measured on CUDA, a CPU reaches 0.983; convert refuses under 0.90."""
    assert Bundle.open(gpu_bundle).fidelity_median >= 0.95


def test_a_bundle_swept_on_a_cpu_serves_on_a_gpu(smollm2_bundle: Path) -> None:
    """Δ after every prefix of the prompts, GPU against CPU. Noise of either size would leave a cosine near 0."""
    with (
        ProxyPair.open(smollm2_bundle, n_ctx=512) as cpu,
        ProxyPair.open(smollm2_bundle, n_ctx=512, n_gpu_layers=-1) as gpu,
        closing(llama_cpp.Llama(str(smollm2_bundle / PLUS_NAME), vocab_only=True, verbose=False)) as vocabulary,
    ):
        cosines = []
        for prompt in PROMPTS:
            tokens = vocabulary.tokenize(prompt.encode())
            for ours, theirs in zip(gpu.delta(tokens), cpu.delta(tokens), strict=True):
                cosines.append(np.corrcoef(ours, theirs)[0, 1])
            gpu.clear()
            cpu.clear()
    assert np.median(cosines) > 0.95


def test_proxies_on_the_cpu_beside_a_teacher_on_the_gpu(smollm2: Path, smollm2_bundle: Path) -> None:
    """Rows of the pair are those of a pair on the CPU, to the bit: the same batch on one thread."""
    own: dict[str, Any] = {"bundle": smollm2_bundle, "proxy_n_gpu_layers": 0, "proxy_n_threads": 1}
    with (
        closing(AntidistillationLlama(str(smollm2), strength=STRENGTH, **own, **KWARGS)) as llm,
        ProxyPair.open(smollm2_bundle, n_ctx=512, n_outputs=1, n_threads=1) as cpu,
    ):
        tokens = llm.tokenize(PROMPTS[0].encode())
        last_row(llm, tokens)
        cpu.sync(tokens[:-1])
        cpu.sync(tokens)
        assert np.array_equal(llm.pair.rows(), cpu.rows())


def test_parallel_sequences_get_a_dose(smollm2: Path, gpu_bundle: Path) -> None:
    """The same prompts, protected and plain, in batches: what is protected doses more, to the pair on the CPU too."""
    with ProxyPair.open(gpu_bundle, n_ctx=512) as cpu:

        def dosed(**protection: Any) -> float:
            with closing(ParallelLlama(smollm2, n_ctx=512, n_gpu_layers=-1, **protection)) as llm:
                prompts = [llm.model.tokenize(prompt.encode(), True, False) for prompt in PROMPTS]
                requests = [Request(i, tokens, n_predict=32, seed=i) for i, tokens in enumerate(prompts)]
                done = list(llm.generate(requests, Sampling(temp=0.8)))
            assert len(done) == len(PROMPTS)
            texts = [(prompts[c.index], [*prompts[c.index], *c.tokens]) for c in done]
            return float(sum(np.sum(cpu.doses(text)[len(prompt) - 1 :]) for prompt, text in texts))

        assert dosed(bundle=gpu_bundle, strength=STRENGTH) > dosed() + 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no CUDA here")
def test_the_gradient_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Float32 on both sides, summed in other orders: 1e-5 of the norm."""
    path = tiny.write_gguf(tiny.tiny_model("llama"), tmp_path / "llama.gguf")
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, tiny.N_VOCAB, n).tolist() for n in (9, 30, 17)]
    traces = [EncodedTrace(f"trace {i}", t, [False] * 3 + [True] * (len(t) - 3)) for i, t in enumerate(tokens)]
    found = []
    for device in ("cpu", "cuda"):
        proxy = Proxy(path, device=device)
        names = [t.name for t in proxy.tensors]
        file = compute_gradient(proxy, traces, names, tmp_path / device, Settings(2), lambda share, loss: None).file
        found.append(torch.cat([file.get(name).flatten() for name in names]))
    cpu, cuda = found
    assert (cuda - cpu).norm() < 1e-5 * cpu.norm()
