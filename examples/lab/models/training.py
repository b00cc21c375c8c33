"""Training of tiny models: one loop for teachers, proxies and students."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..task.vocabulary import BOS, EOS, encode

_IGNORED = -100  # of cross_entropy
_WARMUP = 50


@dataclass(frozen=True)
class Example:
    """A trace as ids; the loss counts from `n_prompt` on. A weight multiplies its loss."""

    ids: Sequence[int]
    n_prompt: int
    weight: float = 1.0

    @classmethod
    def of(cls, prompt: str, completion: str, weight: float = 1.0, *, ended: bool = True) -> Example:
        start = [BOS, *encode(prompt)]
        return cls([*start, *encode(completion), *([EOS] if ended else [])], len(start), weight)


@dataclass(frozen=True)
class Batch:
    """Padded examples: ids and targets (rows, length), the weight of each row (rows,)."""

    ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        length = max(len(e.ids) for e in examples)
        ids = torch.zeros(len(examples), length, dtype=torch.long)
        targets = torch.full_like(ids, _IGNORED)
        for row, e in enumerate(examples):
            ids[row, : len(e.ids)] = torch.tensor(e.ids)
            targets[row, e.n_prompt - 1 : len(e.ids) - 1] = ids[row, e.n_prompt : len(e.ids)]
        return cls(ids, targets, torch.tensor([e.weight for e in examples]))


def row_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of each row's completion tokens, in nats, (rows,)."""
    # Padding is on the right, where causal attention keeps it from what counts: no mask is needed.
    logits = model(input_ids=batch.ids).logits
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.targets, ignore_index=_IGNORED, reduction="none"
    )
    return losses.sum(1) / (batch.targets != _IGNORED).sum(1)


def train(
    model: Any, batches: Iterable[Batch], n_steps: int, lr: float, on_step: Callable[[int, float], object]
) -> None:
    """AdamW with a short warm-up and a cosine to zero.

    Args:
        model: changed in place.
        batches: at least `n_steps` of them.
        lr: the largest learning rate.
        on_step: told the number of each step and its loss in nats a token.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, n_steps))
    for step, batch in zip(range(n_steps), batches, strict=False):
        losses = row_losses(model, batch)
        loss = (losses * batch.weights).sum() / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, float(loss.detach()))
    model.eval()


def epochs(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless epochs, shuffled anew each; examples of like length share a batch, to pad less."""
    rng = random.Random(seed)
    while True:
        order = sorted(examples, key=lambda e: len(e.ids) + rng.random() * 8)
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            yield Batch.of(chunk)


def _share(step: int, n_steps: int) -> float:
    warm = min(1.0, (step + 1) / _WARMUP)
    return warm * 0.5 * (1 + math.cos(math.pi * step / n_steps))
