"""The engine's slots: who gets which, and who waits. Keys take turns, and none goes on with what another one left."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from .events import Failed


@dataclass
class Slot:
    """One sequence of the engine.

    Attributes:
        number: the engine's `id_slot`, and the plugin's sequence.
        key: whose conversation it holds; None where it holds none.
        text: what it holds, from its start on.
    """

    number: int
    key: str | None = None
    text: str = ""

    def common(self, key: str, prompt: str) -> int:
        """Characters of a prompt that need not be read again; 0 where most of another conversation would be lost."""
        length = _common_prefix(self.text, prompt) if key == self.key else 0
        return length if 2 * length >= len(self.text) else 0


@dataclass
class _Waiting:
    key: str
    prompt: str
    found: asyncio.Future[Slot] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Slots:
    """Slots and the queue before them.

    Requests of one key are served in the order they came; keys take turns. Use in one event loop.

    Args:
        n: slots that the engine has.
        queue, queue_per_key: requests that wait at most, of all keys and of one.
        queue_seconds: how long one waits at most.
    """

    def __init__(self, n: int, *, queue: int, queue_per_key: int, queue_seconds: float) -> None:
        self.n = n
        self.limit(queue, queue_per_key, queue_seconds)
        self._idle = {number: Slot(number) for number in range(n)}
        self._waiting: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        self._seconds = 5.0  # a request's, as far as one knows: what Retry-After is told from
        self._open = True

    @property
    def n_waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def most(self) -> int:
        """Answers of one key that can be worked on or wait."""
        queue, of_key, _ = self._limits
        return self.n + min(queue, of_key)

    @property
    def n_idle(self) -> int:
        """Slots that could be given at once."""
        return len(self._idle)

    async def acquire(self, key: str, prompt: str) -> Slot:
        """A slot, which `release` gives back: the one that holds most of the same key's prompt, else the lowest.

        Raises:
            Failed: too many requests wait already, or this one waited too long.
        """
        queue, of_key, seconds = self._limits
        if self.n_waiting >= queue or len(self._waiting.get(key, ())) >= of_key:
            raise Failed(
                429, "rate_limit_error", "too many requests are waiting; try again later", retry_after=self.wait()
            )
        waiting = _Waiting(key, prompt)
        self._waiting.setdefault(key, deque()).append(waiting)
        self._hand_out()
        try:
            async with asyncio.timeout(seconds):
                return await waiting.found
        except TimeoutError:
            self._give_up(waiting)
            message = f"no slot became free within {seconds:g} s; try again later"
            raise Failed(429, "rate_limit_error", message, retry_after=self.wait()) from None
        except asyncio.CancelledError:
            self._give_up(waiting)
            raise

    def release(self, slot: Slot, key: str | None, text: str, seconds: float | None = None) -> None:
        """Gives a slot back, with what it holds now.

        Args:
            key: None where nobody may go on with it.
            seconds: how long the request took; None where that says nothing.
        """
        slot.key, slot.text = key, text
        if seconds is not None:
            self._seconds += 0.2 * (seconds - self._seconds)
        self._idle[slot.number] = slot
        self._hand_out()

    def wait(self) -> float:
        """Seconds after which a request that comes now may find a slot."""
        return max(1.0, self._seconds * (self.n_waiting + 1) / self.n)

    def close(self) -> None:
        """Hands out nothing until `open`: there is no engine."""
        self._open = False

    def open(self) -> None:
        """Hands out slots, which hold nothing: the engine is new."""
        for slot in self._idle.values():
            slot.key, slot.text = None, ""
        self._open = True
        self._hand_out()

    def limit(self, queue: int, queue_per_key: int, queue_seconds: float) -> None:
        """Sets other limits, for requests that come from now on."""
        self._limits = queue, queue_per_key, queue_seconds

    def _hand_out(self) -> None:
        while self._open and self._idle and (waiting := self._next()) is not None:
            best = max(
                self._idle.values(),
                key=lambda slot: (slot.common(waiting.key, waiting.prompt), slot.key is None, -slot.number),
            )
            waiting.found.set_result(self._idle.pop(best.number))

    def _next(self) -> _Waiting | None:
        """The oldest request of the key whose turn it is. The key goes to the end of the round."""
        while self._waiting:
            key, queue = self._waiting.popitem(last=False)
            waiting = queue.popleft()
            if queue:
                self._waiting[key] = queue
            if not waiting.found.done():
                return waiting
        return None

    def _give_up(self, waiting: _Waiting) -> None:
        """Leaves the queue, or gives back a slot that came too late."""
        found = waiting.found
        if found.done() and not found.cancelled() and found.exception() is None:
            slot = found.result()
            self.release(slot, slot.key, slot.text)
        found.cancel()
        queue = self._waiting.get(waiting.key)
        if queue is not None and waiting in queue:
            queue.remove(waiting)
            if not queue:
                del self._waiting[waiting.key]


def _common_prefix(one: str, other: str) -> int:
    """By halves, since comparing slices is quick."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
