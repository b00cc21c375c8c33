"""Every family from a Hugging Face directory to a bundle: the proxy in PyTorch is transformers' model, its gradient is
autograd's, and Δ through llama.cpp is the exact derivative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adlocal.bundle import ADAPTER, HALVES
from adlocal.bundle.verify import verify
from adlocal.traces import EncodedTrace
from adlocal_convert.convert import convert
from adlocal_convert.direction.gradient import Settings, compute_gradient
from adlocal_convert.model.architectures import stored_as
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.options import Options
from adlocal_convert.source.export import export_directory
from bench import fidelity_table
from support import families

# Both sides compute in float32: 3e-6 standard deviations of the logits was measured, and 4e-7 of the gradient's norm.
CLOSE_LOGITS, CLOSE_GRADIENT = 1e-4, 5e-6
MAPPED = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def traces() -> list[EncodedTrace]:
    """Longer than the families' windows."""
    rng = np.random.default_rng(1)
    return [EncodedTrace("t", rng.integers(0, 256, n).tolist(), [i > 4 for i in range(n)]) for n in (40, 23)]


def exported(model: Any, teacher: Path, directory: Path) -> Path:
    path = directory.with_suffix(".gguf")
    export_directory(families.save(model, directory), teacher, path)
    return path


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_proxy_is_transformers_model(name: str, teacher: Path, tmp_path: Path) -> None:
    model = families.family_model(name)
    proxy = Proxy(exported(model, teacher, tmp_path / name))
    ids = torch.tensor([traces()[0].tokens])
    with torch.no_grad():
        found, expected = proxy.logits(proxy.hidden(ids)), model(ids).logits
    assert float((found - expected).abs().max() / expected.std()) < CLOSE_LOGITS


@pytest.mark.parametrize("name", MAPPED)
def test_the_gradient_is_autograds_in_the_files_order(name: str, teacher: Path, tmp_path: Path) -> None:
    """Oracle: transformers' own gradient, saved and exported as if it were a model, so that it lies as weights do."""
    model = families.family_model(name)
    proxy = Proxy(exported(model, teacher, tmp_path / "model"))
    for trace in traces():
        at = torch.tensor(trace.targets).nonzero()[:, 0]
        rows = model(torch.tensor([trace.tokens])).logits[0, at - 1]
        (torch.nn.functional.cross_entropy(rows, torch.tensor(trace.tokens)[at]) / 2).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    expected = Proxy(exported(model, teacher, tmp_path / "gradient"))
    names = [t.name for t in proxy.tensors]
    found = compute_gradient(proxy, traces(), names, tmp_path / "g", Settings(batch_size=2), lambda n, loss: None)
    error = total = 0.0
    for tensor in names:
        value = expected.weights.get(tensor).astype(np.float64) - offset(model, tensor)
        error += float(np.square(found.file.get(tensor).numpy() - value).sum())
        total += float(np.square(value).sum())
    assert error**0.5 < CLOSE_GRADIENT * total**0.5


def offset(model: Any, tensor: str) -> float:
    """What the file of this family holds more in a norm than its parameter."""
    family = stored_as(model.config.model_type)
    return family.norm_offset if family and "norm" in tensor else 0.0


@pytest.mark.parametrize("format", [HALVES, ADAPTER])
@pytest.mark.parametrize("name", MAPPED)
def test_delta_through_llama_cpp_is_the_exact_derivative(name: str, format: str, teacher: Path, tmp_path: Path) -> None:
    """F32 weights, so that only ε², llama.cpp's F16 cache and, in Gemma, its table of GELU are left: 0.999 measured."""
    directory = families.save(families.family_model(name), tmp_path / name)
    rows = fidelity_table.write_traces(tmp_path / "traces.jsonl", 6)
    options = Options(str(directory), {"t": rows}, tmp_path / "bundle", teacher=teacher, format=format, n_threads=1)
    bundle = convert(options, lambda line: None)
    verify(options.out)
    assert bundle.fidelity_median > 0.995
    assert bundle.fidelity_slope == pytest.approx(1, abs=0.1)
    assert bundle.params == ("linear" if format == ADAPTER else "all")
