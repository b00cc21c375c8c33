"""`make proxy-types`: fidelity, size and speed by the type of the proxy, with SmolLM2-135M-Instruct as teacher.

The teacher stays Q4_1, as it is shipped. Each proxy is the same model, as it is or requantized from it, and is
converted with the demo's settings. Then the plain teacher and all protected ones answer the same new problems in one
process, greedily and in turns. A round gives the tokens per second of each over those of the plain teacher. What
prompts cost is left out: each is answered before, until both proxies hold it. The first round only warms up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
from tqdm import tqdm

from adlocal import AntidistillationLlama, Bundle, BundleError
from adlocal.commands.demo import STRENGTH
from adlocal.llamacpp.batching import Batching
from adlocal.traces import TraceEncoder
from adlocal_convert.convert import convert
from adlocal_convert.demo.smollm2 import demo_model
from adlocal_convert.demo.word_problems import word_problems
from adlocal_convert.options import Options
from support.json_lines import write_lines

AS_IT_IS = "as-is"
TYPES = (AS_IT_IS, "Q4_0", "Q4_K_M", "Q8_0")
_N_TRACES = 48  # the demo's
_N_CTX = 1024

Prompt = list[int]


@dataclass(frozen=True)
class Answer:
    """What one took: seconds, tokens, and those of them where there was a choice."""

    seconds: float
    n_tokens: int
    n_steerable: int


@dataclass
class Speed:
    """Of one contestant: tokens per second of each round, and the share of tokens where there was a choice."""

    rounds: list[float] = field(default_factory=list)
    choices: list[float] = field(default_factory=list)

    def add(self, answers: list[Answer]) -> None:
        """A round."""
        n = sum(answer.n_tokens for answer in answers)
        self.rounds.append(n / sum(answer.seconds for answer in answers))
        self.choices.append(sum(answer.n_steerable for answer in answers) / n)

    def over(self, plain: Speed) -> str:
        """Median and range of the ratio in one round."""
        ratios = [own / other for own, other in zip(self.rounds, plain.rounds, strict=True)]
        return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"


def main() -> int:
    """Prints a row a type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE", help=f"as --quant, or {AS_IT_IS}")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="keeps the bundles, and takes those that lie there")
    parser.add_argument("--prompts", type=int, default=4, metavar="N")
    parser.add_argument("-n", "--n-predict", type=int, default=64, metavar="N", help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    args = parser.parse_args()
    with ExitStack() as stack:
        directory = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundles = {kind: bundle_of(kind, directory, args.threads) for kind in args.types}
        plain, protected = stack.enter_context(opened(bundles, args.threads))
        speeds = measured(plain, protected, args)
        print(f"plain teacher: {statistics.median(speeds['plain'].rounds):.1f} tokens/s")
        print("proxy    mostly    base MB  bundle MB  fidelity  p10     choices  protected/plain (range)")
        for kind, bundle in bundles.items():
            print(row(kind, bundle, speeds[kind], speeds["plain"]))
    return 0


def bundle_of(kind: str, directory: Path, n_threads: int) -> Bundle:
    """The demo's bundle, with the proxy in a type."""
    out = directory / f"bundle-{kind}"
    try:
        return Bundle.open(out)
    except BundleError:
        directory.mkdir(parents=True, exist_ok=True)
    traces = write_lines(directory / "traces.jsonl", *word_problems(_N_TRACES))
    os.environ["ADLOCAL_CACHE"] = str(directory / "cache")
    quant = None if kind == AS_IT_IS else kind
    options = Options(str(demo_model()), {"traces": traces}, out, quant=quant, n_threads=n_threads, overwrite=True)
    return convert(options, lambda line: tqdm.write(f"{kind}: {line}", file=sys.stderr))


@contextmanager
def opened(
    bundles: dict[str, Bundle], n_threads: int
) -> Iterator[tuple[llama_cpp.Llama, dict[str, AntidistillationLlama]]]:
    """The plain teacher, and one under each bundle's protection."""
    path = str(demo_model())
    params: dict[str, Any] = {"n_ctx": _N_CTX, "n_threads": n_threads, "n_threads_batch": n_threads, "verbose": False}
    with ExitStack() as stack:
        plain = stack.enter_context(closing(llama_cpp.Llama(path, **params)))
        protected = {
            kind: stack.enter_context(closing(AntidistillationLlama(path, bundle=bundle, strength=STRENGTH, **params)))
            for kind, bundle in bundles.items()
        }
        yield plain, protected


def measured(
    plain: llama_cpp.Llama, protected: dict[str, AntidistillationLlama], args: argparse.Namespace
) -> dict[str, Speed]:
    """Everybody answers one prompt, then the next; who begins changes from round to round."""
    encoder = TraceEncoder(plain._model)
    asked = word_problems(_N_TRACES + args.prompts)[_N_TRACES:]
    prompts = [encoder.encode_prompt("prompt", problem["prompt"]) for problem in asked]
    contestants: dict[str, llama_cpp.Llama] = {"plain": plain, **protected}
    names, speeds = list(contestants), {name: Speed() for name in contestants}
    for i in tqdm(range(args.rounds + 1), desc="answering", unit="round", file=sys.stderr):
        answers: dict[str, list[Answer]] = {name: [] for name in names}
        for prompt in prompts:
            for name in names:
                answers[name].append(answered(contestants[name], prompt, args.n_predict))
        if i > 0:
            for name in names:
                speeds[name].add(answers[name])
        names.append(names.pop(0))
    return speeds


def hold(llm: llama_cpp.Llama, prompt: Prompt) -> None:
    """Answers until all models hold the prompt: the pair takes it when there is a first choice."""
    with closing(llm.generate(prompt, temp=0.0)) as stream:
        for _ in stream:
            if not isinstance(llm, AntidistillationLlama) or llm._lockstep.n_held >= len(prompt):
                return


def answered(llm: llama_cpp.Llama, prompt: Prompt, most: int) -> Answer:
    """A greedy answer to a prompt that is held."""
    hold(llm, prompt)
    n, started = 0, time.perf_counter()
    with closing(llm.generate(prompt, temp=0.0)) as stream:
        for token in stream:
            n += 1
            if n == most or llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
                break
    seconds = time.perf_counter() - started
    return Answer(seconds, n, llm.last_dose.n_steerable if isinstance(llm, AntidistillationLlama) else 0)


def row(kind: str, bundle: Bundle, speed: Speed, plain: Speed) -> str:
    """Of the table."""
    tensors = bundle.headers()[0].tensors
    size = sum(path.stat().st_size for path in bundle.files)
    return (
        f"{kind:8} {Batching.of(tensors).type:8} {bundle.base_bytes / 1e6:8.1f}  {size / 1e6:9.1f}  "
        f"{bundle.fidelity_median:8.4f}  {bundle.fidelity_p10:.4f}  {statistics.mean(speed.choices):7.0%}  "
        f"{speed.over(plain)}"
    )


if __name__ == "__main__":
    sys.exit(main())
