"""The teacher's context as `llama_cpp.Llama` uses it, with a pair that follows and logits adjusted in place.

Everything that `Llama` samples from, reports as log-probabilities or verifies drafts against comes out of
`LlamaContext.decode`. Adjusting there leaves no later way around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama_cpp._internals import LlamaBatch, LlamaContext

from ..errors import ProxyError
from ..pair import PairState, ProxyPair
from ..settings import Settings


@dataclass(frozen=True)
class AdjustedRow:
    """One adjusted row of the last decode: its place in it, KL, and how many tokens were steered."""

    index: int
    kl: float
    n_candidates: int


class LockstepContext:
    """Stands in for a Llama's `_ctx`. Offers what `Llama` asks of a `LlamaContext`, and nothing else.

    Attributes:
        settings: of the next decode.
        tokens: ids in the teacher's memory, in order.
        rows: the last decode's adjusted rows, empty when none may be sampled from.
        evaluated_with: the settings that gave `rows`, and the pair's ε at that time.
    """

    # Reads that no adjustment depends on.
    _DELEGATED = frozenset({"ctx", "model", "params", "n_ctx", "pooling_type", "reset_timings", "print_timings"})

    def __init__(self, teacher: LlamaContext, pair: ProxyPair, settings: Settings) -> None:
        self._teacher = teacher
        self._pair = pair
        self._in_step = pair.serial  # the pair's serial number when it held the teacher's tokens; -1: it lags behind
        self.settings = settings
        self.evaluated_with = self.in_force
        self.tokens: list[int] = []
        self.rows: list[AdjustedRow] = []
        self._is_restored = False

    def __getattr__(self, name: str) -> Any:
        if name not in self._DELEGATED:
            raise AttributeError(
                f"LockstepContext keeps {name!r} from callers: it would part the teacher from its pair"
            )
        return getattr(self._teacher, name)

    @property
    def in_force(self) -> tuple[Settings, float]:
        """All that an adjustment depends on besides the logits: the settings, and the pair's ε."""
        return self.settings, self._pair.epsilon

    def decode(self, batch: LlamaBatch) -> None:
        """Evaluates a batch in both proxies and the teacher, then adjusts the teacher's output rows in place.

        The proxies go first: when one fails, the teacher's logits of this batch were never computed.

        Whatever fails, no row is left to sample from, and the pair makes up for what it missed at the next decode.

        Raises:
            ProxyError: a proxy failed.
        """
        self.rows, self._is_restored = [], False
        start, tokens = self._sequence(batch)
        protect = self.settings.protects
        if protect:
            self._follow(start)
            self._pair.decode(batch)
        self._teacher.decode(batch)
        self.tokens[start:] = tokens
        self._in_step = self._pair.serial if protect else -1
        self.rows = self.adjust_rows() if protect else [AdjustedRow(i, 0.0, 0) for i in range(_n_outputs(batch))]
        self.evaluated_with = self.in_force

    def _follow(self, start: int) -> None:
        """Brings the pair to the teacher's first `start` tokens, at no cost where nothing but decoding has happened."""
        if self._in_step != self._pair.serial or start != len(self.tokens):
            self._pair.sync(self.tokens[:start])

    def get_logits(self) -> Any:
        """The adjusted rows of the last decode, as `llama_get_logits`."""
        self.require_rows()
        return self._teacher.get_logits()

    def require_rows(self) -> None:
        """Refuses to go on unless the logits at hand were adjusted with the present settings."""
        if not self.has_rows() or self.evaluated_with != self.in_force:
            raise ProxyError("no logits were evaluated with the present strength and guard; evaluate a token first")

    def has_rows(self) -> bool:
        """Whether there are rows to sample from, and the pair still holds theirs."""
        return bool(self.rows) and self._in_step in (-1, self._pair.serial)

    def row(self, position: int) -> AdjustedRow:
        """The adjusted row that the token after `position` is sampled from."""
        self.require_rows()
        back = len(self.tokens) - position
        if not 0 < back <= len(self.rows):
            raise ProxyError(
                f"no logits for position {position} of {len(self.tokens)}; evaluate it with logits_all=True"
            )
        return self.rows[-back]

    def dose(self, row: AdjustedRow, token: int) -> float | None:
        """Δ(token) − E[Δ] for a row; None at strength 0, where the pair is not evaluated."""
        return self._pair.dose(row.index, token) if self.evaluated_with[0].protects else None

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """Forgets the positions from p0 on. The pair follows at its next decode."""
        if p1 >= 0:
            raise ProxyError(f"removing positions {p0} to {p1} would shift the context; protection needs it whole")
        removed = bool(self._teacher.kv_cache_seq_rm(seq_id, p0, p1))
        if removed and max(p0, 0) < len(self.tokens):  # Llama asks before every batch, mostly for nothing
            del self.tokens[max(p0, 0) :]
            self.rows, self._in_step = [], -1
        return removed

    def kv_cache_clear(self) -> None:
        """Empties the teacher's memory and the pair's."""
        self._teacher.kv_cache_clear()
        self._pair.clear()
        self.tokens, self.rows, self._in_step, self._is_restored = [], [], self._pair.serial, False

    def pair_state(self) -> PairState:
        """The pair's memory as it is. It may lag behind the teacher's; the next decode brings it up."""
        return self._pair.save_state()

    def restored(self, tokens: list[int], evaluated_with: tuple[Settings, float] | None) -> None:
        """Says that the teacher's memory was replaced and now holds `tokens`; no row may be sampled until a decode.

        Args:
            tokens: what it holds.
            evaluated_with: how the rows were adjusted that belonged to it; None where they never were.
        """
        self.tokens, self.rows, self._in_step = list(tokens), [], -1
        self._is_restored = bool(tokens) and evaluated_with is not None
        self.evaluated_with = evaluated_with or self.evaluated_with

    def lacks_its_row(self) -> bool:
        """Whether a state was restored whose last row is the one to sample from, but states hold no rows."""
        return self._is_restored and self.evaluated_with == self.in_force

    def _sequence(self, batch: LlamaBatch) -> tuple[int, list[int]]:
        """First position and ids of a batch that continues sequence 0."""
        raw = batch.batch
        start = int(raw.pos[0])
        if start > len(self.tokens) or raw.seq_id[0][0] != 0:
            raise ProxyError(
                f"position {start} of sequence {raw.seq_id[0][0]} follows {len(self.tokens)} known tokens: "
                "something evaluated the teacher around adlocal (multimodal input does); call reset()"
            )
        return start, raw.token[: raw.n_tokens]

    def adjust_rows(self) -> list[AdjustedRow]:
        """Adjusts the output rows of the teacher's last decode in place, with the pair's."""
        settings = self.settings
        found = self._pair.adjust(self._teacher.get_logits(), settings.strength, settings.guard)
        return [AdjustedRow(i, kl, n_candidates) for i, (kl, n_candidates) in enumerate(found)]


def _n_outputs(batch: LlamaBatch) -> int:
    """How many rows of logits a batch asks for."""
    raw = batch.batch
    return sum(map(bool, raw.logits[: raw.n_tokens]))
