"""The product's Δ against PyTorch in float64, on the laboratory's own models."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adlocal import ProxyPair

from ..models.pretrained import Pretrained, load
from ..models.training import Batch, Example, row_losses
from ..stages import Stage
from .bundles import BundleStage
from .sampled import TracesStage, read

_N_HELD_OUT = 4  # `adlocal convert` takes the last few traces for its own measure of fidelity
_N_MEASURED = 32


@dataclass(frozen=True)
class Exact(Stage):
    """Cosines, a position, between Δ through llama.cpp and the directional derivative in float64.

    Gradient and derivative are those of the weights before any quantization, so what quantizing the proxy changes
    counts as error.

    Attributes:
        bundle: of the gradient of all parameters.
        proxy: its proxy.
        fresh: traces whose first few give the positions.
    """

    bundle: BundleStage
    proxy: Pretrained
    fresh: TracesStage

    def run(self, root: Path, out: Path) -> None:
        model = load(self.proxy.path(root)).double()
        model.set_attn_implementation("eager")  # the one that has a forward derivative
        learned = [_example(row) for row in read(self.bundle.holdout, root)][:-_N_HELD_OUT]
        direction = _unit_gradient(model, learned)
        measured = [_example(row) for row in read(self.fresh, root)[:_N_MEASURED]]
        with closing(ProxyPair.open(self.bundle.path(root) / "bundle", n_threads=1)) as pair:
            cosines = np.concatenate([_cosines(pair, model, direction, example) for example in measured])
        found = {"median": float(np.median(cosines)), "p10": float(np.quantile(cosines, 0.1)), "n": len(cosines)}
        (out / "exact.json").write_text(json.dumps(found))


def _example(row: dict[str, Any]) -> Example:
    return Example.of(row["prompt"], row["completion"], ended=row["finish_reason"] == "stop")


def _unit_gradient(model: Any, examples: list[Example]) -> dict[str, torch.Tensor]:
    for i in range(0, len(examples), 64):
        (row_losses(model, Batch.of(examples[i : i + 64])).sum() / len(examples)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.sqrt(torch.stack([(g**2).sum() for g in gradients.values()]).sum())
    return {name: g / norm for name, g in gradients.items()}


def _cosines(pair: ProxyPair, model: Any, direction: dict[str, torch.Tensor], example: Example) -> Any:
    """Of the centred rows that predict the completion."""
    ids = torch.tensor([list(example.ids)])
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits(at: dict[str, torch.Tensor]) -> Any:
        return torch.func.functional_call(model, at, kwargs={"input_ids": ids, "use_cache": False}).logits[0]

    exact = torch.func.jvp(logits, (parameters,), (direction,))[1]
    rows = slice(example.n_prompt - 1, len(example.ids) - 1)
    ours, theirs = (
        d - d.mean(axis=1, keepdims=True)
        for d in (pair.delta(list(example.ids))[rows].astype(np.float64), exact.detach().numpy()[rows])
    )
    return np.sum(ours * theirs, axis=1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
