"""The gradient of the proxy's loss on traces: summed in memory, saved as it goes, and gone on with."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.checkpoint

from adlocal.errors import ConversionError
from adlocal.traces import EncodedTrace

from ..model.loss import LARGEST_LOGITS, trace_losses
from ..model.proxy import Proxy
from .tensor_file import TensorFile

# What is computed is saved about this often, so that an interruption costs little more than it.
SAVE_SECONDS = 30.0
# Traces longer than this are checkpointed unless told otherwise: attention's memory grows with the square.
LONG_TRACE = 1024


@dataclass(frozen=True)
class Gradient:
    """g = ∇ℓ(θ_P), where ℓ is the mean over traces of each trace's mean negative log-likelihood of its targets.

    Attributes:
        file: GGUF tensor name -> float32 gradient in the file's order and shape.
        loss: ℓ in nats a token.
        n_traces, n_tokens: what it was computed on.
    """

    file: TensorFile
    loss: float
    n_traces: int
    n_tokens: int

    @classmethod
    def open(cls, path: Path) -> Gradient | None:
        """A gradient that was computed before; None if there is none, or only a part."""
        state = _State.read(path)
        return cls(state.file, state.loss / state.n_done, state.n_done, state.n_tokens) if state else None


@dataclass(frozen=True)
class Settings:
    """How the passes are made; none of it changes the result beyond rounding.

    Attributes:
        batch_size: traces of one pass.
        checkpointing: recompute activations in the backward pass; None: where a trace is long.
        bytes_per_weight: how much of the gradient, 4 bytes a weight of it, is summed in memory at a time. Less than 4
            means several runs over the traces, each for a group of tensors.
        largest_logits: more logits than this are computed in pieces, and their gradient with them.
    """

    batch_size: int = 2
    checkpointing: bool | None = None
    bytes_per_weight: float = 4.0
    largest_logits: int = LARGEST_LOGITS

    @classmethod
    def low_memory(cls) -> Settings:
        """One trace at a time, checkpointed, a third of the gradient at a time."""
        return cls(batch_size=1, checkpointing=True, bytes_per_weight=1.4, largest_logits=1 << 22)


def compute_gradient(
    proxy: Proxy,
    traces: Sequence[EncodedTrace],
    names: Sequence[str],
    path: Path,
    settings: Settings,
    progress: Callable[[float, float], None],
) -> Gradient:
    """Computes the gradient over the tensors `names` into the file `path`, or goes on where an interruption stopped it.

    Args:
        proxy: its tensors are differentiated where they are.
        traces: what the loss is on.
        names: GGUF names; no other gradient is computed.
        path: of the result; what is done so far is kept beside it. A name for these tensors and traces alone: what lies
            there is taken for it.
        settings: see there.
        progress: told the share of the traces just done and the running loss.

    Raises:
        ConversionError: the loss of a trace is not finite.
    """
    groups = _groups(proxy, names, settings.bytes_per_weight)
    parts = []
    for i, group in enumerate(groups):
        part = path if len(groups) == 1 else path.with_name(f"{path.name}.{i + 1}of{len(groups)}")
        told = functools.partial(_tell, progress, len(groups))
        done = _State.read(part)
        if done is None:
            done = _run(_Run(proxy, traces, group, part, settings), told)
        else:
            told(done.n_done, done.loss / done.n_done)
        parts.append(done)
    return _joined(parts, path)


def _tell(progress: Callable[[float, float], None], n_groups: int, n: int, loss: float) -> None:
    progress(n / n_groups, loss)


def _groups(proxy: Proxy, names: Sequence[str], bytes_per_weight: float) -> list[list[str]]:
    """Consecutive tensors whose gradients take at most `bytes_per_weight` a weight of them all; at least one each."""
    sizes = {t.name: 4 * t.n_weights for t in proxy.tensors if t.name in names}
    room = bytes_per_weight * sum(sizes.values()) / 4
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and size + sum(sizes[other] for other in groups[-1]) > room:
            groups.append([])
        groups[-1].append(name)
    return groups


def _run(run: _Run, progress: Callable[[int, float], None]) -> _State:
    progress(run.n_done, run.mean_loss)
    with _checkpointing(run.proxy, run.settings, run.traces):
        for batch in run.batches():
            run.add(batch)
            progress(len(batch), run.mean_loss)
            run.save_now_and_then()
    return run.finish()


def _joined(parts: Sequence[_State], path: Path) -> Gradient:
    """One file of all groups' tensors."""
    state = parts[0]
    if len(parts) > 1:
        shapes = {name: part.file.shapes[name] for part in parts for name in part.file}
        whole = TensorFile.create(path.with_name(f"{path.name}.new"), shapes)
        for part in parts:
            for name in part.file:
                whole.add(name, part.file.get(name))
        state = _State(whole, state.n_done, state.n_tokens, state.loss)
        state.save(path)
        for part in parts:
            part.file.close()
            part.file.path.unlink()
    return Gradient(state.file, state.loss / state.n_done, state.n_done, state.n_tokens)


@contextmanager
def _checkpointing(proxy: Proxy, settings: Settings, traces: Sequence[EncodedTrace]) -> Iterator[None]:
    wanted = settings.checkpointing
    if wanted is None:
        wanted = max(len(t.tokens) for t in traces) > LONG_TRACE
    layers = proxy.model.model.layers if wanted else []
    for layer in layers:
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass
class _State:
    """A sum of gradients and what it is over; the header of its file holds the figures."""

    file: TensorFile
    n_done: int = 0
    n_tokens: int = 0
    loss: float = 0.0

    @classmethod
    def read(cls, path: Path) -> _State | None:
        try:
            file = TensorFile(path)
            return cls(file, **json.loads(file.metadata["state"]))
        except (OSError, ValueError, KeyError):
            return None

    def add(self, other: _State) -> None:
        for name in other.file:
            self.file.add(name, other.file.get(name))
        self.n_done += other.n_done
        self.n_tokens += other.n_tokens
        self.loss += other.loss

    def save(self, path: Path) -> None:
        """Under another name, at once and whole."""
        figures = {"n_done": self.n_done, "n_tokens": self.n_tokens, "loss": self.loss}
        self.file.metadata["state"] = json.dumps(figures)
        self.file.save_as(path)
        self.file = TensorFile(path)


class _Run:
    """The sum over one group of tensors: what was saved, and what has come since.

    A batch enters the saved sum whole or not at all.
    """

    def __init__(
        self, proxy: Proxy, traces: Sequence[EncodedTrace], names: Sequence[str], path: Path, settings: Settings
    ) -> None:
        self.proxy, self.settings, self._path = proxy, settings, path
        self._shapes = {name: proxy.weights.shape(name) for name in names}
        # Longest first: should memory not do, it shows at once. The order does not depend on the batch size.
        self.traces = sorted(traces, key=lambda t: -len(t.tokens))
        self._partial = path.with_name(path.name + ".partial")
        self._saved = _State.read(self._partial)
        self._new = self._nothing()
        self._saved_at = time.monotonic()
        self._pause = SAVE_SECONDS

    def _nothing(self) -> _State:
        return _State(TensorFile.create(self._path.with_name(self._path.name + ".new"), self._shapes, in_memory=True))

    @property
    def n_done(self) -> int:
        return self._new.n_done + (self._saved.n_done if self._saved else 0)

    @property
    def mean_loss(self) -> float:
        return (self._new.loss + (self._saved.loss if self._saved else 0.0)) / max(1, self.n_done)

    def batches(self) -> Iterator[Sequence[EncodedTrace]]:
        size = self.settings.batch_size
        for i in range(self.n_done, len(self.traces), size):
            yield self.traces[i : i + size]

    def add(self, batch: Sequence[EncodedTrace]) -> None:
        """Backpropagates one batch into the sum."""
        self.proxy.model.zero_grad(set_to_none=True)
        with self.proxy.stream.collecting(_Accumulator(self._new.file)):
            losses = trace_losses(self.proxy, batch, self.settings.largest_logits)
            for trace, loss in zip(batch, losses.tolist(), strict=True):
                if not math.isfinite(loss):
                    raise ConversionError(f"{trace.where}: the proxy's loss is {loss}; check the model and this trace")
            (losses.sum() / len(self.traces)).backward()
        for name, parameter in self.proxy.small.items():
            if name in self._shapes and parameter.grad is not None:
                self._new.file.add(name, parameter.grad)
        self.proxy.model.zero_grad(set_to_none=True)
        self._new.n_done += len(batch)
        self._new.n_tokens += sum(t.n_targets for t in batch)
        self._new.loss += losses.sum().item()

    def save_now_and_then(self) -> None:
        started = time.monotonic()
        if started - self._saved_at < self._pause:
            return
        self._save()
        self._saved_at = time.monotonic()
        self._pause = max(SAVE_SECONDS, 20 * (self._saved_at - started))  # at most 5% of the time goes into saving

    def _save(self) -> None:
        if self._saved is not None:
            self._new.add(self._saved)
            self._saved.file.close()
        self._new.save(self._partial)
        self._saved, self._new = self._new, self._nothing()

    def finish(self) -> _State:
        if self._saved is not None:
            self._new.add(self._saved)
        self._new.save(self._path)
        self._partial.unlink(missing_ok=True)
        return self._new


class _Accumulator:
    """The sink that adds to a file."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file

    def wants(self, name: str) -> bool:
        return name in self._file

    def add_product(self, name: str, first_row: int, dy: torch.Tensor, x: torch.Tensor) -> None:
        self._file.add_product(name, first_row, dy.T, x)

    def add_rows(self, name: str, ids: torch.Tensor, gradients: torch.Tensor) -> None:
        self._file.add_rows(name, ids, gradients)
