"""Fidelity, the sweep and delta_scale: on pairs whose logits are known, and on a tiny model through llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from adlocal.bundle import MINUS_NAME, PLUS_NAME, Bundle
from adlocal.errors import ConversionError
from adlocal.pair import ProxyPair, context_params
from adlocal.traces import EncodedTrace
from adlocal_convert.bundle.fidelity import (
    TOP_K,
    Fidelity,
    Reference,
    check_agreement,
    delta_scale,
    first_epsilon,
    sweep,
)
from adlocal_convert.bundle.perturb import load_carriers, write_half
from adlocal_convert.bundle.presets import wide_type
from adlocal_convert.direction.gradient import Settings, compute_gradient
from adlocal_convert.direction.mixture import Mixture
from adlocal_convert.model.loss import directional_derivative
from adlocal_convert.model.proxy import Proxy
from support.loading import load_as

N_VOCAB = 200
Rows = npt.NDArray[Any]


class FakePair:
    """A pair with given logits a position: `middle` ± ε · `slope`, in chunks as the real one gives them."""

    def __init__(self, middle: Rows, slope: Rows, epsilon: float) -> None:
        self.plus, self.minus = middle + epsilon * slope, middle - epsilon * slope
        self.epsilon = epsilon

    def logits(self, tokens: Sequence[int]) -> Iterator[tuple[Rows, Rows]]:
        for i in range(0, len(tokens), 3):
            yield self.plus[i : min(i + 3, len(tokens))], self.minus[i : min(i + 3, len(tokens))]

    def swapped(self) -> FakePair:
        self.plus, self.minus = self.minus, self.plus
        return self


def fake(middle: Rows, slope: Rows, epsilon: float = 0.5) -> Any:
    return FakePair(middle.astype(np.float32), slope.astype(np.float32), epsilon)


@pytest.fixture
def known() -> tuple[EncodedTrace, Rows, Rows]:
    """A trace of 20 tokens, 13 of them targets, and for each of 19 positions the middle logits and their slope."""
    rng = np.random.default_rng(0)
    targets = [(i >= 6 and i % 5 != 0) or i == 3 for i in range(20)]
    trace = EncodedTrace("known", rng.integers(0, N_VOCAB, 20).tolist(), targets)
    return trace, rng.normal(size=(19, N_VOCAB)) * 2, rng.normal(size=(19, N_VOCAB))


def reference(trace: EncodedTrace, middle: Rows, slope: Rows) -> Reference:
    at = [i - 1 for i, counts in enumerate(trace.targets) if counts]
    top = np.argsort(middle[at], axis=1)[:, -TOP_K:]
    logits, derivative = (np.take_along_axis(values[at], top, axis=1) for values in (middle, slope))
    return Reference(
        trace,
        top,
        logits - logits.mean(axis=1, keepdims=True),
        derivative - derivative.mean(axis=1, keepdims=True),
    )


def test_logits_that_are_exactly_linear_are_faithful(known: tuple[EncodedTrace, Rows, Rows]) -> None:
    """Up to float32: z₊ − z₋ loses 2⁻²⁴ of logits around 10, which is 1e-6 of Δ."""
    trace, middle, slope = known
    found = Fidelity.measure(fake(middle, slope), [reference(trace, middle, slope)])
    assert found.epsilon == 0.5
    assert found.n_positions == trace.n_targets
    for value in (found.median, found.p10, found.slope):
        assert value == pytest.approx(1, abs=1e-5)


def test_swapped_halves_point_the_other_way(known: tuple[EncodedTrace, Rows, Rows]) -> None:
    trace, middle, slope = known
    found = Fidelity.measure(fake(middle, slope).swapped(), [reference(trace, middle, slope)])
    for value in (found.median, found.p10, found.slope):
        assert value == pytest.approx(-1, abs=1e-5)


def test_a_constant_in_a_row_does_not_matter(known: tuple[EncodedTrace, Rows, Rows]) -> None:
    trace, middle, slope = known
    shifted = slope + np.random.default_rng(1).normal(size=(19, 1)) * 5
    found = Fidelity.measure(fake(middle, shifted), [reference(trace, middle, slope)])
    assert found.median == pytest.approx(1, abs=1e-5)
    assert found.slope == pytest.approx(1, abs=1e-4)


def test_half_a_slope_is_half_a_slope_in_the_same_direction(known: tuple[EncodedTrace, Rows, Rows]) -> None:
    trace, middle, slope = known
    found = Fidelity.measure(fake(middle, slope / 2), [reference(trace, middle, slope)])
    assert found.median == pytest.approx(1, abs=1e-5)
    assert found.slope == pytest.approx(0.5, abs=1e-5)


def test_cosine_slope_and_quantile_are_those_of_their_definitions(known: tuple[EncodedTrace, Rows, Rows]) -> None:
    """Oracle: each position's cosine by `np.corrcoef` (the correlation is the centred cosine), two traces pooled."""
    trace, middle, slope = known
    noisy = slope + np.random.default_rng(2).normal(size=slope.shape) * np.linspace(0.1, 3, 19)[:, None]
    one, two = reference(trace, middle, slope), reference(trace, middle, slope[::-1].copy())
    found = Fidelity.measure(fake(middle, noisy), [one, two])
    at = [i - 1 for i, counts in enumerate(trace.targets) if counts]
    pairs = [(noisy[i][ids], exact) for r in (one, two) for i, ids, exact in zip(at, r.top, r.derivative, strict=True)]
    cosines = [np.corrcoef(x, y)[0, 1] for x, y in pairs]
    assert found.median == pytest.approx(np.median(cosines), abs=1e-5)
    assert found.p10 == pytest.approx(np.quantile(cosines, 0.1), abs=1e-5)
    through_origin = sum(x @ y for x, y in pairs) / sum(y @ y for _, y in pairs)  # y is centred, so x need not be
    assert found.slope == pytest.approx(through_origin, abs=1e-5)
    assert found.n_positions == 2 * trace.n_targets


def test_a_pair_that_does_not_move_has_no_fidelity(known: tuple[EncodedTrace, Rows, Rows]) -> None:
    trace, middle, slope = known
    found = Fidelity.measure(fake(middle, 0 * slope), [reference(trace, middle, slope)])
    assert (found.median, found.p10, found.slope) == (0, 0, 0)


def fidelity(epsilon: float, median: float) -> Fidelity:
    return Fidelity(epsilon, median, p10=0.0, slope=1.0, n_positions=1)


@pytest.mark.parametrize("width", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("peak", [0, 1, -1, 2, -3, 4, 5, -5, 6, -6, 0.4, -2.6, 3.5])
def test_sweep_finds_the_best_of_its_grid_and_stops(peak: float, width: float) -> None:
    """`peak` in half octaves from the start: up to three octaves away, on the grid and between its points."""
    measured = list(sweep(3.0, lambda eps: fidelity(eps, 1 / (1 + ((2 * np.log2(eps / 3.0) - peak) / width) ** 2))))
    best = max(measured, key=lambda f: f.median)
    steps = [2 * np.log2(f.epsilon / 3.0) for f in measured]
    assert 2 * np.log2(best.epsilon / 3.0) == pytest.approx(round(peak), abs=0.5 + 1e-9)
    assert abs(2 * np.log2(best.epsilon / 3.0) - peak) <= 0.5 + 1e-9
    assert len(set(np.round(steps, 6))) == len(steps), "no ε twice"
    assert len(steps) <= 9
    assert all(abs(step - round(step)) < 1e-9 for step in steps), "two an octave"


def test_sweep_gives_up_on_a_curve_without_a_peak() -> None:
    measured = list(sweep(1.0, lambda eps: fidelity(eps, eps)))
    assert len(measured) == 12


def test_sweep_measures_lazily() -> None:
    """A caller may show each result as it comes."""
    asked: list[float] = []

    def measure(epsilon: float) -> Fidelity:
        asked.append(epsilon)
        return fidelity(epsilon, 0.5)

    next(sweep(2.0, measure))
    assert asked == [2.0]


@pytest.mark.parametrize("guard", [0.0, 0.05, 0.3])
def test_delta_scale_is_the_rms_over_plausible_tokens(known: tuple[EncodedTrace, Rows, Rows], guard: float) -> None:
    """Oracle: the definition in float64. A position whose proxy leaves one candidate has nothing to choose."""
    trace, middle, slope = known
    middle = middle.copy()
    at = [i - 1 for i, counts in enumerate(trace.targets) if counts]
    middle[at[0], 7] = 60.0  # one candidate, if there is a guard
    slope = slope.copy()
    slope[at[0]] *= 1000 if guard else 1  # it would show
    squares: list[float] = []
    for i in at:
        p = np.exp(middle[i] - middle[i].max())
        inside = slope[i][p >= guard * p.max()]
        if len(inside) > 1:
            squares += list((inside - inside.mean()) ** 2)
    found = delta_scale(fake(middle, slope), [reference(trace, middle, slope)], guard)
    assert found == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5)  # float32 logits


def test_delta_scale_without_any_choice_is_zero(known: tuple[EncodedTrace, Rows, Rows]) -> None:
    trace, middle, slope = known
    middle = middle.copy()
    middle[:, 7] = 60.0
    assert delta_scale(fake(middle, slope, 1e-3), [reference(trace, middle, slope)], 0.05) == 0


def test_logits_of_another_model_are_refused(known: tuple[EncodedTrace, Rows, Rows]) -> None:
    """The pair's middle is the base, whatever the slope and whatever is added to all logits of a position."""
    trace, middle, slope = known
    exact = [reference(trace, middle, slope)]
    check_agreement(fake(middle + np.arange(19)[:, None], slope), exact)
    noise = np.random.default_rng(3).normal(size=middle.shape)
    check_agreement(fake(middle + 0.01 * noise, slope), exact)
    for other in (noise, np.nan * middle):
        with pytest.raises(ConversionError, match=r"agree only to a cosine of -?0\.\d{3}: "):
            check_agreement(fake(other, slope), exact)


def test_the_first_epsilon_moves_a_typical_logit_by_one_nat(known: tuple[EncodedTrace, Rows, Rows]) -> None:
    trace, middle, slope = known
    one, two = reference(trace, middle, slope), reference(trace, middle, 3 * slope)
    moved = first_epsilon([one, two]) * np.concatenate([one.derivative, two.derivative])
    assert np.sqrt(np.mean(moved**2)) == pytest.approx(1, rel=1e-6)
    with pytest.raises(ConversionError, match="the exact derivative is zero on every held-out trace"):
        first_epsilon([reference(trace, middle, 0 * slope)])


@pytest.fixture(scope="module")
def through_llama_cpp(
    tiny_llama: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Proxy, Mixture, Callable[[float], ProxyPair]]:
    """The tiny proxy, the direction of a gradient, and pairs of F32 files with every tensor a carrier."""
    torch.set_num_threads(1)
    proxy, directory = Proxy(tiny_llama), tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(3)
    traces = [EncodedTrace("t", rng.integers(0, 256, 24).tolist(), [i > 7 for i in range(24)]) for _ in range(3)]
    names = [t.name for t in proxy.tensors]
    path = directory / "gradient.safetensors"
    gradient = compute_gradient(proxy, traces, names, path, Settings(), lambda n, loss: None)
    direction, bundle = Mixture.of([gradient], [1.0], names), Bundle.open(tiny_bundle)
    carriers = load_carriers(proxy, direction, {t.name: wide_type(t) for t in proxy.tensors})

    def pair(epsilon: float) -> ProxyPair:
        plus, minus = directory / PLUS_NAME, directory / MINUS_NAME
        for path, step in ((plus, epsilon), (minus, -epsilon)):
            write_half(path, gguf.GGUFReader(proxy.path), carriers, step, [])
        return load_as(dataclasses.replace(bundle, epsilon=epsilon), plus, minus, context_params(n_ctx=64, n_threads=1))

    return proxy, direction, pair


def held_out() -> EncodedTrace:
    tokens = np.random.default_rng(9).integers(0, 256, 40).tolist()
    return EncodedTrace("held out", tokens, [i > 5 and i % 3 != 1 for i in range(40)])


def test_delta_through_llama_cpp_follows_the_exact_derivative(
    through_llama_cpp: tuple[Proxy, Mixture, Callable[[float], ProxyPair]],
) -> None:
    """F32 weights in the linear range: 1 but for ε² and llama.cpp's F16 KV cache (measured: 0.9999, slope 0.996)."""
    proxy, direction, open_pair = through_llama_cpp
    exact = Reference.of(proxy, direction, held_out())
    with open_pair(0.1) as pair:
        found = Fidelity.measure(pair, [exact])
        check_agreement(pair, [exact])
    assert found.n_positions == held_out().n_targets
    assert found.median > 0.999
    assert found.p10 > 0.999
    assert found.slope == pytest.approx(1, abs=0.01)


def test_every_logit_moves_by_its_derivative(
    through_llama_cpp: tuple[Proxy, Mixture, Callable[[float], ProxyPair]],
) -> None:
    """Not only those of the top tokens: Δ itself, uncentred; 1% of its size was measured."""
    proxy, direction, open_pair = through_llama_cpp
    _, derivative = directional_derivative(proxy, direction, held_out())
    at = [i - 1 for i, counts in enumerate(held_out().targets) if counts]
    with open_pair(0.1) as pair:
        delta = pair.delta(held_out().tokens[:-1])[at]
    exact = derivative.numpy()
    assert np.linalg.norm(delta - exact) < 0.03 * np.linalg.norm(exact)


def test_reference_has_the_proxys_top_tokens_with_centred_logits_and_derivative(
    through_llama_cpp: tuple[Proxy, Mixture, Callable[[float], ProxyPair]],
) -> None:
    proxy, direction, _ = through_llama_cpp
    found = Reference.of(proxy, direction, held_out())
    values, derivative = (t.numpy() for t in directional_derivative(proxy, direction, held_out()))
    for i, ids in enumerate(found.top):
        assert set(ids) == set(np.argsort(values[i])[-TOP_K:])
        for rows, full in ((found.logits, values), (found.derivative, derivative)):
            np.testing.assert_allclose(rows[i], full[i][ids] - full[i][ids].mean(), atol=1e-5)


def test_a_tiny_bundle_says_that_it_is_faithful(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.fidelity_median > 0.99
    assert bundle.fidelity_slope == pytest.approx(1, abs=0.05)
    assert bundle.fidelity_median == max(bundle.sweep_median)
    assert bundle.sweep_epsilon[bundle.sweep_median.index(bundle.fidelity_median)] == bundle.epsilon
    assert bundle.sweep_epsilon == sorted(bundle.sweep_epsilon)
    ratios = np.diff(np.log2(cast(Any, bundle.sweep_epsilon)))
    assert np.allclose(ratios * 2, np.round(ratios * 2))
