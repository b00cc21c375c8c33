"""`adlocal traces`: many traces from a teacher, clean for a converter's holdout, or protected by a bundle."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from ..engine.parallel import ParallelLlama
from ..engine.sequences import Request, Sampling
from ..errors import AdlocalError, InputError, TraceError
from ..files import sha256
from ..llamacpp.gguf import GGUFHeader
from ..traces import Prompt, TraceEncoder, TraceWriter, final_answer, read_prompts, remarks
from ..traces.writer import check_unanswered


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, and its token ids."""

    prompt: Prompt
    tokens: list[int]


def run(args: argparse.Namespace) -> None:
    """Writes the traces; a summary goes to stderr, and with --json as one object to stdout."""
    asked = read_prompts(args.prompts)
    check_unanswered(asked)
    _check(args)
    with closing(_open_teacher(args)) as teacher:
        encoder = TraceEncoder(teacher.model, raw=args.raw)
        prompts = _encode(asked, encoder, teacher.n_ctx)
        writer = TraceWriter(args.out, [each.prompt for each in prompts], _made_by(args, teacher), args.overwrite)
        notes = remarks(asked, encoder)
        seconds, n_sampled = _finish(teacher, prompts, writer, args)
    summary = {
        "traces": writer.n_rows,
        **{name: writer.counts[name] for name in ("stop", "length", "empty")},
        "skipped": len(asked) - len(prompts),
        "resumed": writer.n_resumed,
        "tokens": n_sampled,
        "seconds": seconds,
        "tokens_per_second": n_sampled / seconds,
        "notes": notes,
    }
    print(_describe(summary, teacher.n_ctx), file=sys.stderr)
    if args.json:
        print(json.dumps(summary))


def _check(args: argparse.Namespace) -> None:
    if args.out.exists() and args.prompts.exists() and os.path.samefile(args.out, args.prompts):
        raise InputError(f"{args.out} is the file of prompts; give another -o")
    if args.best_of > 1 and args.temp == 0:
        raise InputError(f"--best-of {args.best_of}: greedy traces of a prompt are all alike; give --temp, 0.7 perhaps")


def _open_teacher(args: argparse.Namespace) -> ParallelLlama:
    return ParallelLlama(
        args.model,
        n_ctx=args.ctx_size,
        n_parallel=args.parallel,
        n_threads=args.threads,
        n_gpu_layers=args.gpu_layers,
        bundle=args.bundle,
        strength=args.strength,
        guard=args.guard,
        best_of=args.best_of,
        answer=final_answer if args.consistent else None,
    )


def _finish(
    teacher: ParallelLlama, prompts: Sequence[EncodedPrompt], writer: TraceWriter, args: argparse.Namespace
) -> tuple[float, int]:
    try:
        return _harvest(teacher, prompts, writer, args)
    except KeyboardInterrupt:
        left = f"{writer.n_rows} of {len(prompts)} traces are in {args.out}; the same command goes on"
        print(left, end="", file=sys.stderr)  # what main prints next begins a line
        raise
    except OSError as error:
        raise AdlocalError(
            f"cannot write {args.out}: {error.strerror or error}; mend that and repeat the command, it will go on"
        ) from None


def _describe(summary: dict[str, Any], n_ctx: int) -> str:
    parts = [
        f"{summary['traces']} traces: {summary['stop']} ended, {summary['length']} cut at the length limit",
        f"{summary['empty']} without text" if summary["empty"] else "",
        f"{summary['skipped']} skipped, their prompts fill the context of {n_ctx} tokens" if summary["skipped"] else "",
        f"{summary['resumed']} were there already" if summary["resumed"] else "",
        f"{summary['tokens']:,} tokens, {summary['tokens_per_second']:.1f} a second",
        *summary["notes"],
    ]
    return "; ".join(part for part in parts if part)


def _encode(asked: Sequence[Prompt], encoder: TraceEncoder, n_ctx: int) -> list[EncodedPrompt]:
    """The prompts that leave room in the context for an answer."""
    prompts = [EncodedPrompt(each, encoder.encode_prompt(each.where, each.prompt, each.tools)) for each in asked]
    if nothing := [each.prompt.where for each in prompts if not each.tokens]:
        raise TraceError(f"{nothing[0]}: the chat template makes no text of the prompt; check its roles, or say --raw")
    fitting = [each for each in prompts if len(each.tokens) < n_ctx]
    if not fitting:
        raise TraceError(f"all {len(asked)} prompts fill the context of {n_ctx} tokens; ask for a larger one")
    return fitting


def _made_by(args: argparse.Namespace, teacher: ParallelLlama) -> dict[str, Any]:
    """What the text depends on besides the prompt."""
    sampling = {"temp": 0.0} if args.temp == 0 else {**asdict(_sampling(args)), "seed": args.seed}
    settings = {"ctx_size": teacher.n_ctx, "n_predict": args.n_predict, "raw": args.raw, **sampling}
    if teacher.pair is not None:
        settings |= {"bundle": teacher.pair.bundle.id, **asdict(teacher.settings)}
        settings |= {"best_of": teacher.best_of} if teacher.best_of > 1 else {}
        settings |= {"consistent": True} if args.consistent else {}
    return {"teacher": _identity(args.model), **settings}


def _identity(model: str) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a GGUF, or of all parts of one that was split."""
    n_parts = GGUFHeader(model).get("split.count", 1)
    parts = [re.sub(r"-\d{5}(?=-of-\d{5}\.gguf$)", f"-{i:05}", model) for i in range(1, n_parts + 1)]
    digests = [sha256(part) for part in (parts if n_parts > 1 else [model])]
    return (digests[0] if n_parts < 2 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]


def _sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temp, args.top_k, args.top_p, args.min_p)


def derive_seed(seed: int, tokens: Sequence[int], nth: int) -> int:
    """The seed for the nth row with this prompt: rows that repeat a prompt sample it anew, whenever they are run."""
    digest = hashlib.sha256(json.dumps([seed, nth, list(tokens)]).encode()).digest()
    return int.from_bytes(digest[:4], "little") % 0xFFFFFFFF  # llama.cpp takes that number for "a random seed"


def _requests(prompts: Sequence[EncodedPrompt], args: argparse.Namespace) -> Iterator[Request]:
    seen: Counter[tuple[int, ...]] = Counter()
    for i, prompt in enumerate(prompts):
        key = tuple(prompt.tokens)
        yield Request(i, key, args.n_predict, derive_seed(args.seed, key, seen[key]))
        seen[key] += 1


def _harvest(
    teacher: ParallelLlama, prompts: Sequence[EncodedPrompt], writer: TraceWriter, args: argparse.Namespace
) -> tuple[float, int]:
    """Seconds and sampled tokens that it took to finish the file."""
    requests = [r for r in _requests(prompts, args) if r.index >= writer.n_rows]
    with writer, tqdm(total=len(prompts), initial=writer.n_rows, desc="traces", unit="trace") as bar:
        speed = _Speed(bar)
        for completion in teacher.generate(requests, _sampling(args), speed.count):
            bar.update(writer.add(completion, teacher.text(completion.tokens)))
        return speed.seconds, speed.n_tokens


class _Speed:
    """Shows tokens a second on a bar, now and then."""

    def __init__(self, bar: tqdm[object]) -> None:
        self._bar = bar
        self._started = self._shown = time.perf_counter()
        self.n_tokens = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def count(self, n: int) -> None:
        self.n_tokens += n
        if time.perf_counter() - self._shown > 0.2:
            self._shown = time.perf_counter()
            self._bar.set_postfix_str(f"{self.n_tokens / self.seconds:.1f} tokens/s")
