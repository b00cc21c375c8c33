"""The command line: every verb's arguments, with an example of each."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..bundle import HALVES, NAMES
from ..bundle.choices import BALANCED, PARAMS, QUALITIES
from ..settings import DEFAULT_GUARD
from .arguments import add_protected, add_protection, add_runtime, add_sampling, count, eps, seed, temperature
from .program_verbs import add_engine, add_plugin, add_run, add_status
from .serve_verbs import add_keys, add_serve
from .verb import Parser, add_verb
from .watch_verbs import add_watch


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command. Its result has `verb`, and `handler`, which runs it."""
    from .. import __version__

    parser = Parser(prog="adlocal", description="Antidistillation sampling (arXiv 2504.13146) for llama.cpp.")
    parser.add_argument("--version", action="version", version=f"adlocal {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        _add_traces,
        _add_convert,
        _add_inspect,
        _add_generate,
        _add_calibrate,
        _add_score,
        add_run,
        add_engine,
        add_serve,
        add_keys,
        add_watch,
        add_status,
        add_plugin,
        _add_bench,
        _add_demo,
    ):
        add(verbs)
    return parser


def _add_traces(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "traces",
        "Generate traces: clean ones for convert, protected ones with --bundle; a second run goes on where it stopped",
        "adlocal traces -m teacher.gguf --prompts prompts.jsonl -o traces.jsonl",
    )
    parser.add_argument("-m", "--model", required=True, metavar="TEACHER.gguf")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE.jsonl", help="JSON lines, CSV and others: see docs/data.md"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="TRACES.jsonl")
    add_protection(parser)
    parser.add_argument(
        "--best-of",
        type=count,
        default=1,
        metavar="N",
        help="sample N traces a prompt and keep the one with the highest dose; needs --bundle and --temp above 0",
    )
    parser.add_argument(
        "--consistent",
        action="store_true",
        help="with --best-of, choose only among traces whose final number is the most frequent: fewer wrong ones",
    )
    parser.add_argument("-n", "--n-predict", type=count, default=512, metavar="N", help="most tokens of a trace")
    parser.add_argument("-np", "--parallel", type=count, default=4, metavar="N", help="sequences decoded together")
    parser.add_argument("--raw", action="store_true", help="send string prompts as they are, without the chat template")
    parser.add_argument("--overwrite", action="store_true", help="start TRACES.jsonl again, whatever is in it")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_sampling(parser, temp=0.0)
    parser.add_argument("-s", "--seed", type=seed, default=0, metavar="N", help="each prompt derives its own from it")
    add_runtime(parser, ctx_size=2048, help_ctx="tokens of context a sequence")


def _add_convert(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "convert",
        "Make a bundle from a proxy student and traces",
        "adlocal convert owner/proxy-GGUF:Q4_K_M --traces math=a.jsonl --traces code=b.jsonl --out bundle/",
    )
    _add_convert_inputs(parser)
    _add_convert_method(parser)
    parser.add_argument("--force", action="store_true", help="write and mark a bundle whose fidelity is too low")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that lies in DIR")
    parser.add_argument("--json", action="store_true", help="print the bundle's metadata as JSON")
    add_runtime(parser, ctx_size=2048)


def _add_convert_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "proxy",
        metavar="PROXY",
        help="the proxy student: a GGUF, a Hugging Face directory, or a hub id (owner/name, owner/name:Q8_0)",
    )
    parser.add_argument(
        "--traces",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help="JSON lines, CSV, Parquet, a datasets id, in any shape of docs/data.md; repeat once per capability",
    )
    parser.add_argument("--mix", metavar="NAME=WEIGHT,...", help="weights of the capabilities, equal by default")
    parser.add_argument(
        "--loss-on", metavar="REGEX", help="compute the loss only on tokens that match REGEX; '[0-9]' for numbers"
    )
    parser.add_argument("--raw", action="store_true", help="concatenate string pairs, without the chat template")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory of the bundle; it is a secret"
    )
    parser.add_argument("--teacher", type=Path, metavar="TEACHER.gguf", help="gives a Hugging Face proxy its tokenizer")
    parser.add_argument("--quant", metavar="TYPE", help="requantize the proxy first, with llama.cpp: Q4_K_M, Q8_0, ...")


def _add_convert_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=tuple(NAMES), default=HALVES, help="two files of weights, or one and a LoRA"
    )
    parser.add_argument(
        "--quality",
        choices=QUALITIES,
        default=BALANCED,
        help="halves of 1.1 or 1.25 times the proxy's size, or in F16",
    )
    parser.add_argument(
        "--params",
        choices=PARAMS,
        help="which weights are protected (default: all; linear for adapter)",
    )
    parser.add_argument(
        "--carriers",
        type=float,
        metavar="FRACTION",
        help="share of the linear weights that carry (overrides --quality)",
    )
    parser.add_argument("--rank", type=count, metavar="N", help="adapter rank (overrides --quality)")
    parser.add_argument("--eps", type=eps, default="auto", metavar="STEP", help="step along the unit gradient, or auto")
    parser.add_argument("-b", "--batch-size", type=count, default=2, metavar="N", help="traces of one pass")
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="one trace a pass, activations recomputed, a third of the gradient at a time",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="for the gradient")


def _add_inspect(verbs: Any) -> None:
    description = "Tell what a bundle is and whether its halves fit together"
    parser = add_verb(verbs, "inspect", description, "adlocal inspect bundle/ --json")
    parser.add_argument("bundle", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_generate(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "generate",
        "Generate text under protection",
        "adlocal generate -m teacher.gguf --bundle bundle/ --chat -p 'Why is the sky blue?' --strength 4",
    )
    add_protected(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    parser.add_argument("--unprotected", action="store_true", help="run the plain teacher, without a bundle")
    add_sampling(parser, temp=0.8)
    parser.add_argument("-s", "--seed", type=seed, metavar="N", help="random if not given")


def _add_calibrate(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "calibrate",
        "Find the strength that spends a budget, and make it the bundle's default",
        "adlocal calibrate -m teacher.gguf --bundle bundle/ --prompts prompts.jsonl --kl 0.1 --plot calibration.png",
    )
    parser.add_argument("-m", "--model", required=True, metavar="TEACHER.gguf")
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="from adlocal convert")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE.jsonl", help="whatever adlocal traces --prompts takes"
    )
    parser.add_argument(
        "--answers", type=Path, metavar="FILE.jsonl", help='lines with "answer", if the prompts have none'
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--kl", type=float, metavar="NATS", help="budget: KL to the teacher, nats a token")
    budget.add_argument("--accuracy-drop", type=float, metavar="PCT", help="budget: points of accuracy to lose at most")
    parser.add_argument(
        "--guard",
        type=float,
        metavar="SHARE",
        help=f"fixed; else the one with the largest dose for --kl, or {DEFAULT_GUARD:g}",
    )
    parser.add_argument("--temp", type=temperature, metavar="T", help="0.8 for --kl, greedy for --accuracy-drop")
    parser.add_argument("-n", "--n-predict", type=count, default=256, metavar="N", help="most tokens a prompt")
    parser.add_argument("-s", "--seed", type=seed, default=0, metavar="N")
    parser.add_argument("--raw", action="store_true", help="take string prompts as they are, without the chat template")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it; needs adlocal[plot]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_runtime(parser, ctx_size=2048)


def _add_score(verbs: Any) -> None:
    description = "Measure the dose of existing traces"
    example = "adlocal score --bundle bundle/ traces.jsonl --html scores.html"
    parser = add_verb(verbs, "score", description, example)
    parser.add_argument("traces", type=Path, metavar="TRACES.jsonl")
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    parser.add_argument("--raw", action="store_true", help="concatenate string pairs, without the chat template")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw histograms of the doses")
    parser.add_argument(
        "--html", type=Path, metavar="FILE.html", help="write a page that shades every token by its dose"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tokens", action="store_true", help="list every token in the JSON object")
    add_runtime(parser, ctx_size=2048)


def _add_bench(verbs: Any) -> None:
    description = "Measure what protection costs, as ratios in one run"
    parser = add_verb(verbs, "bench", description, "adlocal bench -m teacher.gguf --bundle bundle/ --guard 0.2 -n 64")
    add_protected(parser, bundle_required=True, n_predict=32)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="what to go on from, by default the start of a story")
    parser.add_argument(
        "-np",
        "--parallel",
        type=count,
        nargs="*",
        default=[1, 2, 4, 8],
        metavar="N",
        help="numbers of sequences to decode together; none leaves that out",
    )
    parser.add_argument("--rounds", type=count, default=9, metavar="N", help="that count, after one to warm up")


def _add_demo(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "demo",
        "Convert SmolLM2-135M-Instruct and answer one prompt without and with protection",
        "adlocal demo",
    )
    parser.add_argument("--dir", type=Path, default=Path("adlocal-demo"), help="where traces and bundle are kept")
    parser.add_argument("-t", "--threads", type=count, default=os.cpu_count() or 1, metavar="N")
