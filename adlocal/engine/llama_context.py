"""The teacher's context as `llama_cpp.Llama` uses it: every decode is a protected step of the native core.

Everything that `Llama` samples from, reports as log-probabilities or verifies drafts against comes out of
`LlamaContext.decode`. Adjusting there leaves no later way around it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import llama_cpp
from llama_cpp._internals import LlamaBatch, LlamaContext

from ..errors import ProxyError
from ..llamacpp import native
from ..pair import PairState, ProxyPair
from ..settings import Settings
from .lockstep import Lockstep, row_params
from .prefix import Prefix, whole_blocks


@dataclass(frozen=True)
class AdjustedRow:
    """One row of the last decode: its place in it, KL, and how many tokens passed the guard."""

    index: int
    kl: float
    n_candidates: int


class LockstepContext:
    """Stands in for a Llama's `_ctx`. Offers what `Llama` asks of a `LlamaContext`, and nothing else.

    Attributes:
        settings: of the next decode.
        tokens: ids in the teacher's memory, in order.
        rows: the last decode's rows, empty when none may be sampled from.
        evaluated_with: the settings that gave `rows`, and the pair's ε at that time.
        full: whether the pair is evaluated for every row, or only where there is a choice to steer.
        wants_rows: whether the next decode is to give rows; not for a prompt that goes on.
        prefix: how the tokens in memory were evaluated.
    """

    # Reads that no adjustment depends on.
    _DELEGATED = frozenset({"ctx", "model", "params", "n_ctx", "pooling_type", "reset_timings", "print_timings"})

    def __init__(self, teacher: LlamaContext, pair: ProxyPair, settings: Settings, *, full: bool = False) -> None:
        """Takes an empty teacher's context; the pair's memory is cleared. `full` evaluates the pair for every row."""
        self._teacher, self._pair, self._step = teacher, pair, Lockstep(teacher.ctx, pair)
        self.full, self.wants_rows = full, True
        self.prefix = Prefix(whole_blocks(llama_cpp.llama_n_ubatch(teacher.ctx)))
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

    def close(self) -> None:
        """Frees the lockstep, before the pair is closed; the teacher's context stays its owner's."""
        self._step.close()

    @property
    def in_force(self) -> tuple[Settings, float]:
        """All that an adjustment depends on besides the logits: the settings, and the pair's ε."""
        return self.settings, self._pair.epsilon

    def decode(self, batch: LlamaBatch) -> None:
        """Evaluates a batch in the teacher, and in the pair where a row has a choice; then adjusts rows in place.

        Whatever fails, no row is left to sample from, and the pair makes up for what it missed when it is next needed.

        Raises:
            ProxyError: a proxy failed, or the teacher was evaluated around adlocal.
            RuntimeError: the teacher's `llama_decode` failed, as in llama-cpp-python.
        """
        self.rows, self._is_restored = [], False
        raw = batch.batch
        if (start := int(raw.pos[0])) > len(self.tokens):
            raise ProxyError(
                f"position {start} follows {len(self.tokens)} known tokens: something evaluated the teacher around "
                "adlocal (multimodal input does); call reset()"
            )
        if not self.wants_rows:
            for i in range(raw.n_tokens):
                raw.logits[i] = False
        n = sum(map(bool, raw.logits[: raw.n_tokens]))
        try:
            results = self._step.decode(raw, [row_params(self.settings, full=self.full)] * n)
        finally:
            self._note(start, raw.token[: raw.n_tokens])
        if any(each.closed for each in results):
            raise native.error()
        self.rows = [AdjustedRow(i, each.kl, each.n_candidates) for i, each in enumerate(results)]
        self.evaluated_with = self.in_force

    def _note(self, start: int, tokens: list[int]) -> None:
        """The teacher's memory after a decode that may have failed: what it holds of these tokens."""
        memory = llama_cpp.llama_get_memory(self._teacher.ctx)
        n_held = llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1
        self.tokens[start:] = tokens
        del self.tokens[n_held:]
        self.prefix.decoded(start, len(tokens), protects=self.settings.protects)
        self.prefix.truncated(n_held)

    def stats(self) -> dict[str, int]:
        """Rows, rows with a choice, rows whose Δ was computed, batches of the pair and tokens in them, so far."""
        return self._step.stats()

    def get_logits(self) -> Any:
        """The adjusted rows of the last decode, as `llama_get_logits`."""
        self.require_rows()
        return self._teacher.get_logits()

    def require_rows(self) -> None:
        """Refuses to go on unless the logits at hand were adjusted with the present settings."""
        if not self.rows or self.evaluated_with != self.in_force:
            raise ProxyError("no logits were evaluated with the present strength and guard; evaluate a token first")

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
        """Δ(token) − E[Δ] for a row of the last decode; None where Δ was not computed: there was nothing to steer."""
        return self._step.dose(row.index, token)

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """Forgets the positions from p0 on, in teacher and pair."""
        if p1 >= 0:
            raise ProxyError(f"removing positions {p0} to {p1} would shift the context; protection needs it whole")
        removed = self._step.seq_rm(seq_id, p0, p1)
        if removed and max(p0, 0) < len(self.tokens):  # Llama asks before every batch, mostly for nothing
            del self.tokens[max(p0, 0) :]
            self.rows = []
            self.prefix.truncated(len(self.tokens))
        return removed

    def kv_cache_clear(self) -> None:
        """Empties the teacher's memory and the pair's."""
        self._step.clear()
        self.tokens, self.rows, self._is_restored = [], [], False
        self.prefix.truncated(0)

    @property
    def n_held(self) -> int:
        """How many of the tokens the pair holds; the others wait until a row of theirs has a choice."""
        return self._step.n_held(0)

    def pair_state(self) -> PairState:
        """The pair's memory as it is."""
        return self._pair.save_state(self.tokens[: self.n_held])

    def restored(
        self,
        tokens: list[int],
        pair: PairState | None,
        evaluated_with: tuple[Settings, float] | None,
        prefix: Prefix | None,
    ) -> None:
        """Says that the teacher's memory was replaced and now holds `tokens`; no row may be sampled until a decode.

        Args:
            tokens: what it holds.
            pair: the pair's memory of that time, to be restored; None where there was none.
            evaluated_with: how the rows were adjusted that belonged to it; None where they never were.
            prefix: how they were evaluated; None where that is not known.
        """
        n_held = 0 if pair is None else self._pair.load_state(pair)
        self._step.restore(0, tokens, n_held)
        self.tokens, self.rows = list(tokens), []
        known = prefix or Prefix(self.prefix.n_batch, usable=len(tokens))
        self.prefix = replace(known, n_batch=self.prefix.n_batch)
        self._is_restored = bool(tokens) and evaluated_with is not None
        self.evaluated_with = evaluated_with or self.evaluated_with

    def lacks_its_row(self) -> bool:
        """Whether a state was restored whose last row is the one to sample from, but states hold no rows."""
        return self._is_restored and self.evaluated_with == self.in_force
