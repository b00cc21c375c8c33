"""The gradient and the directional derivative, against a llama written out here in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from adlocal_convert.gradient import Gradient, directional_derivative, trace_loss

from adlocal.errors import ConversionError
from adlocal.traces import EncodedTrace

N_LAYERS, N_HEAD, N_HEAD_KV = 2, 4, 2
Weights = Mapping[str, torch.Tensor]

# Both sides round to float32 (2⁻²⁴ = 6e-8) thousands of times: 4e-7 was measured, and a wrong weighting of one trace
# in six, or a target too many, costs over 1e-2.
CLOSE = 5e-6


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)  # for models this small, more threads only wait for each other
    return tiny.tiny_model()


def trace(seed: int, n_given: int, n_targets: int) -> EncodedTrace:
    """Random tokens."""
    tokens = np.random.default_rng(seed).integers(0, tiny.N_VOCAB, n_given + n_targets).tolist()
    return EncodedTrace(f"trace {seed}", tokens, [False] * n_given + [True] * n_targets)


TRACES = [trace(0, 5, 1), trace(1, 3, 20), trace(2, 8, 4), trace(3, 1, 9), trace(4, 12, 2), trace(5, 2, 30)]


def as_double(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary positions, (n_head, n_tokens, size): component j turns with component j + size / 2."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double()[:, None] * base ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attention(w: Weights, layer: str, x: torch.Tensor, base: float) -> torch.Tensor:
    q, k, v = (x @ w[f"{layer}.self_attn.{part}_proj.weight"].T for part in "qkv")
    q, k, v = (t.view(len(x), n, -1).transpose(0, 1) for t, n in ((q, N_HEAD), (k, N_HEAD_KV), (v, N_HEAD_KV)))
    q, k = rotated(q, base), rotated(k, base)
    k, v = (t.repeat_interleave(N_HEAD // N_HEAD_KV, 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
    out: torch.Tensor = mixed @ w[f"{layer}.self_attn.o_proj.weight"].T
    return out


def logits(w: Weights, config: Any, tokens: Sequence[int]) -> torch.Tensor:
    """A llama in float64, (n_tokens, n_vocab); transformers' own computes parts in float32 whatever its dtype."""
    eps, base = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    x = w["model.embed_tokens.weight"][torch.tensor(tokens)]
    for i in range(N_LAYERS):
        layer = f"model.layers.{i}"
        x = x + attention(w, layer, norm(x, w[f"{layer}.input_layernorm.weight"], eps), base)
        y = norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        gate, up = (y @ w[f"{layer}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{layer}.mlp.down_proj.weight"].T
    rows: torch.Tensor = norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T
    return rows


def own_loss(w: Weights, config: Any, trace: EncodedTrace) -> torch.Tensor:
    rows = logits(w, config, trace.tokens)
    terms = [
        rows[i - 1].exp().sum().log() - rows[i - 1, trace.tokens[i]] for i, counts in enumerate(trace.targets) if counts
    ]
    return torch.stack(terms).mean()


def own_gradient(model: Any, traces: Sequence[EncodedTrace]) -> tuple[float, dict[str, torch.Tensor]]:
    w = as_double(model)
    loss = torch.stack([own_loss(w, model.config, t) for t in traces]).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in w.items() if p.grad is not None}


def flat(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values[name].double().flatten() for name in sorted(values)])


def apart(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """‖a − b‖ / ‖b‖"""
    assert a.keys() == b.keys()
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def gradient(model: Any, traces: Sequence[EncodedTrace]) -> Gradient:
    return Gradient.of(model, traces, lambda loss: None)


def test_gradient_is_that_of_the_mean_over_traces_of_each_traces_mean(model: Any) -> None:
    found = gradient(model, TRACES)
    loss, values = own_gradient(model, TRACES)
    assert found.loss == pytest.approx(loss, rel=CLOSE)
    assert apart(found.values, values) < CLOSE
    for name, value in values.items():  # also where a tensor's share of the whole is small
        assert apart({name: found.values[name]}, {name: value}) < 10 * CLOSE, name
    assert found.norm == pytest.approx(float(flat(values).norm()), rel=CLOSE)


def test_values_are_float32_of_every_parameter_and_the_model_is_left_clean(model: Any) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = gradient(model, TRACES[:2])
    for name, parameter in model.named_parameters():
        assert found.values[name].shape == parameter.shape
        assert found.values[name].dtype == torch.float32
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_gradients_left_by_others_do_not_enter(model: Any) -> None:
    clean = gradient(model, TRACES[:1])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert apart(gradient(model, TRACES[:1]).values, clean.values) == 0


def test_the_order_of_traces_does_not_matter(model: Any) -> None:
    """Up to the rounding of a sum of six."""
    assert apart(gradient(model, TRACES[::-1]).values, gradient(model, TRACES).values) < CLOSE


@pytest.mark.parametrize("n", [1, 2, 4])
def test_gradient_of_a_union_is_the_weighted_mean_of_its_parts(model: Any, n: int) -> None:
    first, second, union = gradient(model, TRACES[:n]), gradient(model, TRACES[n:]), gradient(model, TRACES)
    share = n / len(TRACES)
    mean = {name: share * value + (1 - share) * second.values[name] for name, value in first.values.items()}
    assert apart(union.values, mean) < CLOSE
    assert union.loss == pytest.approx(share * first.loss + (1 - share) * second.loss, rel=CLOSE)


def test_a_trace_weighs_the_same_whatever_its_length(model: Any) -> None:
    """1 and 30 targets: their mean is far from the mean over all 31 tokens."""
    short, long = TRACES[0], TRACES[5]
    losses = [trace_loss(model, t).item() for t in (short, long)]
    found = gradient(model, [short, long])
    assert found.loss == pytest.approx(sum(losses) / 2, rel=CLOSE)
    assert abs(found.loss - (losses[0] + 30 * losses[1]) / 31) > 1e-2


def test_only_targets_count(model: Any) -> None:
    """What comes after the last target has no effect at all, and one target alone is its own −log p."""
    base = trace(7, 6, 3)
    longer = EncodedTrace("longer", [*base.tokens, 9, 8, 7], [*base.targets, False, False, False])
    assert trace_loss(model, longer).item() == pytest.approx(trace_loss(model, base).item(), rel=CLOSE)
    rows = model(input_ids=torch.tensor([base.tokens])).logits[0].detach().double().log_softmax(-1)
    for i in range(1, len(base.tokens)):
        alone = EncodedTrace("alone", base.tokens, [j == i for j in range(len(base.tokens))])
        assert trace_loss(model, alone).item() == pytest.approx(-rows[i - 1, base.tokens[i]].item(), rel=CLOSE)


def test_targets_may_be_interrupted(model: Any) -> None:
    """As in a conversation with several assistant turns."""
    tokens = trace(8, 4, 8).tokens
    gapped = EncodedTrace("gapped", tokens, [i in (3, 4, 9) for i in range(len(tokens))])
    assert trace_loss(model, gapped).item() == pytest.approx(
        own_loss(as_double(model), model.config, gapped).item(), rel=CLOSE
    )


def test_progress_is_the_running_loss(model: Any) -> None:
    told: list[float] = []
    found = Gradient.of(model, TRACES, told.append)
    losses = [trace_loss(model, t).item() for t in TRACES]
    assert told == pytest.approx([sum(losses[:n]) / n for n in range(1, 7)], rel=CLOSE)
    assert told[-1] == pytest.approx(found.loss)


def unit(model: Any, seed: int, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """A random unit direction over some parameters, all by default."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        name: torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if names is None or name in names
    }
    length = flat(chosen).norm().float()
    return {name: value / length for name, value in chosen.items()}


@pytest.mark.parametrize("names", [None, ["model.norm.weight"], ["model.layers.0.self_attn.q_proj.weight"]])
def test_directional_derivative_equals_central_differences(model: Any, names: list[str] | None) -> None:
    """Oracle in float64: h = 1e-3 leaves an error of order h² (3e-4 at h = 0.1), so float32 sets the tolerance."""
    held_out, direction, h = TRACES[1], unit(model, 1, names), 1e-3
    w = {name: p.detach() for name, p in as_double(model).items()}
    at = [i - 1 for i, counts in enumerate(held_out.targets) if counts]
    plus, minus = (
        logits(
            {name: p + step * direction[name].double() if name in direction else p for name, p in w.items()},
            model.config,
            held_out.tokens,
        )[at]
        for step in (h, -h)
    )
    expected = (plus - minus) / (2 * h)
    values, derivative = directional_derivative(model, direction, held_out)
    assert derivative.shape == values.shape == (held_out.n_targets, tiny.N_VOCAB)
    assert float((derivative - expected).norm() / expected.norm()) < 1e-5
    plain = logits(w, model.config, held_out.tokens)[at]
    assert float((values - plain).norm() / plain.norm()) < CLOSE


def test_directional_derivative_is_the_gradient_of_each_logit_times_the_direction(model: Any) -> None:
    """Forward mode against reverse mode."""
    held_out, direction = TRACES[2], unit(model, 2)
    _, derivative = directional_derivative(model, direction, held_out)
    position = held_out.targets.index(True) - 1
    for token in (0, 17, 263):
        rows = model(input_ids=torch.tensor([held_out.tokens])).logits[0]
        model.zero_grad()
        rows[position, token].backward()
        product = float(sum((p.grad * direction[name]).double().sum() for name, p in model.named_parameters()))
        assert derivative[0, token].item() == pytest.approx(product, abs=1e-5 * float(derivative[0].abs().max()))
    model.zero_grad()


def test_directional_derivative_leaves_the_model_as_it_was(model: Any) -> None:
    before = model.config._attn_implementation
    _, derivative = directional_derivative(model, unit(model, 3), TRACES[0])
    assert model.config._attn_implementation == before
    assert not derivative.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused_with_its_trace(value: float) -> None:
    model = tiny.tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(ConversionError, match="trace 0: the proxy's loss is nan; check the model and this trace"):
        gradient(model, TRACES[:2])


def test_a_gradient_that_is_no_number_is_refused(model: Any) -> None:
    """The loss may be finite and its gradient not, as where a square root meets zero."""
    hook = model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    try:
        with pytest.raises(ConversionError, match="the gradient's norm is nan"):
            gradient(model, TRACES[:1])
    finally:
        hook.remove()


def test_a_zero_gradient_is_refused(model: Any) -> None:
    hooks = [p.register_hook(torch.zeros_like) for p in model.parameters()]
    try:
        with pytest.raises(ConversionError, match=r"norm is 0\.0: nothing to steer by"):
            gradient(model, TRACES[:1])
    finally:
        for hook in hooks:
            hook.remove()
