"""The bundle that `adlocal convert` makes of a real model, with its defaults, and the same prompt twice under it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from adlocal import AntidistillationLlama
from adlocal.bundle import MINUS_NAME, PLUS_NAME, Bundle
from adlocal.bundle.verify import verify
from support.paths import REAL_TRACES
from support.problems import cold_and_cached, encoded_problems

pytestmark = pytest.mark.real

N_PROMPTS = 3


def test_fidelity(smollm2_bundle: Path) -> None:
    """Δ through llama.cpp's quantized kernels against the exact derivative, on traces that gave no gradient."""
    bundle = Bundle.open(smollm2_bundle)
    assert bundle.fidelity_median == max(bundle.sweep_median)
    assert bundle.fidelity_positions > 200
    if REAL_TRACES is None:
        pytest.skip("the bar of 0.98 is for GSM8K's solutions, which are not here")
    assert bundle.gradient_traces == 92
    assert bundle.fidelity_median >= 0.98


def test_size(smollm2: Path, smollm2_bundle: Path) -> None:
    for name in (PLUS_NAME, MINUS_NAME):
        assert (smollm2_bundle / name).stat().st_size <= 1.25 * smollm2.stat().st_size


def test_bulk_is_the_bases_and_every_key_is_kept(smollm2: Path, smollm2_bundle: Path) -> None:
    verify(smollm2_bundle)
    carriers = set(Bundle.open(smollm2_bundle).carriers)
    base = gguf.GGUFReader(smollm2)
    for name in (PLUS_NAME, MINUS_NAME):
        half = gguf.GGUFReader(smollm2_bundle / name)
        for key, field in base.fields.items():
            if not key.startswith("GGUF."):
                assert stored(half.fields[key]) == stored(field), key
        for theirs, ours in zip(base.tensors, half.tensors, strict=True):
            assert theirs.name == ours.name
            if ours.name not in carriers:
                assert theirs.tensor_type == ours.tensor_type
                assert np.array_equal(theirs.data, ours.data)


@pytest.mark.parametrize("strength", [1.0, 2.0, 6.0])
def test_cold_and_cached(strength: float, smollm2: Path, smollm2_bundle: Path) -> None:
    """`make cold-and-cached` in short: the same ids the first, the second, the third time, and after another prompt."""
    options: dict[str, Any] = {"bundle": smollm2_bundle, "n_ctx": 512, "n_threads": 2, "verbose": False}
    with closing(AntidistillationLlama(str(smollm2), **options)) as llm:
        prompts = encoded_problems(llm, N_PROMPTS)
        for i, prompt in enumerate(prompts):
            said = dict(cold_and_cached(llm, prompt, prompts[i - 1], 24, strength))
            assert said == dict.fromkeys(said, said["first"])
            assert len(said["first"]) > 1


def stored(field: Any) -> bytes:
    """Type and value of a key, as the file's bytes hold them."""
    return b"".join(part.tobytes() for part in field.parts[2:])
