"""Protection for llama.cpp programs that nobody changed: what a program is started with, and its control file."""

from .build import build, version_of
from .control import Control, Counters, Decodes, InForce, Think
from .directory import control_directory, controls
from .environment import Protection, environment, library, proxies_bytes
from .program import check_program

__all__ = [
    "Control",
    "Counters",
    "Decodes",
    "InForce",
    "Protection",
    "Think",
    "build",
    "check_program",
    "control_directory",
    "controls",
    "environment",
    "library",
    "proxies_bytes",
    "version_of",
]
