"""One sequence: plain, protected and bare, and what the pair's batches cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import llama_cpp

from ...llama import AntidistillationLlama
from . import bare
from .gaps import Gaps, Stats, difference, shares
from .rounds import Contestant, medians
from .row import LargeRow


class Single:
    """A plain and a protected teacher that go on from one prompt, greedily.

    The clock starts where the pair has read the prompt, after the first row with a choice, and runs for `n` tokens. The
    lazy pair reads it no sooner, which belongs to the prompt's cost, as the teacher's own reading does.

    Attributes:
        text: the prompt and what the protected teacher says.
        gaps: when its pair was evaluated.
    """

    def __init__(self, plain: llama_cpp.Llama, llm: AntidistillationLlama, prompt: Sequence[int], n: int) -> None:
        self.plain, self.llm, self.prompt, self.n = plain, llm, prompt, n
        self.text, stats = self._walk(min(n, len(llm.input_ids) - len(prompt) - n))
        self._n_before = len(stats) - 1 - n
        self.gaps = Gaps.of(stats, n)

    def measure(self, rounds: int) -> dict[str, float]:
        """Medians: seconds a token of each contestant, shares of the lazy one, and seconds of the pair's batches."""
        row = LargeRow()
        contestants: list[Contestant] = [
            lambda: {"plain": self._seconds(self.plain)},
            lambda: {"bare": self._bare()},
            self._protected,
            self._full,
            lambda: {"strength_0": self._seconds(self.llm, strength=0.0)},
            self._batches,
            row.native,
            row.numpy,
        ]
        try:
            return medians(contestants, rounds, "one sequence")
        finally:
            self.llm.reset()

    def _walk(self, most: int) -> tuple[list[int], list[Stats]]:
        """Goes to the first row with a choice, by `most` tokens at most, and by `n` tokens more.

        Returns:
            The text; and the stats before the prompt, and after each token.
        """
        self.llm.reset()
        said: list[int] = []
        stats: list[Stats] = [self._stats()]
        n_before = most
        with closing(self.llm.generate(self.prompt, temp=0.0)) as stream:
            while len(said) < n_before + self.n:
                said.append(next(stream))
                stats.append(self._stats())
                if stats[-1]["n_choices"] > stats[0]["n_choices"]:
                    n_before = min(n_before, len(said))
        return [*self.prompt, *said], stats

    def _stats(self) -> dict[str, int]:
        return self.llm._lockstep.stats()

    def _protected(self) -> dict[str, float]:
        counts: list[Stats] = []
        seconds = self._seconds(self.llm, around=lambda: counts.append(self._stats()))
        return {"protected": seconds, **shares(difference(*counts), self.n)}

    def _full(self) -> dict[str, float]:
        with _every_row(self.llm):
            return {"full": self._seconds(self.llm)}

    def _bare(self) -> float:
        start = len(self.text) - self.n
        bare.rewind(self.plain.ctx, self.text, start)
        return bare.timed(self.plain.ctx, self.text[start:], start, 1) / self.n

    def _batches(self) -> dict[str, float]:
        """Seconds of a batch of each size in both proxies, each after a token of the teacher's, as protection has it.

        They start in the middle of what is timed, where that leaves room for the largest.
        """
        sizes = list(self.gaps.counts)
        start = len(self.text) - max(self.n // 2, *sizes, 1)
        found = {}
        for size in sizes:
            for context in (self.llm.ctx, *self.llm.pair.contexts):
                bare.rewind(context, self.text, start)
            bare.timed(self.llm.ctx, self.text[start : start + 1], start, 1)
            batch = self.text[start : start + size]
            found[batch_of(size)] = sum(bare.timed(context, batch, start, size) for context in self.llm.pair.contexts)
        return found

    def _seconds(self, llm: llama_cpp.Llama, around: Callable[[], object] = lambda: None, **kwargs: Any) -> float:
        """Seconds a token of `n`; `around` is called before and after them."""
        llm.reset()
        with closing(llm.generate(self.prompt, temp=0.0, **kwargs)) as stream:
            _take(stream, self._n_before)
            around()
            started = time.perf_counter()
            _take(stream, self.n)
            seconds = time.perf_counter() - started
            around()
        return seconds / self.n


def _take(stream: Iterator[int], n: int) -> None:
    for _ in itertools.islice(stream, n):
        pass


def batch_of(size: int) -> str:
    """The name of the figure for a batch of the pair."""
    return f"batch of {size}"


@contextmanager
def _every_row(llm: AntidistillationLlama) -> Iterator[None]:
    """The pair is evaluated for every row, whether there is a choice or not."""
    llm._lockstep.full = True
    try:
        yield
    finally:
        llm._lockstep.full = False
