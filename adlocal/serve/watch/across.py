"""The view across keys: one harvest over many accounts shares its template, and so do the honest users of one app.

What tells them apart is how they use it. Accounts that one program works through ask equally often, in steady gaps,
for hours; people ask in bursts, some much and most little, and a class with one exercise is over after a lesson. So a
template is taken for a harvest only when enough parties have shared it for long enough (their median, from first to
last request) and several of these signals agree:

- fresh: nine of ten fillings resemble none that came before, from whatever party.
- even volume: the requests per party vary little more than chance, σ²/μ² − 1/μ ≤ 0.15 (people: about 1).
- steady timing: the median party's gaps have a coefficient of variation of 1.1 or less (random arrivals: 1; people,
  who come and go: 2 and more).
- reasoning: half of the requests or more ask for it.

Counts fade by e in a day. Templates are compared with all that are known, which 512 make cheaper than an index and
exact. Only requests of the template itself are raised, whichever party they come from.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .buckets import DAY, HOUR
from .features import coefficient_of_variation
from .ramp import Standing
from .settings import AcrossKeys, Capacity
from .sketch import PERMUTATIONS, SAME_TEMPLATE, Signature, Sketch, similarities

SIGNALS = ("fresh", "even volume", "steady timing", "reasoning")
_FRESH, _NEW_CONTENT = 0.9, 0.5
_EVEN, _STEADY, _REASONING = 0.15, 1.1, 0.5
_CONTENTS = 128
_LEAST_GAPS = 3
_AGAIN = 5.0  # seconds that a verdict is kept


@dataclass
class _Part:
    """What one party asked of a template; fading."""

    first: float
    time: float
    requests: float = 0.0
    gaps: float = 0.0
    gap: float = 0.0
    gap2: float = 0.0

    def add(self, now: float) -> None:
        gap = min(max(0.0, now - self.time), float(HOUR))
        fade = math.exp(-max(0.0, now - self.time) / DAY)
        if self.requests:
            self.gaps, self.gap, self.gap2 = self.gaps * fade + 1.0, self.gap * fade + gap, self.gap2 * fade + gap**2
        self.requests = self.requests * fade + 1.0
        self.time = max(self.time, now)


@dataclass
class Template:
    """A template and who uses it.

    Attributes:
        name: of its first request's ends, the same on every node.
        parties: the latest to use it, last.
        requests, fresh, reasoning: counts; fading.
        time: of its last request.
        standing: on the ramp.
    """

    name: str
    parties: OrderedDict[str, _Part] = field(default_factory=OrderedDict)
    requests: float = 0.0
    fresh: float = 0.0
    reasoning: float = 0.0
    time: float = 0.0
    standing: Standing = field(default_factory=Standing)
    contents: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros((0, PERMUTATIONS), np.uint16))
    n_contents: int = 0
    verdict: tuple[float, tuple[str, ...]] = (-math.inf, ())

    def add(self, now: float, party: str, sketch: Sketch, reasoning: bool, most: int) -> None:
        """Counts a request; of more than `most` parties the longest silent is forgotten."""
        fade = math.exp(-max(0.0, now - self.time) / DAY)
        self.requests = self.requests * fade + 1.0
        self.fresh = self.fresh * fade + self._is_new(sketch.content)
        self.reasoning = self.reasoning * fade + reasoning
        self.time = max(self.time, now)
        self.parties.setdefault(party, _Part(now, now)).add(now)
        self.parties.move_to_end(party)
        if len(self.parties) > most:
            self.parties.popitem(last=False)

    def signals(self, settings: AcrossKeys, now: float) -> tuple[str, ...]:
        """Which of `SIGNALS` there are; none while too few share it, or not for long. Recomputed every five seconds."""
        if now - self.verdict[0] >= _AGAIN:
            self.verdict = (now, self._signals(settings, now))
        return self.verdict[1]

    def forget(self) -> None:
        """As if nobody had asked."""
        self.parties.clear()
        self.requests = self.fresh = self.reasoning = 0.0
        self.standing, self.verdict = Standing(), (-math.inf, ())

    def _signals(self, settings: AcrossKeys, now: float) -> tuple[str, ...]:
        recent = [part for part in self.parties.values() if now - part.time < DAY]
        if len(recent) < settings.keys or self.requests < settings.requests:
            return ()
        if float(np.median([part.time - part.first for part in recent])) < settings.hours * HOUR:
            return ()
        found = (
            self.fresh >= _FRESH * self.requests,
            excess_variation([part.requests for part in recent]) <= _EVEN,
            _median_variation(recent) <= _STEADY,
            self.reasoning >= _REASONING * self.requests,
        )
        return tuple(name for name, there in zip(SIGNALS, found, strict=True) if there)

    def _is_new(self, content: Signature) -> bool:
        new = not len(self.contents) or float(similarities(self.contents, content).max()) < _NEW_CONTENT
        if len(self.contents) < _CONTENTS:
            self.contents = np.concatenate((self.contents, content[None]))
        else:
            self.contents[self.n_contents % _CONTENTS] = content
        self.n_contents += 1
        return new


class Across:
    """The templates of all traffic, at most `capacity.templates`, the longest unused dropped."""

    def __init__(self, settings: AcrossKeys, capacity: Capacity) -> None:
        self._settings, self._capacity = settings, capacity
        self._ends = np.zeros((capacity.templates, 2, PERMUTATIONS), np.uint16)
        self._templates: list[Template] = []

    def add(self, now: float, party: str, sketch: Sketch, reasoning: bool) -> Template:
        """Counts a request and returns its template, a new one if it resembles none."""
        template = self._found(sketch)
        template.add(now, party, sketch, reasoning, self._capacity.parties)
        return template

    def named(self, name: str) -> Template | None:
        """The template of this name."""
        return next((each for each in self._templates if each.name == name), None)

    def shared(self) -> list[Template]:
        """Those that enough parties use to be judged."""
        return [each for each in self._templates if len(each.parties) >= self._settings.keys]

    def _found(self, sketch: Sketch) -> Template:
        ends = np.stack((sketch.head, sketch.tail))
        n = len(self._templates)
        if n:
            alike = similarities(self._ends[:n], ends).max(axis=1)
            best = int(alike.argmax())
            if alike[best] >= SAME_TEMPLATE:
                return self._templates[best]
        new = Template(f"template:{zlib.crc32(ends.tobytes()):08x}")
        if n < len(self._ends):
            self._templates.append(new)
            self._ends[n] = ends
        else:
            oldest = min(range(n), key=lambda i: self._templates[i].time)
            self._templates[oldest], self._ends[oldest] = new, ends
        return new


def excess_variation(counts: list[float]) -> float:
    """Squared coefficient of variation of counts beyond what chance gives them: σ²/μ² − 1/μ, from 0 up."""
    mean = float(np.mean(counts))
    return max(0.0, (float(np.var(counts)) - mean) / mean**2)


def _median_variation(parts: list[_Part]) -> float:
    found = [coefficient_of_variation(each.gaps, each.gap, each.gap2) for each in parts if each.gaps >= _LEAST_GAPS]
    return float(np.median(found)) if 2 * len(found) >= len(parts) else math.inf
