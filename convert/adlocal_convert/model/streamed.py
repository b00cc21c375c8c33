"""Layers that hold no weights: each reads its matrix from the GGUF when it is used, and hands its gradient on at once.

The forward and the backward pass read a matrix once each. A gradient exists only from the moment autograd has it to the
moment the sink has taken it, so the memory of a pass is that of its activations and of one layer.

Outputs are in transformers' order of features, weights and gradients in the file's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.autograd import forward_ad

from .weights import WeightFile


class Sink(Protocol):
    """Takes gradients as they come."""

    def wants(self, name: str) -> bool:
        """Whether the gradient of this tensor has to be computed at all."""

    def add_product(self, name: str, first_row: int, dy: torch.Tensor, x: torch.Tensor) -> None:
        """dyᵀ x, a share of the gradient of the rows from `first_row` on; dy (n, n_rows), x (n, row length)."""

    def add_rows(self, name: str, ids: torch.Tensor, gradients: torch.Tensor) -> None:
        """Shares of rows `ids`, which may repeat, (len(ids), row length)."""


class Direction(Protocol):
    """A direction in weight space, read a tensor at a time."""

    def __contains__(self, name: object) -> bool: ...

    def get(self, name: str) -> torch.Tensor:
        """Tangent of a tensor, float32, in the file's order."""

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Tangents of some rows."""


class Observer(Protocol):
    """Sees what goes into each matrix while a directional derivative is taken."""

    def __call__(self, name: str, x: torch.Tensor, tangent: torch.Tensor) -> None: ...


class Stream:
    """What the layers of one model share: where weights come from, where gradients go, which way weights move.

    Attributes:
        device: where the layers compute.
        sink: takes gradients in a backward pass; None: none is computed.
        direction: tangents of the weights inside `moving`; None outside.
        observer: sees what goes into each matrix inside `moving`.
        flow: sees the gradient of what went into each matrix, in a backward pass.
    """

    def __init__(self, weights: WeightFile, device: torch.device) -> None:
        self.weights = weights
        self.device = device
        self.sink: Sink | None = None
        self.direction: Direction | None = None
        self.observer: Observer | None = None
        self.flow: Callable[[str, torch.Tensor], None] | None = None

    def bands(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """A matrix in bands of rows."""
        return ((rows, torch.from_numpy(band).to(self.device)) for rows, band in self.weights.bands(name))

    def wants(self, name: str) -> bool:
        return self.sink is not None and self.sink.wants(name)

    @contextmanager
    def collecting(self, sink: Sink | None) -> Any:
        """Gradients of backward passes within go to `sink`."""
        self.sink = sink
        try:
            yield
        finally:
            self.sink = None

    @contextmanager
    def watching(self, flow: Callable[[str, torch.Tensor], None]) -> Any:
        """Backward passes within show the gradient of what went into each matrix to `flow`."""
        self.flow = flow
        try:
            yield
        finally:
            self.flow = None

    @contextmanager
    def moving(self, direction: Direction, observer: Observer | None = None) -> Any:
        """Forward passes within carry the derivative along `direction` as the tangent of their results."""
        self.direction, self.observer = direction, observer
        try:
            with torch.no_grad(), forward_ad.dual_level():
                yield
        finally:
            self.direction = self.observer = None


class StreamedLinear(torch.nn.Module):
    """y = x Wᵀ + b, `torch.nn.Linear` with W in the file.

    Args:
        n_head: heads whose rows the file keeps interleaved, 0 where both formats agree.
        bias: in the file's order, as W.
    """

    def __init__(self, stream: Stream, name: str, bias: torch.nn.Parameter | None = None, n_head: int = 0) -> None:
        super().__init__()
        self._stream, self.name, self._n_head = stream, name, n_head
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n_in) to (..., n_out)."""
        y = _product(self._stream, self.name, x)
        y = y if self.bias is None else y + self.bias
        return deinterleave(y, self._n_head) if self._n_head else y


class StreamedEmbedding(torch.nn.Module):
    """`torch.nn.Embedding` with its table in the file; only the rows in use are read."""

    def __init__(self, stream: Stream, name: str, scale: torch.Tensor | float = 1.0) -> None:
        super().__init__()
        self._stream, self.name, self._scale = stream, name, scale
        # Autograd goes no further back than to what requires a gradient: this makes it go through all layers.
        self._anchor = torch.zeros(0, device=stream.device, requires_grad=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) to (..., width)."""
        rows: torch.Tensor = _lookup(self._anchor, ids.flatten(), self._stream, self.name)
        direction = self._stream.direction
        if direction is not None and self.name in direction:
            rows = forward_ad.make_dual(rows, direction.rows(self.name, ids.flatten()).to(rows.device))
        return rows.view(*ids.shape, -1) * self._scale


def _product(stream: Stream, name: str, x: torch.Tensor) -> torch.Tensor:
    direction = stream.direction
    if direction is None:
        return _multiply(x, stream, name)
    value, tangent = forward_ad.unpack_dual(x)
    moved = torch.zeros_like(value) if tangent is None else tangent
    if stream.observer is not None:
        stream.observer(name, value, moved)
    y: torch.Tensor = _times_transposed(stream, name, value)
    dy: torch.Tensor = _times_transposed(stream, name, moved)
    if name in direction:
        dy += value @ direction.get(name).to(stream.device).T
    dual: torch.Tensor = forward_ad.make_dual(y, dy)
    return dual


def _times_transposed(stream: Stream, name: str, x: torch.Tensor) -> torch.Tensor:
    """x Wᵀ"""
    parts: list[torch.Tensor] = [x @ weight.T for _, weight in stream.bands(name)]
    return torch.cat(parts, -1)


class _Product(torch.autograd.Function):
    """x Wᵀ; the backward pass reads W anew."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stream: Stream, name: str) -> torch.Tensor:
        ctx.stream, ctx.name, ctx.wanted = stream, name, stream.wants(name)
        ctx.save_for_backward(*([x] if ctx.wanted else []))
        return _times_transposed(stream, name, x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        stream: Stream = ctx.stream
        x = ctx.saved_tensors[0].flatten(0, -2) if ctx.wanted else None
        dx = torch.zeros((), device=dy.device)
        for rows, weight in stream.bands(ctx.name):
            part = dy[..., rows]
            if x is not None and stream.sink is not None:
                stream.sink.add_product(ctx.name, rows.start, part.flatten(0, -2), x)
            dx = dx + part @ weight
        if stream.flow is not None:
            stream.flow(ctx.name, dx)
        return dx, None, None


class _Lookup(torch.autograd.Function):
    """Rows of a table."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, ids: torch.Tensor, stream: Stream, name: str) -> torch.Tensor:
        ctx.stream, ctx.name, ctx.ids = stream, name, ids
        different, position = ids.cpu().unique(return_inverse=True)
        rows = torch.from_numpy(stream.weights.rows(name, different.tolist()))[position]
        return rows.to(stream.device)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        stream: Stream = ctx.stream
        if stream.wants(ctx.name) and stream.sink is not None:
            stream.sink.add_rows(ctx.name, ctx.ids, dy)
        return torch.zeros(0, device=dy.device), None, None, None


_multiply: Callable[..., torch.Tensor] = _Product.apply
_lookup: Callable[..., torch.Tensor] = _Lookup.apply


def deinterleave(y: torch.Tensor, n_head: int) -> torch.Tensor:
    """Features from llama.cpp's order (pairs within each head) to transformers' (halves): its converter's `permute`."""
    pairs: torch.Tensor = y.unflatten(-1, (n_head, -1, 2))
    return pairs.transpose(-1, -2).flatten(-3)
