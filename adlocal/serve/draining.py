"""Slots whose request was left: they are given back once the engine works on it no more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..plugin import Control
from .slots import Slot, Slots

_TICK_SECONDS = 0.02
#: A slot is idle when its sequence was left out of so many batches, or when nothing was decoded for so long.
_IDLE_DECODES, _IDLE_SECONDS = 3, 0.25
#: Then it is given back whatever it does: the engine lets the next request for it wait.
_DRAIN_SECONDS = 30.0

_draining: set[asyncio.Task[None]] = set()


def drain(slots: Slots, slot: Slot, key: str, text: str, control: Control, lives: Callable[[], bool]) -> None:
    """Gives a slot back once the engine no longer works on what it was given last, or is no more."""

    async def wait() -> None:
        try:
            await _until_idle(control, slot.number, lives)
        finally:
            slots.release(slot, key, text)

    task = asyncio.create_task(wait())
    _draining.add(task)  # the loop itself keeps no task alive
    task.add_done_callback(_draining.discard)


async def _until_idle(control: Control, sequence: int, lives: Callable[[], bool]) -> None:
    began = last = time.monotonic()
    n_decoded, begun = control.counters(sequence).n_decoded, control.decodes().begun
    while lives() and time.monotonic() - began < _DRAIN_SECONDS:
        await asyncio.sleep(_TICK_SECONDS)
        decodes, found, now = control.decodes(), control.counters(sequence).n_decoded, time.monotonic()
        if found != n_decoded:
            n_decoded, begun = found, decodes.begun
            last = now
        elif decodes.begun != decodes.ended:
            last = now
        if decodes.ended - begun >= _IDLE_DECODES or now - last >= _IDLE_SECONDS:
            return
