"""Protection for llama.cpp programs that nobody changed: what a program is started with."""

from .environment import Protection, environment, library

__all__ = ["Protection", "environment", "library"]
