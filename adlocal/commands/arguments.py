"""Arguments that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..settings import CALIBRATED, DEFAULT_GUARD, DEFAULT_STRENGTH


def add_protected(parser: argparse.ArgumentParser, bundle_required: bool = False, n_predict: int = 256) -> None:
    """A teacher under protection, and how it is run."""
    parser.add_argument("-m", "--model", required=True, metavar="TEACHER.gguf")
    add_protection(parser, required=bundle_required)
    parser.add_argument("-n", "--n-predict", type=count, default=n_predict, metavar="N", help="most tokens to generate")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_runtime(parser, ctx_size=2048)


def add_protection(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The bundle, and how much of it."""
    parser.add_argument("--bundle", type=Path, required=required, metavar="DIR", help="from adlocal convert")
    parser.add_argument(
        "--strength",
        type=strength,
        metavar="NATS",
        help="typical shift of a plausible token's logit; the calibrated one if the bundle has one, else "
        f"{DEFAULT_STRENGTH:g}",
    )
    parser.add_argument(
        "--guard",
        type=float,
        metavar="SHARE",
        help="minimum probability, as a share of the top token's, for a token to be lifted (0: no guard, as in the "
        f"paper; default: calibrated, else {DEFAULT_GUARD:g})",
    )


def add_preloaded(parser: argparse.ArgumentParser) -> None:
    """Protection of a program that nobody changed, which `run.protection_of` reads."""
    add_protection(parser, required=True)
    parser.add_argument("--epsilon", type=eps, metavar="STEP", help="for an adapter bundle; the bundle's by default")
    parser.add_argument("--observe", action="store_true", help="evaluate the proxies and change nothing")
    parser.add_argument("--proxy-threads", type=count, metavar="N", help="the teacher's by default")
    parser.add_argument("--proxy-gpu-layers", type=int, metavar="N", help="layers of the proxies to offload")
    parser.add_argument(
        "--allow-model",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a model that may generate unprotected: a draft, or one of another vocabulary than the bundle's; may be "
        "repeated",
    )
    add_control(parser)


def add_control(parser: argparse.ArgumentParser) -> None:
    """Where programs under protection are watched."""
    parser.add_argument("--control", type=Path, metavar="DIR", help="where control files lie; your own by default")


def add_sampling(parser: argparse.ArgumentParser, temp: float) -> None:
    """How tokens are sampled; `temp` is the default temperature."""
    parser.add_argument("--temp", type=temperature, default=temp, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=40, metavar="N", help="0 is off")
    parser.add_argument("--top-p", type=share, default=0.95, metavar="P", help="1 is off")
    parser.add_argument("--min-p", type=share, default=0.05, metavar="P", help="0 is off")


def add_runtime(parser: argparse.ArgumentParser, ctx_size: int, help_ctx: str = "tokens of context") -> None:
    """What llama.cpp runs with."""
    parser.add_argument("-c", "--ctx-size", type=count, default=ctx_size, metavar="N", help=help_ctx)
    parser.add_argument("-t", "--threads", type=count, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("-ngl", "--gpu-layers", type=int, default=0, metavar="N", help="layers to offload, -1 for all")


def count(text: str) -> int:
    """A whole number from 1 up."""
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 up")
    return int(text)


def seed(text: str) -> int:
    """A 32-bit number."""
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 0 to {2**32 - 1}")
    return int(text)


def strength(text: str) -> float | str:
    """Nats, or "calibrated"."""
    try:
        return text if text == CALIBRATED else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give a number of nats, or calibrated") from None


def temperature(text: str) -> float:
    """0 to 100."""
    return _number(text, 0.0, 100.0)


def seconds(text: str) -> float:
    """0.05 to a day."""
    return _number(text, 0.05, 86_400.0)


def share(text: str) -> float:
    """0 to 1."""
    return _number(text, 0.0, 1.0)


def _number(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text}: give a number from {least:g} to {most:g}")
    return value


def eps(text: str) -> float | None:
    """A number, or None for "auto"."""
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give a positive number, or auto") from None
