"""The decodes that pairs, and locksteps over them, ask llama.cpp for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

from ...llamacpp import native

_Decode = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, llama_cpp.llama_batch)


class Issued:
    """A batch of its own, like one that was decoded in `context`."""

    def __init__(self, context: int, batch: Any) -> None:
        n, self.context = batch.n_tokens, context
        self._token = (ctypes.c_int32 * n)(*batch.token[:n])
        self._pos = (ctypes.c_int32 * n)(*batch.pos[:n])
        self._n_seq_id = (ctypes.c_int32 * n)(*batch.n_seq_id[:n])
        self._ids = [(ctypes.c_int32 * batch.n_seq_id[i])(*batch.seq_id[i][: batch.n_seq_id[i]]) for i in range(n)]
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._seq_id = (pointer * n)(*[ctypes.cast(ids, pointer) for ids in self._ids])
        self._logits = (ctypes.c_int8 * n)(*batch.logits[:n])
        self.batch = llama_cpp.llama_batch(n, self._token, None, self._pos, self._n_seq_id, self._seq_id, self._logits)


class Recorder:
    """Stands in for the `llama_decode` of pairs that are loaded in `installed`; every call goes on to llama.cpp.

    It has to live for as long as such a pair does.
    """

    def __init__(self) -> None:
        self._issued: list[Issued] = []
        self._stopped: BaseException | None = None
        self._callback = _Decode(self._decode)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The scope in which to load them."""
        with native.replaced("llama_decode", self._callback):
            yield

    def record(self, work: Callable[[], object]) -> list[Issued]:
        """All decodes of a piece of work, in order."""
        self._issued, self._stopped = [], None
        try:
            work()
        except Exception:  # by whatever name the decode's failure went on
            if self._stopped is None:
                raise
        if self._stopped is not None:
            raise self._stopped
        return self._issued

    def _decode(self, context: int, batch: Any) -> int:
        try:
            self._issued.append(Issued(context, batch))
            return int(llama_cpp.llama_decode(ctypes.c_void_p(context), batch))
        except BaseException as error:  # Ctrl-C, say: ctypes would print it and go on
            self._stopped = error
            return -3
