"""Whether a model can do a step in its head: how often it says the right result where it has not said the operands."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..stages import Stage
from ..task import word_problems
from .pretrained import load
from .training import Batch, Example

_N_PROBLEMS = 500
_BATCH_SIZE = 100
_SAID = {"+": "{b} plus {a} is", "-": "{b} minus {a} is"}
_UNSAID = "that leads to"
_LINK = ". so"


@dataclass(frozen=True)
class Probe(Stage):
    """Share of the steps of test problems with + and − alone, which all bases know, whose result is right.

    probe.json has it for `said` operands and `unsaid` ones. The steps before are told, with their operands.

    Attributes:
        model: a stage with a Hugging Face model.
    """

    model: Stage

    def run(self, root: Path, out: Path) -> None:
        model = load(self.model.path(root))
        problems = list(itertools.islice(word_problems.problems("probe", "test", ("+", "-")), _N_PROBLEMS))
        found = {}
        for name, saying in (("said", None), ("unsaid", _UNSAID)):
            examples = [example for problem in problems for example in _examples(problem, saying)]
            batches = [examples[i : i + _BATCH_SIZE] for i in range(0, len(examples), _BATCH_SIZE)]
            found[name] = sum(_n_right(model, Batch.of(batch)) for batch in batches) / len(examples)
        (out / "probe.json").write_text(json.dumps(found))


def _examples(problem: word_problems.Problem, saying: str | None) -> Iterator[Example]:
    """For each step the prompt, the steps before, and `saying`, or the operands; its result is the only target."""
    told = ""
    for step, before, after in zip(problem.steps, problem.values, problem.values[1:], strict=False):
        said = _SAID[step.kind].format(b=before, a=step.operand)
        yield Example.of(f"{problem.prompt}{told} {saying or said}", f" {after}", ended=False)
        told += f" {said} {after} {_LINK}"


@torch.no_grad()
def _n_right(model: Any, batch: Batch) -> int:
    likeliest = model(input_ids=batch.ids).logits.argmax(-1)
    return int((likeliest == batch.targets).sum())
