"""`adlocal score`: the dose of traces that exist already, whoever wrote them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import plotting
from ..bundle import Bundle
from ..errors import InputError
from ..files import check_target
from ..llamacpp.model import context_length, open_vocabulary
from ..pair import ProxyPair
from ..score import Score, TokenDose, score_trace
from ..score.page import write_page
from ..score.plot import write_plot
from ..traces import TraceEncoder, TraceFile, encode_all, read_traces, remarks


@dataclass(frozen=True)
class Counts:
    """What happened to the traces before they were scored.

    Attributes:
        n_cut: cut to the context.
        n_skipped: left out because their prompt alone fills it.
        n_reasoning: with reasoning beside their text.
        notes: what else there is to know.
    """

    n_cut: int
    n_skipped: int
    n_reasoning: int = 0
    notes: Sequence[str] = ()


def run(args: argparse.Namespace) -> None:
    """A row a trace and the mean, with --json one object; a plot and a page where they are asked for."""
    _check(args)
    traces = read_traces(args.traces)
    bundle = Bundle.open(args.bundle)
    n_ctx = context_length(bundle.proxy, args.ctx_size)
    with (
        ProxyPair.open(bundle, n_ctx=n_ctx, n_threads=args.threads, n_gpu_layers=args.gpu_layers) as pair,
        closing(open_vocabulary(bundle.proxy)) as vocabulary,
    ):
        encoder = TraceEncoder(vocabulary, raw=args.raw)
        encoded, n_cut, n_skipped = encode_all(traces, encoder, pair.n_ctx)
        counts = Counts(n_cut, n_skipped, traces.n_reasoning, _notes(traces, encoder))
        scores = [score_trace(pair, trace) for trace in tqdm(encoded, desc="scoring", unit="trace", file=sys.stderr)]
    try:
        if args.plot:
            write_plot(args.plot, scores)
        if args.html:
            write_page(args.html, scores, f"{args.traces.name}, bundle {bundle.id[:16]}")
    finally:  # the work is not lost where a disk is full
        print(report(scores, counts, args.tokens) if args.json else table(scores, counts))


def _check(args: argparse.Namespace) -> None:
    if args.tokens and not args.json:
        raise InputError("--tokens lists every token in the JSON object; give --json too")
    if args.plot:
        check_target("--plot", args.plot, ".png")
        plotting.require("--plot")
    if args.html:
        check_target("--html", args.html, ".html")


def _notes(traces: TraceFile, encoder: TraceEncoder) -> list[str]:
    left_out = {"duplicates, left out": traces.n_duplicates, "left out, they have no text": traces.n_empty}
    return [*(f"{n} {what}" for what, n in left_out.items() if n), *remarks(traces, encoder)]


def report(scores: Sequence[Score], counts: Counts, tokens: bool = False) -> str:
    """One JSON object. `tokens` lists the text and the dose of every token too, null where it does not count."""
    n_tokens, dose = sum(s.n_tokens for s in scores), sum(s.dose for s in scores)
    read = {"cut": counts.n_cut, "skipped": counts.n_skipped, "reasoning": counts.n_reasoning, "notes": counts.notes}
    total = {"n_tokens": n_tokens, "dose": dose, "dose_per_token": dose / n_tokens}
    each = [_as_json(score, tokens) for score in scores]
    return json.dumps({"traces": len(scores), **read, **total, "scores": each})


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


def table(scores: Sequence[Score], counts: Counts) -> str:
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
    last = f"{dose:+10.2f}  {dose / n_tokens:+9.4f}  {n_tokens:6}  all {len(scores)} "
    last += "; ".join([f"({counts.n_cut} cut, {counts.n_skipped} skipped)", *counts.notes])
    return "\n".join([head, *rows, last])


def _line(tokens: Sequence[TokenDose]) -> str:
    return "  ".join(f"{token.token!r} {token.dose:+.2f}" for token in tokens)  # repr leaves a terminal no controls
