"""A bundle: the directory that `adlocal convert` writes and the runtime opens.

It holds two GGUF files, the proxy at θ + εĝ and at θ − εĝ. Everything the runtime needs is in their metadata, under
`adlocal.*`; nobody types ε at inference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._gguf import GGUFHeader
from .errors import BundleError, ModelError

FORMAT_VERSION = 1
PREFIX = "adlocal."
PLUS_NAME, MINUS_NAME = "proxy-plus.gguf", "proxy-minus.gguf"
DEFAULT_GUARD = 0.05

# GGUF value types of the keys below, by gguf's names; lists are arrays of them.
U32, I32, F64, BOOL, STRING = "UINT32", "INT32", "FLOAT64", "BOOL", "STRING"


def _key(name: str, kind: str) -> Any:
    """A field of Bundle that is stored as metadata key `adlocal.<name>`."""
    return field(metadata={"key": PREFIX + name, "type": kind})


@dataclass(frozen=True)
class Bundle:
    """What a bundle says of itself. Every field is a metadata key, the same in both halves.

    Lengths are in nats of logit, ε and norms in units of the weights.
    """

    format_version: int = _key("format_version", U32)
    id: str = _key("bundle_id", STRING)
    converter: str = _key("converter", STRING)
    #: Step along ĝ = g / ‖g‖ from the base to each half.
    epsilon: float = _key("epsilon", F64)
    #: ‖g‖ over every weight of `params`, carriers or not: the paper's λ is λ / (τ ‖g‖).
    gradient_norm: float = _key("gradient.norm", F64)
    #: The proxy's loss on the traces of the gradient, mean per trace.
    gradient_loss: float = _key("gradient.loss", F64)
    gradient_traces: int = _key("gradient.traces", U32)
    gradient_tokens: int = _key("gradient.tokens", U32)
    #: RMS of the centred Δ over plausible tokens of held-out traces: λ = strength / delta_scale.
    delta_scale: float = _key("delta_scale", F64)
    #: The guard at which delta_scale was measured.
    guard: float = _key("guard", F64)
    #: Which weights the gradient is over.
    params: str = _key("params", STRING)
    #: Names of the tensors that carry the perturbation; all others are the base's, byte for byte.
    carriers: list[str] = _key("carriers.names", STRING)
    #: The share of the linear weights among them.
    carrier_fraction: float = _key("carriers.fraction", F64)
    #: Their share of ‖g‖².
    carrier_energy: float = _key("carriers.energy", F64)
    #: SHA-256 of the carriers' bytes in each half, in file order.
    plus_sha256: str = _key("plus.sha256", STRING)
    minus_sha256: str = _key("minus.sha256", STRING)
    #: Δ through llama.cpp against the exact directional derivative, a figure a position of held-out traces.
    fidelity_median: float = _key("fidelity.median", F64)
    fidelity_p10: float = _key("fidelity.p10", F64)
    fidelity_slope: float = _key("fidelity.slope", F64)
    fidelity_positions: int = _key("fidelity.positions", U32)
    fidelity_top_k: int = _key("fidelity.top_k", U32)
    #: Written with --force under the fidelity that convert asks for.
    forced: bool = _key("fidelity.forced", BOOL)
    sweep_epsilon: list[float] = _key("sweep.epsilon", F64)
    sweep_median: list[float] = _key("sweep.median", F64)
    sweep_p10: list[float] = _key("sweep.p10", F64)
    sweep_slope: list[float] = _key("sweep.slope", F64)
    base_sha256: str = _key("base.sha256", STRING)
    base_bytes: int = _key("base.bytes", "UINT64")
    traces_sha256: str = _key("traces.sha256", STRING)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Bundle:
        """Reads and validates both halves' metadata and tensor tables; no weights are read.

        Raises:
            BundleError: a half is missing or unreadable, or the halves do not fit together.
        """
        plus, minus = (_half(Path(directory), name) for name in (PLUS_NAME, MINUS_NAME))
        _check_version(plus)
        _check_version(minus)
        _check_signs(plus, minus)
        bundle, other = cls._from_header(plus), cls._from_header(minus)
        if bundle.id != other.id:
            raise BundleError(
                f"{directory}: {PLUS_NAME} is of bundle {bundle.id[:12]} and {MINUS_NAME} of {other.id[:12]}; "
                "take both halves from one conversion"
            )
        for f in dataclasses.fields(cls):
            if getattr(bundle, f.name) != getattr(other, f.name):
                raise BundleError(f"{directory}: the halves disagree on {f.metadata['key']}; convert again")
        if [(t.name, t.ggml_type) for t in plus.tensors] != [(t.name, t.ggml_type) for t in minus.tensors]:
            raise BundleError(f"{directory}: the halves hold different tensors; convert again")
        bundle._check_values(directory)
        return bundle

    @classmethod
    def _from_header(cls, header: GGUFHeader) -> Bundle:
        values = {}
        for f in dataclasses.fields(cls):
            kind = f.metadata["type"]
            values[f.name] = _typed(header, f.metadata["key"], f"ARRAY of {kind}" if "list" in str(f.type) else kind)
        return cls(**values)

    def _check_values(self, directory: str | os.PathLike[str]) -> None:
        for name in ("epsilon", "delta_scale", "gradient_norm"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise BundleError(f"{directory}: {name} is {value}, expected a positive number; convert again")
        if not 0 <= self.guard <= 1:
            raise BundleError(f"{directory}: guard is {self.guard}, expected 0 to 1; convert again")
        if not 1 <= len(self.id) <= 64:
            raise BundleError(f"{directory}: bundle_id has {len(self.id)} characters, expected 1 to 64; convert again")

    def lam(self, strength: float) -> float:
        """λ of a strength in nats: the factor of Δ in logit space."""
        return strength / self.delta_scale

    def paper_lambda(self, strength: float, temperature: float = 1.0) -> float:
        """The paper's λ for a strength: it multiplies the raw gradient's Δ, in log-probability over τ."""
        return self.lam(strength) / (temperature * self.gradient_norm)

    def metadata(self, sign: int) -> Iterable[tuple[str, Any, str]]:
        """(key, value, GGUF type) of every key that a half stores; `sign` is +1 or −1."""
        for f in dataclasses.fields(self):
            yield f.metadata["key"], getattr(self, f.name), f.metadata["type"]
        yield PREFIX + "sign", sign, I32


def _half(directory: Path, name: str) -> GGUFHeader:
    if not directory.is_dir():
        raise BundleError(f"{directory}: no such bundle directory; `adlocal convert PROXY.gguf --out DIR` makes one")
    try:
        return GGUFHeader(directory / name)
    except ModelError as error:
        raise BundleError(f"bundle half unusable: {error}") from None


def _typed(half: GGUFHeader, key: str, expected: str) -> Any:
    """Value of a key that has to be there, in the GGUF type that convert writes."""
    kind = half.type_of(key)
    if kind is None:
        raise BundleError(f"{half.path}: key {key} is missing; convert again")
    if kind != expected:
        raise BundleError(f"{half.path}: key {key} is of GGUF type {kind}, expected {expected}; convert again")
    return half.get(key)


def _check_version(half: GGUFHeader) -> None:
    if half.type_of(PREFIX + "format_version") is None:
        raise BundleError(f"{half.path}: a GGUF file, but no half of a bundle; make one with `adlocal convert`")
    version = _typed(half, PREFIX + "format_version", U32)
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{half.path}: bundle format {version}; this adlocal reads {FORMAT_VERSION}: "
            f"{'upgrade adlocal' if version > FORMAT_VERSION else 'convert again'}"
        )


def _check_signs(plus: GGUFHeader, minus: GGUFHeader) -> None:
    signs = tuple(_typed(half, PREFIX + "sign", I32) for half in (plus, minus))
    if signs == (-1, 1):
        raise BundleError(
            f"{plus.path.parent}: the halves are swapped; exchange the names {PLUS_NAME} and {MINUS_NAME}"
        )
    if signs != (1, -1):
        raise BundleError(f"{plus.path.parent}: the halves' signs are {signs}, expected (1, -1); convert again")


def verify(directory: str | os.PathLike[str], progress: Callable[[int], None] = lambda n: None) -> None:
    """Reads every byte of both halves: bulk tensors must be identical, carriers must match their hash.

    Args:
        directory: the bundle.
        progress: told the number of bytes just read.

    Raises:
        BundleError: naming the tensor or the half that does not fit.
    """
    bundle = Bundle.open(directory)
    carriers = set(bundle.carriers)
    plus, minus = (_half(Path(directory), name) for name in (PLUS_NAME, MINUS_NAME))
    _check_headers(plus, minus)
    digests = hashlib.sha256(), hashlib.sha256()
    for tensor, p, m in zip(plus.tensors, _data(plus), _data(minus), strict=True):
        if tensor.name in carriers:
            digests[0].update(p.data)
            digests[1].update(m.data)
        elif not np.array_equal(p, m):
            raise BundleError(f"{directory}: bulk tensor {tensor.name} differs between the halves; convert again")
        progress(2 * tensor.n_bytes)
    for name, digest, stored in zip(
        (PLUS_NAME, MINUS_NAME), digests, (bundle.plus_sha256, bundle.minus_sha256), strict=True
    ):
        if digest.hexdigest() != stored:
            raise BundleError(f"{Path(directory) / name}: its carriers were altered since conversion; convert again")


def _check_headers(plus: GGUFHeader, minus: GGUFHeader) -> None:
    """Everything before the tensors' data, tokenizer and all, must be the same but for the four bytes of the sign."""
    a, b = (np.memmap(half.path, dtype=np.uint8, mode="r")[: half.tensors[0].offset] for half in (plus, minus))
    differing = np.flatnonzero(a != b) if len(a) == len(b) else np.arange(len(a))
    if len(differing) != 4 or differing[-1] - differing[0] != 3:
        raise BundleError(f"{plus.path.parent}: the halves' metadata differ in more than the sign; convert again")


def _data(half: GGUFHeader) -> Iterable[npt.NDArray[np.uint8]]:
    """Bytes of each tensor, in the order of the header."""
    mapped = np.memmap(half.path, dtype=np.uint8, mode="r")
    for tensor in half.tensors:
        yield mapped[tensor.offset : tensor.offset + tensor.n_bytes]
