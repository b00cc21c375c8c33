"""Students: an attacker fine-tunes the base student on what it collected, and is graded on test problems."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from adlocal.engine.best_of import consistent

from ..models.pretrained import grade, load, save
from ..models.training import Batch, Example, epochs, row_losses, train
from ..stages import Stage
from ..task import word_problems
from ..traces.sampled import N_TRACES, TracesStage, read

Attack = Literal["naive", "right answers", "perplexity", "answer only", "majority", "reweighted"]
Row = dict[str, Any]

_LR = 2e-3
_BATCH_SIZE = 32
_N_TEST = 1000
_KEPT = 0.75  # share of the traces that the perplexity filter keeps
_STEP = 1e-2  # along the attacker's own gradient, in units of the weights


@dataclass(frozen=True)
class Student(Stage):
    """A base model fine-tuned on traces.

    Attributes:
        base: the model to start from.
        traces: what it is trained on, beside clean traces.
        attack: how the attacker treats the traces. naive: as they are. right answers: only those that end in the right
            answer. perplexity: the three quarters that the base finds most likely. answer only: nothing but the final
            answers. majority: of k samples a problem, one that agrees with most. reweighted: each by how well its own
            gradient agrees with that of clean traces.
        clean: traces of the unprotected teacher that the attacker has, or None.
        share: of the traces that are clean.
        n_epochs: over all of them.
    """

    base: Stage
    traces: tuple[TracesStage, ...]
    attack: Attack = "naive"
    clean: TracesStage | None = None
    share: float = 0.0
    n_epochs: int = 8

    @property
    def seconds(self) -> float:
        n = sum(t.n for t in self.traces) or N_TRACES * self.share
        return n * self.n_epochs / _BATCH_SIZE * 0.08 + 8

    def run(self, root: Path, out: Path) -> None:
        model = load(self.base.path(root))
        clean = read(self.clean, root) if self.clean else []
        examples = self._examples(model, [row for t in self.traces for row in read(t, root)], clean)
        n_steps = -(-len(examples) * self.n_epochs // _BATCH_SIZE)
        losses: list[float] = []
        train(model, epochs(examples, _BATCH_SIZE, 0), n_steps, _LR, lambda step, loss: losses.append(loss))
        save(model, out)
        (out / "losses.json").write_text(json.dumps(losses))
        result = {**grade(out / "model.gguf", _N_TEST), "n_examples": len(examples), "n_steps": n_steps}
        (out / "result.json").write_text(json.dumps(result))

    def _examples(self, model: Any, rows: Sequence[Row], clean: Sequence[Row]) -> list[Example]:
        n_clean = round(self.share * len(clean))
        kept, own = list(rows[n_clean:]), list(clean[:n_clean])  # as many in all as without clean ones
        if self.attack == "right answers":
            kept = [row for row in kept if row["right"]]
        elif self.attack == "perplexity":
            ranked = sorted(zip(_losses(model, kept), range(len(kept)), strict=True))
            kept = [kept[i] for _, i in sorted(ranked[: round(_KEPT * len(kept))], key=lambda pair: pair[1])]
        elif self.attack == "majority":
            kept = majority(kept)
        elif self.attack == "answer only":
            kept = [{**row, "completion": f" the answer is {_answer(row)}"} for row in kept if _answer(row) is not None]
        elif self.attack == "reweighted":
            weights = agreement(model, kept, own)
            return [*map(_example, own), *map(_example, kept, weights)]
        return [_example(row) for row in [*own, *kept]]


def majority(rows: Sequence[Row]) -> list[Row]:
    """For each prompt the first row whose answer is the most frequent one."""
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    chosen = []
    for group in by_prompt.values():
        chosen.append(consistent(group, [_answer(row) for row in group])[0])
    return chosen


def agreement(model: Any, rows: Sequence[Row], clean: Sequence[Row]) -> list[float]:
    """A weight for each row: 1 on average, more where a step on it lowers the loss of clean rows more than others do.

    To first order that is ⟨∇ℓ(row), ĝ⟩, here by central differences along the unit gradient ĝ of the clean rows.
    """
    _gradient(model, clean)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters) + torch.zeros(()))
    found = []
    for sign in (1, -2):  # to +ε, and from there to −ε
        with torch.no_grad():
            for p in parameters:
                p += sign * _STEP * p.grad / norm
        found.append(torch.tensor(_losses(model, rows)))
    with torch.no_grad():
        for p in parameters:
            p += _STEP * p.grad / norm
    model.zero_grad(set_to_none=True)
    scores = (found[0] - found[1]) / (2 * _STEP)
    weights = (1 + (scores - scores.mean()) / scores.std()).clamp(min=0)
    return [float(w) for w in weights / weights.mean()]


def _gradient(model: Any, rows: Sequence[Row]) -> None:
    model.zero_grad()
    for batch in _batches(rows):
        (row_losses(model, batch).sum() / len(rows)).backward()


@torch.no_grad()
def _losses(model: Any, rows: Sequence[Row]) -> list[float]:
    """Nats a token of each row."""
    return [loss for batch in _batches(rows) for loss in row_losses(model, batch).tolist()]


def _batches(rows: Sequence[Row], size: int = 64) -> list[Batch]:
    examples = [_example(row) for row in rows]
    return [Batch.of(examples[i : i + size]) for i in range(0, len(examples), size)]


def _example(row: Row, weight: float = 1.0) -> Example:
    return Example.of(row["prompt"], row["completion"], weight, ended=row["finish_reason"] == "stop")


def _answer(row: Row) -> int | None:
    return word_problems.answer_of(row["completion"])
