"""A subject's latest sketches, and what they say: how alike its prompts are in form, and how unlike in content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .sketch import PERMUTATIONS, SAME_CONTENT, SAME_TEMPLATE, Sketch, similarities

_ENTRY = np.dtype(
    [
        ("time", np.float64),
        ("head", np.uint16, PERMUTATIONS),
        ("tail", np.uint16, PERMUTATIONS),
        ("content", np.uint16, PERMUTATIONS),
        ("template", np.int64),
        ("nearest", np.float32),
        ("mean", np.float32),
    ]
)


@dataclass(frozen=True)
class Forms:
    """Of a window's sketches.

    Attributes:
        n: how many there are.
        repetition: 1 − distinct templates / n.
        spread: repetition · mean(1 − similarity to the nearest earlier content): many different fillings of few
            templates, as when a list of questions is worked through.
        narrowness: mean similarity of a content to earlier ones, the same ones left out: one subject, however worded.
    """

    n: int = 0
    repetition: float = 0.0
    spread: float = 0.0
    narrowness: float = 0.0


class Recent:
    """At most `most` sketches, the oldest overwritten."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: npt.NDArray[Any] = np.zeros(0, _ENTRY)
        self._n = 0
        self._next_template = 0

    def add(self, time: float, sketch: Sketch) -> None:
        """Compares it with those that are kept, and keeps it."""
        seen = self._entries[: self._n]
        template, nearest, mean = self._compared(seen, sketch)
        slot = self._slot()
        entry = (time, sketch.head, sketch.tail, sketch.content, template, nearest, mean)
        self._entries[slot] = entry

    def forms(self, now: float, window: int) -> Forms:
        """What the sketches of the last `window` seconds say."""
        seen = self._entries[: self._n]
        seen = seen[seen["time"] > now - window]
        n = len(seen)
        if n < 2:
            return Forms(n)
        repetition = 1.0 - len(set(seen["template"].tolist())) / n
        spread = repetition * (1.0 - float(seen["nearest"].sum()) / n)
        return Forms(n, repetition, spread, float(seen["mean"].sum()) / n)

    def _compared(self, seen: npt.NDArray[Any], sketch: Sketch) -> tuple[int, float, float]:
        """Its template's number, and the greatest and the mean similarity of contents."""
        if len(seen):
            forms = np.maximum(similarities(seen["head"], sketch.head), similarities(seen["tail"], sketch.tail))
            contents = similarities(seen["content"], sketch.content)
            others = contents[contents < SAME_CONTENT]
            nearest, mean = float(contents.max()), float(others.sum()) / max(1, len(others))
            best = int(forms.argmax())
            if forms[best] >= SAME_TEMPLATE:
                return int(seen["template"][best]), nearest, mean
        else:
            nearest = mean = 0.0
        self._next_template += 1
        return self._next_template, nearest, mean

    def _slot(self) -> int:
        if self._n < len(self._entries):
            self._n += 1
            return self._n - 1
        if self._n < self._most:
            room = np.zeros(min(self._most, max(8, 2 * self._n)) - self._n, _ENTRY)
            self._entries = np.concatenate((self._entries, room))
            self._n += 1
            return self._n - 1
        return int(self._entries["time"].argmin())
