"""The verb `watch` and its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import seconds
from .verb import add_verb


def add_watch(verbs: Any) -> None:
    """`adlocal watch`."""
    description = "Show whom the gateway's extraction watch suspects; calibrate it; forget a subject"
    parser = add_verb(verbs, "watch", description, "adlocal watch --state /var/lib/adlocal --watch")
    _add_shown(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    calibrate = actions.add_parser(
        "calibrate",
        help="learn what benign traffic is",
        description="Writes the medians and spreads of benign traffic: what the watch recorded, or a file.",
        epilog="in serve.toml: [watch] baseline = 'FILE.toml'",
    )
    _add_state(calibrate, argparse.SUPPRESS)
    calibrate.add_argument(
        "--from", type=Path, dest="observations", metavar="FILE.jsonl", help="observations, in place of the recorded"
    )
    calibrate.add_argument("--out", type=Path, metavar="FILE.toml", help="printed if not given")
    reset = actions.add_parser("reset", help="forget a subject", description="Forgets what a subject has asked.")
    reset.add_argument("subject", metavar="SUBJECT", help="as the table names it: key:ID, owner:NAME, ...")
    _add_state(reset, argparse.SUPPRESS)


def _add_shown(parser: argparse.ArgumentParser) -> None:
    _add_state(parser, None)
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE.toml", help="of adlocal watch calibrate, if the gateway uses one"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array, or one a line with --watch")
    parser.add_argument(
        "-w",
        "--watch",
        type=seconds,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="again and again, every 2 seconds by default",
    )


def _add_state(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument(
        "--state", default=default, metavar="DIR|redis://...", help="as in serve.toml; adlocal's own by default"
    )
