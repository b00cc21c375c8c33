"""A llama.cpp whose `llama_decode` fails or computes nonsense when told to, slipped under the native core."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

from adlocal.llamacpp import native

_Decode = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, llama_cpp.llama_batch)


class Faults:
    """Stands in for a failure only: every other call goes to llama.cpp."""

    def __init__(self) -> None:
        self._broken: dict[int, tuple[int, float | None]] = {}
        self._callback = _Decode(self._decode)  # kept alive as long as pairs may call it

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The scope in which to open the pairs that are to be broken."""
        with native.replaced("llama_decode", self._callback):
            yield

    @contextmanager
    def failing(self, context: int, code: int = -3) -> Iterator[None]:
        """llama_decode of this context returns `code`."""
        self._broken[context] = (code, None)
        yield
        del self._broken[context]

    @contextmanager
    def computing(self, context: int, value: float) -> Iterator[None]:
        """The first logit of this context is `value`."""
        self._broken[context] = (0, value)
        yield
        del self._broken[context]

    def _decode(self, context: int, batch: Any) -> int:
        code, value = self._broken.get(context, (0, None))
        code = code or llama_cpp.llama_decode(ctypes.c_void_p(context), batch)
        if value is not None:
            llama_cpp.llama_get_logits(ctypes.c_void_p(context))[0] = value
        return code
