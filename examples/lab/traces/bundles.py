"""Bundles for the laboratory, all written by `adlocal convert`; some along other directions than the gradient."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from adlocal.llamacpp.model import open_vocabulary
from adlocal.traces import TraceEncoder
from adlocal_convert.convert import convert
from adlocal_convert.direction.capabilities import DEFAULT_NAME, Capability
from adlocal_convert.direction.gradient import Settings, compute_gradient
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.options import Options

from ..models.pretrained import N_CTX
from ..stages import Stage, environment

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BundleStage(Stage):
    """A bundle of a proxy.

    Attributes:
        proxy: a stage with model.gguf.
        holdout: a stage with traces.jsonl, which give the gradient.
        params: as `adlocal convert --params`.
        quant: type to quantize the proxy to first, or None for F32.
        random: the number of a random unit direction in place of the gradient.
        along: stages with model.gguf of the proxy's size, at whose weights gradients are taken and averaged, too.
    """

    proxy: Stage
    holdout: Stage
    params: str = "all"
    quant: str | None = None
    random: int | None = None
    along: tuple[Stage, ...] = ()

    @property
    def seconds(self) -> float:
        return 5.0

    @property
    def loss_on(self) -> str | None:
        """As `adlocal convert --loss-on`."""
        return None

    def run(self, root: Path, out: Path) -> None:
        options = Options(
            proxy=str(self.proxy.path(root) / "model.gguf"),
            traces={DEFAULT_NAME: self.holdout.path(root) / "traces.jsonl"},
            out=out / "bundle",
            quant=self.quant,
            params=self.params,
            loss_on=self.loss_on,
            quality="balanced" if self.quant else "exact",
            n_ctx=N_CTX,
            n_threads=1,
            batch_size=32,
            force=True,
        )
        with environment("ADLOCAL_CACHE", str(out / "cache")):  # a stage has all of its files to itself
            convert(options, lambda line: None, self._direction(options, root, out))

    def _direction(self, options: Options, root: Path, out: Path) -> Tensors | None:
        """Another direction than the gradient at the proxy's weights, if it is to be one."""
        if self.random is None and not self.along:
            return None
        if self.quant:
            raise ValueError(f"quant={self.quant}: another direction than the gradient is for an F32 proxy")
        base = Path(options.proxy)
        if self.random is not None:
            return _random(base, self.random)
        with closing(open_vocabulary(base)) as vocabulary:
            file = options.traces[DEFAULT_NAME]
            capability = Capability.read(DEFAULT_NAME, file, TraceEncoder(vocabulary), N_CTX, self.loss_on)
        bases = [base, *(stage.path(root) / "model.gguf" for stage in self.along)]
        names = [name for name, _ in _shapes(base)]
        return _mean([_gradient(b, capability, names, out / f"gradient-{i}") for i, b in enumerate(bases)])


@dataclass(frozen=True)
class Numbers(BundleStage):
    """A bundle of the gradient of the loss on numbers alone."""

    @property
    def loss_on(self) -> str:
        return r"\d"


def _random(base: Path, number: int) -> Tensors:
    generator = torch.Generator().manual_seed(random.Random(f"direction {number}").getrandbits(32))
    return {name: torch.randn(shape, generator=generator) for name, shape in _shapes(base)}


def _gradient(base: Path, capability: Capability, names: list[str], target: Path) -> Tensors:
    """The unit gradient at the weights of `base`."""
    with closing(Proxy(base, n_threads=1)) as proxy:
        gradient = compute_gradient(
            proxy, capability.learned, names, target, Settings(batch_size=32), lambda n, loss: None
        )
        tensors = {name: gradient.file.get(name) for name in names}
    norm = torch.sqrt(sum((t.double() ** 2).sum() for t in tensors.values()) + torch.zeros(()))
    return {name: t / float(norm) for name, t in tensors.items()}


def _mean(found: list[Tensors]) -> Tensors:
    return {name: torch.stack([tensors[name] for tensors in found]).mean(0) for name in found[0]}


def _shapes(base: Path) -> list[tuple[str, tuple[int, ...]]]:
    with closing(Proxy(base, n_threads=1)) as proxy:
        return [(t.name, proxy.weights.shape(t.name)) for t in proxy.tensors]
