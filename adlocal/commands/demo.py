"""`adlocal demo`: the main job on a real model, from traces to one prompt answered without and with protection."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from tqdm import tqdm

from ..bundle import Bundle
from ..errors import BundleError
from ..files import sha256, written_whole
from ..llama import AntidistillationLlama
from ..score import score_trace
from ..traces import EncodedTrace, TraceEncoder
from .convert import say
from .offline import converter

STRENGTH = 1.0
_N_TRACES = 48
_N_PREDICT = 120


@dataclass(frozen=True)
class Answer:
    """One generation, and what its telemetry and its score say."""

    text: str
    n_tokens: int
    dose: float
    mean_kl: float
    tokens_per_second: float

    def rows(self) -> list[str]:
        """The figures, a line each."""
        return [
            f"dose {self.dose:+.1f}",
            f"mean Δ {self.dose / self.n_tokens:+.3f}",
            f"KL {self.mean_kl:.3f} nats a token",
            f"{self.tokens_per_second:.1f} tokens/s",
        ]


def run(args: argparse.Namespace) -> None:
    """Makes what is not there yet, then shows both answers side by side."""
    with converter():
        from adlocal_convert.demo.smollm2 import demo_model
        from adlocal_convert.demo.word_problems import word_problems
    model, directory = demo_model(), args.dir
    directory.mkdir(parents=True, exist_ok=True)
    *problems, new = word_problems(_N_TRACES + 1)
    question = new["prompt"]
    traces = directory / "traces.jsonl"
    with written_whole(traces) as partial:
        partial.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in problems), encoding="utf-8")
    bundle = _bundle(model, traces, directory / "bundle", args.threads)
    say(f"bundle {bundle.id[:12]}, fidelity {bundle.fidelity_median:.3f}. A new problem for it:\n\n{question}\n")
    with closing(
        AntidistillationLlama(
            str(model), bundle=directory / "bundle", n_ctx=1024, n_threads=args.threads, verbose=False
        )
    ) as llm:
        answers = [answer(llm, question, strength) for strength in (0.0, STRENGTH)]
    print(side_by_side(answers[0], answers[1], shutil.get_terminal_size().columns))


def answer(llm: AntidistillationLlama, question: str, strength: float, n_predict: int = _N_PREDICT) -> Answer:
    """Greedy answer to a user's message, with its dose measured alike at any strength."""
    prompt = TraceEncoder(llm._model).encode_prompt("prompt", question)
    tokens: list[int] = []
    bar = tqdm(total=n_predict, desc=f"answering at strength {strength:g}", unit="token", file=sys.stderr, leave=False)
    started = 0.0
    with bar, closing(llm.generate(prompt, temp=0.0, strength=strength)) as stream:
        for token in stream:
            started = started or time.perf_counter()  # the first token ends the prompt's evaluation
            tokens.append(token)
            bar.update()
            if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token) or len(tokens) == n_predict:
                break
    seconds = time.perf_counter() - started
    trace = EncodedTrace("answer", prompt + tokens, [False] * len(prompt) + [True] * len(tokens))
    kl = llm.last_dose.mean_kl
    return Answer(
        text=llm.detokenize(tokens).decode("utf-8", errors="replace").strip(),
        n_tokens=len(tokens),
        dose=score_trace(llm.pair, trace).dose,
        mean_kl=kl,
        tokens_per_second=(len(tokens) - 1) / seconds,
    )


def side_by_side(plain: Answer, protected: Answer, columns: int) -> str:
    """Both answers in two columns, their figures below."""
    width = max(30, (columns - 3) // 2)
    titles = "without protection", f"strength {STRENGTH:g}"
    texts = (
        [line for part in a.text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        for a in (plain, protected)
    )
    left, right = ([title, "-" * width, *text] for title, text in zip(titles, texts, strict=True))
    height = max(len(left), len(right))
    for column, shown in ((left, plain), (right, protected)):
        column += [""] * (height - len(column)) + ["-" * width, *shown.rows()]
    return "\n".join(f"{a:<{width}} | {b}" for a, b in zip(left, right, strict=True))


def _bundle(model: Path, traces: Path, directory: Path, n_threads: int) -> Bundle:
    """The bundle of this model and these traces, converted unless it lies there already."""
    try:
        bundle = Bundle.open(directory)
    except BundleError:
        bundle = None
    if bundle and (bundle.base_sha256, bundle.capability_sha256) == (sha256(model), [sha256(traces)]):
        say(f"reusing {directory}")
        return bundle
    with converter():
        from adlocal_convert.convert import convert
        from adlocal_convert.direction.capabilities import DEFAULT_NAME
        from adlocal_convert.options import Options
    options = Options(str(model), {DEFAULT_NAME: traces}, directory, n_threads=n_threads, overwrite=True)
    return convert(options, say)
