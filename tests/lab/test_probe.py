"""What the laboratory's probe asks of a base, read anew by its words, and how it counts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.lab.models import probe
from examples.lab.models.training import Batch
from examples.lab.stages import Stage
from examples.lab.task import vocabulary, word_problems


def some() -> list[word_problems.Problem]:
    return list(itertools.islice(word_problems.problems("some", "test", ("+", "-")), 50))


@pytest.mark.parametrize("saying", [None, "that leads to"])
def test_a_step_follows_the_prompt_and_the_steps_before(saying: str | None) -> None:
    for problem in some():
        examples = list(probe._examples(problem, saying))
        assert len(examples) == len(problem.steps)
        for i, (example, value) in enumerate(zip(examples, problem.values[1:], strict=True)):
            text = vocabulary.decode(example.ids)
            assert example.n_prompt == len(example.ids) - 1, "one target, and no end"
            assert text.startswith(problem.prompt + " ")
            words = text.removeprefix(problem.prompt).split()
            assert words.pop() == str(value)
            assert " ".join(words).count(" . so ") == i
            *before, last = " ".join(words).split(" . so ")
            assert [said.split()[-1] for said in before] == [str(v) for v in problem.values[1 : i + 1]]
            step, old = problem.steps[i], problem.values[i]
            operation = {"+": "plus", "-": "minus"}[step.kind]
            assert last == (saying or f"{old} {operation} {step.operand} is")


def test_said_and_unsaid_operands_are_asked_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers 3 after "is", which only said operands end in, and 0 elsewhere, which no step results in."""

    def says(input_ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, vocabulary.N_VOCAB)
        logits[:, :, vocabulary.IDS[" 0"]] = 0.5
        logits[:, :, vocabulary.IDS[" 3"]] = (input_ids == vocabulary.IDS[" is"]).float()
        return SimpleNamespace(logits=logits)

    monkeypatch.setattr(probe, "load", lambda directory: says)
    probe.Probe(Stage()).run(tmp_path, tmp_path)
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["unsaid"] == 0
    assert 0 < found["said"] < 0.2, "a result among 40"


def test_right_results_are_counted() -> None:
    """Of a model that says the same number everywhere: the share of steps with that result."""
    examples = [example for problem in some() for example in probe._examples(problem, "that leads to")]
    results = [example.ids[-1] for example in examples]
    for number in (3, 7, 12):
        token = vocabulary.IDS[f" {number}"]

        def says(input_ids: torch.Tensor, token: int = token) -> SimpleNamespace:
            logits = torch.zeros(*input_ids.shape, vocabulary.N_VOCAB)
            logits[:, :, token] = 1.0
            return SimpleNamespace(logits=logits)

        assert probe._n_right(says, Batch.of(examples)) == results.count(token)
    assert len(set(results)) > 10
