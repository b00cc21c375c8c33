"""Continuous batching: requests come and go while others are being answered.

A step has every sequence decode its next token, and gives what is left of the batch to prompts that are being read, to
the one that has waited longest first. A request takes over what is in memory of its prompt: from the sequence that it
gets, or copied from another.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import llama_cpp

from ..errors import AdlocalError, BusyError, InputError, ProxyError
from ..settings import Settings
from .prefix import BLOCK, cuts, whole_blocks
from .runner import Chunk, Row, Runner
from .sequences import Completion, Ended, Event, Failed, Request, Sampled, Sampling
from .slots import Running, Slot, Slots

#: The most tokens of prompts in a step in which others are given a token, so that these do not wait for long.
N_CHUNK = 128


@dataclass(frozen=True)
class _Waiting:
    """A request that no sequence has been given to, with what it is answered under: its own, or the scheduler's."""

    id: int
    request: Request
    settings: Settings
    sampling: Sampling


class Scheduler:
    """Answers requests, `submit`ted at any time, a `step` at a time. Not safe for several threads at once.

    Args:
        runner: with an empty context, which is the scheduler's from then on.
        n_parallel: its sequences.
        n_ctx: tokens of context for each.
        settings, sampling: of requests that are submitted without their own.
        max_waiting: how many requests may wait for a sequence.

    Attributes:
        slots: the sequences, and what they hold.

    Raises:
        InputError: the batch has no room for a part of a prompt beside all sequences.

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
        if runner.n_batch < n_parallel + BLOCK:
            raise InputError(
                f"n_batch={runner.n_batch}, n_parallel={n_parallel}: a prompt is read {BLOCK} tokens at a time "
                f"beside the sequences; give n_batch={n_parallel + BLOCK} or more"
            )
        self.settings, self.sampling, self.max_waiting = settings, sampling or Sampling(), max_waiting
        self.slots = Slots(runner, n_parallel)
        self._runner, self._n_ctx = runner, n_ctx
        self._vocab = llama_cpp.llama_model_get_vocab(runner.context.model.model)
        self._n_batch = whole_blocks(runner.n_batch)
        self._waiting: deque[_Waiting] = deque()
        self._untold: list[Ended | Failed] = []  # who was cancelled, and who was lost with a step that failed
        self._n_submitted = 0

    @property
    def n_waiting(self) -> int:
        """Requests that no sequence has been given to."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Requests that have a sequence."""
        return len(self.slots.running)

    @property
    def n_free(self) -> int:
        """Sequences that nobody has."""
        return len(self.slots) - self.n_running

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to be done."""
        return not (self._waiting or self._untold or self.n_running)

    def submit(self, request: Request) -> int:
        """Queues a request.

        Returns:
            its id, which events tell.

        Raises:
            BusyError: `max_waiting` requests wait already.
            InputError: it has no prompt, no token to predict, a prompt that fills the context or is of another
                vocabulary, or asks for protection or a dose where there is no bundle.
        """
        settings = request.settings or self.settings
        self._check(request, settings.strength)
        if self.n_waiting >= self.max_waiting:
            raise BusyError(f"{self.n_waiting} requests wait already, max_waiting={self.max_waiting}; try again later")
        self._n_submitted += 1
        self._waiting.append(_Waiting(self._n_submitted, request, settings, request.sampling or self.sampling))
        return self._n_submitted

    def _check(self, request: Request, strength: float) -> None:
        n, n_vocab = len(request.tokens), llama_cpp.llama_vocab_n_tokens(self._vocab)
        if not 0 < n < self._n_ctx or request.n_predict < 1:
            raise InputError(
                f"a prompt of {n} tokens and n_predict={request.n_predict}: give at least one of each, and a prompt "
                f"shorter than the context of {self._n_ctx}"
            )
        stranger = next((token for token in request.tokens if not 0 <= token < n_vocab), None)
        if stranger is not None:
            raise InputError(f"token {stranger}: the vocabulary has 0 to {n_vocab - 1}; give ids of this model")
        if self._runner.lockstep is None and (strength > 0 or request.dosed):
            raise InputError(f"strength={strength:g}, dosed={request.dosed}: they act through a bundle; give one")

    def cancel(self, id: int) -> None:
        """Ends a request, waiting or running, and frees its sequence at once.

        The next step tells, with what it was given so far. One that has ended is left alone.
        """
        for waiting in [each for each in self._waiting if each.id == id]:
            self._waiting.remove(waiting)
            self._untold.append(Ended(id, Completion(waiting.request.index, [], "cancelled")))
        for slot, running in self.slots.running:
            if running.id == id:
                self.slots.release(slot)
                self._untold.append(Ended(id, Completion(running.request.index, running.sampled, "cancelled")))

    def step(self) -> list[Event]:
        """Decodes once, for all sequences.

        Returns:
            what came of it, in the order of the sequences: a token for each that has read its prompt, and who ended.

        Raises:
            AdlocalError: llama.cpp failed. All running requests are lost and their memory is cleared; others wait on.
                The next step tells of each that was lost.
        """
        try:
            self._admit()
            chunks = self._schedule()
            rows = self._runner.decode(chunks) if chunks else []
            self.slots.note(chunks)
            events = self._emit(rows)
        except BaseException as error:
            self._lose(error)
            raise
        untold, self._untold = self._untold, []
        return [*untold, *events]

    def _lose(self, error: BaseException) -> None:
        reason = error if isinstance(error, AdlocalError) else AdlocalError(f"the step was broken off ({error!r})")
        self._untold += [Failed(running.id, reason) for _, running in self.slots.running]
        self.slots.clear()

    def clear(self) -> None:
        """Forgets the prompts in memory: what comes next gets the sequences that it would get in a fresh context.

        Raises:
            InputError: a request is being answered.
        """
        if self.n_running:
            raise InputError(f"n_running={self.n_running}: wait until no request is being answered, or cancel those")
        self.slots.clear()

    # Who gets a sequence

    def _admit(self) -> None:
        """Gives sequences to requests in their order. One whose prompt is being read for another waits to share it."""
        for waiting in list(islice(self._waiting, len(self.slots))):
            if not self.n_free:
                return
            if (taken := self.slots.take(waiting.request.tokens)) is not None:
                self._waiting.remove(waiting)
                self._start(*taken, waiting)

    def _start(self, slot: Slot, n_held: int, waiting: _Waiting) -> None:
        request = waiting.request
        limit = min(request.n_predict, self._n_ctx - len(request.tokens))
        sampler, pending = waiting.sampling.chain(request.seed), list(request.tokens[n_held:])
        slot.running = Running(waiting.id, request, waiting.settings, limit, sampler, pending)

    # What is decoded

    def _schedule(self) -> list[Chunk]:
        """The next batch: a token of every sequence that is past its prompt, and of prompts what there is room for."""
        parts = self._parts()
        return [
            Chunk(slot.seq_id, each.pending[: parts[each.id]], len(slot.held), each.settings if each.is_read else None)
            for slot, each in self.slots.running
            if parts[each.id]
        ]

    def _parts(self) -> dict[int, int]:
        """How many tokens each running request decodes, by its id."""
        running = self.slots.running
        parts = {each.id: 1 for _, each in running if each.is_read}
        room = min(self._runner.n_batch - len(parts), N_CHUNK if parts else self._runner.n_batch)
        for slot, each in sorted(running, key=lambda one: one[1].id):
            if not each.is_read:
                parts[each.id] = self._part(slot, each, room)
                room -= parts[each.id]
        return parts

    def _part(self, slot: Slot, running: Running, room: int) -> int:
        """How much of a prompt is read next: batches begin at multiples of `BLOCK`, see `prefix`."""
        start = len(slot.held)
        n = cuts(start, len(running.pending), self._n_batch)[0]
        return n if n <= room else max((start + room) // BLOCK * BLOCK - start, 0)

    # What comes of it

    def _emit(self, rows: Sequence[Row]) -> list[Event]:
        events = list[Event]()
        ended = list[tuple[Slot, Running, str]]()
        for row in rows:
            slot = self.slots[row.seq_id]
            if (running := slot.running) is None:
                continue
            if row.error is not None:
                events.append(Failed(running.id, row.error))
                self.slots.release(slot)
            else:
                events += self._sample(running, row)
                if (reason := self._reason(running)) is not None:
                    ended.append((slot, running, reason))
        return [*events, *(self._end(*each) for each in ended)]  # last: doses take the place of the step's rows

    def _sample(self, running: Running, row: Row) -> list[Event]:
        token = int(running.sampler.sample(self._runner.context, row.index))
        lockstep = self._runner.lockstep
        running.sampled.append(token)
        running.pending = [token]
        if self._is_end(token):
            return []
        return [Sampled(running.id, token, None if lockstep is None else lockstep.dose(row.output, token))]

    def _is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def _reason(self, running: Running) -> str | None:
        if self._is_end(running.sampled[-1]):
            return "stop"
        return "length" if len(running.sampled) == running.limit else None

    def _end(self, slot: Slot, running: Running, reason: str) -> Event:
        request, sampled = running.request, running.sampled
        self.slots.release(slot)
        try:
            dose = self._dose(slot, request, sampled) if request.dosed else None
        except ProxyError as error:
            return Failed(running.id, error)
        return Ended(running.id, Completion(request.index, sampled[: len(sampled) - (reason == "stop")], reason, dose))

    def _dose(self, slot: Slot, request: Request, sampled: Sequence[int]) -> float:
        doses = self._runner.doses(slot.seq_id, len(request.tokens), sampled)
        return math.fsum(doses) / len(doses)
