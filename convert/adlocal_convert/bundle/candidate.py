"""A bundle in the making, in either format: run at any ε through llama.cpp, then written at the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np

from adlocal.bundle import ADAPTER, HALVES, SIGNS, Bundle
from adlocal.pair import ProxyPair

from ..direction.lowrank import LowRank, captured_energy
from ..direction.mixture import Mixture
from ..model.proxy import Proxy
from .adapter import adapter_sha256, write_adapter
from .perturb import Carrier, carriers_sha256, load_carriers, move_carriers, write_half

Types = Mapping[str, gguf.GGMLQuantizationType]


@dataclasses.dataclass(frozen=True)
class Backend:
    """How llama.cpp runs a candidate.

    Attributes:
        params: of both contexts.
        n_gpu_layers: layers to offload.
    """

    params: Any
    n_gpu_layers: int

    def load(self, first: Path, second: Path, *, format: str, epsilon: float) -> ProxyPair:
        """Two files as a pair that evaluates, and that nobody samples from: it needs no `delta_scale` yet."""
        return ProxyPair.load(
            first,
            second,
            format=format,
            epsilon=epsilon,
            delta_scale=1.0,
            params=self.params,
            n_gpu_layers=self.n_gpu_layers,
        )


class Candidate(Protocol):
    """What both formats offer. Close it when done."""

    format: str
    #: Tensors that carry the perturbation, in file order.
    names: list[str]
    #: Largest rank of an adapter, 0 for halves.
    rank: int
    #: The share of ‖ĝ‖² that is carried.
    energy: float

    def n_bytes(self) -> list[int]:
        """Size of each file, without metadata."""

    def at(self, epsilon: float) -> Any:
        """Context manager: the pair at this ε."""

    def sha256(self, epsilon: float) -> list[str]:
        """What `Bundle.carriers_sha256` holds."""

    def write(self, bundle: Bundle) -> None:
        """Writes both files where the bundle is to lie."""

    def close(self) -> None: ...


class Halves:
    """Two files with the base's bulk, and carriers at θ ± εĝ.

    Args:
        proxy: the base.
        direction: ĝ.
        types: the carriers' types; all other tensors are the base's.
        staging: where the files lie that are tried.
    """

    format = HALVES
    rank = 0

    def __init__(self, proxy: Proxy, direction: Mixture, types: Types, staging: Path, backend: Backend) -> None:
        self._backend = backend
        self._carriers: Sequence[Carrier] = load_carriers(proxy, direction, types)
        self.names = [carrier.name for carrier in self._carriers]
        self.energy = sum(direction.energy(name) for name in self.names)
        self._paths = staging / "candidate-plus.gguf", staging / "candidate-minus.gguf"
        self._reader = proxy.reader
        for path in self._paths:
            write_half(path, self._reader, self._carriers, 0.0, [])

    def n_bytes(self) -> list[int]:
        return [path.stat().st_size for path in self._paths]

    @contextmanager
    def at(self, epsilon: float) -> Iterator[ProxyPair]:
        for path, sign in zip(self._paths, SIGNS[HALVES], strict=True):
            move_carriers(path, self._carriers, sign * epsilon)
        with self._backend.load(*self._paths, format=HALVES, epsilon=epsilon) as pair:
            yield pair

    def sha256(self, epsilon: float) -> list[str]:
        return [carriers_sha256(self._carriers, sign * epsilon) for sign in SIGNS[HALVES]]

    def write(self, bundle: Bundle) -> None:
        for path, sign in zip(bundle.files, SIGNS[HALVES], strict=True):
            step = sign * bundle.epsilon
            write_half(path, self._reader, self._carriers, step, bundle.metadata(sign))

    def close(self) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)


class Adapter:
    """The base in one file, ĝ as a LoRA adapter in the other.

    Args:
        proxy: the base.
        parts: ĝ, tensor by tensor, truncated.
        types: tensors that the base is to hold in a wider type than the proxy.
        staging: where the files lie that are tried.
    """

    format = ADAPTER

    def __init__(self, proxy: Proxy, parts: Sequence[LowRank], types: Types, staging: Path, backend: Backend) -> None:
        self._proxy, self._parts, self._backend = proxy, parts, backend
        self.names = [part.name for part in parts]
        self.rank = max(len(part.a) for part in parts)
        self.energy = captured_energy(parts)
        self._wide = [
            Carrier(name, t, weights, np.zeros_like(weights))
            for name, t in types.items()
            for weights in [proxy.weights.get(name)]
        ]
        self._paths = staging / "candidate-base.gguf", staging / "candidate-adapter.gguf"
        self._reader = proxy.reader
        write_half(self._paths[0], self._reader, self._wide, 0.0, [])
        write_adapter(self._paths[1], proxy.architecture.name, parts, [], tied=proxy.is_tied)
        self._pair: ProxyPair | None = None

    def n_bytes(self) -> list[int]:
        return [path.stat().st_size for path in self._paths]

    @contextmanager
    def at(self, epsilon: float) -> Iterator[ProxyPair]:
        if self._pair is None:
            self._pair = self._backend.load(*self._paths, format=ADAPTER, epsilon=epsilon)
        self._pair.set_epsilon(epsilon)
        yield self._pair

    def sha256(self, epsilon: float) -> list[str]:
        return [adapter_sha256(self._parts)]

    def write(self, bundle: Bundle) -> None:
        (base, adapter), (sign_base, sign_adapter) = bundle.files, SIGNS[ADAPTER]
        write_half(base, self._reader, self._wide, 0.0, bundle.metadata(sign_base))
        metadata = bundle.metadata(sign_adapter)
        write_adapter(adapter, self._proxy.architecture.name, self._parts, metadata, tied=self._proxy.is_tied)

    def close(self) -> None:
        if self._pair is not None:
            self._pair.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
