"""The proxy's loss on traces, and the exact derivative of its logits along a direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad

from adlocal.traces import EncodedTrace

from .proxy import Proxy
from .streamed import Direction, Observer

#: More logits than this are computed in pieces, and their gradient with them.
LARGEST_LOGITS = 1 << 26


def trace_losses(proxy: Proxy, traces: Sequence[EncodedTrace], largest_logits: int = LARGEST_LOGITS) -> torch.Tensor:
    """Mean negative log-likelihood of each trace's targets, each given all tokens before it. (n_traces,), nats a token.

    Traces are padded on the right, which changes nothing for the tokens before.
    """
    ids = torch.zeros(len(traces), max(len(t.tokens) for t in traces), dtype=torch.long)
    for row, trace in zip(ids, traces, strict=True):
        row[: len(trace.tokens)] = torch.tensor(trace.tokens)
    at = [(i, j) for i, trace in enumerate(traces) for j, counts in enumerate(trace.targets) if counts]
    row, position = torch.tensor(at).T
    states = proxy.hidden(ids)[row, position - 1]
    losses = _cross_entropy(proxy, states, ids[row, position].to(states.device), largest_logits)
    counts = torch.tensor([t.n_targets for t in traces])
    share = (1.0 / counts)[row].to(losses)
    return torch.zeros(len(traces), device=losses.device).index_add(0, row.to(losses.device), losses * share)


def _cross_entropy(proxy: Proxy, states: torch.Tensor, targets: torch.Tensor, largest_logits: int) -> torch.Tensor:
    """−log p of each target, (n,). Never holds more than `largest_logits` logits."""

    def piece(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(proxy.logits(states), targets, reduction="none")

    n = max(1, largest_logits // proxy.n_vocab)
    if len(states) <= n:
        return piece(states, targets)
    pieces = zip(states.split(n), targets.split(n), strict=True)
    return torch.cat([torch.utils.checkpoint.checkpoint(piece, s, t, use_reentrant=False) for s, t in pieces])


def directional_derivative(
    proxy: Proxy, direction: Direction, trace: EncodedTrace, observer: Observer | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the trace's targets and their exact derivative along a direction in weight space, by forward mode.

    Args:
        proxy: where the derivative is taken.
        direction: tensors that it does not hold do not move.
        trace: its targets are the positions.
        observer: sees what goes into each matrix.

    Returns:
        (logits, derivative), each (n_targets, n_vocab), float32.
    """
    at = torch.tensor(trace.targets).nonzero()[:, 0] - 1
    ids = torch.tensor(trace.tokens)[None].to(proxy.stream.device)
    with _forward_mode(proxy), proxy.stream.moving(direction, observer):
        moved = {
            proxy.parameters[name]: forward_ad.make_dual(p.detach(), direction.get(name).to(p.device))
            for name, p in proxy.small.items()
            if name in direction
        }
        kwargs = {"logits_to_keep": at, "use_cache": False}
        logits = torch.func.functional_call(proxy.model, moved, (ids,), kwargs).logits[0]
        value, derivative = forward_ad.unpack_dual(logits)
        return value.cpu(), torch.zeros_like(value.cpu()) if derivative is None else derivative.cpu()


@contextmanager
def _forward_mode(proxy: Proxy) -> Iterator[None]:
    """The fused attention kernels have no forward-mode rule."""
    before = proxy.model.config._attn_implementation
    proxy.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        proxy.model.set_attn_implementation(before)
