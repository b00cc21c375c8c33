"""Which tensors carry: the choice on made-up gains, sizes of real files, and the gains against what they predict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from adlocal.traces import EncodedTrace
from adlocal_convert.bundle.fidelity import Reference, first_epsilon
from adlocal_convert.bundle.gain import Gain, Rounding
from adlocal_convert.bundle.perturb import load_carriers, write_half
from adlocal_convert.bundle.presets import QUALITIES, carrier_types, extra_bytes, wide_base, wide_type
from adlocal_convert.model.loss import directional_derivative
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.model.weights import Tensor
from adlocal_convert.source.quantize import quantize
from support import tiny
from support.directions import Given, made_tensor, random_values

F32, F16, BF16 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16"))


def made_up(seed: int, *, with_vectors: bool = True) -> tuple[list[Tensor], Gain]:
    """Seven matrices of different sizes and types and two vectors, with random signal and noise."""
    rng = np.random.default_rng(seed)
    tensors = [
        made_tensor(f"m{i}", (32 * int(rng.integers(1, 8)), 64), t)
        for i, t in enumerate(["Q4_0", "Q8_0", "Q4_0", "Q4_0", "BF16", "F16", "Q8_0"])
    ]
    tensors += [made_tensor(f"v{i}", (64,)) for i in range(2 * with_vectors)]
    share = rng.dirichlet(np.full(len(tensors), 0.5))
    noise = {t.name: float(rng.exponential(0.02)) for t in tensors if t.is_linear}
    return tensors, Gain(dict(zip([t.name for t in tensors], share.tolist(), strict=True)), noise)


def predicted(chosen: set[str], tensors: Sequence[Tensor], gain: Gain) -> float:
    """log cos² between the exact derivative and a sum of the carriers' signal and the others' rounding noise.

    Matrices that are in a float type in the base round no activations, carriers or not. Without any signal: of 1e-9.
    """
    slope = max(sum(gain.slope[name] for name in chosen), 1e-9)
    quantized = [t.name for t in tensors if t.ggml_type.name in ("Q8_0", "Q4_0")]
    noise = sum(gain.noise[name] for name in quantized if name not in chosen)
    return math.log(slope**2 / (slope**2 + noise))


def greedy(tensors: Sequence[Tensor], gain: Gain, cost: dict[str, int], budget: int) -> set[str]:
    """Oracle: whoever lifts the prediction most a unit of cost and still fits comes next."""
    chosen = {name for name, c in cost.items() if c <= 0}
    while True:
        left = budget - sum(cost[name] for name in chosen if cost[name] > 0)
        open_ = [t.name for t in tensors if t.name not in chosen and cost[t.name] <= left]
        if not open_:
            return chosen
        here = predicted(chosen, tensors, gain)
        chosen.add(max(open_, key=lambda name: (predicted(chosen | {name}, tensors, gain) - here) / cost[name]))


def bytes_more(tensors: Sequence[Tensor]) -> dict[str, int]:
    """By which a wide tensor is larger: 4 bytes a weight for vectors and those of 8 bits of exponent, else 2."""
    wide = {t.name: 4 if len(t.shape) == 1 or t.ggml_type in (F32, BF16) else 2 for t in tensors}
    return {t.name: wide[t.name] * int(np.prod(t.shape)) - t.n_bytes for t in tensors}


# The choice


@pytest.mark.parametrize("with_vectors", [True, False])
@pytest.mark.parametrize("largest", [1.0, 1.1, 1.25, 1.5, 2.0, 4.0])
def test_the_next_carrier_is_the_one_with_the_most_gain_a_byte(largest: float, with_vectors: bool) -> None:
    preset = dataclasses.replace(QUALITIES["small"], largest=largest)
    for seed in range(5):
        tensors, gain = made_up(seed, with_vectors=with_vectors)
        base = sum(t.n_bytes for t in tensors)
        cost = bytes_more(tensors)
        assert {t.name: extra_bytes(t) for t in tensors} == cost
        found = carrier_types(tensors, gain, preset, None, base)
        assert set(found) == greedy(tensors, gain, cost, int((largest - 1) * base))
        assert sum(max(0, cost[name]) for name in found) <= (largest - 1) * base
        assert all(found[t.name] == wide_type(t) for t in tensors if t.name in found)
        assert set(found) >= {t.name for t in tensors if cost[t.name] <= 0} >= {"m5"}, "what costs nothing carries"


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("quality", QUALITIES)
def test_a_share_is_of_the_matrices_weights(fraction: float, quality: str) -> None:
    """Whatever the quality; vectors cost nothing of it, matrices that are wide already do."""
    for seed in range(5):
        tensors, gain = made_up(seed)
        matrices = {t.name: t.n_weights for t in tensors if t.is_linear}
        cost = {t.name: matrices.get(t.name, 0) for t in tensors}
        found = carrier_types(tensors, gain, QUALITIES[quality], fraction, 10**9)
        assert set(found) == greedy(tensors, gain, cost, int(fraction * sum(matrices.values())))
        assert sum(cost[name] for name in found) <= fraction * sum(matrices.values())
        assert {"v0", "v1"} <= set(found)
    assert len(found) == {0.0: 2, 1.0: len(tensors)}.get(fraction, len(found))


def test_a_selection_without_matrices_or_vectors() -> None:
    tensors, gain = made_up(0)
    for part in (tensors[:7], tensors[7:]):
        for fraction in (None, 1.0):
            found = carrier_types(part, gain, QUALITIES["exact"], fraction, 10**6)
            assert set(found) == {t.name for t in part}
    assert set(carrier_types(tensors[7:], gain, QUALITIES["small"], 0.0, 10**6)) == {"v0", "v1"}


def test_exact_takes_every_matrix_wide() -> None:
    tensors, gain = made_up(0)
    found = carrier_types(tensors, gain, QUALITIES["exact"], None, 1)
    assert found == {t.name: F32 if not t.is_linear or t.ggml_type == BF16 else F16 for t in tensors}


def test_the_base_of_an_exact_adapter_is_wide_where_it_is_not_yet() -> None:
    tensors, _ = made_up(0)
    assert wide_base(tensors, QUALITIES["balanced"]) == {}
    found = wide_base(tensors, QUALITIES["exact"])
    assert found == {f"m{i}": F32 if i == 4 else F16 for i in (0, 1, 2, 3, 4, 6)}


# Files


@pytest.fixture(scope="module")
def tiny_files(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in several types."""
    folder, files = tmp_path_factory.mktemp("types"), {"F32": tiny_llama}
    for name in ("F16", "BF16", "Q8_0", "Q4_0"):
        files[name] = folder / f"{name}.gguf"
        quantize(tiny_llama, files[name], name, 1)
    return files


@dataclasses.dataclass(frozen=True)
class Case:
    """A proxy, a direction over all its tensors, and what both predict for one trace."""

    proxy: Proxy
    direction: Given
    reference: Reference
    rounding: Rounding
    epsilon: float

    @classmethod
    def of(cls, path: Path, trace: EncodedTrace) -> Case:
        proxy = Proxy(path)
        values = random_values(proxy.tensors)
        norm = sum(float(v.square().sum()) for v in values.values()) ** 0.5
        direction, rounding = Given({name: v / norm for name, v in values.items()}), Rounding()
        reference = Reference.of(proxy, direction, trace, rounding)
        return cls(proxy, direction, reference, rounding, first_epsilon([reference]))

    def gain(self, epsilon: float | None = None) -> Gain:
        return Gain.of(self.proxy, self.direction, self.reference, self.rounding, epsilon or self.epsilon)


TRACE = EncodedTrace(
    "t", np.random.default_rng(9).integers(0, 256, 60).tolist(), [i > 5 and i % 3 != 1 for i in range(60)]
)


@pytest.mark.parametrize("quality", ["small", "balanced"])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_a_file_is_no_larger_than_its_quality_says(
    name: str, quality: str, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    """Beside the padding of each tensor to 32 bytes. No further tensor would have fitted."""
    case, base = Case.of(tiny_files[name], TRACE), tiny_files[name].stat().st_size
    types = carrier_types(case.proxy.tensors, case.gain(), QUALITIES[quality], None, base)
    half = tmp_path / "half.gguf"
    write_half(half, gguf.GGUFReader(case.proxy.path), load_carriers(case.proxy, case.direction, types), 0.1, [])
    room = QUALITIES[quality].largest * base - half.stat().st_size
    assert room >= -32 * len(case.proxy.tensors)
    others = [t for t in case.proxy.tensors if t.name not in types]
    assert min(extra_bytes(t) for t in others) > room
    assert any(t.is_linear and t.name in types for t in case.proxy.tensors)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_an_exact_file_has_matrices_in_f16_or_f32(name: str, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    proxy = Proxy(tiny_files[name])
    direction = Given(random_values(proxy.tensors))
    types = carrier_types(proxy.tensors, Gain(), QUALITIES["exact"], None, tiny_files[name].stat().st_size)
    half = tmp_path / "half.gguf"
    write_half(half, gguf.GGUFReader(proxy.path), load_carriers(proxy, direction, types), 0.1, [])
    stored = {t.name: t for t in gguf.GGUFReader(half).tensors}
    expected = F32 if name in ("F32", "BF16") else F16
    assert {t.tensor_type for t in stored.values() if len(t.shape) > 1} == {expected}
    assert {t.tensor_type for t in stored.values() if len(t.shape) == 1} == {F32}


# The gains


@pytest.fixture(
    scope="module", params=[("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {})], ids=str
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    architecture, overrides = request.param
    path = tmp_path_factory.mktemp("gain") / "model.gguf"
    return Case.of(tiny.write_gguf(tiny.tiny_model(architecture, **overrides), path), TRACE)


def test_a_tensors_slope_is_its_own_derivatives_share(case: Case) -> None:
    """Oracle: the derivative along that tensor alone, projected on the whole one, in float64. To 1e-4 of the whole:
    float32 passes. The table of a tied model is in it twice, as table and as head.
    """
    gain, d = case.gain(), case.reference.derivative.astype(np.float64)
    for name in case.direction.values:
        _, alone = directional_derivative(case.proxy, case.direction.only(name), TRACE)
        at = np.take_along_axis(alone.numpy().astype(np.float64), case.reference.top, axis=1)
        assert gain.slope[name] == pytest.approx(float(np.sum(at * d) / np.sum(d * d)), abs=1e-4), name
    assert set(gain.slope) == set(case.direction.values)
    assert sum(gain.slope.values()) == pytest.approx(1, abs=1e-4)
    assert max(gain.slope.values()) > 0.05


def test_tensors_that_do_not_move_have_no_slope(case: Case) -> None:
    only = dataclasses.replace(case, direction=case.direction.only("blk.1.ffn_down.weight"))
    assert set(only.gain().slope) == {"blk.1.ffn_down.weight"}


def test_nothing_is_left_behind_in_the_proxy(case: Case) -> None:
    """What is computed with it afterwards would be wrong."""
    case.gain()
    assert case.proxy.stream.flow is None
    assert case.proxy.stream.sink is None
    assert [name for name, parameter in case.proxy.small.items() if parameter.grad is not None] == []


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To 8 bits in blocks of 32, as ggml's Q8_0."""
    blocks = x.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    found: torch.Tensor = (torch.round(blocks / step.clamp_min(1e-30)) * step).flatten(-2)
    return found


def delta(halves: Sequence[Proxy], reference: Reference, epsilon: float, name: str | None) -> Any:
    """Centred Δ of the reference's tokens, where the input of one matrix is rounded in both halves."""
    at, ids = torch.tensor(TRACE.targets).nonzero()[:, 0] - 1, torch.tensor(TRACE.tokens)[None]
    found = []
    for proxy in halves:
        layers = [m for m in proxy.model.modules() if getattr(m, "name", None) == name] if name else []
        hooks = [m.register_forward_pre_hook(lambda _, args: (rounded(args[0]),)) for m in layers]
        with torch.no_grad():
            found.append(proxy.logits(proxy.hidden(ids)[0, at]).double().numpy())
        for hook in hooks:
            hook.remove()
    chosen = np.take_along_axis((found[0] - found[1]) / (2 * epsilon), reference.top, axis=1)
    return chosen - chosen.mean(axis=1, keepdims=True)


MATRICES = [
    "blk.0.attn_q.weight",
    "blk.0.ffn_up.weight",
    "blk.1.attn_v.weight",
    "blk.1.ffn_down.weight",
    "output.weight",
]


@pytest.mark.parametrize("share", [0.003, 0.03])
def test_noise_is_what_rounding_of_an_input_does_to_delta(share: float, tiny_llama: Path, tmp_path: Path) -> None:
    """Oracle: both halves in float32, once with one matrix's input rounded to 8 bits and once without; the energy of
    the difference, relative to the derivative's. Within a factor of 2: one draw of signs predicts one set of roundings.
    At the smaller ε activations move by less than a rounding step, at the larger by about one.
    """
    case = Case.of(tiny_llama, TRACE)
    epsilon = share * case.epsilon
    carriers = load_carriers(case.proxy, case.direction, {t.name: F32 for t in case.proxy.tensors})
    halves = []
    for name, step in (("plus", epsilon), ("minus", -epsilon)):
        write_half(tmp_path / name, gguf.GGUFReader(case.proxy.path), carriers, step, [])
        halves.append(Proxy(tmp_path / name))
    gain, d = case.gain(epsilon), case.reference.derivative.astype(np.float64)
    clean = delta(halves, case.reference, epsilon, None)
    ratios = []
    for name in MATRICES:
        noise = delta(halves, case.reference, epsilon, name) - clean
        ratios.append(gain.noise[name] / float(np.sum(noise**2) / np.sum(d**2)))
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios


def test_noise_is_of_every_matrix_and_of_no_vector(case: Case) -> None:
    """An embedding table is looked up, not multiplied with, unless it is the head."""
    gain = case.gain()
    matrices = {t.name for t in case.proxy.tensors if t.is_linear}
    assert set(gain.noise) == matrices - ({"token_embd.weight"} if not case.proxy.is_tied else set())
    assert all(value > 0 for value in gain.noise.values())


@pytest.mark.parametrize("moves", [1e-3, 0.03, 10.0])
def test_variance_of_a_difference_of_roundings(moves: float) -> None:
    """Oracle: 300,000 values, evenly spread over their blocks, that move by `moves` steps from one half to the other,
    half more or less. It is q |δ| on average while that is small, q²/6 once it is not; to 10%, since the smallest
    moves pass a step 300 times in all, which is 6% of chance.
    """
    rng, epsilon, q = np.random.default_rng(0), 0.25, 0.01
    x = rng.uniform(-1, 1, (300_000 // 32, 32))
    x[:, 0] = 127 * q  # the largest of each block
    tangent = moves * rng.uniform(0.5, 1.5, x.shape) * q / (2 * epsilon)
    rounding = Rounding()
    rounding("m", torch.from_numpy(x), torch.from_numpy(tangent))
    found = rounding.variance("m", epsilon).numpy().reshape(x.shape)
    errors = [np.round(v / q) * q - v for v in (x - epsilon * tangent, x + epsilon * tangent)]
    measured = np.mean((errors[1] - errors[0])[:, 1:] ** 2)
    assert found[:, 1:].mean() == pytest.approx(measured, rel=0.1)
    assert found.mean() == pytest.approx(moves * q**2 if moves < 1 else q**2 / 6, rel=0.01)
