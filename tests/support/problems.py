"""Prompts for the real model: problems, real ones where the environment names them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import llama_cpp

from adlocal import AntidistillationLlama
from adlocal.traces import TraceEncoder, read_prompts
from adlocal_convert.demo.word_problems import word_problems
from support.paths import REAL_TRACES


def encoded_problems(llm: llama_cpp.Llama, n: int, seed: int = 1) -> list[list[int]]:
    """Problems under the model's chat template, as ids: of ADLOCAL_TEST_TRACES, or generated."""
    encoder = TraceEncoder(llm._model)
    if REAL_TRACES is not None:
        real = itertools.islice(read_prompts(REAL_TRACES), n)
        return [encoder.encode_prompt(each.where, each.prompt, each.tools) for each in real]
    return [encoder.encode_prompt("prompt", problem["prompt"]) for problem in word_problems(n, seed=seed)]


def cold_and_cached(
    llm: AntidistillationLlama, prompt: Sequence[int], other: Sequence[int], n_predict: int, strength: float
) -> Iterator[tuple[str, list[int]]]:
    """(when, greedy ids) of a prompt in a fresh context, the second and the third time, and after another prompt."""

    def greedy(tokens: Sequence[int], n: int = n_predict) -> list[int]:
        return list(itertools.islice(llm.generate(tokens, temp=0.0, strength=strength), n))

    llm.reset()
    for time in ("first", "second", "third"):
        yield time, greedy(prompt)
    greedy(other, 8)
    yield "after another", greedy(prompt)
