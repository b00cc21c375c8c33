"""`make ends-table`: three ways to treat the tokens that end generation, on SmolLM2-135M-Instruct.

    steered   ends are candidates like others, and candidates move by λ (Δ − mean_C Δ): adlocal before 0.1.0
    left out  ends are no candidates, the others move by λ (Δ − mean_C Δ)
    kept      ends are no candidates, the others move by λΔ + c and keep their mass: the product

The first two are computed here from the teacher's and the pair's rows. All sample from the whole vocabulary.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adlocal import adjust
from adlocal.bundle import Bundle
from adlocal.engine.parallel import ParallelLlama
from adlocal.engine.runner import Evaluated
from adlocal.engine.sequences import Completion, Request, Sampling
from adlocal.llamacpp.tokens import end_tokens
from adlocal.settings import Settings
from adlocal.traces import TraceEncoder
from adlocal_convert.convert import convert
from adlocal_convert.demo.smollm2 import demo_model
from adlocal_convert.demo.word_problems import word_problems
from adlocal_convert.options import Options
from support.json_lines import write_lines
from support.reference import log_softmax

Row = npt.NDArray[np.float32]
#: (teacher's row, Δ, λ, guard, ends) to the row that is sampled from.
Way = Callable[[Row, Row, float, float, adjust.Ids], Row]


def steered(z: Row, delta: Row, lam: float, guard: float, ends: adjust.Ids) -> Row:
    """Ends are candidates."""
    return left_out(z, delta, lam, guard, adjust.NO_ENDS)


def left_out(z: Row, delta: Row, lam: float, guard: float, ends: adjust.Ids) -> Row:
    """Ends are no candidates; the others are centred on their mean."""
    ids = adjust.candidates(z, guard, len(delta), ends)
    changed, at = z.copy(), delta[ids].astype(np.float64)
    if len(ids):
        changed[ids] += (lam * (at - at.mean())).astype(np.float32)
    return changed


def kept(z: Row, delta: Row, lam: float, guard: float, ends: adjust.Ids) -> Row:
    """The product's."""
    return adjust.adjust(z, delta, lam=lam, guard=guard, ends=ends).logits


def plain(z: Row, delta: Row, lam: float, guard: float, ends: adjust.Ids) -> Row:
    """The teacher's."""
    return z.copy()


KINDS = ("raw", "chat")
WAYS: dict[str, Way] = {"steered": steered, "left out": left_out, "kept": kept}


class Writer(ParallelLlama):
    """A teacher whose rows are changed in a way that is set between two calls of `generate`."""

    def __init__(self, teacher: Path, bundle: Path, n_ctx: int, guard: float) -> None:
        super().__init__(teacher, bundle=bundle, n_ctx=n_ctx, n_parallel=8, guard=guard, adjuster=self._adjust_rows)
        self._ends = end_tokens(self.model.vocab)
        self.set(plain, 0.0)

    def set(self, way: Way, strength: float) -> None:
        """Takes a way and a strength; forgets what was measured."""
        self.way, self.strength = way, strength
        self.settings = Settings(1.0, self.settings.guard)  # above 0, so that the pair is evaluated
        self.kls: list[float] = []
        self.end_before = self.end_after = 0.0

    def _adjust_rows(self, rows: Evaluated) -> None:
        (proxies,), (pair,) = rows.proxies, rows.pairs
        lam, guard = pair.bundle.lam(self.strength), self.settings.guard
        for z, delta in zip(rows.teacher, adjust.delta(*proxies, pair.epsilon), strict=True):
            before = log_softmax(z)
            z[:] = self.way(z, delta, lam, guard, self._ends)
            after = log_softmax(z)
            self.kls.append(float(np.exp(after) @ (after - before)))
            self.end_before += float(np.exp(before[self._ends]).sum())
            self.end_after += float(np.exp(after[self._ends]).sum())


def main() -> int:
    """Prints a row a way and strength."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bundle(parser)
    parser.add_argument("--prompts", type=int, default=16, metavar="N")
    parser.add_argument("-n", "--n-predict", type=int, default=32, metavar="N")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 3.0, 10.0], metavar="NATS")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="beside plain")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T")
    parser.add_argument(
        "--as", nargs="+", choices=KINDS, default=list(KINDS), dest="kinds", help="how prompts are sent"
    )
    args = parser.parse_args()
    with bundle(args.bundle) as directory:
        longest = 192 + args.n_predict
        with closing(Writer(demo_model(), directory, longest, Bundle.open(directory).guard)) as writer:
            print("prompts  way       strength  tokens  empty    cut  KL/token  dose/token  end/teacher's", flush=True)
            for kind in args.kinds:
                asked = requests(writer, args.prompts, args.n_predict, raw=kind == "raw")
                settings = [(name, s) for s in args.strengths for name in args.ways]
                for name, strength in [("plain", 0.0), *settings]:
                    writer.set(WAYS.get(name, plain), strength)
                    sampling = Sampling(args.temperature, top_k=0, top_p=1.0, min_p=0.0)
                    found = list(writer.generate(asked, sampling))
                    print(line(writer, found, kind, name), flush=True)
    return 0


def requests(writer: Writer, n: int, n_predict: int, raw: bool) -> Sequence[Request]:
    """Problems that the bundle was not made from, a seed each."""
    encoder = TraceEncoder(writer.model, raw=raw)
    prompts = [encoder.encode_prompt("prompt", problem["prompt"]) for problem in word_problems(n, seed=5)]
    return [Request(i, tokens, n_predict, seed=i, dosed=True) for i, tokens in enumerate(prompts)]


def line(writer: Writer, found: Sequence[Completion], prompts: str, way: str) -> str:
    """What a way did to its completions."""
    empty = np.mean([not writer.text(done.tokens).strip() for done in found])
    cut = np.mean([done.finish_reason == "length" for done in found])
    n_sampled = [len(done.tokens) + (done.finish_reason == "stop") for done in found]
    dose = np.average([done.dose or 0.0 for done in found], weights=n_sampled)
    return (
        f"{prompts:7}  {way:8}  {writer.strength:8g}  {np.mean([len(done.tokens) for done in found]):6.1f}  "
        f"{empty:5.0%}  {cut:5.0%}  {np.mean(writer.kls):8.3f}  {dose:+10.3f}  "
        f"{writer.end_after / writer.end_before:13.3f}"
    )


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The argument that `bundle` takes."""
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="default: one is made from 96 of the demo's problems"
    )


@contextmanager
def bundle(given: Path | None) -> Iterator[Path]:
    """The directory that was given, or one of a bundle made for now."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as name:
        traces = write_lines(Path(name) / "traces.jsonl", *word_problems(96))
        convert(Options(str(demo_model()), {"traces": traces}, Path(name) / "bundle"), print)
        yield Path(name) / "bundle"


if __name__ == "__main__":
    sys.exit(main())
