"""The native core's lockstep: the protected step of a teacher's context and a pair, row by row."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from ..llamacpp import native
from ..pair import ProxyPair, Rows
from ..settings import Settings


class DecodeError(RuntimeError):
    """The teacher's `llama_decode` failed, with this code."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Lockstep:
    """`struct adl_lockstep` of native/include/adlocal.h. The teacher's memory is changed through it alone.

    Args:
        teacher: llama.cpp's context of the teacher, empty.
        pair: made for the teacher's model; its memory is cleared. Both have to outlive the lockstep.
    """

    def __init__(self, teacher: int, pair: ProxyPair) -> None:
        self._lib, self._pair = native.library(), pair
        handle = self._lib.adl_lockstep_init(pair.handle, teacher, native.sized(native.LockstepParams, False))
        if handle is None:
            raise native.error()
        self._handle = handle
        self._free = weakref.finalize(self, self._lib.adl_lockstep_free, handle)

    def close(self) -> None:
        """Frees it; to be done before the pair is closed."""
        self._free()

    def decode(self, batch: Any, rows: Sequence[native.RowParams]) -> Sequence[native.RowResult]:
        """The teacher's `llama_decode`, and the pair's where a row has a choice; adjusts rows in place.

        Args:
            batch: a `llama_batch` with positions, sequences and output flags.
            rows: an entry for each row that it asks for.

        Returns:
            what became of each row. One that is `closed` must not be sampled from: `native.error()` says why.

        Raises:
            DecodeError: the teacher's `llama_decode` failed. No row may be sampled from.
            AdlocalError: nor may any be after another error.
        """
        params, results = self._arrays(rows)
        status = self._lib.adl_lockstep_decode(self._handle, batch, params, len(rows), results)
        if status > 0 or status == native.ERROR_DECODE:
            raise DecodeError(status, f"llama_decode returned {status}" if status > 0 else native.last_words())
        return _checked(status, results)

    def begin(self, batch: Any, rows: Sequence[native.RowParams]) -> None:
        """The first half of `decode`, where another lockstep has the teacher decode; `end` is the second."""
        params, self._results = self._arrays(rows)
        native.check(self._lib.adl_lockstep_begin(self._handle, batch, params, len(rows)))

    def end(self, status: int) -> Sequence[native.RowResult]:
        """The second half; `status` is what the teacher's `llama_decode` returned."""
        return _checked(self._lib.adl_lockstep_end(self._handle, status, self._results), self._results)

    def _arrays(self, rows: Sequence[native.RowParams]) -> tuple[Any, Any]:
        return (native.RowParams * len(rows))(*rows), (native.RowResult * len(rows))()

    def dose(self, row: int, token: int) -> float | None:
        """Δ(token) − E[Δ] for a row of the last step; None where Δ was not computed: there was nothing to steer."""
        dose = float(self._lib.adl_lockstep_dose(self._handle, row, token))
        return None if math.isnan(dose) else dose

    def doses(self, seq_id: int, position: int, tokens: Sequence[int]) -> list[float]:
        """Doses of all `tokens` that a sequence has from a position on, the last of which need not be decoded yet.

        The pair evaluates them afresh, in as few batches as its rows allow. The step's rows are gone after it.

        Raises:
            ProxyError: a proxy failed.
        """
        n = len(tokens)
        ids, doses = (ctypes.c_int32 * n)(*tokens), (ctypes.c_double * n)()
        native.check(self._lib.adl_lockstep_doses(self._handle, seq_id, position, ids, n, doses))
        return list(doses)

    def proxies(self, n_rows: int) -> tuple[Rows, Rows]:
        """(z₊, z₋) of the last step's rows, each (n_rows, n_vocab). The pair was evaluated for all of them."""
        shape = (self._pair.n_vocab,)
        plus, minus = (
            np.stack(
                [
                    np.ctypeslib.as_array(self._lib.adl_lockstep_get_logits(self._handle, row, sign), shape)
                    for row in range(n_rows)
                ]
            )
            for sign in (native.PLUS, native.MINUS)
        )
        return plus, minus

    def stats(self) -> dict[str, int]:
        """Rows, rows with a choice, rows whose Δ was computed, batches of the pair and tokens in them, so far."""
        stats = self._lib.adl_lockstep_get_stats(self._handle)
        return {field[0]: int(getattr(stats, field[0])) for field in native.LockstepStats._fields_}

    def clear(self) -> None:
        """Empties the teacher's memory and the pair's."""
        self._lib.adl_lockstep_memory_clear(self._handle)

    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """`llama_memory_seq_rm` of teacher and pair; False where the teacher's memory cannot forget a part."""
        return bool(self._lib.adl_lockstep_memory_seq_rm(self._handle, seq_id, p0, p1))

    def seq_cp(self, source: int, target: int, p0: int, p1: int) -> None:
        """`llama_memory_seq_cp` of teacher and pair."""
        native.check(self._lib.adl_lockstep_memory_seq_cp(self._handle, source, target, p0, p1))

    def n_held(self, seq_id: int) -> int:
        """How many of a sequence's tokens the pair holds; the others wait until a row of theirs has a choice."""
        return int(self._lib.adl_lockstep_n_held(self._handle, seq_id))

    def restore(self, seq_id: int, tokens: Sequence[int], n_held: int) -> None:
        """Says that the teacher's sequence was replaced by these tokens, of which the pair holds the first `n_held`."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        native.check(self._lib.adl_lockstep_restore(self._handle, seq_id, ids, None, len(tokens), n_held))


def _checked(status: int, results: Any) -> Sequence[native.RowResult]:
    """The results, if the failure is one of rows: those are closed, and the others may be sampled from."""
    if status < 0 and not any(each.closed for each in results):
        raise native.error()
    return cast(Sequence[native.RowResult], results)


def row_params(settings: Settings, *, full: bool = False) -> native.RowParams:
    """What becomes of a row under these settings; `full` evaluates the pair even where the teacher has no choice."""
    mode = native.MODE_PROTECT if settings.protects else native.MODE_OFF
    return native.RowParams(settings.strength, settings.guard, mode, full)
