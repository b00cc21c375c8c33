"""Adapter bundles of tiny models along a random direction of rank 3, and the halves that they must equal."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from adlocal.bundle import ADAPTER, ADAPTER_NAME, BASE_NAME, HALVES, MINUS_NAME, PLUS_NAME, Bundle
from adlocal_convert.bundle.adapter import adapter_sha256, write_adapter
from adlocal_convert.bundle.perturb import Carrier, write_half
from adlocal_convert.direction.lowrank import LowRank
from support import tiny

RANK = 3
EPSILON = 0.3


@dataclass(frozen=True)
class Pairs:
    """A model file, a direction for each of its linear tensors, and what the metadata are made from."""

    base: Path
    architecture: str
    tied: bool
    directions: list[LowRank]
    template: Bundle

    @classmethod
    def of(cls, folder: Path, architecture: str, template: Bundle, **overrides: Any) -> Pairs:
        """A random model with random directions, each a unit matrix."""
        model = tiny.tiny_model(architecture, **overrides)
        base = tiny.write_gguf(model, folder / "base.gguf", tiny.CHAT_TEMPLATE)
        return cls.over(base, architecture, template, tied=bool(model.config.tie_word_embeddings))

    @classmethod
    def over(cls, base: Path, architecture: str, template: Bundle, *, tied: bool = False) -> Pairs:
        """Random directions for a model that is written already."""
        rng, directions = np.random.default_rng(7), list[LowRank]()
        for tensor in gguf.GGUFReader(base).tensors:
            if len(tensor.shape) == 2 and not (tied and tensor.name == "token_embd.weight"):
                n_in, n_out = map(int, tensor.shape)
                a, b = rng.normal(size=(RANK, n_in)), rng.normal(size=(n_out, RANK))
                unit = b / np.linalg.norm(b @ a)
                directions.append(LowRank(tensor.name, a.astype(np.float32), unit.astype(np.float32)))
        return cls(base, architecture, tied, directions, template)

    def moved(self, step: float) -> dict[str, Any]:
        """Weights of the linear tensors at θ + step · b @ a, in float64 and rounded once."""
        base = {t.name: t.data for t in gguf.GGUFReader(self.base).tensors}
        return {
            d.name: (base[d.name] + step * (d.b.astype(np.float64) @ d.a)).astype(np.float32) for d in self.directions
        }

    def write_adapter_bundle(self, out: Path, epsilon: float = EPSILON) -> Path:
        """Base and adapter."""
        hashes, names = [adapter_sha256(self.directions)], [d.name for d in self.directions]
        bundle = self._bundle(ADAPTER, epsilon, carriers_sha256=hashes, carriers=names, adapter_rank=RANK)
        out.mkdir()
        write_half(out / BASE_NAME, gguf.GGUFReader(self.base), [], 0.0, bundle.metadata(0))
        write_adapter(out / ADAPTER_NAME, self.architecture, self.directions, bundle.metadata(1), tied=self.tied)
        return out

    def write_halves(self, out: Path, epsilon: float = EPSILON) -> Path:
        """Both halves in full, F32."""
        bundle = self._bundle(HALVES, epsilon, carriers_sha256=["", ""])
        out.mkdir()
        for name, sign in ((PLUS_NAME, 1), (MINUS_NAME, -1)):
            carriers = [
                Carrier(tensor, gguf.GGMLQuantizationType.F32, weights, np.zeros_like(weights))
                for tensor, weights in self.moved(sign * epsilon).items()
            ]
            write_half(out / name, gguf.GGUFReader(self.base), carriers, 0.0, bundle.metadata(sign))
        return out

    def _bundle(self, kind: str, epsilon: float, **changes: Any) -> Bundle:
        return dataclasses.replace(self.template, format=kind, epsilon=epsilon, delta_scale=0.5, **changes)
