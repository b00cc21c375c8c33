"""Continuous batching: requests come and go while others are being answered.

A step has every sequence decode its next token, and gives what is left of the batch to prompts that are being read. A
request takes over what is in memory of its prompt: from the sequence that it gets, or copied from another.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import llama_cpp
from llama_cpp._internals import LlamaSampler

from ..errors import BusyError, InputError, ProxyError
from ..settings import Settings
from . import prefix
from .runner import Chunk, Row, Runner
from .sequences import Completion, Ended, Event, Failed, Request, Sampled, Sampling

#: The most tokens of prompts in a step in which others are given a token, so that these do not wait for long.
N_CHUNK = 128


@dataclass
class _Running:
    """A request that is being answered: `pending` is still to be decoded."""

    id: int
    request: Request
    settings: Settings
    limit: int
    sampler: LlamaSampler
    pending: Sequence[int]
    sampled: list[int] = field(default_factory=list)

    @property
    def is_read(self) -> bool:
        """Whether its prompt is, but for the last token, which gives the first row."""
        return len(self.pending) == 1


@dataclass
class _Slot:
    """A sequence of the context, what it holds, and who has it.

    Attributes:
        held: tokens in memory.
        canonical: how many of them are as a fresh context would have them; see `prefix`.
        used_at: when it was last given to a request.
    """

    seq_id: int
    held: list[int] = field(default_factory=list)
    canonical: int = 0
    used_at: int = 0
    running: _Running | None = None


class Scheduler:
    """Answers requests, `submit`ted at any time, a `step` at a time. Not safe for several threads at once.

    Args:
        runner: with an empty context, which is the scheduler's from then on.
        n_parallel: its sequences.
        n_ctx: tokens of context for each.
        settings, sampling: of requests that have none of their own.
        max_waiting: how many requests may wait for a sequence.

    Example:
        >>> scheduler.submit(Request(0, tokens, n_predict=64))
        >>> while not scheduler.is_idle:
        ...     for event in scheduler.step():
        ...         print(event)
    """

    def __init__(
        self,
        runner: Runner,
        n_parallel: int,
        n_ctx: int,
        settings: Settings,
        sampling: Sampling | None = None,
        max_waiting: int = 1024,
    ) -> None:
        self.settings, self.sampling, self.max_waiting = settings, sampling or Sampling(), max_waiting
        self.shares = runner.can_share()
        self._runner, self._n_ctx = runner, n_ctx
        self._vocab = llama_cpp.llama_model_get_vocab(runner.context.model.model)
        self._slots = [_Slot(seq_id) for seq_id in range(n_parallel)]
        self._waiting: deque[tuple[int, Request]] = deque()
        self._cancelled: list[Ended] = []
        self._n_submitted = 0

    @property
    def n_waiting(self) -> int:
        """Requests that no sequence has been given to."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Requests that have a sequence."""
        return sum(slot.running is not None for slot in self._slots)

    @property
    def n_free(self) -> int:
        """Sequences that nobody has."""
        return len(self._slots) - self.n_running

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to be done."""
        return not (self._waiting or self._cancelled or self.n_running)

    def submit(self, request: Request) -> int:
        """Queues a request.

        Returns:
            its id, which events tell.

        Raises:
            BusyError: `max_waiting` requests wait already.
            InputError: it has no prompt, no token to predict, or a prompt that fills the context.
        """
        n = len(request.tokens)
        if not 0 < n < self._n_ctx or request.n_predict < 1:
            raise InputError(
                f"a prompt of {n} tokens and n_predict={request.n_predict}: give at least one of each, and a prompt "
                f"shorter than the context of {self._n_ctx}"
            )
        if self.n_waiting >= self.max_waiting:
            raise BusyError(f"{self.n_waiting} requests wait already, max_waiting={self.max_waiting}; try again later")
        self._n_submitted += 1
        self._waiting.append((self._n_submitted, request))
        return self._n_submitted

    def cancel(self, id: int) -> None:
        """Ends a request, waiting or running; the next step tells. One that has ended is left alone."""
        for waiting in [each for each in self._waiting if each[0] == id]:
            self._waiting.remove(waiting)
            self._cancelled.append(Ended(id, Completion(waiting[1].index, [], "cancelled")))
        for slot in self._slots:
            if (running := slot.running) is not None and running.id == id:
                self._release(slot)
                self._cancelled.append(Ended(id, Completion(running.request.index, running.sampled, "cancelled")))

    def step(self) -> list[Event]:
        """Decodes once, for all sequences.

        Returns:
            what came of it, in the order of the sequences: a token for each that has read its prompt, and who ended.

        Raises:
            AdlocalError: llama.cpp failed. All running requests are lost and their memory is cleared; others wait on.
        """
        cancelled, self._cancelled = self._cancelled, []
        self._admit()
        try:
            chunks = self._schedule()
            rows = self._runner.decode(chunks) if chunks else []
            self._note(chunks)
            return [*cancelled, *self._emit(rows)]
        except BaseException:
            self._empty()
            raise

    def clear(self) -> None:
        """Forgets the prompts in memory: what comes next gets the sequences that it would get in a fresh context.

        Raises:
            InputError: a request is being answered.
        """
        if self.n_running:
            raise InputError(f"n_running={self.n_running}: wait until no request is being answered, or cancel those")
        self._empty()

    def _empty(self) -> None:
        for slot in self._slots:
            self._release(slot)
            slot.held, slot.canonical, slot.used_at = [], 0, 0
        self._runner.clear()

    # Who gets a sequence

    def _admit(self) -> None:
        """Gives sequences to requests in their order. One whose prompt is being read for another waits to share it."""
        while self._waiting and self.n_free:
            id, request = self._waiting[0]
            place = self._place(request.tokens)
            if place is None:
                return
            self._waiting.popleft()
            slot, source, n = place
            self._prepare(slot, source, n)
            self._start(slot, id, request, n)

    def _place(self, prompt: Sequence[int]) -> tuple[_Slot, _Slot, int] | None:
        """A free slot for a prompt, the slot whose tokens it takes over, and how many; None to wait for them."""
        free = sorted((each for each in self._slots if each.running is None), key=lambda each: each.used_at)
        own = max(free, key=lambda slot: (self._reusable(slot, prompt), not slot.held))
        n, source = self._reusable(own, prompt), own
        others = [(slot, running) for slot, running in self._running() if self.shares]
        for slot, running in others:
            if running.is_read and (found := prefix.reusable(slot.held, slot.canonical, prompt)) > n:
                n, source = found, slot
        if any(not running.is_read and _gain(running.request.tokens, prompt) > n for _, running in others):
            return None
        return (own if source is own else free[0]), source, n

    def _reusable(self, slot: _Slot, prompt: Sequence[int]) -> int:
        """How many of its tokens a prompt may begin with. Where memory forgets, all or none."""
        if self.shares:
            return prefix.reusable(slot.held, slot.canonical, prompt)
        n = len(slot.held)
        return n if n < len(prompt) and list(prompt[:n]) == slot.held else 0

    def _prepare(self, slot: _Slot, source: _Slot, n: int) -> None:
        """Has the slot hold the first n tokens of the source, and nothing else."""
        if source is not slot:
            self._runner.forget(slot.seq_id, 0)
            self._runner.share(source.seq_id, slot.seq_id, n)
        elif n < len(slot.held):
            self._runner.forget(slot.seq_id, n)
        slot.held, slot.canonical = source.held[:n], min(source.canonical, n)

    def _start(self, slot: _Slot, id: int, request: Request, n_held: int) -> None:
        limit = min(request.n_predict, self._n_ctx - len(request.tokens))
        sampler = (request.sampling or self.sampling).chain(request.seed)
        settings = request.settings or self.settings
        slot.used_at = id
        slot.running = _Running(id, request, settings, limit, sampler, list(request.tokens[n_held:]))

    def _release(self, slot: _Slot) -> None:
        if slot.running is not None:
            slot.running.sampler.close()
            slot.running = None

    # What is decoded

    def _schedule(self) -> list[Chunk]:
        """The next batch: a token of every sequence that is past its prompt, and of prompts what there is room for."""
        running = list(self._running())
        n_read = sum(each.is_read for _, each in running)
        room = min(self._runner.n_batch - len(running), N_CHUNK if n_read else self._runner.n_batch)
        chunks = []
        for slot, each in running:
            n = 1 if each.is_read else self._part(slot, each, room)
            room -= 0 if each.is_read else n
            if n:
                settings = each.settings if each.is_read else None
                chunks.append(Chunk(slot.seq_id, each.pending[:n], len(slot.held), settings))
        return chunks

    def _part(self, slot: _Slot, running: _Running, room: int) -> int:
        """How much of a prompt is read next: batches begin at multiples of `prefix.BLOCK`, see there."""
        start = len(slot.held)
        n = prefix.cuts(start, len(running.pending), self._runner.n_batch)[0]
        return n if n <= room else max((start + room) // prefix.BLOCK * prefix.BLOCK - start, 0)

    def _running(self) -> Iterator[tuple[_Slot, _Running]]:
        return ((slot, slot.running) for slot in self._slots if slot.running is not None)

    def _note(self, chunks: Sequence[Chunk]) -> None:
        """What the memory holds after a decode."""
        for chunk in chunks:
            slot, n = self._slots[chunk.seq_id], len(chunk.tokens)
            slot.canonical = prefix.canonical(slot.canonical, chunk.n_past, n)
            slot.held += chunk.tokens
            if slot.running is not None:
                slot.running.pending = slot.running.pending[n:]

    # What comes of it

    def _emit(self, rows: Sequence[Row]) -> list[Event]:
        events = list[Event]()
        ended = list[tuple[_Slot, _Running, str]]()
        for row in rows:
            slot = self._slots[row.seq_id]
            if (running := slot.running) is None:
                continue
            if row.error is not None:
                events.append(Failed(running.id, row.error))
                self._release(slot)
            else:
                events += self._sample(running, row)
                if (reason := self._reason(running)) is not None:
                    ended.append((slot, running, reason))
        return [*events, *(self._end(*each) for each in ended)]  # last: doses take the place of the step's rows

    def _sample(self, running: _Running, row: Row) -> list[Event]:
        token = int(running.sampler.sample(self._runner.context, row.index))
        lockstep = self._runner.lockstep
        running.sampled.append(token)
        running.pending = [token]
        if self._is_end(token):
            return []
        return [Sampled(running.id, token, None if lockstep is None else lockstep.dose(row.output, token))]

    def _is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def _reason(self, running: _Running) -> str | None:
        if self._is_end(running.sampled[-1]):
            return "stop"
        return "length" if len(running.sampled) == running.limit else None

    def _end(self, slot: _Slot, running: _Running, reason: str) -> Event:
        request, sampled = running.request, running.sampled
        self._release(slot)
        try:
            dose = self._dose(slot, request, sampled) if request.dosed else None
        except ProxyError as error:
            return Failed(running.id, error)
        return Ended(running.id, Completion(request.index, sampled[: len(sampled) - (reason == "stop")], reason, dose))

    def _dose(self, slot: _Slot, request: Request, sampled: Sequence[int]) -> float:
        if self._runner.lockstep is None:
            raise InputError("a dose is measured by a bundle's proxies; give one")
        doses = self._runner.lockstep.doses(slot.seq_id, len(request.tokens), sampled)
        return math.fsum(doses) / len(doses)


def _gain(other: Sequence[int], prompt: Sequence[int]) -> int:
    """How many of its tokens a prompt may begin with once another one has been read."""
    return prefix.reusable(other, len(other) - 1, prompt)
