"""What llama.cpp logs, caught for our own messages."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp
from llama_cpp._logger import llama_log_callback, logger


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collects what llama.cpp logs as an error, instead of printing it beside our own message.

    A caller who asked for `verbose` still sees everything.
    """
    lines: list[str] = []

    def collect(level: int, text: bytes, _user_data: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR; llama-cpp-python's own table of levels is out of date
            lines.append(text.decode("utf-8", errors="replace").strip())
        if logger.level == logging.DEBUG:  # what verbose=True sets
            llama_log_callback(level, text, ctypes.c_void_p(0))

    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def last_line(log: list[str]) -> str:
    """The most specific thing that llama.cpp said: its first error, without the function's name in front."""
    return log[0].rpartition(": ")[2] or log[0] if log else "llama.cpp gave no reason"
