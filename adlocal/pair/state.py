"""Saved states of a pair."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import llama_cpp

from ..errors import ProxyError


@dataclass(frozen=True)
class PairState:
    """Both proxies' memory, as `llama_state_get_data` gives it, the tokens it holds, and what it was computed with."""

    bundle_id: str
    epsilon: float
    tokens: tuple[int, ...]
    plus: bytes
    minus: bytes


def get_state(context: int) -> bytes:
    """Copy of a context's memory."""
    size = llama_cpp.llama_state_get_size(context)
    buffer = (ctypes.c_uint8 * size)()
    return ctypes.string_at(buffer, llama_cpp.llama_state_get_data(context, buffer, size))


def set_state(context: int, state: bytes) -> None:
    """Restores a copy, or raises ProxyError."""
    buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    if llama_cpp.llama_state_set_data(context, buffer, len(state)) != len(state):
        raise ProxyError("llama.cpp refused a saved state of a proxy; call reset() and evaluate the prompt again")
