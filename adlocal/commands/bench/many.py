"""Many sequences together: plain, protected, and the bare decodes that were issued for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import llama_cpp
from llama_cpp._internals import LlamaSampler

from ...engine.parallel import ParallelLlama
from ...engine.sequences import Request, Sampling
from ...llamacpp.tokens import end_tokens
from . import bare
from .gaps import difference, shares
from .recorder import Issued, Recorder
from .rounds import medians

#: Opens the teacher for several sequences, protected or plain.
Opener = Callable[[bool], ParallelLlama]
#: A batch, and where it was decoded: 0 is the teacher's context, 1 and 2 are the pair's.
Decode = tuple[int, Issued]


@dataclass(frozen=True)
class Endless(Sampling):
    """Greedy sampling that never ends a turn."""

    n_vocab: int = 0
    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, vocab: Any) -> Endless:
        """For a model's vocabulary."""
        ends = tuple(int(token) for token in end_tokens(vocab))
        return cls(n_vocab=llama_cpp.llama_vocab_n_tokens(vocab), ends=ends)

    def chain(self, seed: int) -> LlamaSampler:
        """A sampler of its own for one sequence."""
        chain = LlamaSampler()
        chain.add_logit_bias(self.n_vocab, dict.fromkeys(self.ends, -float("inf")))
        chain.add_greedy()
        return chain


def measure(
    open_teacher: Opener, prompt: Sequence[int], n_predict: int, n_sequences: Sequence[int], rounds: int
) -> list[dict[str, float]]:
    """Medians for each number of sequences: seconds a token of all, and shares of the protected run.

    Args:
        open_teacher: with room for the most sequences.
        prompt: of the first sequence; each of the others has one token less.
        n_predict: tokens of each sequence; ends of generation are not sampled.
        n_sequences: how many are decoded together.
        rounds: that count.
    """
    asked = {n: requests(prompt, n, n_predict) for n in n_sequences}
    recorder = Recorder()
    with recorder.installed(), closing(open_teacher(True)) as llm:
        decodes = {n: record(recorder, llm, asked[n]) for n in n_sequences}
    with closing(open_teacher(False)) as plain, closing(open_teacher(True)) as protected:
        found = []
        for n in n_sequences:
            run = _Run(plain, protected, asked[n], decodes[n])
            contestants = (run.plain, run.bare_plain, run.protected, run.bare_protected)
            found.append(medians(contestants, rounds, f"{n} sequences" if n > 1 else "1 sequence of many"))
        return found


def requests(prompt: Sequence[int], n: int, n_predict: int) -> list[Request]:
    """Prompts of different lengths, which part after their first token: none is read for another."""
    return [Request(i, [prompt[0], *prompt[1 + i :]], n_predict) for i in range(n)]


def record(recorder: Recorder, llm: ParallelLlama, asked: Iterable[Request]) -> list[Decode]:
    """What these requests make a protected teacher decode."""
    roles = {context: i for i, context in enumerate(_contexts(llm))}
    return [(roles[each.context], each) for each in recorder.record(lambda: _generate(llm, asked))]


class _Run:
    """One number of sequences; every method runs once, and tells seconds a token of all sequences."""

    def __init__(
        self, plain: ParallelLlama, protected: ParallelLlama, asked: Sequence[Request], decodes: Sequence[Decode]
    ) -> None:
        self._plain, self._protected, self._asked, self._decodes = plain, protected, asked, decodes
        self._n_tokens = sum(request.n_predict for request in asked)

    def plain(self) -> dict[str, float]:
        return {"plain": _generate(self._plain, self._asked) / self._n_tokens}

    def protected(self) -> dict[str, float]:
        before = self._protected.stats()
        seconds = _generate(self._protected, self._asked)
        after = self._protected.stats()
        counted = difference(before, after)
        return {"protected": seconds / self._n_tokens, **shares(counted, self._n_tokens)}

    def bare_plain(self) -> dict[str, float]:
        of_teacher = [(role, issued) for role, issued in self._decodes if role == 0]
        return {"bare_plain": replay(of_teacher, _contexts(self._plain)) / self._n_tokens}

    def bare_protected(self) -> dict[str, float]:
        return {"bare_protected": replay(self._decodes, _contexts(self._protected)) / self._n_tokens}


def replay(decodes: Iterable[Decode], contexts: Sequence[Any]) -> float:
    """Seconds of the same decodes, bare, in these contexts, whose memory is empty before and after."""
    for context in contexts:
        bare.clear(context)
    started = time.perf_counter()
    for role, issued in decodes:
        bare.decode(contexts[role], issued.batch)
    seconds = time.perf_counter() - started
    for context in contexts:
        bare.clear(context)
    return seconds


def _generate(llm: ParallelLlama, asked: Iterable[Request]) -> float:
    """Seconds from the first prompt to the last token. Nothing is in memory before."""
    sampling = Endless.of(llm.model.vocab)
    llm.scheduler.clear()
    started = time.perf_counter()
    for _ in llm.generate(asked, sampling):
        pass
    return time.perf_counter() - started


def _contexts(llm: ParallelLlama) -> list[Any]:
    """llama.cpp's contexts of the teacher and of the pair, if there is one."""
    return [llm.context, *(llm.pair.contexts if llm.pair is not None else ())]
