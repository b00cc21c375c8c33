"""What protection did to one generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.llama_context import AdjustedRow


@dataclass
class Dose:
    """Telemetry of one generation, over every sampled token (a token cut off by a stop string counts too).

    Attributes:
        strength, guard: the settings it was sampled with.
        n_tokens: sampled tokens.
        n_steerable: those where at least two tokens passed the guard, so that there was a choice to steer.
        n_dosed: those whose Δ was computed: where there was a choice, or all of them with `full`.
        total: Σ (Δ(x_t) − E[Δ]) over these, the derivative of the text's log-probability along ĝ: to first order, how
            much a step of training on it raises the proxy's loss. The proxy's own text has none on average. None where
            the pair was never evaluated, as at strength 0; `adlocal score` measures any text, and all of it.
        kl: Σ KL(adjusted ‖ teacher) a token, nats.
    """

    strength: float
    guard: float
    n_tokens: int = 0
    n_steerable: int = 0
    total: float | None = None
    kl: float = 0.0
    n_dosed: int = 0

    @property
    def per_token(self) -> float | None:
        """Mean centred Δ of the tokens whose Δ was computed."""
        return None if self.total is None else self.total / self.n_dosed

    @property
    def mean_kl(self) -> float:
        """Mean KL(adjusted ‖ teacher) a token, nats."""
        return self.kl / self.n_tokens if self.n_tokens else 0.0

    def add(self, row: AdjustedRow, dose: float | None) -> None:
        """Counts a token sampled from `row`; `dose` is its Δ − E[Δ], None where it was not computed."""
        self.n_tokens += 1
        self.n_steerable += row.n_candidates > 1
        self.kl += row.kl
        if dose is not None:
            self.total = (self.total or 0.0) + dose
            self.n_dosed += 1
