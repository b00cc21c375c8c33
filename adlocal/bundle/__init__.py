"""What the converter wrote."""

from .calibration import CALIBRATION_NAME, Calibration, teacher_identity
from .metadata import (
    ADAPTER,
    ADAPTER_NAME,
    BASE_NAME,
    FORMAT_VERSION,
    HALVES,
    MINUS_NAME,
    NAMES,
    PLUS_NAME,
    SIGNS,
    Bundle,
    format_of,
)

__all__ = [
    "ADAPTER",
    "ADAPTER_NAME",
    "BASE_NAME",
    "CALIBRATION_NAME",
    "FORMAT_VERSION",
    "HALVES",
    "MINUS_NAME",
    "NAMES",
    "PLUS_NAME",
    "SIGNS",
    "Bundle",
    "Calibration",
    "format_of",
    "teacher_identity",
]
