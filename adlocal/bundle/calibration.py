"""A calibration: strength and guard that `adlocal calibrate` chose for a bundle and a teacher, beside the weights.

It is a file of its own, `calibration.gguf`, so that one rename replaces it and the weights stay as they are; and a GGUF
of metadata alone, because everything that reads a bundle reads GGUF.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import adjust
from ..errors import BundleError, ConversionError, InputError, ModelError
from ..files import replaced
from ..llamacpp.gguf import GGUFHeader, write_metadata
from ..llamacpp.record import F64, STRING, U32, GGUFRecord, KeyProblem, key
from .metadata import PREFIX, Bundle

CALIBRATION_NAME = "calibration.gguf"
CALIBRATION_VERSION = 1
_BLOCK = 4096
REMEDY = "run `adlocal calibrate -m TEACHER.gguf --bundle {} --prompts PROMPTS.jsonl --kl NATS`"


def _key(name: str, gguf_type: str) -> Any:
    return key(f"{PREFIX}calibration.{name}", gguf_type)


@dataclass(frozen=True)
class Calibration(GGUFRecord):
    """The settings that spend a budget, and what was measured to find them. Every field is a metadata key.

    KL is that of the adjusted logits to the teacher's at temperature 1, in nats a token; dose is as in `Dose`, a token.
    """

    version: int = _key("version", U32)
    #: The bundle that was calibrated.
    bundle_id: str = _key("bundle_id", STRING)
    converter: str = _key("converter", STRING)
    strength: float = _key("strength", F64)
    guard: float = _key("guard", F64)
    #: "kl", in nats a token, or "accuracy-drop", in percentage points.
    budget_kind: str = _key("budget.kind", STRING)
    budget: float = _key("budget.value", F64)
    #: What the protected text spent at these settings, in the budget's unit.
    reached: float = _key("budget.reached", F64)
    #: One standard error of `reached`, over the prompts.
    standard_error: float = _key("budget.standard_error", F64)
    #: `teacher_identity` of the teacher's file.
    teacher: str = _key("teacher.identity", STRING)
    prompts_sha256: str = _key("prompts.sha256", STRING)
    n_prompts: int = _key("prompts.count", U32)
    #: Tokens of protected text at the chosen settings.
    n_tokens: int = _key("tokens", U32)
    temperature: float = _key("temperature", F64)
    #: Rounds of protected text, by strength, all at `guard`; 0 is the plain teacher. No accuracies without answers.
    measured_strength: list[float] = _key("measured.strength", F64)
    measured_kl: list[float] = _key("measured.kl", F64)
    measured_dose: list[float] = _key("measured.dose", F64)
    measured_accuracy: list[float] = _key("measured.accuracy", F64)
    #: What each strength would do along the plain teacher's text, at `guard`.
    curve_strength: list[float] = _key("curve.strength", F64)
    curve_kl: list[float] = _key("curve.kl", F64)
    curve_dose: list[float] = _key("curve.dose", F64)

    @classmethod
    def open(cls, bundle: Bundle | str | os.PathLike[str]) -> Calibration | None:
        """The calibration of a bundle, or None if there is none.

        Args:
            bundle: the bundle, or its directory.

        Raises:
            BundleError: the calibration is unreadable, or another bundle's.
        """
        directory = bundle.directory if isinstance(bundle, Bundle) else Path(bundle)
        path = directory / CALIBRATION_NAME
        if not path.exists():
            return None
        calibration = cls._read(path)
        bundle_id = (bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)).id
        if calibration.bundle_id != bundle_id:
            raise BundleError(
                f"{path} is of bundle {calibration.bundle_id[:12]}, and this one is {bundle_id[:12]}; delete it, or "
                + REMEDY.format(directory)
            )
        return calibration

    @classmethod
    def _read(cls, path: Path) -> Calibration:
        try:
            values = cls.stored_in(GGUFHeader(path))
        except ModelError as error:
            raise BundleError(f"calibration unusable: {error}") from None
        except KeyProblem as problem:
            raise BundleError(f"{problem}; delete the file, and calibrate again") from None
        return cls(**values)._checked(path)

    def _checked(self, path: Path) -> Calibration:
        if self.version != CALIBRATION_VERSION:
            raise BundleError(
                f"{path}: calibration format {self.version}, this adlocal reads {CALIBRATION_VERSION}; "
                "upgrade adlocal, or calibrate again"
            )
        try:
            adjust.check_strength(self.strength)
            adjust.check_guard(self.guard)
        except InputError as error:
            raise BundleError(f"{path}: {error}; delete the file, and calibrate again") from None
        return self

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Puts the calibration into a bundle's directory, for its owner alone to read, in place of an older one.

        Raises:
            ConversionError: it cannot be written; an older one is left as it was.
        """
        path = Path(directory) / CALIBRATION_NAME
        try:
            with replaced(path, private=True) as partial:
                write_metadata(partial, self.keys())
                if self._read(partial) != self:  # a full disk may show only when the last block is written
                    raise OSError(f"{partial} does not hold what was written")
        except (OSError, BundleError) as error:
            raise ConversionError(f"the calibration cannot be written: {error}; nothing was changed") from None

    def summary(self) -> str:
        """The settings and what they spend, as one line."""
        spent = (
            f"KL {self.reached:.4g} ± {self.standard_error:.2g} nats a token of {self.budget:g}"
            if self.budget_kind == "kl"
            else f"accuracy drop {self.reached:.3g} ± {self.standard_error:.2g} points of {self.budget:g}"
        )
        text = f"{self.n_prompts} prompts, {self.n_tokens:,} tokens, temperature {self.temperature:g}"
        return f"strength {self.strength:.4g}, guard {self.guard:g}: {spent} (one standard error; {text})"


def teacher_identity(path: str | os.PathLike[str]) -> str:
    """SHA-256 over a GGUF's size, header and 64 blocks from all over its weights: cheap for a file of any size.

    Two quantizations or fine-tunes of one model differ in it; a change of single weights may go unseen.
    """
    header = GGUFHeader(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    first = min((tensor.offset for tensor in header.tensors), default=len(data))
    digest = hashlib.sha256(len(data).to_bytes(8, "little"))
    digest.update(data[:first].data)
    for start in np.linspace(first, max(first, len(data) - _BLOCK), 64).astype(int):
        digest.update(data[start : start + _BLOCK].data)
    return digest.hexdigest()
