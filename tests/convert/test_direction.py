"""The direction: the algebra of mixed and normalised gradients, and what `--mix` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from adlocal.errors import ConversionError, InputError
from adlocal_convert.direction.gradient import Gradient
from adlocal_convert.direction.mixture import Mixture, parse_mix
from adlocal_convert.direction.tensor_file import TensorFile

SHAPES = {"token_embd.weight": (12, 8), "blk.0.attn_q.weight": (8, 8), "output_norm.weight": (8,)}
NAMES = list(SHAPES)
CLOSE = 1e-6  # values are float32: 2⁻²⁴ = 6e-8 each, and sums of a few of them
Values = dict[str, torch.Tensor]
Make = Callable[..., Gradient]


def drawn(seed: int, scale: float = 1.0) -> Values:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a gradient of given values."""

    def make(values: Values, loss: float = 1.0) -> Gradient:
        file = TensorFile.create(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors", SHAPES)
        for name, value in values.items():
            file.add(name, value)
        return Gradient(file, loss, n_traces=3, n_tokens=30)

    return make


def flat(values: Values | Mixture, names: Sequence[str] = NAMES) -> torch.Tensor:
    parts = [values.get(name) for name in names]
    return torch.cat([part.double().flatten() for part in parts if part is not None])


# Three gradients whose lengths differ by orders of magnitude, as those of capabilities may.
LENGTHS, WEIGHTS, LOSSES = (1.0, 30.0, 0.02), (0.5, 0.3, 0.2), (0.7, 1.9, 3.1)


@pytest.fixture
def three(make: Make) -> tuple[list[Values], Mixture]:
    values = [drawn(seed, scale) for seed, scale in enumerate(LENGTHS)]
    gradients = [make(v, loss) for v, loss in zip(values, LOSSES, strict=True)]
    return values, Mixture.of(gradients, WEIGHTS, NAMES)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_one_gradient_is_itself_over_its_norm(make: Make, scale: float) -> None:
    values = drawn(0, scale)
    mixture = Mixture.of([make(values, 2.5)], [1.0], NAMES)
    length = float(flat(values).norm())
    torch.testing.assert_close(flat(mixture), flat(values) / length, rtol=CLOSE, atol=0)
    assert mixture.norm == pytest.approx(length, rel=CLOSE)
    assert mixture.norms == pytest.approx([length], rel=CLOSE)
    assert (mixture.coefficients.tolist(), mixture.cosines.tolist()) == ([1.0], [[pytest.approx(1)]])
    assert mixture.loss == 2.5


def test_coefficients_are_weights_over_norms_and_sum_to_one(three: tuple[list[Values], Mixture]) -> None:
    values, mixture = three
    norms = [float(flat(v).norm()) for v in values]
    ratios = [a * norm / weight for a, norm, weight in zip(mixture.coefficients, norms, WEIGHTS, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=CLOSE)
    assert float(mixture.coefficients.sum()) == pytest.approx(1, rel=1e-12)
    assert mixture.norms == pytest.approx(norms, rel=CLOSE)


def test_each_normalised_gradient_enters_with_its_weight(three: tuple[list[Values], Mixture]) -> None:
    """ĝ ∝ Σ w_k ĝ_k, of length 1."""
    values, mixture = three
    total = torch.stack([w * flat(v) / flat(v).norm() for w, v in zip(WEIGHTS, values, strict=True)]).sum(0)
    torch.testing.assert_close(flat(mixture), total / total.norm(), rtol=CLOSE, atol=CLOSE)
    assert float(flat(mixture).norm()) == pytest.approx(1, rel=CLOSE)
    assert mixture.get(NAMES[0]).dtype == torch.float32


def test_it_is_the_gradient_of_the_mixed_loss(three: tuple[list[Values], Mixture]) -> None:
    """g = Σ a_k g_k belongs to ℓ = Σ a_k ℓ_k."""
    values, mixture = three
    g = torch.stack([float(a) * flat(v) for a, v in zip(mixture.coefficients, values, strict=True)]).sum(0)
    assert mixture.norm == pytest.approx(float(g.norm()), rel=CLOSE)
    torch.testing.assert_close(flat(mixture) * mixture.norm, g, rtol=CLOSE, atol=CLOSE * float(g.norm()))
    assert mixture.loss == pytest.approx(sum(a * x for a, x in zip(mixture.coefficients, LOSSES, strict=True)))


@pytest.mark.parametrize("factor", [10.0, 1e-3])
def test_a_capabilitys_own_length_and_the_weights_sum_do_not_matter(make: Make, factor: float) -> None:
    a, b = drawn(1), drawn(2)
    longer = {name: factor * value for name, value in b.items()}
    plain = Mixture.of([make(a), make(b)], [0.25, 0.75], NAMES)
    other = Mixture.of([make(a), make(longer)], [1.0, 3.0], NAMES)
    torch.testing.assert_close(flat(other), flat(plain), rtol=CLOSE, atol=CLOSE)
    assert other.weights == plain.weights == [0.25, 0.75]


def test_two_of_the_same_are_one(make: Make) -> None:
    values = drawn(3)
    both = Mixture.of([make(values), make(values)], [0.9, 0.1], NAMES)
    torch.testing.assert_close(flat(both), flat(Mixture.of([make(values)], [1.0], NAMES)), rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(both.cosines, np.ones((2, 2)), rtol=CLOSE)


def test_cosines_are_those_of_the_capabilities(three: tuple[list[Values], Mixture]) -> None:
    values, mixture = three
    cosines = [[float(flat(a) @ flat(b) / flat(a).norm() / flat(b).norm()) for a in values] for b in values]
    np.testing.assert_allclose(mixture.cosines, cosines, rtol=CLOSE, atol=CLOSE)


def test_energy_is_a_tensors_share_and_sums_to_one(three: tuple[list[Values], Mixture]) -> None:
    _, mixture = three
    for name in NAMES:
        assert mixture.energy(name) == pytest.approx(float(mixture.get(name).double().square().sum()), rel=CLOSE)
    assert sum(mixture.energy(name) for name in NAMES) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:]], ids=", ".join)
def test_a_direction_over_some_tensors_is_normalised_over_them(make: Make, names: list[str]) -> None:
    """The other tensors' values have no part in norms, cosines or energy."""
    a, b = drawn(4, 5.0), drawn(5)
    mixture = Mixture.of([make(a), make(b)], [0.5, 0.5], names)
    total = flat(a, names) / flat(a, names).norm() + flat(b, names) / flat(b, names).norm()
    torch.testing.assert_close(flat(mixture, names), total / total.norm(), rtol=CLOSE, atol=CLOSE)
    assert mixture.norms == pytest.approx([float(flat(v, names).norm()) for v in (a, b)], rel=CLOSE)
    assert sum(mixture.energy(name) for name in names) == pytest.approx(1, rel=1e-12)
    assert [name in mixture for name in NAMES] == [name in names for name in NAMES]


def test_rows_are_those_of_the_tensor(three: tuple[list[Values], Mixture]) -> None:
    _, mixture = three
    ids = torch.tensor([7, 0, 7, 11])
    assert torch.equal(mixture.rows(NAMES[0], ids), mixture.get(NAMES[0])[ids])


def test_progress_is_called_after_each_tensor(make: Make) -> None:
    calls: list[None] = []
    Mixture.of([make(drawn(6))], [1.0], NAMES, lambda: calls.append(None))
    assert len(calls) == len(NAMES)


@pytest.mark.filterwarnings("error")  # one line for the user, without NumPy's
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another"])
@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (float("nan"), "nan"), (float("inf"), "(inf|nan)")])
def test_gradients_without_a_direction_are_refused(make: Make, value: float, text: str, alone: bool) -> None:
    """Not finite in one place, or zero in all."""
    values = {name: torch.zeros(shape) for name, shape in SHAPES.items()} if value == 0 else drawn(7)
    values["output_norm.weight"][3] = value
    gradients = [make(values)] if alone else [make(drawn(8)), make(values)]
    with pytest.raises(ConversionError, match=rf"^the gradient's norm is {text}: nothing to steer by; check that"):
        Mixture.of(gradients, [1.0] * len(gradients), NAMES)


def test_gradients_that_cancel_are_refused(make: Make) -> None:
    """To the last bit: powers of two, so that nothing is rounded."""
    values = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    opposite = {name: -2 * value for name, value in values.items()}
    with pytest.raises(ConversionError, match=r"^the gradient's norm is 0: nothing to steer by"):
        Mixture.of([make(values), make(opposite)], [0.5, 0.5], NAMES)


def test_weights_are_equal_unless_given() -> None:
    assert parse_mix(None, ["math", "code", "law"]) == pytest.approx([1 / 3] * 3)
    assert parse_mix(None, ["math"]) == [1.0]


@pytest.mark.parametrize("text", ["math=0.7,code=0.3", "code=3,math=7", "code=0.0003,math=7e-4"])
def test_weights_are_normalised_in_the_order_of_the_names(text: str) -> None:
    assert parse_mix(text, ["math", "code"]) == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("math=1,law=1", r"^--mix names 'law', and --traces gives math, code; name one of those$"),
        ("", r"^--mix names '', and --traces gives math, code; name one of those$"),
        ("math=1,code=1,", r"^--mix names '', and"),
        ("math=1", r"^--mix math=1: give a weight for code, too, or leave its --traces out$"),
        ("math=much,code=1", r"^--mix math=much: give a positive number, as in --mix math=0\.7,code=0\.3$"),
        ("math,code=1", r"^--mix math=: give a positive number"),
        ("math=1=2,code=1", r"^--mix math=1=2: give a positive number"),
        ("math=0,code=1", r"^--mix math=0: give a positive number"),
        ("math=1,code=-1", r"^--mix code=-1: give a positive number"),
        ("math=nan,code=1", r"^--mix math=nan: give a positive number"),
        ("math=1,code=inf", r"^--mix code=inf: give a positive number"),
    ],
)
def test_what_says_no_weights_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_mix(text, ["math", "code"])
