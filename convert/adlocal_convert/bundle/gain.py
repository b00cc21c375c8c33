"""What each tensor would do for Δ if it were a carrier in a wide type: the signal it adds, the noise it takes away.

Signal: Δ's regression on the exact derivative d = J ĝ has a slope, and the slope is a sum over the tensors that carry:
⟨J_t ĝ_t, d⟩ / ‖d‖². One backward pass with d as cotangent gives all of them.

Noise: llama.cpp's CPU kernels for quantized weights round activations to 8 bits. Where an activation moves by δ between
the halves and a rounding step is q, their rounding errors differ with a variance of q |δ| while δ is small, and of q²/6
once it is not. A backward pass with random signs as cotangent carries that to the logits. A tensor in F16 or F32 leaves
its input unrounded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..model.proxy import Proxy
from ..model.streamed import Direction, Sink
from ..model.weights import Array
from .fidelity import Reference

_BLOCK, _STEPS = 32, 127  # of Q8_0 and Q8_1, which llama.cpp rounds to


@dataclass
class Gain:
    """Signal and noise of each tensor at one ε.

    Attributes:
        slope: tensor -> its share of the slope; all tensors' sum to 1.
        noise: matrix -> variance that its rounded input gives Δ, relative to ‖d‖².
    """

    slope: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    noise: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, proxy: Proxy, direction: Direction, reference: Reference, rounding: Rounding, epsilon: float) -> Gain:
        """Two backward passes over one trace; `rounding` has observed its directional derivative."""
        gain = cls()
        norm = float(np.sum(np.square(reference.derivative, dtype=np.float64)))
        signs = np.random.default_rng(0).choice([-1.0, 1.0], reference.derivative.shape).astype(np.float32)
        signs -= signs.mean(axis=1, keepdims=True)

        def share(name: str, product: float) -> None:
            gain.slope[name] += product / norm

        def flow(name: str, gradient: torch.Tensor) -> None:
            variance = rounding.variance(name, epsilon)
            gain.noise[name] += float((gradient.cpu().square().flatten() * variance).sum()) / norm / (2 * epsilon) ** 2

        _backward(proxy, reference, reference.derivative, _Shares(direction, share))
        for name, parameter in proxy.small.items():
            if name in direction and parameter.grad is not None:
                share(name, float((parameter.grad.cpu() * direction.get(name)).sum()))
        with proxy.stream.watching(flow):
            _backward(proxy, reference, signs, None)
        proxy.model.zero_grad(set_to_none=True)
        return gain


class Rounding:
    """Observes a directional derivative: rounding step and tangent of every input of every matrix."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, name: str, x: torch.Tensor, tangent: torch.Tensor) -> None:
        step = x.unflatten(-1, (-1, _BLOCK)).abs().amax(-1).cpu() / _STEPS
        self._seen[name] = step, tangent.abs().cpu()

    def variance(self, name: str, epsilon: float) -> torch.Tensor:
        """Of the difference of both halves' rounding errors at ε, flat."""
        step, tangent = self._seen[name]
        q = step.repeat_interleave(_BLOCK, -1)
        return torch.minimum(q * 2 * epsilon * tangent, q.square() / 6).flatten()


class _Shares:
    """A sink that measures gradients against the direction and keeps none."""

    def __init__(self, direction: Direction, share: Callable[[str, float], None]) -> None:
        self._direction, self._share = direction, share

    def wants(self, name: str) -> bool:
        return name in self._direction

    def add_product(self, name: str, first_row: int, dy: torch.Tensor, x: torch.Tensor) -> None:
        moved = self._direction.get(name)[first_row : first_row + dy.shape[1]]
        self._share(name, float((dy.cpu() @ moved * x.cpu()).sum()))

    def add_rows(self, name: str, ids: torch.Tensor, gradients: torch.Tensor) -> None:
        self._share(name, float((gradients.cpu() * self._direction.rows(name, ids)).sum()))


def _backward(proxy: Proxy, reference: Reference, cotangent: Array, sink: Sink | None) -> None:
    trace = reference.trace
    at = torch.tensor(trace.targets).nonzero()[:, 0] - 1
    with proxy.stream.collecting(sink):
        logits = proxy.logits(proxy.hidden(torch.tensor(trace.tokens)[None])[0, at])
        chosen = logits.gather(1, torch.from_numpy(reference.top).to(logits.device))
        (chosen * torch.from_numpy(cotangent).to(chosen)).sum().backward()
