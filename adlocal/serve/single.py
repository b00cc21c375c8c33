"""One answer: a slot, its settings, the engine's parts, and what of them is shown."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import httpx2

from ..plugin import Control, Counters, InForce, Think
from ..settings import Settings
from . import upstream
from .aligned import Piece
from .disclosure import Disclosure, Splitter
from .draining import drain
from .events import Delta, Event, Failed, Finished, FinishReason, Steering, ToolCall
from .slots import Slot, Slots
from .stops import Cutter
from .tags import Tags

#: Of a token, at least on average: what a prompt is reckoned with before it is read.
CHARACTERS = 3
_UNVERIFIED = "this request's protection could not be verified, so nothing of the answer is sent; tell the operator"
_CLOSED = "protection could not be computed from here on, so the answer ends; try again, or tell the operator"


@dataclass(frozen=True)
class Shown:
    """How an answer is shown.

    Attributes:
        disclosure: of reasoning.
        tags: around reasoning; None where there is none.
        starts_hidden: the prompt ends inside reasoning.
        thinks: whether the model may reason; where it must not, the tags are banned from the start.
        stop: the client's texts that end the answer.
        steering: tell with each part what was steered; for the operator.
    """

    disclosure: Disclosure
    tags: Tags | None
    starts_hidden: bool
    thinks: bool
    stop: Sequence[str]
    steering: bool = False

    @property
    def ban(self) -> Think | None:
        """What the plugin bans, so that no block of reasoning can come where it would be shown.

        A block that the prompt has opened can be closed, also by a model that was told not to think.
        """
        if self.disclosure == "show" or self.tags is None or not self.tags.bannable:
            return None
        return Think(self.tags.open_id, self.tags.close_id, from_start=not self.thinks and not self.starts_hidden)

    def splitter(self) -> Splitter:
        """A new one, for one answer."""
        ban = self.ban
        tags = None if ban is not None and ban.from_start else self.tags
        return Splitter(tags, self.disclosure, starts_hidden=self.starts_hidden, banned=ban is not None)


@dataclass
class Applied:
    """What was asked for an answer, and what became of it.

    Attributes:
        choice: its number.
        settings: that were asked for.
        slot: of the engine.
        in_force: as the engine has them; None where nothing was generated.
        counters: of its tokens.
        n_prompt, n_tokens: tokens of the prompt and of the answer, hidden ones included.
        n_hidden: of these, reasoning that was not shown.
        reason: why it ended; None where it was broken off.
        queued, seconds: waiting for a slot, and from then on.
    """

    choice: int
    settings: Settings
    slot: int | None = None
    in_force: InForce | None = None
    counters: Counters = field(default_factory=Counters)
    n_prompt: int = 0
    n_tokens: int = 0
    n_hidden: int = 0
    reason: FinishReason | None = None
    queued: float = 0.0
    seconds: float = 0.0


class Behind(Protocol):
    """The engine behind the gateway, as it is when one looks."""

    @property
    def client(self) -> httpx2.AsyncClient:
        """Of the engine that is there now; raises `Failed` where there is none."""

    @property
    def control(self) -> Control | None:
        """Its control file."""

    @property
    def reuses(self) -> bool:
        """Whether a key may go on with what it left in a slot."""


class Single:
    """One answer, from one slot.

    Args:
        key: whose turn it is, and whose slot's content may be gone on with.
        body: for the engine.
        prompt: as the engine reads it, to find the slot that holds most of it.
        applied: is filled in.
    """

    def __init__(self, key: str, body: upstream.Body, prompt: str, shown: Shown, applied: Applied) -> None:
        self._key, self._body, self._prompt, self._shown = key, body, prompt, shown
        self.applied = applied
        self._text: list[str] = []
        self._splitter, self._cutter = shown.splitter(), Cutter(shown.stop)
        self._stop: str | None = None
        self._calls: list[ToolCall] = []  # held back, while a close may come that makes them thoughts
        self._closes = 0
        self._called = False

    @property
    def text(self) -> str:
        """The whole answer so far, as the model wrote it."""
        return "".join(self._text)

    async def events(self, slots: Slots, engine: Behind) -> AsyncGenerator[Event]:
        """What the client is shown of it. Closing the iterator hangs up on the engine.

        Raises:
            Failed: it cannot be answered, or not to its end.
        """
        came = time.monotonic()
        slot = await slots.acquire(self._key, self._prompt)
        began = time.monotonic()
        self.applied.queued, self.applied.slot = began - came, slot.number
        over, control = False, engine.control  # of the engine that is there now, which may have started meanwhile
        try:
            if control is None:
                raise Failed(503, "unavailable_error", "the engine is starting again; try again", retry_after=5)
            before = control.counters(slot.number)
            reuse = engine.reuses and slot.key == self._key
            try:
                async with contextlib.aclosing(self._answer(engine.client, control, slot, reuse)) as events:
                    async for event in events:
                        yield event
                over = self._stop is None
            except (GeneratorExit, asyncio.CancelledError):
                self._reckon_prompt(control.counters(slot.number).n_decoded - before.n_decoded)
                raise
            finally:
                self.applied.counters = control.counters(slot.number) - before
                self.applied.seconds = time.monotonic() - began
        finally:
            text = self._prompt + self.text
            if over or control is None:
                slots.release(slot, self._key, text, self.applied.seconds)
            else:
                drain(slots, slot, self._key, text, control, lambda: engine.control is control)

    def _reckon_prompt(self, n_decoded: int) -> None:
        """What the client is charged who left before the engine told it: what it has read, or will have."""
        if not self.applied.n_prompt:
            self.applied.n_prompt = max(n_decoded, len(self._prompt) // CHARACTERS)

    async def _answer(
        self, client: httpx2.AsyncClient, control: Control, slot: Slot, reuse: bool
    ) -> AsyncGenerator[Event]:
        applied = self.applied
        seen = control.counters(slot.number)
        n_closed = seen.n_closed
        epoch = control.ask(slot.number, applied.settings, think=self._shown.ban)
        body = self._body.at(slot.number, reuse)
        finished: FinishReason | None = None
        async with upstream.answer(client, self._body.path, body) as chunks:
            async for chunk in chunks:
                if applied.in_force is None:
                    applied.in_force = verified(control, slot.number, epoch, applied.settings, self._shown.ban)
                events = self._events_of(chunk)
                if self._shown.steering and events:
                    seen, steering = steered(control, slot.number, seen)
                    events[-1] = replace(events[-1], steering=steering)
                for event in events:
                    yield event
                finished = chunk.finished or finished
                if self._stop is not None:
                    break
        if control.counters(slot.number).n_closed > n_closed:
            raise Failed(500, "server_error", _CLOSED)
        for last in self._ending(finished):
            yield last

    def _ending(self, finished: FinishReason | None) -> list[Event]:
        """What was held back to the end, and the end."""
        applied, events = self.applied, list[Event]()
        if self._stop is None:
            pieces, self._stop = self._cutter.feed(self._splitter.end())
            rest: list[Piece] = []
            if self._stop is None:
                rest, self._stop = self._cutter.end()
            events += [piece.delta(applied.choice) for piece in (*pieces, *rest)]
            if self._calls:
                self._called = True
                events.append(Delta(applied.choice, tool_calls=self._calls))
        applied.n_hidden = self._splitter.hidden_tokens
        only_thought = finished == "tool_calls" and not self._called
        reason = "stop" if self._stop is not None or only_thought or finished is None else finished
        applied.reason = reason
        return [*events, self._finished(reason)]

    def _events_of(self, chunk: upstream.Chunk) -> list[Delta]:
        applied = self.applied
        n_new = max(0, chunk.n_tokens - applied.n_tokens)
        applied.n_tokens += n_new
        applied.n_prompt = max(applied.n_prompt, chunk.n_prompt)
        self._text.append(chunk.text)
        pieces = self._splitter.feed(chunk.text, chunk.logprobs, n_new, time.monotonic())
        if chunk.reasoning and self._shown.disclosure == "show":
            pieces.insert(0, Piece(chunk.reasoning, reasoning=True))
        pieces, self._stop = self._cutter.feed(pieces)
        events = [piece.delta(applied.choice) for piece in pieces]
        if calls := self._calls_of(chunk):
            self._called = True
            events.append(Delta(applied.choice, tool_calls=calls))
        return events

    def _calls_of(self, chunk: upstream.Chunk) -> Sequence[ToolCall]:
        """Calls that may be shown now. What the model has only thought of is no call."""
        splitter = self._splitter
        if splitter.n_closes > self._closes:
            self._closes, self._calls = splitter.n_closes, []
        if splitter.thinking:
            return ()
        if splitter.undecided:
            self._calls += chunk.tool_calls
            return ()
        return chunk.tool_calls

    def _finished(self, reason: FinishReason) -> Finished:
        applied, summary = self.applied, self._shown.disclosure == "summary" and self._shown.tags is not None
        return Finished(
            applied.choice,
            reason,
            self._stop,
            reasoning_tokens=applied.n_hidden if summary else None,
            reasoning_seconds=self._splitter.hidden_seconds if summary else None,
        )


def steered(control: Control, sequence: int, seen: Counters) -> tuple[Counters, Steering]:
    """A sequence's counters now, and what they have grown by."""
    now = control.counters(sequence)
    more = now - seen
    return now, Steering(more.n_rows, more.n_choices, round(more.kl, 6), round(more.dose, 6))


def verified(control: Control, sequence: int, epoch: int, asked: Settings, ban: Think | None) -> InForce:
    """What the engine has in force for a request whose first token is there.

    Raises:
        Failed: it is not what was asked for, nor more.
    """
    found = control.in_force(sequence)
    protects = found.mode == "protect" and found.strength >= asked.strength and found.guard <= asked.guard
    if found.epoch != epoch or found.think != ban or not protects:
        raise Failed(500, "server_error", _UNVERIFIED)
    return found
