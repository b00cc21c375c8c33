"""Several completions of a prompt: what to ask for, and which of them count."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from .sequences import Request

T = TypeVar("T")


def repeated(requests: Iterable[Request], n: int) -> Iterator[Request]:
    """Each request n times: as it is, and with seeds so far apart that requests with seeds in a row share none."""
    for request in requests:
        yield request
        for i in range(1, n):
            seed = (request.seed + i * 0x9E3779B1) % 0xFFFFFFFF  # which llama.cpp would take for "a random seed"
            yield dataclasses.replace(request, seed=seed)


def consistent(candidates: Sequence[T], answers: Sequence[Hashable | None]) -> list[T]:
    """Those whose answer is the most frequent one, of several such all; all candidates where none answers."""
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=0)
    return [c for c, answer in zip(candidates, answers, strict=True) if counts[answer] == most]
