"""`adlocal convert`: a bundle from a proxy student and traces."""

from __future__ import annotations

import argparse
import json
import sys

from tqdm import tqdm

from .inspect import as_json, sizes_of
from .offline import converter


def run(args: argparse.Namespace) -> None:
    """Converts, reporting to stderr; with --json the bundle's metadata go to stdout."""
    with converter():
        from adlocal_convert.convert import convert
        from adlocal_convert.direction.capabilities import parse_traces
        from adlocal_convert.options import Options
    options = Options(
        proxy=args.proxy,
        traces=parse_traces(args.traces),
        out=args.out,
        teacher=args.teacher,
        mix=args.mix,
        loss_on=args.loss_on,
        quant=args.quant,
        format=args.format,
        quality=args.quality,
        carriers=args.carriers,
        rank=args.rank,
        params=args.params,
        eps=args.eps,
        raw=args.raw,
        low_memory=args.low_memory,
        batch_size=args.batch_size,
        device=args.device,
        n_ctx=args.ctx_size,
        n_threads=args.threads,
        n_gpu_layers=args.gpu_layers,
        force=args.force,
        overwrite=args.overwrite,
    )
    bundle = convert(options, say)
    if args.json:
        print(json.dumps(as_json(bundle, sizes_of(bundle))))


def say(line: str) -> None:
    """A line of report, clear of the progress bars."""
    tqdm.write(line, file=sys.stderr)
