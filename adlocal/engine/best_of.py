"""Several completions of a prompt: what to ask for, and which one is kept."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from .sequences import Completion, Request

T = TypeVar("T")


def repeated(requests: Iterable[Request], n: int) -> Iterator[Request]:
    """Each request n times: as it is, and with seeds so far apart that requests with seeds in a row share none."""
    for request in requests:
        yield request
        for i in range(1, n):
            seed = (request.seed + i * 0x9E3779B1) % 0xFFFFFFFF  # which llama.cpp would take for "a random seed"
            yield dataclasses.replace(request, seed=seed)


def best_of(
    completions: Iterable[Completion], n: int, answer: Callable[[Completion], Hashable | None]
) -> Iterator[Completion]:
    """Of every n completions of a request, the one with the highest dose among those that agree."""
    candidates: dict[int, list[Completion]] = {}
    for completion in completions:
        found = candidates.setdefault(completion.index, [])
        found.append(completion)
        if len(found) == n:
            found = candidates.pop(completion.index)
            yield max(consistent(found, list(map(answer, found))), key=lambda c: c.dose or 0.0)


def consistent(candidates: Sequence[T], answers: Sequence[Hashable | None]) -> list[T]:
    """Those whose answer is the most frequent one, of several such all; all candidates where none answers."""
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=0)
    return [c for c, answer in zip(candidates, answers, strict=True) if counts[answer] == most]
