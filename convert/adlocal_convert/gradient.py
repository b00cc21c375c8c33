"""The gradient of the proxy's loss on the traces, and the exact derivative of its logits along a direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adlocal.errors import ConversionError
from adlocal.traces import EncodedTrace


@dataclass(frozen=True)
class Gradient:
    """g = ∇ℓ(θ_P), where ℓ is the mean over traces of each trace's mean negative log-likelihood of its targets.

    Attributes:
        values: parameter name -> float32 tensor of the parameter's shape.
        loss: ℓ in nats a token.
        norm: ‖g‖₂ over all parameters.
    """

    values: dict[str, torch.Tensor]
    loss: float
    norm: float

    @classmethod
    def of(cls, model: Any, traces: Sequence[EncodedTrace], progress: Callable[[float], None]) -> Gradient:
        """Backpropagates one trace at a time, so that neither padding nor a batch size can enter the result.

        Args:
            model: a causal language model of transformers; its `.grad` fields are used and cleared.
            traces: what the loss is on.
            progress: told the running loss after each trace.

        Raises:
            ConversionError: loss or gradient is not finite, or the gradient is zero.
        """
        model.zero_grad(set_to_none=True)
        total = 0.0
        for n, trace in enumerate(traces, 1):
            loss = trace_loss(model, trace)
            if not torch.isfinite(loss):
                raise ConversionError(
                    f"{trace.where}: the proxy's loss is {loss.item()}; check the model and this trace"
                )
            (loss / len(traces)).backward()
            total += loss.item()
            progress(total / n)
        values = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return cls(values, total / len(traces), _norm(values))


def trace_loss(model: Any, trace: EncodedTrace) -> torch.Tensor:
    """Mean negative log-likelihood of the trace's targets, each given all tokens before it. A scalar, nats a token."""
    ids = torch.tensor(trace.tokens)
    at = torch.tensor(trace.targets).nonzero()[:, 0]
    logits = model(input_ids=ids[None], logits_to_keep=at - 1, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits, ids[at])


def directional_derivative(
    model: Any, direction: Mapping[str, torch.Tensor], trace: EncodedTrace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the trace's targets and their exact derivative along a direction in weight space, by forward mode.

    Args:
        model: a causal language model of transformers.
        direction: parameter name -> tangent; parameters left out do not move.
        trace: its targets are the positions.

    Returns:
        (logits, derivative), each (n_targets, n_vocab), in the model's dtype.
    """
    at = torch.tensor(trace.targets).nonzero()[:, 0] - 1
    ids = torch.tensor(trace.tokens)[None]
    parameters = {name: p.detach() for name, p in model.named_parameters() if name in direction}

    def logits(moved: dict[str, torch.Tensor]) -> torch.Tensor:
        kwargs = {"logits_to_keep": at, "use_cache": False}
        output: torch.Tensor = torch.func.functional_call(model, moved, (ids,), kwargs).logits[0]
        return output

    # The fused attention kernels have no forward-mode rule.
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            moved: Any = torch.func.jvp(logits, (parameters,), (dict(direction),))
    finally:
        model.set_attn_implementation(before)
    return moved[0], moved[1]


def _norm(values: Mapping[str, torch.Tensor]) -> float:
    norm = float(sum(v.double().square().sum() for v in values.values()) ** 0.5)
    if not norm > 0 or norm == float("inf"):
        raise ConversionError(
            f"the gradient's norm is {norm}: nothing to steer by; check that the traces' completions count"
        )
    return norm
