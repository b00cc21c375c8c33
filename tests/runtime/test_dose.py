"""Does steering by Δ load the text? Paired over prompts on the real model, against the same shifts dealt at random."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from adlocal import AntidistillationLlama, ProxyPair
from adlocal.adjust import adjust, candidates, delta
from adlocal.engine.llama_context import LockstepContext
from adlocal.llamacpp import native
from adlocal.llamacpp.tokens import end_tokens
from adlocal.traces import Trace, TraceEncoder
from adlocal_convert.demo.word_problems import word_problems

pytestmark = pytest.mark.real

N_PROMPTS, N_TOKENS, STRENGTH = 30, 16, 4.0
# Too little to change a sampled token, enough for the pair to be evaluated and the plain text's dose to be known.
UNPROTECTED = 1e-6


def permuted(pair: ProxyPair, logits: Any, strength: float, guard: float) -> list[tuple[float, int]]:
    """`ProxyPair.adjust` with Δ permuted among the candidates: the same shifts, on the wrong tokens."""
    (plus,), (minus,) = pair.rows()
    proxy = llama_cpp.llama_get_model(native.library().adl_pair_get_context(pair.handle, native.PLUS))
    ends = end_tokens(llama_cpp.llama_model_get_vocab(proxy))  # the teacher's too: one vocabulary
    z = np.ctypeslib.as_array(logits, (pair.n_vocab,))
    dealt = delta(plus, minus, pair.bundle.epsilon)
    ids = candidates(z, guard, ends=ends)
    dealt[ids] = np.random.default_rng(int(ids.sum())).permutation(dealt[ids])
    result = adjust(z, dealt, lam=pair.bundle.lam(strength), guard=guard, ends=ends)
    z[:] = result.logits
    return [(result.kl, result.n_candidates)]


DECODE = LockstepContext.decode


def decode_and_permute(self: LockstepContext, batch: Any) -> None:
    """The step with next to no strength, which evaluates the pair; then the row is adjusted with permuted Δ."""
    settings = self.settings
    try:
        self.settings = settings.but(strength=UNPROTECTED)
        DECODE(self, batch)
    finally:
        self.settings = settings
    self.evaluated_with = self.in_force
    permuted(self._pair, self._teacher.get_logits(), settings.strength, settings.guard)


def test_protected_text_carries_more_dose_and_permuted_delta_does_not(
    smollm2: Path, smollm2_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy: dict[str, Any] = {"temp": 0.0}
    doses: dict[str, list[float]] = {}
    with closing(
        AntidistillationLlama(str(smollm2), bundle=smollm2_bundle, n_ctx=512, n_threads=2, full=True, verbose=False)
    ) as llm:
        encoder = TraceEncoder(llm._model)
        for i, problem in enumerate(word_problems(N_PROMPTS, seed=2)):
            trace = encoder.encode(Trace("prompt", prompt=problem["prompt"], completion="."))
            prompt = trace.tokens[: trace.targets.index(True)]
            llm.set_seed(i)

            def dose(name: str, strength: float, prompt: list[int] = prompt, **sampling: Any) -> None:
                list(itertools.islice(llm.generate(prompt, strength=strength, **sampling), N_TOKENS))
                doses.setdefault(name, []).append(llm.last_dose.per_token or 0.0)

            dose("greedy plain", UNPROTECTED, **greedy)
            dose("greedy protected", STRENGTH, **greedy)
            dose("sampled plain", UNPROTECTED, temp=1.0)
            dose("sampled protected", STRENGTH, temp=1.0)
            with monkeypatch.context() as patch:
                patch.setattr(LockstepContext, "decode", decode_and_permute)
                dose("greedy permuted", STRENGTH, **greedy)
                dose("sampled permuted", STRENGTH, temp=1.0)
    for way in ("greedy", "sampled"):
        plain, protected, random = (np.array(doses[f"{way} {how}"]) for how in ("plain", "protected", "permuted"))
        with capsys.disabled():
            print(f"\n{way}: dose a token, mean ± standard error of the difference to plain over {N_PROMPTS} prompts")
            print(f"  plain {plain.mean():+.3f}")
            print(f"  protected {describe(protected - plain)}, permuted {describe(random - plain)}")
        gain, chance = protected - plain, random - plain
        assert gain.mean() > 5 * error(gain), "protected text is not well above plain text"
        assert chance.mean() < gain.mean() / 2, "permuted Δ does much of what Δ does"  # 4 standard errors away, here


def error(differences: npt.NDArray[np.float64]) -> float:
    """Standard error of the mean."""
    return float(differences.std(ddof=1) / np.sqrt(len(differences)))


def describe(differences: npt.NDArray[np.float64]) -> str:
    return f"{differences.mean():+.3f} ± {error(differences):.3f}"
