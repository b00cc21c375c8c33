"""What is in force: strength and guard, from the caller, the bundle's calibration or the defaults."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from . import adjust
from .bundle.calibration import REMEDY, Calibration, teacher_identity
from .bundle.metadata import Bundle
from .errors import InputError

CALIBRATED = "calibrated"
DEFAULT_STRENGTH = 1.0
DEFAULT_GUARD = 0.05


@dataclass(frozen=True)
class Settings:
    """How strongly a row is steered, and among which tokens.

    Attributes:
        strength: typical shift of a plausible token's logit, in nats; 0 is exactly the teacher.
        guard: tokens under this share of the top token's probability are never lifted; 0 is the paper.

    Raises:
        InputError: a value is out of range.
    """

    strength: float = DEFAULT_STRENGTH
    guard: float = DEFAULT_GUARD

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", adjust.check_strength(self.strength))
        object.__setattr__(self, "guard", adjust.check_guard(self.guard))

    @property
    def protects(self) -> bool:
        """Whether anything is steered at all."""
        return self.strength > 0

    def but(self, strength: float | None = None, guard: float | None = None) -> Settings:
        """These settings with what a caller gives in place of its own.

        Raises:
            InputError: a value is out of range.
        """
        given = {"strength": strength, "guard": guard}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})


def resolve(
    bundle: Bundle, teacher: str | os.PathLike[str] | None, strength: float | str | None, guard: float | None
) -> Settings:
    """The settings that a caller asks for, with what is left open from the calibration, or from the defaults.

    Args:
        bundle: as it lies in its directory.
        teacher: the teacher's GGUF; None where it is not known yet, and a calibration is taken for its own.
        strength: nats; "calibrated"; or None, the calibrated one if there is one, else 1.
        guard: a share; or None, the calibrated one if there is one, else 0.05.

    Raises:
        InputError: a value is out of range, "calibrated" without a calibration, or one for another teacher.
    """
    given: Any = None if strength == CALIBRATED else strength  # another string is refused where it is checked
    asked = Settings().but(given, guard)
    if given is not None and guard is not None:
        return asked
    calibration = Calibration.open(bundle)
    if calibration is None:
        if strength == CALIBRATED:
            where = bundle.directory
            raise InputError(f"strength={CALIBRATED!r}: bundle {where} has no calibration; {REMEDY.format(where)}")
        return asked
    if teacher is not None and calibration.teacher != teacher_identity(teacher):
        raise InputError(
            f"bundle {bundle.directory} was calibrated for another teacher than {teacher}; give strength and guard, "
            f"or {REMEDY.format(bundle.directory)}"
        )
    return Settings(calibration.strength, calibration.guard).but(given, guard)
