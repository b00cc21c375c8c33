"""What protection did to one generation."""

from __future__ import annotations

from dataclasses import dataclass

from .engine.lockstep import AdjustedRow


@dataclass
class Dose:
    """Telemetry of one generation, over every sampled token (a token cut off by a stop string counts too).

    Attributes:
        strength, guard: the settings it was sampled with.
        n_tokens: sampled tokens.
        n_steerable: those where at least two tokens passed the guard, so that there was a choice to steer.
        total: Σ (Δ(x_t) − E[Δ]), the derivative of the text's log-probability along ĝ: to first order, how much a step
            of training on it raises the proxy's loss. The proxy's own text has none on average. None at strength 0,
            where the pair is not evaluated; `adlocal score` measures any text.
        kl: Σ KL(adjusted ‖ teacher) a token, nats.
    """

    strength: float
    guard: float
    n_tokens: int = 0
    n_steerable: int = 0
    total: float | None = None
    kl: float = 0.0

    @property
    def per_token(self) -> float | None:
        """Mean centred Δ of a sampled token."""
        return None if self.total is None else self.total / self.n_tokens

    @property
    def mean_kl(self) -> float:
        """Mean KL(adjusted ‖ teacher) a token, nats."""
        return self.kl / self.n_tokens if self.n_tokens else 0.0

    def add(self, row: AdjustedRow, dose: float | None) -> None:
        """Counts a token sampled from `row`; `dose` is its Δ − E[Δ], None at strength 0."""
        self.n_tokens += 1
        self.n_steerable += row.n_candidates > 1
        self.kl += row.kl
        if dose is not None:
            self.total = (self.total or 0.0) + dose
