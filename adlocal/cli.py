"""The `adlocal` command.

Exit status: 0 done; 1 the input was right and the work failed; 2 the input is wrong. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import AdlocalError

Handler = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status."""
    args = _parser().parse_args(argv)
    # Termination unwinds like Ctrl-C, so that half-written files are removed.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        args.handler(args)
        sys.stdout.flush()
    except AdlocalError as error:
        print(f"adlocal {args.verb}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"\nadlocal {args.verb}: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `adlocal inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _verb(module: str) -> Handler:
    """Imports a verb's module when it runs, so that `--help` stays fast."""

    def handler(args: argparse.Namespace) -> None:
        importlib.import_module(module).run(args)

    return handler


def _offline_verb(module: str) -> Handler:
    def handler(args: argparse.Namespace) -> None:
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise AdlocalError(
                f"the converter needs {error.name}, which is not installed; run: pip install 'adlocal[convert]'"
            ) from None
        imported.run(args)

    return handler


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(prog="adlocal", description="Antidistillation sampling (arXiv 2504.13146) for llama.cpp.")
    parser.add_argument("--version", action="version", version=f"adlocal {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_add_convert, _add_inspect, _add_generate, _add_score, _add_bench, _add_demo):
        add(verbs)
    return parser


def _add(verbs: Any, name: str, handler: Handler, description: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=description[0].lower() + description[1:],
        description=f"{description}.",
        epilog=f"example:\n  {example}",
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


class _Parser(argparse.ArgumentParser):
    """Tells an error in one line, as `main` does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the example as it is written."""


def _add_convert(verbs: Any) -> None:
    parser = _add(
        verbs,
        "convert",
        _offline_verb("adlocal_convert.command"),
        "Make a bundle from a proxy student and traces",
        "adlocal convert proxy.Q4_K_M.gguf --traces traces.jsonl --out bundle/",
    )
    parser.add_argument("proxy", type=Path, metavar="PROXY.gguf", help="the proxy student, architecture llama or qwen2")
    parser.add_argument(
        "--traces", type=Path, required=True, metavar="FILE.jsonl", help="prompt and completion, or messages"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory of the bundle; it is a secret"
    )
    parser.add_argument("--quant", metavar="TYPE", help="requantize the proxy first, with llama.cpp: Q4_K_M, Q8_0, ...")
    parser.add_argument("--carriers", type=float, default=0.05, metavar="FRACTION", help="share of the linear weights")
    parser.add_argument(
        "--eps", type=_eps, default="auto", metavar="STEP", help="step along the unit gradient, or auto"
    )
    parser.add_argument("--raw", action="store_true", help="concatenate string pairs, without the chat template")
    parser.add_argument("--force", action="store_true", help="write and mark a bundle whose fidelity is too low")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that lies in DIR")
    parser.add_argument("--json", action="store_true", help="print the bundle's metadata as JSON")
    _add_runtime(parser, ctx_size=2048)


def _add_inspect(verbs: Any) -> None:
    description = "Tell what a bundle is and whether its halves fit together"
    parser = _add(verbs, "inspect", _verb("adlocal.inspect"), description, "adlocal inspect bundle/ --json")
    parser.add_argument("bundle", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_generate(verbs: Any) -> None:
    parser = _add(
        verbs,
        "generate",
        _verb("adlocal.generate"),
        "Generate text under protection",
        "adlocal generate -m teacher.gguf --bundle bundle/ --chat -p 'Why is the sky blue?' --strength 4",
    )
    _add_protected(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    parser.add_argument("--unprotected", action="store_true", help="run the plain teacher, without a bundle")
    parser.add_argument("--temp", type=_temperature, default=0.8, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=40, metavar="N", help="0 is off")
    parser.add_argument("--top-p", type=_share, default=0.95, metavar="P", help="1 is off")
    parser.add_argument("--min-p", type=_share, default=0.05, metavar="P", help="0 is off")
    parser.add_argument("-s", "--seed", type=_seed, metavar="N", help="random if not given")


def _add_score(verbs: Any) -> None:
    description = "Measure the dose of existing traces"
    parser = _add(verbs, "score", _verb("adlocal.score"), description, "adlocal score --bundle bundle/ traces.jsonl")
    parser.add_argument("traces", type=Path, metavar="TRACES.jsonl")
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    parser.add_argument("--raw", action="store_true", help="concatenate string pairs, without the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_runtime(parser, ctx_size=2048)


def _add_bench(verbs: Any) -> None:
    description = "Measure what protection costs, as ratios in one run"
    parser = _add(verbs, "bench", _verb("adlocal.bench"), description, "adlocal bench -m teacher.gguf --bundle bundle/")
    _add_protected(parser, bundle_required=True, n_predict=32)


def _add_demo(verbs: Any) -> None:
    parser = _add(
        verbs,
        "demo",
        _offline_verb("adlocal_convert.demo"),
        "Convert SmolLM2-135M-Instruct and answer one prompt without and with protection",
        "adlocal demo",
    )
    parser.add_argument("--dir", type=Path, default=Path("adlocal-demo"), help="where traces and bundle are kept")
    parser.add_argument("-t", "--threads", type=_count, default=os.cpu_count() or 1, metavar="N")


def _add_protected(parser: argparse.ArgumentParser, bundle_required: bool = False, n_predict: int = 256) -> None:
    parser.add_argument("-m", "--model", required=True, metavar="TEACHER.gguf")
    parser.add_argument("--bundle", type=Path, required=bundle_required, metavar="DIR", help="from adlocal convert")
    parser.add_argument("--strength", type=float, default=1.0, help="typical shift of a plausible token's logit, nats")
    parser.add_argument(
        "--guard", type=float, default=0.05, help="share of the top probability a token needs; 0 is the paper"
    )
    parser.add_argument(
        "-n", "--n-predict", type=_count, default=n_predict, metavar="N", help="most tokens to generate"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_runtime(parser, ctx_size=2048)


def _add_runtime(parser: argparse.ArgumentParser, ctx_size: int) -> None:
    parser.add_argument("-c", "--ctx-size", type=_count, default=ctx_size, metavar="N", help="tokens of context")
    parser.add_argument("-t", "--threads", type=_count, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("-ngl", "--gpu-layers", type=int, default=0, metavar="N", help="layers to offload, -1 for all")


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 up")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 0 to {2**32 - 1}")
    return int(text)


def _temperature(text: str) -> float:
    return _number(text, 0.0, 100.0)


def _share(text: str) -> float:
    return _number(text, 0.0, 1.0)


def _number(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text}: give a number from {least:g} to {most:g}")
    return value


def _eps(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give a positive number, or auto") from None
