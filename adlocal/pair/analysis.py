"""What a pair says of a whole text, evaluated afresh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .. import adjust
from ..errors import InputError

Rows = npt.NDArray[np.float32]


class Evaluator(Protocol):
    """What the analysis of texts asks of a pair."""

    n_outputs: int

    @property
    def n_ctx(self) -> int: ...
    @property
    def epsilon(self) -> float: ...
    def clear(self) -> None: ...
    def rows(self) -> tuple[Rows, Rows]: ...
    def dose(self, row: int, token: int) -> float: ...
    def evaluate(self, tokens: Sequence[int], *, logits_all: bool) -> int: ...


class TextAnalysis:
    """Methods of `ProxyPair` that evaluate a text from its first token on, in place of what the memory held."""

    def delta(self: Evaluator, tokens: Sequence[int]) -> Rows:
        """Δ after each prefix of `tokens`: row i is Δ for the token that follows tokens[: i + 1].

        Returns:
            float32 array of shape (len(tokens), n_vocab), in logits a unit of ε along ĝ.
        """
        return np.concatenate([adjust.delta(p, m, self.epsilon) for p, m in _logits(self, tokens)])

    def doses(self: Evaluator, tokens: Sequence[int]) -> list[float]:
        """Dose of each token after the first, given those before it."""
        return [
            self.dose(row, tokens[first + row + 1])
            for first, n_rows in _chunks(self, tokens[:-1])
            for row in range(n_rows)
        ]

    def logits(self: Evaluator, tokens: Sequence[int]) -> Iterator[tuple[Rows, Rows]]:
        """(z₊, z₋) after each prefix of `tokens`, in chunks of at most `n_outputs` rows, each (rows, n_vocab).

        A chunk is a view: it is valid until the next one is asked for.
        """
        return _logits(self, tokens)


def _logits(pair: Evaluator, tokens: Sequence[int]) -> Iterator[tuple[Rows, Rows]]:
    return (pair.rows() for _ in _chunks(pair, tokens))


def _chunks(pair: Evaluator, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Evaluates `tokens` afresh, a row for each; yields (index of the first, number of rows) of each decode."""
    if not 0 < len(tokens) <= pair.n_ctx:
        raise InputError(
            f"{len(tokens)} tokens given, expected 1 to n_ctx={pair.n_ctx}; open the pair with a larger n_ctx"
        )
    pair.clear()
    for i in range(0, len(tokens), pair.n_outputs):
        yield i, pair.evaluate(tokens[i : i + pair.n_outputs], logits_all=True)
