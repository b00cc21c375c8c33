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
from ..traces import TraceEncoder
from ..traces.prompts import final_answer
from ..traces.records import Row, check_messages, prompt_of, read_rows
from ..traces.writer import OURS, Output


@dataclass(frozen=True)
class Prompt:
    """A row to answer, and its prompt's token ids."""

    row: Row
    tokens: list[int]


def run(args: argparse.Namespace) -> None:
    """Writes the traces; a summary goes to stderr, and with --json as one object to stdout."""
    rows = read_prompts(args.prompts)
    if args.out.exists() and args.prompts.exists() and os.path.samefile(args.out, args.prompts):
        raise InputError(f"{args.out} is the file of prompts; give another -o")
    if args.best_of > 1 and args.temp == 0:
        raise InputError(f"--best-of {args.best_of}: greedy traces of a prompt are all alike; give --temp, 0.7 perhaps")
    teacher = ParallelLlama(
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
    with closing(teacher):
        prompts = _encode(rows, teacher, args.raw)
        output = Output(args.out, [prompt.row for prompt in prompts], _made_by(args, teacher), args.overwrite)
        seconds, n_sampled = _finish(teacher, prompts, output, args)
    summary = {
        "traces": output.n_rows,
        **{name: output.counts[name] for name in ("stop", "length", "empty")},
        "skipped": len(rows) - len(prompts),
        "resumed": output.n_resumed,
        "tokens": n_sampled,
        "seconds": seconds,
        "tokens_per_second": n_sampled / seconds,
    }
    print(_describe(summary, teacher.n_ctx), file=sys.stderr)
    if args.json:
        print(json.dumps(summary))


def _finish(
    teacher: ParallelLlama, prompts: Sequence[Prompt], output: Output, args: argparse.Namespace
) -> tuple[float, int]:
    try:
        return _harvest(teacher, prompts, output, args)
    except KeyboardInterrupt:
        left = f"{output.n_rows} of {len(prompts)} traces are in {args.out}; the same command goes on"
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
    ]
    return "; ".join(part for part in parts if part)


def read_prompts(source: str | os.PathLike[str]) -> list[Row]:
    """Rows with a prompt: a string or messages under "prompt", else "messages", else a "question".

    Raises:
        TraceError: the source cannot be read, or a row of it has no prompt to answer; the message says which.
    """
    rows = read_rows(source)
    if not rows:
        raise TraceError(f'{source}: no prompts; give lines like {{"prompt": "..."}}')
    for row in rows:
        _check_prompt(row)
    return rows


def _check_prompt(row: Row) -> None:
    where, fields = row
    prompt = prompt_of(fields)
    if not isinstance(prompt, (str, list)):
        raise TraceError(
            f'{where}: has {sorted(fields)}, expected "prompt", a string or a list of messages, or a list "messages", '
            'or "question"'
        )
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise TraceError(f"{where}: the prompt is empty; remove the line")
    if isinstance(prompt, list):
        check_messages(where, prompt)
        if (role := prompt[-1]["role"]) not in ("user", "tool"):
            raise TraceError(f'{where}: the messages end with a turn of "{role}"; let them end with the user\'s')
    if taken := [name for name in OURS if name in fields]:
        raise TraceError(f'{where}: has "{taken[0]}" already, which is to be generated; rename it, to "answer" perhaps')


def _encode(rows: Sequence[Row], teacher: ParallelLlama, raw: bool) -> list[Prompt]:
    """The prompts that leave room in the context for an answer."""
    encoder = TraceEncoder(teacher.model, raw=raw)
    prompts = [Prompt(row, encoder.encode_prompt(row.where, prompt_of(row.fields))) for row in rows]
    if nothing := [prompt.row.where for prompt in prompts if not prompt.tokens]:
        raise TraceError(f"{nothing[0]}: the chat template makes no text of the prompt; check its roles, or say --raw")
    fitting = [prompt for prompt in prompts if len(prompt.tokens) < teacher.n_ctx]
    if not fitting:
        raise TraceError(f"all {len(rows)} prompts fill the context of {teacher.n_ctx} tokens; ask for a larger one")
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


def _requests(prompts: Sequence[Prompt], args: argparse.Namespace) -> Iterator[Request]:
    seen: Counter[tuple[int, ...]] = Counter()
    for i, prompt in enumerate(prompts):
        key = tuple(prompt.tokens)
        yield Request(i, key, args.n_predict, derive_seed(args.seed, key, seen[key]))
        seen[key] += 1


def _harvest(
    teacher: ParallelLlama, prompts: Sequence[Prompt], output: Output, args: argparse.Namespace
) -> tuple[float, int]:
    """Seconds and sampled tokens that it took to finish the file."""
    requests = [r for r in _requests(prompts, args) if r.index >= output.n_rows]
    with output, tqdm(total=len(prompts), initial=output.n_rows, desc="traces", unit="trace") as bar:
        speed = _Speed(bar)
        for completion in teacher.generate(requests, _sampling(args), speed.count):
            bar.update(output.add(completion, teacher.text(completion.tokens)))
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
