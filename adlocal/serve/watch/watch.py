"""The extraction watch: who looks like a harvest, and how strongly to protect the answer to each request."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace

from ...errors import AdlocalError
from .across import Template
from .buckets import DAY
from .logs import Log
from .observation import Action, Level, Observation, Outcome
from .ramp import Standing, follow
from .records import Admitted, Record, Reset, decode, encode
from .score import Scored
from .settings import WatchSettings
from .state import State, Subject

_LOGGER = logging.getLogger(__name__)
#: Seconds between writes: what a kill -9 loses, and how far nodes are behind each other, is at most about this.
INTERVAL = 0.5


@dataclass(frozen=True)
class Row:
    """A line of the watch's table.

    Attributes:
        subject: "key:...", "user:KEY/...", "owner:...", "all", or "template:...".
        owner: of a key or user.
        requests, tokens: of the last day; a template counts no tokens.
        score, signals, position: as in `Level`; "all" is scored and never raised.
        evaluation: declared as an evaluation loop.
        parties: that share a template; 0 for the others.
    """

    subject: str
    owner: str
    requests: int
    tokens: int
    score: float
    signals: tuple[str, ...]
    position: float
    evaluation: bool = False
    parties: int = 0


class Watch:
    """One node's watch. Its methods are for one event loop; none but `open` and `close` waits for the log.

    Args:
        settings: from policy.
        log: where records are kept and other nodes' found; None for memory only. `close` closes it.
    """

    def __init__(self, settings: WatchSettings | None = None, log: Log | None = None) -> None:
        self.settings = settings or WatchSettings()
        self._state = State(self.settings)
        self._log = log
        self._node = secrets.token_hex(8)
        self._last = ""
        self._pending: deque[bytes] = deque(maxlen=self.settings.capacity.records)
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._writing = asyncio.Lock()
        self._failing = False

    async def open(self) -> None:
        """Reads what is kept, and begins to write.

        Raises:
            AdlocalError: the log cannot be read.
        """
        if self._log is not None:
            await self.read()
            self._task = asyncio.create_task(self._write_forever())

    async def close(self) -> None:
        """Writes what is left."""
        if self._task is not None:
            self._stopping.set()
            await self._task
        if self._log is not None:
            await self._log.close()

    async def read(self) -> None:
        """Takes in what others have written since.

        Raises:
            AdlocalError: the log cannot be read.
        """
        if self._log is None:
            return
        for number, data in await self._log.read(self._last):
            self._last = number
            known = decode(data)
            if known is not None and known[0] != self._node:
                self._state.restore(known[1])

    async def admit(self, observation: Observation) -> Level:
        """Counts a request and says what becomes of it: once, before it begins."""
        record = Admitted.of(observation)
        template = self._state.apply(record)
        standings = self._state.standings(record, template)
        levels = [self._level(name, standing, record, template) for name, standing in standings.items()]
        positions = {name: standing.position for name, standing in standings.items() if standing.position}
        self._keep(replace(record, positions=positions))
        return max(levels, key=lambda level: (level.position, level.score))

    async def finished(self, outcome: Outcome) -> None:
        """Counts an answer, whole or cut short."""
        self._state.apply(outcome)
        self._keep(outcome)

    async def reset(self, subject: str, now: float) -> None:
        """Forgets a subject, here and on the other nodes."""
        record = Reset(now, subject)
        self._state.apply(record)
        self._keep(record)

    def table(self, now: float) -> list[Row]:
        """Everybody seen in the last day, then the templates that many share; the highest scores first."""
        rows = [self._row(each, now) for each in self._state.subjects.values() if now - each.time < DAY]
        shared = [self._template_row(each, now) for each in self._state.across.shared()]
        return sorted([*rows, *shared], key=lambda row: (-row.position, -row.score, row.subject))

    def _level(self, name: str, standing: Standing, record: Admitted, template: Template | None) -> Level:
        """What a subject, or the template, would have become of a request; moves its standing."""
        ramp, actions = self.settings.ramp, self.settings.actions
        subject = self._state.subjects.get(name)
        if subject is None and template is not None:
            found = self._template_score(template, record.time)
            agreed = bool(found.signals)
        else:
            found = self._state.score(self._state.subjects[name], record.time)
            agreed = ramp.agreed(found)
        if record.evaluation and not actions.raise_evaluation:
            return Level(0.0, "none", found.score, found.signals, name)
        position = follow(ramp, standing, found.score, agreed, record.time)
        action = self._action(position, found.score)
        return Level(position if actions.raise_strength else 0.0, action, found.score, found.signals, name)

    def _action(self, position: float, score: float) -> Action:
        actions = self.settings.actions
        if actions.block and position >= 1 and score >= actions.block_at:
            return "block"
        if actions.throttle and position >= 1 and score >= actions.throttle_at:
            return "throttle"
        return "raise" if actions.raise_strength and position > 0 else "none"

    def _template_score(self, template: Template, now: float) -> Scored:
        """Agreeing signals over all signals; nothing while too few agree."""
        signals = template.signals(self.settings.across, now)
        return Scored(len(signals) / 4, signals) if len(signals) >= self.settings.across.signals else Scored()

    def _row(self, subject: Subject, now: float) -> Row:
        found = self._state.score(subject, now)
        sums = subject.buckets.total(now, DAY)
        tokens = int(sums["prompt_tokens"] + sums["completion_tokens"])
        position, requests = subject.standing.position, int(sums["requests"])
        return Row(
            subject.name, subject.owner, requests, tokens, found.score, found.signals, position, subject.evaluation
        )

    def _template_row(self, template: Template, now: float) -> Row:
        signals = template.signals(self.settings.across, now)
        score, n = len(signals) / 4, len(template.parties)
        return Row(template.name, "", int(template.requests), 0, score, signals, template.standing.position, parties=n)

    def _keep(self, record: Record) -> None:
        if self._log is not None:
            self._pending.append(encode(self._node, record))

    async def _write_forever(self) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), INTERVAL)
            await self._write()
        await self._write()  # a short life may not have come so far

    async def _write(self) -> None:
        with suppress(AdlocalError):  # told of already
            await self.write()

    async def write(self) -> None:
        """Appends what is pending and takes in what others wrote. `open` does it twice a second.

        Raises:
            AdlocalError: the log cannot be used; what is pending is kept for the next time.
        """
        if self._log is None:
            return
        async with self._writing:
            await self._write_to(self._log)

    async def _write_to(self, log: Log) -> None:
        records = list(self._pending)
        self._pending.clear()
        try:
            if records:
                await log.append(records)
                records = []
            await self.read()
        except AdlocalError as error:
            self._pending.extendleft(reversed(records))
            if not self._failing:
                _LOGGER.warning("%s; the watch goes on in memory", error)
            self._failing = True
            raise
        else:
            self._failing = False
