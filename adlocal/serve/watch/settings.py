"""The watch's settings, which policy's table `[watch]` maps onto."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...errors import InputError
from .baseline import read_baseline
from .benign import Baseline
from .buckets import DAY, HOUR
from .features import GROUPS, HEAVIEST_GROUP
from .score import Scored


@dataclass(frozen=True)
class Ramp:
    """How a score becomes a strength.

    Attributes:
        start: score up to which nothing is raised; more than any group of features can reach alone.
        full: score from which the strength is the highest.
        signals: groups of features that have to agree before anything is raised.
        needed: the group that has to be present besides, "" for none. By default thought: what adlocal protects are
            traces, and a batch job with answers of a word gives none away.
        hysteresis: what is raised falls again only once the score is this much under `start`.
        rise_per_minute, fall_per_hour: the fastest change of the position, which is 0 to 1.

    Raises:
        InputError: a value is out of range.
    """

    start: float = 0.40
    full: float = 0.75
    signals: int = 3
    needed: str = "thought"
    hysteresis: float = 0.10
    rise_per_minute: float = 0.5
    fall_per_hour: float = 0.5

    def __post_init__(self) -> None:
        _check(HEAVIEST_GROUP < self.start < 1, "ramp.start", self.start, f"above {HEAVIEST_GROUP:.2f} and below 1, so "
               "that no group of signals raises alone")  # fmt: skip
        _check(self.start < self.full <= 1, "ramp.full", self.full, "above ramp.start, 1 at most")
        _check(2 <= self.signals <= len(GROUPS), "ramp.signals", self.signals, f"2 to {len(GROUPS)}")
        _check(self.needed in ("", *GROUPS), "ramp.needed", self.needed, f"one of {', '.join(GROUPS)}, or nothing")
        _check(0 <= self.hysteresis <= self.start, "ramp.hysteresis", self.hysteresis, "0 to ramp.start")
        _check(self.rise_per_minute > 0, "ramp.rise_per_minute", self.rise_per_minute, "above 0")
        _check(self.fall_per_hour > 0, "ramp.fall_per_hour", self.fall_per_hour, "above 0")

    def agreed(self, found: Scored) -> bool:
        """Whether enough groups signal to raise."""
        return len(found.signals) >= self.signals and (not self.needed or found.present(self.needed))

    @staticmethod
    def strength(policy: float, highest: float, position: float) -> float:
        """s = s₀ + (s₁ − s₀) · position, and never under the policy's s₀."""
        return policy + max(0.0, highest - policy) * position


@dataclass(frozen=True)
class Actions:
    """What may be done. A step that is due and not allowed becomes the one before it.

    Attributes:
        raise_strength: the default, and the only one.
        throttle, block: refuse for a while, or until the score falls; from these scores on, at the ramp's end.
        raise_evaluation: raise keys, too, that policy declares as evaluation loops.
    """

    raise_strength: bool = True
    throttle: bool = False
    throttle_at: float = 0.80
    block: bool = False
    block_at: float = 0.90
    raise_evaluation: bool = False

    def __post_init__(self) -> None:
        _check(0 < self.throttle_at <= self.block_at <= 1, "actions.throttle_at, block_at",
               (self.throttle_at, self.block_at), "0 to 1, in this order")  # fmt: skip


@dataclass(frozen=True)
class AcrossKeys:
    """When requests of one template from many keys are one harvest; see `across`.

    Attributes:
        keys, requests: that share the template, at least.
        hours: for which the median key has, at least. Less finds a harvest sooner, and a class with one exercise, too.
        signals: of `across.SIGNALS` that have to agree; 2 at least, since honest users share an app's template.
    """

    keys: int = 8
    requests: int = 100
    hours: float = 2.0
    signals: int = 3

    def __post_init__(self) -> None:
        _check(self.keys >= 2, "across.keys", self.keys, "2 or more")
        _check(self.requests >= self.keys, "across.requests", self.requests, "across.keys or more")
        _check(0 <= self.hours < 24, "across.hours", self.hours, "0 to 24")
        _check(2 <= self.signals <= 4, "across.signals", self.signals, "2 to 4")


@dataclass(frozen=True)
class Capacity:
    """What bounds memory and disk.

    Attributes:
        subjects: that are followed at once, up to 64 KB each; the longest silent one is dropped.
        sketches: of each, the latest.
        templates, parties: of the view across keys, and of each of its templates.
        records: in the log, a request and its end being two, 0.6 KB together: what is known after a restart.
    """

    subjects: int = 2048
    sketches: int = 128
    templates: int = 512
    parties: int = 512
    records: int = 50_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check(value >= 16, f"capacity.{name}", value, "16 or more")


@dataclass(frozen=True)
class WatchSettings:
    """All of it.

    Attributes:
        windows: seconds, a day at most.
        long_answer: tokens from which an answer counts as long.
        baseline: from `adlocal watch calibrate`; empty for the defaults.
    """

    windows: tuple[int, ...] = (600, HOUR, DAY)
    long_answer: int = 400
    ramp: Ramp = field(default_factory=Ramp)
    actions: Actions = field(default_factory=Actions)
    across: AcrossKeys = field(default_factory=AcrossKeys)
    capacity: Capacity = field(default_factory=Capacity)
    baseline: Baseline = field(default_factory=dict)

    def __post_init__(self) -> None:
        good = bool(self.windows) and all(60 <= window <= DAY for window in self.windows)
        _check(good, "windows", self.windows, f"seconds, from 60 to {DAY}")
        _check(self.long_answer >= 1, "long_answer", self.long_answer, "1 or more")


_PARTS: dict[str, type[Any]] = {"ramp": Ramp, "actions": Actions, "across": AcrossKeys, "capacity": Capacity}
_T = TypeVar("_T")


def read_settings(table: Mapping[str, Any]) -> WatchSettings:
    """The settings of a TOML table: `windows`, `long_answer`, `baseline` (a file of `adlocal watch calibrate`), and the
    tables `ramp`, `actions`, `across`, `capacity`.

    Raises:
        InputError: an unknown key, or a value that makes no sense.
    """
    values = dict(table)
    for name, part in _PARTS.items():
        if name in values:
            values[name] = _made(part, values[name], f"watch.{name}")
    if "windows" in values:
        values["windows"] = tuple(values["windows"]) if isinstance(values["windows"], list) else values["windows"]
    if "baseline" in values:
        values["baseline"] = read_baseline(Path(str(values["baseline"])))
    return _made(WatchSettings, values, "watch")


def _made(kind: type[_T], values: Any, where: str) -> _T:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}={values!r}: give a table")
    defaults: Any = kind()
    known = [each.name for each in dataclasses.fields(defaults)]
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{where}.{name}: not known; give one of {', '.join(known)}")
        default = getattr(defaults, name)
        fits = isinstance(value, (int, float)) if isinstance(default, float) else isinstance(value, type(default))
        if not fits or (isinstance(value, bool) and not isinstance(default, bool)):
            raise InputError(f"{where}.{name}={value!r}: expected such a value as {default!r}")
    return kind(**values)


def _check(good: bool, name: str, value: Any, expected: str) -> None:
    if not good:
        raise InputError(f"watch.{name}={value!r}: give {expected}")
