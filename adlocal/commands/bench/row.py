"""The adjustment of one row of logits alone."""

from __future__ import annotations

import ctypes
import time

import numpy as np

from ... import adjust
from ...llamacpp import native
from ...settings import DEFAULT_GUARD

N_LARGE = 152_064


class LargeRow:
    """A row of the largest vocabulary in use (Qwen2.5's), with forty plausible tokens."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.z, self.plus = rng.normal(size=(2, N_LARGE)).astype(np.float32) * 3
        self.minus = self.plus + rng.normal(size=N_LARGE).astype(np.float32) / 100
        self.z[:: N_LARGE // 40] += 14
        self.ends = (ctypes.c_int32 * 2)(0, N_LARGE - 1)

    def native(self, n: int = 50) -> dict[str, float]:
        """Seconds to adjust it in the native core, dose and KL among it."""
        lib, out = native.library(), native.RowStruct()
        started = time.perf_counter()
        for _ in range(n):
            z, plus, minus = (
                row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for row in (self.z, self.plus, self.minus)
            )
            row = z, N_LARGE, plus, minus, N_LARGE, N_LARGE
            native.check(lib.adl_adjust(*row, self.ends, len(self.ends), 0.01, 1.0, DEFAULT_GUARD, out))
        return {"adjustment": (time.perf_counter() - started) / n}

    def numpy(self, n: int = 5) -> dict[str, float]:
        """The same by the oracle."""
        started = time.perf_counter()
        for _ in range(n):
            delta = adjust.delta(self.plus, self.minus, 0.01)
            adjust.expectation(self.plus, self.minus, delta)
            adjust.adjust(self.z, delta, lam=1.0, guard=DEFAULT_GUARD, ends=np.asarray(self.ends))
        return {"adjustment_numpy": (time.perf_counter() - started) / n}
