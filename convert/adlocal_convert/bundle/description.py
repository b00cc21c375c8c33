"""What a bundle says of itself, from what its conversion found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..direction.capabilities import Capability
from ..direction.mixture import Mixture
from .fidelity import TOP_K, Fidelity


@dataclass(frozen=True)
class Sweep:
    """Each ε tried: how well Δ follows the exact derivative there, and delta_scale by ε."""

    measured: list[Fidelity]
    scales: dict[float, float]

    @property
    def best(self) -> Fidelity:
        return max(self.measured, key=lambda fidelity: fidelity.median)


def gradient_fields(direction: Mixture, capabilities: Sequence[Capability]) -> dict[str, Any]:
    """The fields of `Bundle` that tell of its gradient."""
    gradients = direction.gradients
    return {
        "gradient_norm": direction.norm,
        "gradient_loss": direction.loss,
        "gradient_traces": sum(g.n_traces for g in gradients),
        "gradient_tokens": sum(g.n_tokens for g in gradients),
        "capability_names": [c.name for c in capabilities],
        "capability_weights": list(direction.weights),
        "capability_norms": direction.norms,
        "capability_losses": [g.loss for g in gradients],
        "capability_traces": [g.n_traces for g in gradients],
        "capability_sha256": [c.sha256 for c in capabilities],
        "capability_cosines": [float(c) for c in direction.cosines.flat],
    }


def fidelity_fields(found: Sweep, least: float) -> dict[str, Any]:
    """The fields of `Bundle` that tell of its fidelity; `least` is what is asked for."""
    best, ordered = found.best, sorted(found.measured, key=lambda fidelity: fidelity.epsilon)
    return {
        "fidelity_median": best.median,
        "fidelity_p10": best.p10,
        "fidelity_slope": best.slope,
        "fidelity_positions": best.n_positions,
        "fidelity_top_k": TOP_K,
        "forced": not best.median >= least,
        "sweep_epsilon": [f.epsilon for f in ordered],
        "sweep_median": [f.median for f in ordered],
        "sweep_p10": [f.p10 for f in ordered],
        "sweep_slope": [f.slope for f in ordered],
    }
