"""A bundle: the directory that `adlocal convert` writes and the runtime opens.

It holds two GGUF files: either the halves, the proxy at θ + εĝ and at θ − εĝ, or the proxy itself and ĝ as a LoRA
adapter, which llama.cpp attaches at +ε and −ε. Everything the runtime needs is in their metadata, under `adlocal.*`;
nobody types ε at inference.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError, ModelError
from ..llamacpp.gguf import GGUFHeader
from ..llamacpp.record import BOOL, F64, I32, STRING, U32, U64, GGUFRecord, KeyProblem, key, stored_fields, value_of

FORMAT_VERSION = 2
PREFIX = "adlocal."
HALVES, ADAPTER = "halves", "adapter"
PLUS_NAME, MINUS_NAME = "proxy-plus.gguf", "proxy-minus.gguf"
BASE_NAME, ADAPTER_NAME = "proxy-base.gguf", "proxy-adapter.gguf"
# By format: the two files in order, the sign that each stores, and what messages call them.
NAMES = {HALVES: (PLUS_NAME, MINUS_NAME), ADAPTER: (BASE_NAME, ADAPTER_NAME)}
SIGNS = {HALVES: (1, -1), ADAPTER: (0, 1)}
_BOTH = {HALVES: "the halves", ADAPTER: "base and adapter"}
_ALPHA = "adapter.lora.alpha"


def _key(name: str, gguf_type: str) -> Any:
    """A field of Bundle that is stored as metadata key `adlocal.<name>`."""
    return key(PREFIX + name, gguf_type)


@dataclass(frozen=True)
class Bundle(GGUFRecord):
    """A bundle: what it says of itself, and where it lies.

    Every field but `directory` is a metadata key, the same in both of its files. Lengths are in nats of logit, ε and
    norms in units of the weights.
    """

    #: Where its files lie, or will lie. Two bundles are equal that say the same, wherever they are.
    directory: Path = field(compare=False)

    format_version: int = _key("format_version", U32)
    #: "halves" or "adapter".
    format: str = _key("format", STRING)
    id: str = _key("bundle_id", STRING)
    converter: str = _key("converter", STRING)
    #: Step along ĝ = g / ‖g‖ from the base to either side.
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
    #: One entry a capability: its name, its weight in g, ‖g_k‖, its loss, its number of traces, SHA-256 of their file.
    capability_names: list[str] = _key("capabilities.names", STRING)
    capability_weights: list[float] = _key("capabilities.weights", F64)
    capability_norms: list[float] = _key("capabilities.norms", F64)
    capability_losses: list[float] = _key("capabilities.losses", F64)
    capability_traces: list[int] = _key("capabilities.traces", U32)
    capability_sha256: list[str] = _key("capabilities.sha256", STRING)
    #: Cosines between the capabilities' gradients, k × k by rows.
    capability_cosines: list[float] = _key("capabilities.cosines", F64)
    #: Which weights the gradient is over: "all", "linear" or "norms".
    params: str = _key("params", STRING)
    #: Names of the tensors among them that the format cannot carry.
    params_excluded: list[str] = _key("params.excluded", STRING)
    #: What was asked of convert: "small", "balanced", "exact" or "custom".
    quality: str = _key("quality", STRING)
    #: The adapter's largest rank, 0 for halves.
    adapter_rank: int = _key("adapter.rank", U32)
    #: Names of the tensors that carry the perturbation; all others are the base's, byte for byte.
    carriers: list[str] = _key("carriers.names", STRING)
    #: The share of the linear weights among them.
    carrier_fraction: float = _key("carriers.fraction", F64)
    #: Their share of ‖g‖².
    carrier_energy: float = _key("carriers.energy", F64)
    #: SHA-256 of the carriers' bytes in file order: of both halves, or of the adapter.
    carriers_sha256: list[str] = _key("carriers.sha256", STRING)
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
    base_bytes: int = _key("base.bytes", U64)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Bundle:
        """Reads and validates both files' metadata and tensor tables; no weights are read.

        Raises:
            BundleError: a file is missing or unreadable, or the two do not fit together.
        """
        place = Path(directory)
        format = format_of(place)
        first, second = _headers(place, format)
        _check_version(first)
        _check_version(second)
        _check_signs(first, second, format)
        bundle, other = (cls(directory=place, **_stored(header)) for header in (first, second))
        _check_agreement(bundle, other, format)
        if format == ADAPTER:
            _check_alpha(second)
        elif _table(first) != _table(second):
            raise BundleError(f"{directory}: the halves hold different tensors; convert again")
        bundle._check_values(format)
        return bundle

    @property
    def files(self) -> tuple[Path, Path]:
        """Both halves, plus before minus; or base and adapter."""
        first, second = NAMES[self.format]
        return self.directory / first, self.directory / second

    def headers(self) -> tuple[GGUFHeader, GGUFHeader]:
        """The headers of both files, read now."""
        return _headers(self.directory, self.format)

    @property
    def proxy(self) -> Path:
        """The file that holds the proxy's vocabulary, chat template and context length."""
        return self.files[0]

    def _check_values(self, format: str) -> None:
        directory = self.directory
        if self.format != format:
            names = " and ".join(NAMES[format])
            raise BundleError(f"{directory}: {names} say format {self.format!r}, expected {format!r}; convert again")
        for name in ("epsilon", "delta_scale", "gradient_norm"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise BundleError(f"{directory}: {name} is {value}, expected a positive number; convert again")
        if not 0 <= self.guard <= 1:
            raise BundleError(f"{directory}: guard is {self.guard}, expected 0 to 1; convert again")
        if not 1 <= len(self.id) <= 64:
            raise BundleError(f"{directory}: bundle_id has {len(self.id)} characters, expected 1 to 64; convert again")
        k = len(self.capability_names)
        lengths = {f"capability_{name}": k for name in ("weights", "norms", "losses", "traces", "sha256")}
        lengths |= {"capability_cosines": k * k, "carriers_sha256": 2 if self.format == HALVES else 1}
        for name, n in lengths.items():
            if len(getattr(self, name)) != n:
                raise BundleError(
                    f"{directory}: {name} has {len(getattr(self, name))} entries, expected {n}; convert again"
                )

    def lam(self, strength: float) -> float:
        """λ of a strength in nats: the factor of Δ in logit space."""
        return strength / self.delta_scale

    def paper_lambda(self, strength: float, temperature: float = 1.0) -> float:
        """The paper's λ for a strength: it multiplies the raw gradient's Δ, in log-probability over τ."""
        return self.lam(strength) / (temperature * self.gradient_norm)

    def metadata(self, sign: int) -> Iterable[tuple[str, Any, str]]:
        """(key, value, GGUF type) of every key that a file stores; its `sign` is that of SIGNS."""
        yield from self.keys()
        yield PREFIX + "sign", sign, I32


def format_of(directory: Path) -> str:
    """The format of the bundle whose files lie in a directory; where none of either do, halves are missed.

    Raises:
        BundleError: there is no such directory, or it holds files of both formats.
    """
    if not directory.is_dir():
        raise BundleError(f"{directory}: no such bundle directory; `adlocal convert PROXY.gguf --out DIR` makes one")
    found = [
        next((name for name in NAMES[format] if (directory / name).exists()), None) for format in (HALVES, ADAPTER)
    ]
    if all(found):
        raise BundleError(f"{directory}: {found[0]} and {found[1]} are of two formats; remove one of the bundles")
    return ADAPTER if found[1] else HALVES


def _headers(directory: Path, format: str) -> tuple[GGUFHeader, GGUFHeader]:
    try:
        first, second = (GGUFHeader(directory / name) for name in NAMES[format])
    except ModelError as error:
        raise BundleError(f"bundle file unusable: {error}") from None
    return first, second


def _table(header: GGUFHeader) -> list[tuple[str, int]]:
    return [(t.name, t.ggml_type) for t in header.tensors]


def _stored(header: GGUFHeader) -> dict[str, Any]:
    try:
        return Bundle.stored_in(header)
    except KeyProblem as problem:
        raise BundleError(f"{problem}; convert again") from None


def _typed(header: GGUFHeader, key: str, expected: str) -> Any:
    """Value of a key that has to be there, in the GGUF type that convert writes."""
    try:
        return value_of(header, key, expected)
    except KeyProblem as problem:
        raise BundleError(f"{problem}; convert again") from None


def _check_agreement(bundle: Bundle, other: Bundle, format: str) -> None:
    """Both files must say the same."""
    if bundle.id != other.id:
        first, second = NAMES[format]
        raise BundleError(
            f"{bundle.directory}: {first} is of bundle {bundle.id[:12]} and {second} of {other.id[:12]}; take both "
            "from one conversion"
        )
    for name, stored_as, _ in stored_fields(bundle):
        if getattr(bundle, name) != getattr(other, name):
            raise BundleError(f"{bundle.directory}: {_BOTH[format]} disagree on {stored_as}; convert again")


def _check_version(half: GGUFHeader) -> None:
    if half.type_of(PREFIX + "format_version") is None:
        raise BundleError(f"{half.path}: a GGUF file, but no part of a bundle; make one with `adlocal convert`")
    version = _typed(half, PREFIX + "format_version", U32)
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{half.path}: bundle format {version}; this adlocal reads {FORMAT_VERSION}: "
            f"{'upgrade adlocal' if version > FORMAT_VERSION else 'convert again'}"
        )


def _check_alpha(adapter: GGUFHeader) -> None:
    """With any other alpha llama.cpp scales the adapter by more than ε."""
    alpha = _typed(adapter, _ALPHA, "FLOAT32")
    if alpha != 0:
        raise BundleError(f"{adapter.path}: {_ALPHA} is {alpha}, expected 0; convert again")


def _check_signs(first: GGUFHeader, second: GGUFHeader, format: str) -> None:
    signs, directory = tuple(_typed(file, PREFIX + "sign", I32) for file in (first, second)), first.path.parent
    if signs == SIGNS[format][::-1]:
        names = " and ".join(NAMES[format])
        raise BundleError(f"{directory}: {_BOTH[format]} are swapped; exchange the names {names}")
    if signs != SIGNS[format]:
        raise BundleError(
            f"{directory}: the signs of {_BOTH[format]} are {signs}, expected {SIGNS[format]}; convert again"
        )
