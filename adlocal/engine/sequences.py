"""What a model is asked for, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_cpp._internals import LlamaSampler

from ..errors import AdlocalError
from ..settings import Settings


@dataclass(frozen=True)
class Sampling:
    """llama.cpp's sampling chain: top_k, top_p, min_p, temp. A `temp` of 0 is greedy and leaves the others out."""

    temp: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05

    def chain(self, seed: int) -> LlamaSampler:
        """A sampler of its own for one sequence."""
        chain = LlamaSampler()
        if self.temp == 0:
            chain.add_greedy()
            return chain
        chain.add_top_k(self.top_k)
        chain.add_top_p(self.top_p, 1)
        chain.add_min_p(self.min_p, 1)
        chain.add_temp(self.temp)
        chain.add_dist(seed)
        return chain


@dataclass(frozen=True)
class Request:
    """A prompt to go on from.

    Attributes:
        index: handed back with the completion.
        tokens: the prompt.
        n_predict: the most tokens that may follow.
        seed: of its sampler.
        sampling: None for the scheduler's.
        settings: strength and guard of its rows; None for the scheduler's.
        dosed: whether the completion is to say its dose, which takes a prefill of the pair when it ends.
    """

    index: int
    tokens: Sequence[int]
    n_predict: int
    seed: int = 0
    sampling: Sampling | None = None
    settings: Settings | None = None
    dosed: bool = False


@dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    Attributes:
        index: that of the request.
        tokens: sampled ids, without the one that ended the turn.
        finish_reason: "stop" if the model ended its turn, "length" at `n_predict` or at the end of the context,
            "cancelled" if it was.
        dose: mean Δ − E[Δ] of a sampled token, the end of the turn among them; None where it was not asked for.
    """

    index: int
    tokens: list[int]
    finish_reason: str
    dose: float | None = None


@dataclass(frozen=True)
class Sampled:
    """A token that a request was given.

    Attributes:
        id: of the request.
        token: no end of generation.
        dose: Δ − E[Δ]; None where Δ was not computed, because there was nothing to steer.
    """

    id: int
    token: int
    dose: float | None


@dataclass(frozen=True)
class Ended:
    """A request that is done."""

    id: int
    completion: Completion


@dataclass(frozen=True)
class Failed:
    """A request that came to nothing: its protection or its dose could not be computed, or a step that failed lost it.

    No token of that step was emitted for it.
    """

    id: int
    error: AdlocalError


Event = Sampled | Ended | Failed
