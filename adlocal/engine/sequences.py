"""What `ParallelLlama` is asked for, what it works on, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llama_cpp._internals import LlamaSampler


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
    """A prompt to go on from, by at most `n_predict` tokens; `index` is handed back with the completion."""

    index: int
    tokens: Sequence[int]
    n_predict: int
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    Attributes:
        index: that of the request.
        tokens: sampled ids, without the one that ended the turn.
        finish_reason: "stop" if the model ended its turn, "length" at `n_predict` or at the end of the context.
        dose: mean Δ − E[Δ] of a sampled token, the end of the turn among them; None where the pair was not evaluated.
    """

    index: int
    tokens: list[int]
    finish_reason: str
    dose: float | None = None


@dataclass
class Slot:
    """One sequence being generated: `pending` is still to be decoded, after `n_past` tokens that were."""

    request: Request
    limit: int
    sampler: LlamaSampler
    pending: Sequence[int]
    n_past: int = 0
    sampled: list[int] = field(default_factory=list)
    doses: list[float] = field(default_factory=list)

    def completion(self, finish_reason: str) -> Completion:
        dose = math.fsum(self.doses) / len(self.doses) if self.doses else None
        return Completion(self.request.index, self.sampled, finish_reason, dose)


class Queue:
    """Requests, of which the next can be seen before it is taken."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._rest = iter(requests)
        self.head = next(self._rest, None)

    def pop(self) -> Request:
        """Raises IndexError: none is left."""
        if (request := self.head) is None:
            raise IndexError("no request is left")
        self.head = next(self._rest, None)
        return request
