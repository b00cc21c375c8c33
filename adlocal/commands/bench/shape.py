"""What the shape of a batch changes: the same text, a token at a time and in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np
import numpy.typing as npt

from ... import adjust
from ...llama import AntidistillationLlama
from ...llamacpp.tokens import end_tokens
from . import bare

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """How far figures move.

    Attributes:
        logits: the largest change of a plausible token's logit in the teacher, median over positions.
        cosine, cosine_p10: between the two Δ, each centred over the plausible tokens: median and 10th percentile over
            the positions that have at least two; 1 where there is no such position.
        n_positions: how many of these there are.
    """

    logits: float
    cosine: float
    cosine_p10: float
    n_positions: int


def measure(llm: AntidistillationLlama, text: Sequence[int]) -> Shape:
    """Compares the rows after each token of a text.

    Args:
        llm: opened with `logits_all`, a batch as long as the text, and nobody's state to keep.
        text: its tokens.
    """
    one, whole = (_rows(llm, text, size) for size in (1, len(text)))
    delta_one, delta_whole = (_delta(llm, text, size) for size in (1, len(text)))
    ends, guard, n_shared = end_tokens(llm._model.vocab), llm.pair.bundle.guard, delta_one.shape[1]
    plausible = [adjust.candidates(z, guard, n_shared, ends) for z in one]
    return compare(one, whole, delta_one, delta_whole, plausible)


def compare(
    one: Rows, whole: Rows, delta_one: Rows, delta_whole: Rows, plausible: Sequence[npt.NDArray[np.intp]]
) -> Shape:
    """The teacher's rows and Δ, evaluated in two ways, at the ids that are plausible in each row."""
    moved, cosines = [], []
    for i, ids in enumerate(plausible):
        if len(ids) > 0:
            moved.append(float(np.max(np.abs(one[i, ids] - whole[i, ids]))))
        if len(ids) > 1:
            cosines.append(_cosine(delta_one[i, ids], delta_whole[i, ids]))
    return Shape(
        logits=float(np.median(moved)) if moved else 0.0,
        cosine=float(np.median(cosines)) if cosines else 1.0,
        cosine_p10=float(np.quantile(cosines, 0.1)) if cosines else 1.0,
        n_positions=len(cosines),
    )


def _rows(llm: AntidistillationLlama, text: Sequence[int], size: int) -> Rows:
    """The teacher's logits after each token, (tokens, vocabulary)."""
    rows, n_vocab = [], llama_cpp.llama_vocab_n_tokens(llm._model.vocab)
    bare.clear(llm.ctx)
    for n in bare.evaluate(llm.ctx, text, 0, size, rows=True):
        logits = llama_cpp.llama_get_logits(llm.ctx)
        rows.append(np.ctypeslib.as_array(logits, (n, n_vocab)).copy())
    return np.concatenate(rows)


def _delta(llm: AntidistillationLlama, text: Sequence[int], size: int) -> Rows:
    """Δ after each token, (tokens, vocabulary of the proxies)."""
    llm.pair.n_outputs = size
    return llm.pair.delta(text)


def _cosine(a: Rows, b: Rows) -> float:
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (a, b))
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms else 1.0
