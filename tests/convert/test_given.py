"""A direction that is handed in, in the place of the gradient of the traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from adlocal.bundle import ADAPTER, HALVES, Bundle
from adlocal.errors import InputError
from adlocal.files import cache_directory
from adlocal_convert.convert import convert
from adlocal_convert.direction.given import Tensors
from adlocal_convert.direction.gradient import Gradient
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.options import Options


@pytest.fixture
def options(tiny_llama: Path, tiny_traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """At a fixed ε, so that it takes a fraction of a second; no gradient lies in the cache."""
    monkeypatch.setenv("ADLOCAL_CACHE", str(tmp_path / "cache"))
    return Options(str(tiny_llama), {"traces": tiny_traces}, tmp_path / "bundle", carriers=1.0, eps=0.03, n_threads=1)


@pytest.fixture
def proxy(tiny_llama: Path) -> Iterator[Proxy]:
    with closing(Proxy(tiny_llama)) as proxy:
        yield proxy


def run(options: Options, direction: Tensors | None = None) -> tuple[Bundle, list[str]]:
    lines: list[str] = []
    return convert(options, lines.append, direction), lines


@pytest.fixture
def random(proxy: Proxy) -> dict[str, torch.Tensor]:
    """A direction over every tensor, of a length that is not 1."""
    generator = torch.Generator().manual_seed(0)
    return {t.name: 3 * torch.randn(proxy.weights.shape(t.name), generator=generator) for t in proxy.tensors}


def test_the_gradient_handed_in_makes_the_bundle_that_it_makes_computed(options: Options) -> None:
    """To the bit, at half its length: only the direction counts."""
    computed, _ = run(options)
    (path,) = (cache_directory() / "gradients").iterdir()
    gradient = Gradient.open(path)
    assert gradient is not None
    half = {name: gradient.file.get(name) / 2 for name in gradient.file}
    bundle, lines = run(dataclasses.replace(options, overwrite=True), half)
    assert bundle.carriers_sha256 == computed.carriers_sha256
    assert bundle.gradient_norm == pytest.approx(computed.gradient_norm / 2)
    assert (bundle.gradient_traces, bundle.gradient_tokens) == (computed.gradient_traces, computed.gradient_tokens)
    assert bundle.fidelity_median == pytest.approx(computed.fidelity_median)
    assert any("traces: a direction that was handed in, ‖g‖ = " in line for line in lines)


@pytest.mark.parametrize("format", [HALVES, ADAPTER])
def test_nothing_is_computed_or_kept(format: str, options: Options, random: Tensors) -> None:
    changed = dataclasses.replace(options, format=format, carriers=None, quality="exact", force=True)
    bundle, _ = run(changed, random)
    assert bundle.fidelity_median > 0.9  # along the direction, or else it would be about 0
    assert not cache_directory().exists()
    carried = [t for t in random.values() if format == HALVES or t.ndim > 1]
    assert bundle.gradient_norm == pytest.approx(np.sqrt(sum(float(t.double().square().sum()) for t in carried)))


def test_tensors_beyond_the_selection_are_ignored(options: Options, random: dict[str, torch.Tensor]) -> None:
    norms = {name: tensor for name, tensor in random.items() if tensor.ndim == 1}
    selected = dataclasses.replace(options, params="norms", carriers=None, force=True)
    bundle, _ = run(selected, norms)
    again, _ = run(dataclasses.replace(selected, overwrite=True), {**random, "unknown": torch.zeros(1)})
    assert bundle.id == again.id


def test_a_missing_tensor_is_named(options: Options, random: dict[str, torch.Tensor]) -> None:
    del random["blk.1.attn_q.weight"]
    with pytest.raises(InputError, match=r"no tensor blk\.1\.attn_q\.weight; give one for each of the \d+ selected"):
        run(options, random)
    assert not options.out.exists()


def test_another_shape_is_named(options: Options, random: dict[str, torch.Tensor]) -> None:
    random["blk.1.ffn_up.weight"] = random["blk.1.ffn_up.weight"].T
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight is \(64, 96\); give it the base's shape, \(96, 64\)"):
        run(options, random)


def test_one_direction_is_not_taken_for_two_capabilities(options: Options, random: Tensors, tiny_traces: Path) -> None:
    with pytest.raises(InputError, match="and there are 2; give one"):
        run(dataclasses.replace(options, traces={"a": tiny_traces, "b": tiny_traces}), random)
