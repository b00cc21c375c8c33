"""`ParallelLlama` on the native core's lockstep, as the product's will be; the product's own takes its place then."""

from __future__ import annotations

import ctypes
from typing import Any

from adlocal.engine.parallel import ParallelLlama
from adlocal.errors import ProxyError
from adlocal.llamacpp import native


class LazyParallelLlama(ParallelLlama):
    """The pair is evaluated where a row has a choice, all sequences in one batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lockstep: int | None = None
        if self.pair is not None:
            params = native.LockstepParams(ctypes.sizeof(native.LockstepParams), False)
            self._lockstep = native.library().adl_lockstep_init(self.pair.handle, self._context.ctx, params)

    def close(self) -> None:
        native.library().adl_lockstep_free(self._lockstep)
        super().close()

    def stats(self) -> dict[str, int]:
        """As of `LockstepContext`."""
        stats = native.library().adl_lockstep_get_stats(self._lockstep)
        return {field[0]: int(getattr(stats, field[0])) for field in native.LockstepStats._fields_}

    def _evaluate(self, n_sequences: int, n_rows: int) -> None:
        if self._lockstep is None:
            super()._evaluate(n_sequences, n_rows)
            return
        row = native.RowParams(self.settings.strength, self.settings.guard, native.MODE_PROTECT, False)
        rows, lib = (native.RowParams * n_rows)(*[row] * n_rows), native.library()
        if (status := lib.adl_lockstep_decode(self._lockstep, self._batch.batch, rows, n_rows, None)) != 0:
            raise ProxyError(f"adl_lockstep_decode returned {status}")

    def _forget(self, seq_id: int) -> None:
        if self._lockstep is None:
            super()._forget(seq_id)
        else:
            native.library().adl_lockstep_memory_seq_rm(self._lockstep, seq_id, -1, -1)
