"""From a score to a position on the operator's ramp: smooth, with hysteresis, at a limited rate."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import Ramp


@dataclass
class Standing:
    """Where a subject stands.

    Attributes:
        position: 0 to 1.
        time: of its last change, seconds since 1970.
    """

    position: float = 0.0
    time: float = 0.0


def smoothstep(x: float) -> float:
    """3x² − 2x³ within [0, 1], flat at both ends."""
    x = min(1.0, max(0.0, x))
    return x * x * (3.0 - 2.0 * x)


def target(ramp: Ramp, score: float, agreed: bool) -> float:
    """Where a score would lead: smoothstep((S − start) / (full − start)), 0 while too few signals agree."""
    return smoothstep((score - ramp.start) / (ramp.full - ramp.start)) if agreed else 0.0


def follow(ramp: Ramp, standing: Standing, score: float, agreed: bool, now: float) -> float:
    """Moves a standing towards its target and returns its position.

    Up by `rise_per_minute` at most, the first step counting as a minute, so that a burst after a silence does not jump.
    Down by `fall_per_hour`, and only while the score is `hysteresis` under the start: a subject that hovers about the
    start keeps what it has.
    """
    goal = target(ramp, score, agreed)
    elapsed = max(0.0, now - standing.time)
    if goal > standing.position:
        standing.position = min(goal, standing.position + ramp.rise_per_minute * min(elapsed, 60.0) / 60.0)
    elif score < ramp.start - ramp.hysteresis:
        standing.position = max(goal, standing.position - ramp.fall_per_hour * elapsed / 3600.0)
    standing.time = max(standing.time, now)
    return standing.position
