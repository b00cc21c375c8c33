"""`adlocal convert`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from adlocal.bundle import MINUS_NAME, PLUS_NAME
from adlocal.inspect import as_json

from .convert import Options, convert


def run(args: argparse.Namespace) -> None:
    """Converts, reporting to stderr; with --json the bundle's metadata go to stdout."""
    options = Options(
        proxy=args.proxy,
        traces=args.traces,
        out=args.out,
        quant=args.quant,
        carriers=args.carriers,
        eps=args.eps,
        raw=args.raw,
        n_ctx=args.ctx_size,
        n_threads=args.threads,
        n_gpu_layers=args.gpu_layers,
        force=args.force,
        overwrite=args.overwrite,
    )
    bundle = convert(options, say)
    if args.json:
        sizes = {name: (Path(args.out) / name).stat().st_size for name in (PLUS_NAME, MINUS_NAME)}
        print(json.dumps(as_json(bundle, sizes)))


def say(line: str) -> None:
    """A line of report, clear of the progress bars."""
    tqdm.write(line, file=sys.stderr)
