"""`adlocal score`: the dose of traces that exist already, whoever wrote them."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict, dataclass

from tqdm import tqdm

from ._gguf import GGUFHeader
from .bundle import PLUS_NAME, Bundle
from .pair import ProxyPair
from .traces import EncodedTrace, TraceEncoder, encode_all, open_vocabulary, read_traces


@dataclass(frozen=True)
class Score:
    """Dose of one trace, over its target tokens: Σ (Δ(x_t) − E[Δ]), as in `Dose`."""

    where: str
    n_tokens: int
    dose: float
    dose_per_token: float


def score_trace(pair: ProxyPair, trace: EncodedTrace) -> Score:
    """Evaluates the pair along the trace."""
    doses = pair.doses(trace.tokens)
    total = sum(dose for dose, is_target in zip(doses, trace.targets[1:], strict=True) if is_target)
    return Score(trace.where, trace.n_targets, total, total / trace.n_targets)


def run(args: argparse.Namespace) -> None:
    """A line a trace and the mean; with --json one object."""
    traces = read_traces(args.traces)
    Bundle.open(args.bundle)
    n_ctx = min(args.ctx_size, GGUFHeader(args.bundle / PLUS_NAME).n_ctx_train or args.ctx_size)
    with (
        ProxyPair.open(args.bundle, n_ctx=n_ctx, n_threads=args.threads, n_gpu_layers=args.gpu_layers) as pair,
        closing(open_vocabulary(args.bundle / PLUS_NAME)) as vocabulary,
    ):
        encoded, n_cut, n_skipped = encode_all(traces, TraceEncoder(vocabulary, raw=args.raw), pair.n_ctx)
        scores = [score_trace(pair, trace) for trace in tqdm(encoded, desc="scoring", unit="trace", file=sys.stderr)]
    n_tokens, dose = sum(s.n_tokens for s in scores), sum(s.dose for s in scores)
    mean = {"traces": len(scores), "cut": n_cut, "skipped": n_skipped, "n_tokens": n_tokens, "dose": dose}
    if args.json:
        print(json.dumps({**mean, "dose_per_token": dose / n_tokens, "scores": [asdict(s) for s in scores]}))
        return
    print("      dose  per token  tokens  trace")
    for s in scores:
        print(f"{s.dose:+10.2f}  {s.dose_per_token:+9.4f}  {s.n_tokens:6}  {s.where}")
    print(f"{dose:+10.2f}  {dose / n_tokens:+9.4f}  {n_tokens:6}  all {len(scores)} ({n_cut} cut, {n_skipped} skipped)")
