"""`make plugin-speed`: what protection costs servers that nobody changed, SmolLM2-135M-Instruct, side by side.

llama-server and xllamacpp's server run plainly, under `adlocal run` at strength 0, and protected, all at once; each in
its turn answers one request, then four at a time, and who begins changes from round to round. A round gives tokens per
second over those of the same server without the plugin. The drop-in answers the same prompts beside plain
llama-cpp-python. The first round only warms up.

Then a teacher that costs eight times as much (see `large_teacher`) with its proxy as the draft model: protected with a
draft against plain without one. And what it takes to go on from a slot that was saved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import llama_cpp
from tqdm import tqdm

from adlocal import AntidistillationLlama
from adlocal.bundle import Bundle
from adlocal.servers import xllamacpp_server
from adlocal.traces import TraceEncoder
from adlocal_convert.demo.smollm2 import demo_model
from adlocal_convert.demo.word_problems import word_problems
from bench.large_teacher import deepened
from bench.proxy_types import AS_IT_IS, bundle_of
from support.engines import ENGINES, serving
from support.llama_server import Server

N_CTX = 1024
#: Options of `adlocal run` by contestant; None without it.
WAYS: dict[str, list[object] | None] = {"plain": None, "strength 0": ["--strength", 0], "protected": []}

Prompt = list[int]
#: Answers prompts at the same time, so many tokens each; greedily, and never ends before.
Ask = Callable[[Sequence[Prompt], int], None]


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, metavar="DIR", help="keeps the bundle, and takes the one that lies there")
    parser.add_argument("-n", "--n-predict", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("-t", "--threads", type=int, default=2, metavar="N")
    parser.add_argument(
        "--times", type=float, default=8.0, metavar="N", help="what the large teacher costs, in proxies"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bundle = bundle_of(AS_IT_IS, args.dir or Path(name), args.threads)
        prompts = encoded(4)
        print("tokens per second, over the plain one's: median (range)")
        for n_requests in (1, 4):
            with ExitStack() as stack:
                contestants = servers(stack, bundle, n_requests, Path(name), args)
                if n_requests == 1:
                    contestants |= drop_ins(stack, bundle, args)
                compared(contestants, prompts[:n_requests], args, f"{n_requests} at a time")
        with ExitStack() as stack:
            compared(drafting(stack, bundle, Path(name), args), prompts[:1], args, "teacher of eight times the size")
        restored(bundle, prompts[0], Path(name), args)
    return 0


def encoded(n: int) -> list[Prompt]:
    """Problems that gave no gradient, in the model's chat template."""
    params: dict[str, Any] = {"vocab_only": True, "verbose": False}
    with closing(llama_cpp.Llama(str(demo_model()), **params)) as llm:
        encoder = TraceEncoder(llm._model)
        return [encoder.encode_prompt("prompt", problem["prompt"]) for problem in word_problems(200)[-n:]]


def servers(
    stack: ExitStack, bundle: Bundle, n_parallel: int, directory: Path, args: argparse.Namespace
) -> dict[str, Ask]:
    """Both servers, three times."""
    found: dict[str, Ask] = {}
    for way, options in WAYS.items():
        own = ["-m", demo_model(), "-t", args.threads, "-tb", args.threads, "-c", N_CTX * n_parallel]
        log = directory / f"server-{way}-{n_parallel}.log"
        server = Server(
            own, bundle.directory if options is not None else None, options or [], n_parallel=n_parallel, log=log
        )
        found[f"llama-server, {way}"] = asker(stack.enter_context(server).complete_at_once)
        found[f"xllamacpp, {way}"] = xllamacpp(stack, bundle, way, options, n_parallel, directory, args.threads)
    return found


def asker(complete_at_once: Callable[..., Any]) -> Ask:
    """A server's way to be asked."""

    def ask(prompts: Sequence[Prompt], n: int) -> None:
        complete_at_once(prompts, n, ignore_eos=True)

    return ask


def xllamacpp(
    stack: ExitStack,
    bundle: Bundle,
    way: str,
    options: list[object] | None,
    n_parallel: int,
    directory: Path,
    n_threads: int,
) -> Ask:
    """The server that `adlocal engine` starts, and the same without the plugin."""
    log, path = directory / f"xllamacpp-{way}-{n_parallel}.log", {"PYTHONPATH": str(ENGINES / "python")}
    threads = {"cpuparams.n_threads": n_threads, "cpuparams_batch.n_threads": n_threads}
    told = {
        "model.path": str(demo_model()),
        "port": 0,
        "n_parallel": n_parallel,
        "n_ctx": N_CTX * n_parallel,
        **threads,
    }
    command: list[object] = [sys.executable, xllamacpp_server.__file__]
    if options is not None:
        command = [sys.executable, "-m", "adlocal", "run", "--bundle", bundle.directory, *options, "--", *command]
    variables = {**path, xllamacpp_server.VARIABLE: json.dumps(told)}
    return asker(stack.enter_context(serving(command, log, variables, seconds=3600)).complete_at_once)


def drop_ins(stack: ExitStack, bundle: Bundle, args: argparse.Namespace) -> dict[str, Ask]:
    """In this process, with and without protection."""
    kwargs: dict[str, Any] = {
        "n_ctx": N_CTX,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "verbose": False,
    }
    path = str(demo_model())
    plain = stack.enter_context(closing(llama_cpp.Llama(path, **kwargs)))
    protected = stack.enter_context(closing(AntidistillationLlama(path, bundle=bundle, **kwargs)))

    def of(llm: llama_cpp.Llama) -> Ask:
        def ask(prompts: Sequence[Prompt], n: int) -> None:
            for prompt in prompts:
                for _ in itertools.islice(llm.generate(prompt, temp=0.0), n):
                    pass

        return ask

    return {"llama-cpp-python, plain": of(plain), "llama-cpp-python, protected": of(protected)}


def drafting(stack: ExitStack, bundle: Bundle, directory: Path, args: argparse.Namespace) -> dict[str, Ask]:
    """A large teacher: plain, protected, and each with its proxy as a draft model."""
    teacher = deepened(demo_model(), directory / "large.gguf", args.times)
    proxy = bundle.directory / "proxy-plus.gguf"
    draft = ["--model-draft", proxy, "--spec-type", "draft-simple", "--spec-draft-n-max", 4, "-td", args.threads]
    found = {}
    for way, options, more in (
        ("plain", None, []),
        ("protected", [], []),
        ("plain, drafts", None, draft),
        ("protected, drafts", [], draft),
    ):
        own = ["-m", teacher, "-t", args.threads, "-tb", args.threads, "-c", N_CTX, *more]
        log = directory / f"large-{way}.log"
        server = Server(own, bundle.directory if options is not None else None, options or [], log=log)
        found[f"llama-server, {way}"] = asker(stack.enter_context(server).complete_at_once)
    return found


def compared(contestants: dict[str, Ask], prompts: Sequence[Prompt], args: argparse.Namespace, title: str) -> None:
    """A line for each."""
    names, speeds = list(contestants), {name: list[float]() for name in contestants}
    for i in tqdm(range(args.rounds + 1), desc=title, unit="round", file=sys.stderr):
        for name in names:
            started = time.perf_counter()
            contestants[name](prompts, args.n_predict)
            if i > 0:
                speeds[name].append(len(prompts) * args.n_predict / (time.perf_counter() - started))
        names.append(names.pop(0))
    print(f"\n{title}")
    for name, found in speeds.items():
        engine = name.partition(", ")[0]
        ratios = [own / plain for own, plain in zip(found, speeds[f"{engine}, plain"], strict=True)]
        range_of = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:34} {statistics.median(found):7.1f}/s   {statistics.median(ratios):.3f} ({range_of})", flush=True)


def restored(bundle: Bundle, prompt: Prompt, directory: Path, args: argparse.Namespace) -> None:
    """The time of one more token after a slot of some hundred tokens was restored, over that of plain llama-server."""
    slots = directory / "slots"
    slots.mkdir()
    seconds: dict[str, list[float]] = {}
    for way, options in WAYS.items():
        own = ["-m", demo_model(), "-t", args.threads, "-tb", args.threads, "-c", N_CTX, "--slot-save-path", slots]
        protected = bundle.directory if options is not None else None
        with Server(own, protected, options or [], log=directory / f"slots-{way}.log") as server:
            long = prompt + server.complete(prompt, 400, ignore_eos=True)
            server.complete(long, 1)
            server.ask("/slots/0?action=save", {"filename": f"{way}.bin"})
            seconds[way] = [one_restore(server, long, f"{way}.bin") for _ in range(args.rounds)]
    print(f"\nseconds to restore {len(long)} tokens and to go on by one")
    for way, found in seconds.items():
        print(f"llama-server, {way:21} {statistics.median(found):.3f}")


def one_restore(server: Server, prompt: Prompt, name: str) -> float:
    """After the slot was erased."""
    server.ask("/slots/0?action=erase", {})
    started = time.perf_counter()
    server.ask("/slots/0?action=restore", {"filename": name})
    server.complete(prompt, 1)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
