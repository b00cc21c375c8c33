"""`adlocal score`: the dose of traces that exist already, whoever wrote them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from . import _plot
from ._files import check_target
from ._gguf import GGUFHeader
from .bundle import Bundle, proxy_path
from .errors import InputError, ProxyError
from .pair import ProxyPair
from .score_page import write_page
from .score_plot import write_plot
from .token_text import token_pieces, token_texts
from .traces import EncodedTrace, TraceEncoder, encode_all, open_vocabulary, read_traces

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


def run(args: argparse.Namespace) -> None:
    """A row a trace and the mean, with --json one object; a plot and a page where they are asked for."""
    _check(args)
    traces = read_traces(args.traces)
    bundle = Bundle.open(args.bundle)
    proxy = proxy_path(args.bundle)
    n_ctx = min(args.ctx_size, GGUFHeader(proxy).n_ctx_train or args.ctx_size)
    with (
        ProxyPair.open(args.bundle, n_ctx=n_ctx, n_threads=args.threads, n_gpu_layers=args.gpu_layers) as pair,
        closing(open_vocabulary(proxy)) as vocabulary,
    ):
        encoded, n_cut, n_skipped = encode_all(traces, TraceEncoder(vocabulary, raw=args.raw), pair.n_ctx)
        scores = [score_trace(pair, trace) for trace in tqdm(encoded, desc="scoring", unit="trace", file=sys.stderr)]
    try:
        if args.plot:
            write_plot(args.plot, scores)
        if args.html:
            write_page(args.html, scores, f"{args.traces.name}, bundle {bundle.id[:16]}")
    finally:  # the work is not lost where a disk is full
        print(report(scores, n_cut, n_skipped, args.tokens) if args.json else table(scores, n_cut, n_skipped))


def _check(args: argparse.Namespace) -> None:
    if args.tokens and not args.json:
        raise InputError("--tokens lists every token in the JSON object; give --json too")
    if args.plot:
        check_target("--plot", args.plot, ".png")
        _plot.require("--plot")
    if args.html:
        check_target("--html", args.html, ".html")


def report(scores: Sequence[Score], n_cut: int, n_skipped: int, tokens: bool = False) -> str:
    """One JSON object. `tokens` lists the text and the dose of every token too, null where it does not count."""
    n_tokens, dose = sum(s.n_tokens for s in scores), sum(s.dose for s in scores)
    total = {"traces": len(scores), "cut": n_cut, "skipped": n_skipped, "n_tokens": n_tokens, "dose": dose}
    return json.dumps({**total, "dose_per_token": dose / n_tokens, "scores": [_as_json(s, tokens) for s in scores]})


def _as_json(score: Score, tokens: bool) -> dict[str, Any]:
    every = {"tokens": score.texts, "doses": [d if np.isfinite(d) else None for d in score.doses.tolist()]}
    return {
        "where": score.where,
        "n_tokens": score.n_tokens,
        "dose": score.dose,
        "dose_per_token": score.dose_per_token,
        "most": [asdict(token) for token in score.most_loaded()],
        "least": [asdict(token) for token in score.least_loaded()],
        **(every if tokens else {}),
    }


def table(scores: Sequence[Score], n_cut: int, n_skipped: int) -> str:
    """A row a trace, and one of all."""
    n_tokens, dose = sum(s.n_tokens for s in scores), sum(s.dose for s in scores)
    most, least = (
        [_line(tokens) for tokens in side]
        for side in zip(*((s.most_loaded(), s.least_loaded()) for s in scores), strict=True)
    )
    wide, wider = max(len(s.where) for s in scores), max(map(len, most))
    rows = [
        f"{s.dose:+10.2f}  {s.dose_per_token:+9.4f}  {s.n_tokens:6}  {s.where:{wide}}  {high:{wider}}  {low}"
        for s, high, low in zip(scores, most, least, strict=True)
    ]
    head = f"      dose  per token  tokens  {'trace':{wide}}  {'most loaded tokens':{wider}}  least loaded tokens"
    last = f"{dose:+10.2f}  {dose / n_tokens:+9.4f}  {n_tokens:6}  all {len(scores)} ({n_cut} cut, {n_skipped} skipped)"
    return "\n".join([head, *rows, last])


def _line(tokens: Sequence[TokenDose]) -> str:
    return "  ".join(f"{token.token!r} {token.dose:+.2f}" for token in tokens)  # repr leaves a terminal no controls
