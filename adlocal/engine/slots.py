"""The sequences of a context: what each holds, who has it, and which one a prompt gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llama_cpp._internals import LlamaSampler

from ..settings import Settings
from .prefix import Prefix, whole_blocks
from .runner import Chunk, Runner
from .sequences import Request


@dataclass
class Running:
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
class Slot:
    """A sequence, what it holds, and who has it.

    Attributes:
        prefix: how the tokens in memory were evaluated.
        held: these tokens.
        used_at: the decode in which a request last had it.
    """

    seq_id: int
    prefix: Prefix
    held: list[int] = field(default_factory=list)
    used_at: int = 0
    running: Running | None = None


class Slots:
    """Those of a runner's context, which is empty at first. Its memory is changed through them alone.

    Attributes:
        shares: whether a prompt may begin with a part of what is held; where memory forgets, with all of it or nothing.
    """

    def __init__(self, runner: Runner, n: int) -> None:
        self.shares = runner.can_share()
        self._runner, self._n_decodes = runner, 0
        self._n_batch = whole_blocks(runner.n_batch)
        self._slots = [Slot(seq_id, Prefix(self._n_batch)) for seq_id in range(n)]

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, seq_id: int) -> Slot:
        return self._slots[seq_id]

    @property
    def running(self) -> list[tuple[Slot, Running]]:
        """Slots that somebody has, and who."""
        return [(slot, slot.running) for slot in self._slots if slot.running is not None]

    def take(self, prompt: Sequence[int]) -> tuple[Slot, int] | None:
        """A free slot that holds a beginning of a prompt, and how much of it; there has to be one that is free.

        Returns:
            None if it is better to wait: more of the prompt is being read for another request.
        """
        holders = [slot for slot in self._slots if slot.running is None or (self.shares and slot.running.is_read)]
        source = max(holders, key=lambda slot: (self._reusable(slot, prompt), -len(slot.held)))
        n = self._reusable(source, prompt)
        readers = [running for _, running in self.running if self.shares and not running.is_read]
        if any(self._gain(reader.request.tokens, prompt) > n for reader in readers):
            return None
        free = [slot for slot in self._slots if slot.running is None]
        oldest = min(free, key=lambda slot: (bool(slot.held), slot.used_at))
        slot = source if _is_taken_over(source, n, oldest) else oldest
        return slot, self._prepare(slot, source, n)

    def _reusable(self, slot: Slot, prompt: Sequence[int]) -> int:
        if self.shares:
            return slot.prefix.reusable(slot.held, prompt)
        n = len(slot.held)
        return n if n < len(prompt) and list(prompt[:n]) == slot.held else 0

    def _gain(self, other: Sequence[int], prompt: Sequence[int]) -> int:
        """How many of its tokens a prompt may begin with once another one has been read."""
        n = len(other) - 1
        return Prefix(self._n_batch, canonical=n, usable=n).reusable(other, prompt)

    def _prepare(self, slot: Slot, source: Slot, n: int) -> int:
        """Has the slot hold the first n tokens of the source and nothing else; returns how many it does hold."""
        if n == 0 or source is slot:
            keeps = n == len(slot.held) or self._runner.forget(slot.seq_id, n)
        else:
            self._runner.forget(slot.seq_id, 0)
            keeps = self._runner.share(source.seq_id, slot.seq_id, n)
        n = n if keeps else 0
        slot.held, slot.prefix = source.held[:n], replace(source.prefix)
        slot.prefix.truncated(n)
        return n

    def note(self, chunks: Sequence[Chunk]) -> None:
        """What the memory holds after a decode."""
        self._n_decodes += 1
        for chunk in chunks:
            slot, n = self._slots[chunk.seq_id], len(chunk.tokens)
            slot.prefix.decoded(chunk.n_past, n, protects=True)
            slot.held += chunk.tokens
            if slot.running is not None:
                slot.running.pending = slot.running.pending[n:]

    def release(self, slot: Slot) -> None:
        """Takes it from who has it; what it holds stays."""
        if slot.running is not None:
            slot.running.sampler.close()
            slot.running, slot.used_at = None, self._n_decodes

    def clear(self) -> None:
        """Takes all from who has them, and empties the memory: all is as in a fresh context."""
        for slot in self._slots:
            self.release(slot)
            slot.held, slot.used_at = [], 0
            slot.prefix.truncated(0)
        self._runner.clear()


def _is_taken_over(source: Slot, n: int, oldest: Slot) -> bool:
    """Whether a prompt goes on in the source itself, of which it uses n tokens; a copy of them goes into the oldest.

    One that says what was held and more does. One that uses half does, rather than that another is given up for it.
    """
    if source.running is not None or n == 0:
        return False
    return n == len(source.held) or (bool(oldest.held) and 2 * n >= len(source.held))
