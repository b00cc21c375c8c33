"""Several answers at once: their events, as they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from .events import Event

_WAITING = 32  # events that may wait for a client


async def merged(streams: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[Event]:
    """The events of all, as they come. The first failure ends them all."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as events:
            async for event in events:
                yield event
        return
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue(_WAITING)

    async def pump(stream: AsyncGenerator[Event]) -> None:
        try:
            async with contextlib.aclosing(stream) as events:
                async for event in events:
                    await queue.put(event)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        for _ in tasks:
            while (found := await queue.get()) is not None:
                if isinstance(found, Exception):
                    raise found
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
