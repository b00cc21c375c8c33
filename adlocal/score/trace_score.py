"""The dose of a trace that exists already, whoever wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..errors import ProxyError
from ..llamacpp.tokens import token_pieces, token_texts
from ..pair import ProxyPair
from ..traces import EncodedTrace

_N_LOADED = 3


@dataclass(frozen=True)
class TokenDose:
    """One token of a trace: its place among the trace's tokens, its text, its Δ − E[Δ]."""

    index: int
    token: str
    dose: float


@dataclass(frozen=True)
class Score:
    """Dose of one trace, over its target tokens: Σ (Δ(x_t) − E[Δ]), as in `Dose`.

    Attributes:
        where: file and line.
        pieces: bytes of each token, the prompt's too.
        doses: (tokens,) Δ(x_t) − E[Δ] of each target token, NaN for the others.
    """

    where: str
    pieces: list[bytes]
    doses: npt.NDArray[np.float64]

    @cached_property
    def texts(self) -> list[str]:
        """Text of each token, as `token_texts` has it: joined they are the trace."""
        return token_texts(self.pieces)

    @cached_property
    def target_doses(self) -> npt.NDArray[np.float64]:
        """(n_tokens,) doses of the target tokens."""
        return self.doses[np.isfinite(self.doses)]

    @property
    def n_tokens(self) -> int:
        """Target tokens; a trace has at least one."""
        return len(self.target_doses)

    @property
    def dose(self) -> float:
        return float(self.target_doses.sum())

    @property
    def dose_per_token(self) -> float:
        return self.dose / self.n_tokens

    def most_loaded(self) -> list[TokenDose]:
        """The three target tokens with the highest dose, the highest first; fewer if there are no three."""
        return [self._token(i) for i in np.argsort(-self.doses, kind="stable")[: min(_N_LOADED, self.n_tokens)]]

    def least_loaded(self) -> list[TokenDose]:
        """The three target tokens with the lowest dose, the lowest first; fewer if there are no three."""
        return [self._token(i) for i in np.argsort(self.doses, kind="stable")[: min(_N_LOADED, self.n_tokens)]]

    def _token(self, i: int) -> TokenDose:
        text = self.texts[i] or self.pieces[i].decode("utf-8", "backslashreplace")  # a part of a character
        return TokenDose(int(i), text, float(self.doses[i]))


def score_trace(pair: ProxyPair, trace: EncodedTrace) -> Score:
    """Evaluates the pair along the trace.

    Raises:
        ProxyError: the dose of a token is not a number.
    """
    doses = np.array([np.nan, *pair.doses(trace.tokens)])
    targets = np.array(trace.targets)
    broken = np.flatnonzero(targets & ~np.isfinite(doses))
    if len(broken):
        raise ProxyError(f"{trace.where}: the dose of token {broken[0]} is not finite; a proxy gave NaN or inf")
    vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(pair.contexts[0]))
    return Score(trace.where, token_pieces(vocab, trace.tokens), np.where(targets, doses, np.nan))
