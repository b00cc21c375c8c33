"""`adlocal generate`: text from a teacher, protected by a bundle."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp

from ..errors import InputError
from ..llama import AntidistillationLlama
from .teacher import PlainLlama, open_teacher


def run(args: argparse.Namespace) -> None:
    """Streams text to stdout and statistics to stderr; with --json one object to stdout instead."""
    if args.bundle is None and not args.unprotected:
        raise InputError("no --bundle given, so the text would be unprotected; give one, or say --unprotected")
    if args.bundle is not None and args.unprotected:
        raise InputError("--bundle and --unprotected contradict each other; leave one out")
    llm = open_teacher(args)
    pieces, started = [], time.perf_counter()
    for piece in _stream(llm, args):
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    report = {"text": "".join(pieces), **statistics(llm, time.perf_counter() - started)}
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print()
        print(describe(report), file=sys.stderr)


def statistics(llm: llama_cpp.Llama, seconds: float) -> dict[str, Any]:
    """What the last generation was, as JSON can hold it."""
    if not isinstance(llm, AntidistillationLlama):
        n = llm.n_sampled if isinstance(llm, PlainLlama) else 0
        return {"tokens": n, "protected": False, "seconds": seconds, "tokens_per_second": n / seconds}
    dose = llm.last_dose
    return {
        "tokens": dose.n_tokens,
        "protected": dose.strength > 0,
        "strength": dose.strength,
        "guard": dose.guard,
        "dose": dose.total,
        "mean_delta": dose.per_token,
        "mean_kl": dose.mean_kl,
        "steerable": dose.n_steerable,
        "seconds": seconds,
        "tokens_per_second": dose.n_tokens / seconds,
    }


def describe(report: dict[str, Any]) -> str:
    """The statistics as one line."""
    speed = f"{report['tokens']} tokens, {report['tokens_per_second']:.1f} a second"
    if not report["protected"]:
        return f"unprotected: {speed}"
    nothing = report["dose"] is None
    dose = "nothing to steer" if nothing else f"dose {report['dose']:+.1f}, mean Δ {report['mean_delta']:+.3f}"
    return (
        f"{dose}, KL {report['mean_kl']:.3f} nats a token, "
        f"{report['steerable']} of {speed} (strength {report['strength']:g}, guard {report['guard']:g})"
    )


def _stream(llm: llama_cpp.Llama, args: argparse.Namespace) -> Iterator[str]:
    sampling: dict[str, Any] = {
        "max_tokens": args.n_predict,
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "seed": secrets.randbits(31) if args.seed is None else args.seed,
        "stream": True,
    }
    try:
        if args.chat:
            chunks: Any = llm.create_chat_completion([{"role": "user", "content": args.prompt}], **sampling)
            yield from (chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        else:
            chunks = llm.create_completion(args.prompt, **sampling)
            yield from (chunk["choices"][0]["text"] for chunk in chunks)
    except UnicodeEncodeError:
        raise InputError("--prompt is not valid UTF-8; give text") from None
    except ValueError as error:  # llama-cpp-python's word for a prompt that does not fit
        raise InputError(f"{error}; give a larger --ctx-size or a shorter prompt") from None
