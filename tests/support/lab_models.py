"""Stages of the laboratory that need no training: random models with opinions, and traces of the task's own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.lab.models import pretrained as models
from examples.lab.stages import Stage
from examples.lab.task import word_problems
from support.json_lines import write_lines

SIZE = models.Size(64, 2)


@dataclass(frozen=True)
class RandomModel(Stage):
    """A random model; its weights are large enough for logits of a few nats, as a trained one has."""

    seed: str

    def run(self, root: Path, out: Path) -> None:
        models.save(random_model(self.seed), out)


@dataclass(frozen=True)
class Written(Stage):
    """Right solutions of training problems, as traces."""

    seed: str
    n: int

    def run(self, root: Path, out: Path) -> None:
        write_lines(out / "traces.jsonl", *rows(self.seed, self.n))


def random_model(seed: str) -> Any:
    """As `RandomModel` writes it, in float32."""
    model = models.new_model(SIZE, seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, away from 1
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter *= 8
    return model


def rows(seed: str, n: int) -> list[dict[str, Any]]:
    """As `traces.sample` makes them; every third trace was cut, and every fourth is wrong."""
    rng, found = random.Random(seed), []
    for i, problem in enumerate(word_problems.distinct(seed, "train", n)):
        words = problem.solution(rng).split()
        words = words[:-3] if i % 3 == 2 else words
        if i % 4 == 3:
            words += [",", str(problem.answer % word_problems.LARGEST + 1)]
        completion = " " + " ".join(words)
        found.append(
            {
                "prompt": problem.prompt,
                "completion": completion,
                "right": word_problems.is_right(problem, completion),
                "answer": problem.answer,
                "finish_reason": "length" if i % 3 == 2 else "stop",
            }
        )
    return found
