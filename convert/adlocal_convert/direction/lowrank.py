"""The direction as a sum of few rank-one matrices a tensor: what a LoRA adapter can carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from adlocal.errors import ConversionError, InputError

from ..model.streamed import Direction
from ..model.weights import Array, Tensor

MAX_RANK = 64
_OVERSAMPLING = 16  # of the randomized decomposition, which is then exact to rounding where the spectrum falls
_POWER_ITERATIONS = 4


@dataclass(frozen=True)
class LowRank:
    """The direction of one linear tensor as a product, b @ a, in the file's order.

    Attributes:
        name: GGUF tensor name.
        a: (rank, n_in) float32.
        b: (n_out, rank) float32.
    """

    name: str
    a: Array
    b: Array

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return int(self.a.shape[0])

    def check(self) -> None:
        """Raises ConversionError unless the factors are finite, belong together, and are no larger than the matrix."""
        shapes = f"factors of shape {self.b.shape} and {self.a.shape}"
        if self.a.ndim != 2 or self.b.ndim != 2 or self.b.shape[1] != self.rank:
            raise ConversionError(f"tensor {self.name}: {shapes}, expected (n_out, rank) and (rank, n_in)")
        if not 1 <= self.rank <= min(self.b.shape[0], self.a.shape[1]):
            raise ConversionError(f"tensor {self.name}: {shapes}; give a rank from 1 to the matrix's smaller side")
        if not (np.all(np.isfinite(self.a)) and np.all(np.isfinite(self.b))):
            raise ConversionError(f"tensor {self.name}: its direction holds NaN or infinite values")


def factorize(
    direction: Direction, tensors: Sequence[Tensor], rank: int | None, share: float, progress: Callable[[], object]
) -> list[LowRank]:
    """Truncated singular value decompositions of ĝ's matrices.

    Args:
        direction: ĝ.
        tensors: the matrices of the selection.
        rank: of every tensor; None: the components of all with the most energy a byte, at most MAX_RANK of a tensor.
        share: of the energy ‖ĝ‖² that those are to capture.
        progress: called after each tensor.

    Returns:
        One a tensor that has any component; b @ a approximates ĝ in the file's order.

    Raises:
        InputError: `rank` is more than a matrix has.
    """
    if rank is not None:
        for tensor in tensors:
            if not 1 <= rank <= min(tensor.shape):
                raise InputError(
                    f"--rank {rank}: {tensor.name} is {tensor.shape[0]} by {tensor.shape[1]}; "
                    f"give 1 to {min(tensor.shape)}"
                )
    found, total = [], 0.0
    for tensor in tensors:
        matrix = direction.get(tensor.name)
        total += float(matrix.double().square().sum())
        found.append(_decompose(tensor.name, matrix, rank or MAX_RANK))
        progress()
    kept = [rank] * len(found) if rank else _ranks(found, share * total)
    return [_truncated(f, r) for f, r in zip(found, kept, strict=True) if r]


def captured_energy(parts: Sequence[LowRank]) -> float:
    """Σ ‖b a‖²: the components of one decomposition are orthogonal."""
    return float(sum(_component_energies(part).sum() for part in parts))


def _decompose(name: str, matrix: torch.Tensor, rank: int) -> LowRank:
    q = min(*matrix.shape, rank + _OVERSAMPLING)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same gradient gives the same adapter
        u, s, v = torch.svd_lowrank(matrix, q, niter=_POWER_ITERATIONS)
    rank = min(rank, q)
    root = s[:rank].sqrt()
    return LowRank(name, a=(v[:, :rank] * root).T.contiguous().numpy(), b=(u[:, :rank] * root).contiguous().numpy())


def _component_energies(part: LowRank) -> npt.NDArray[np.float64]:
    """σ² of each component, largest first: ‖a_i‖² = ‖b_i‖² = σ_i."""
    return np.asarray(np.square(part.a).sum(axis=1, dtype=np.float64) * np.square(part.b).sum(axis=0, dtype=np.float64))


def _ranks(found: Sequence[LowRank], wanted: float) -> list[int]:
    """How many components of each tensor: those with the most energy a byte, until `wanted` is captured."""
    energies = [_component_energies(part) for part in found]
    bytes_each = [part.a.shape[1] + part.b.shape[0] for part in found]
    value = np.concatenate([e / size for e, size in zip(energies, bytes_each, strict=True)])
    owner = np.repeat(np.arange(len(found)), [len(e) for e in energies])
    order = np.argsort(-value)
    captured = np.cumsum(np.concatenate(energies)[order])
    n = int(np.searchsorted(captured, wanted)) + 1
    return [int(k) for k in np.bincount(owner[order[:n]], minlength=len(found))]


def _truncated(part: LowRank, rank: int) -> LowRank:
    return LowRank(part.name, a=part.a[:rank], b=np.ascontiguousarray(part.b[:, :rank]))
