"""Directions and gradients of known values, in place of computed ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
import torch

from adlocal_convert.direction.gradient import Gradient
from adlocal_convert.direction.mixture import Mixture
from adlocal_convert.direction.tensor_file import TensorFile
from adlocal_convert.model.weights import Tensor


def made_tensor(name: str, shape: tuple[int, ...], ggml_type: str = "F32") -> Tensor:
    """A tensor as a file would describe it."""
    kind = gguf.GGMLQuantizationType[ggml_type]
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return Tensor(name, shape, kind, math.prod(shape) // block * n_bytes, offset=0)


class Given:
    """A direction whose tensors are given; those that are not do not move."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self.values = dict(values)

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def get(self, name: str) -> torch.Tensor:
        return self.values[name]

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        return self.values[name][ids]

    def only(self, name: str) -> Given:
        """Its part in one tensor."""
        return Given({name: self.values[name]})


def random_values(tensors: Iterable[Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random, each tensor of another size."""
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(t.shape, generator=generator) * (1 + i * 5 % 7) for i, t in enumerate(tensors)}


def mixture_of(values: Mapping[str, torch.Tensor], path: Path) -> Mixture:
    """The direction of a gradient that has these values; its file is `path`."""
    file = TensorFile.create(path, {name: tuple(value.shape) for name, value in values.items()})
    for name, value in values.items():
        file.add(name, value)
    return Mixture.of([Gradient(file, loss=1.0, n_traces=1, n_tokens=1)], [1.0], list(values))
