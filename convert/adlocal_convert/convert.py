"""From a proxy student and traces to a bundle."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

import adlocal
from adlocal.bundle import ADAPTER, FORMAT_VERSION, Bundle
from adlocal.errors import ConversionError, InputError, ModelError
from adlocal.files import cache_directory, sha256, write_failure
from adlocal.llamacpp import native
from adlocal.llamacpp.batching import Batching
from adlocal.llamacpp.gguf import GGUFHeader
from adlocal.llamacpp.model import context_length, open_vocabulary
from adlocal.pair import context_params
from adlocal.settings import DEFAULT_GUARD
from adlocal.traces import TraceEncoder

from .bundle.candidate import Adapter, Backend, Candidate, Halves
from .bundle.description import Sweep, fidelity_fields, gradient_fields
from .bundle.fidelity import Fidelity, Reference, check_agreement, delta_scale, first_epsilon, sweep
from .bundle.gain import Gain, Rounding
from .bundle.perturb import bundle_id
from .bundle.presets import QUALITIES, carrier_types, is_mostly_wide, wide_base
from .bundle.staging import publish, staging_directory
from .direction.capabilities import Capability
from .direction.given import Tensors, given_gradient
from .direction.gradient import Gradient, Settings
from .direction.lowrank import factorize
from .direction.mixture import Mixture, parse_mix
from .model.architectures import TABLE, architecture_of
from .model.proxy import Proxy
from .model.weights import Tensor
from .options import Options, checked
from .source.inputs import resolve
from .source.quantize import quantize

Say = Callable[[str], None]


def convert(options: Options, say: Say, direction: Tensors | None = None) -> Bundle:
    """Writes a bundle to `options.out` and returns what it says of itself.

    Args:
        options: see `Options`.
        say: told each line of the report.
        direction: what is protected against in the place of the gradient, of any length: GGUF tensor name -> values in
            the file's order, at least for the tensors that `options.params` selects. Fidelity is measured along it.

    Raises:
        InputError: proxy, traces, an option or the direction cannot be used.
        ConversionError: gradient or fidelity are no good, or the bundle cannot be written. Nothing is left behind.
    """
    options = checked(options)
    torch.set_num_threads(options.n_threads)
    try:
        with staging_directory(options.out) as staging:
            base = _base(options, staging, say)
            if note := _note(base, options):
                say(f"note: {note}")
            capabilities = _capabilities(base, options)
            for capability in capabilities:
                say(capability.report)
            with closing(_open(base, options)) as proxy:
                bundle = _Conversion(options, proxy, capabilities, staging, say, direction).run()
            bundle = publish(bundle, options.out)
    except OSError as error:
        raise ConversionError(f"cannot write the bundle to {options.out}: {write_failure(error)}") from None
    say(f"wrote {options.out}")
    return bundle


class _Conversion:
    """The stages between a proxy and its bundle's files in `staging`."""

    def __init__(
        self,
        options: Options,
        proxy: Proxy,
        capabilities: Sequence[Capability],
        staging: Path,
        say: Say,
        given: Tensors | None,
    ) -> None:
        self.options, self.proxy, self.capabilities, self.staging, self.say = options, proxy, capabilities, staging, say
        self.given = given
        self.base_sha256 = sha256(proxy.path)
        self.selection, self.excluded = select(proxy, str(options.params), options.format)

    def run(self) -> Bundle:
        direction = self._direction()
        rounding = Rounding()
        traces = [t for c in self.capabilities for t in c.held_out]
        references = [
            Reference.of(self.proxy, direction, t, None if i else rounding)
            for i, t in enumerate(tqdm(traces, desc="exact derivative", unit="trace"))
        ]
        with closing(self._candidate(direction, references, rounding)) as candidate:
            self._describe(candidate)
            found = self._sweep(candidate, references)
            _check_fidelity(found, self.options)
            bundle = self._bundle(direction, candidate, found)
            self.say(f"fidelity {bundle.fidelity_median:.4f} at ε = {bundle.epsilon:.4g}")
            candidate.write(bundle)
        return Bundle.open(self.staging)

    def _gradients(self) -> list[Gradient]:
        """One a capability: computed, found where it was saved, or handed in."""
        options, proxy = self.options, self.proxy
        params = options.params or ""
        names = [t.name for t in proxy.tensors if _selected(t, params)]
        if self.given is not None:
            return [given_gradient(self.given, proxy, names, self.capabilities)]
        cache = cache_directory() / "gradients"
        settings = Settings.low_memory() if options.low_memory else Settings(options.batch_size)
        return [c.gradient(proxy, self.base_sha256, params, names, cache, settings) for c in self.capabilities]

    def _direction(self) -> Mixture:
        options, gradients = self.options, self._gradients()
        weights = parse_mix(options.mix, [c.name for c in self.capabilities])
        chosen = [t.name for t in self.selection]
        with tqdm(total=len(chosen), desc="norms", unit="tensor", delay=1) as bar:
            mixture = Mixture.of(gradients, weights, chosen, bar.update)
        for capability, norm, weight, gradient in zip(
            self.capabilities, mixture.norms, mixture.weights, gradients, strict=True
        ):
            share = f", weight {weight:g}" if len(gradients) > 1 else ""
            what = f"loss {gradient.loss:.4f} nats a token" if self.given is None else "a direction that was handed in"
            self.say(f"{capability.name}: {what}, ‖g‖ = {norm:.4f}{share}")
        return mixture

    def _candidate(self, direction: Mixture, references: Sequence[Reference], rounding: Rounding) -> Candidate:
        """The bundle that the options ask for, at no ε yet."""
        options, proxy, preset = self.options, self.proxy, QUALITIES[self.options.quality]
        longest = max(len(reference.trace.tokens) for reference in references)
        backend = Backend(context_params(n_ctx=longest, n_threads=options.n_threads), options.n_gpu_layers)
        if options.format == ADAPTER:
            with tqdm(total=len(self.selection), desc="decomposing", unit="tensor") as bar:
                parts = factorize(direction, self.selection, options.rank, preset.energy, bar.update)
            return Adapter(proxy, parts, wide_base(proxy.tensors, preset), self.staging, backend)
        with tqdm(total=1, desc="predicting gains", unit="trace", delay=1) as bar:
            gain = Gain.of(proxy, direction, references[0], rounding, first_epsilon(references))
            bar.update()
        types = carrier_types(self.selection, gain, preset, options.carriers, proxy.path.stat().st_size)
        return Halves(proxy, direction, types, self.staging, backend)

    def _describe(self, candidate: Candidate) -> None:
        """Says how large the bundle gets and what it carries, before it is measured."""
        base = self.proxy.path.stat().st_size
        sizes = " and ".join(f"{n / 1e6:.1f} MB ({n / base:.3f} of the base)" for n in candidate.n_bytes())
        rank = f", rank up to {candidate.rank}" if candidate.rank else ""
        self.say(
            f"{candidate.format} of {sizes}: {len(candidate.names)} tensors{rank} carry {candidate.energy:.1%} of ‖g‖²"
        )
        if self.excluded:
            self.say(f"not carried: {', '.join(self.excluded)}, which is tied to the head; ‖g‖ is without it")

    def _sweep(self, candidate: Candidate, references: Sequence[Reference]) -> Sweep:
        """Tries one ε after the other, through llama.cpp on the backend that will run the pair."""
        scales: dict[float, float] = {}

        def measure(epsilon: float) -> Fidelity:
            with candidate.at(epsilon) as pair:
                fidelity = Fidelity.measure(pair, references)
                scales[epsilon] = delta_scale(pair, references, DEFAULT_GUARD)
            self.say(f"{epsilon:10.4g}  {fidelity.median:.4f}  {fidelity.p10:.4f}  {fidelity.slope:.3f}")
            return fidelity

        start = first_epsilon(references)
        with candidate.at(start / 1000) as pair:  # as good as the base
            check_agreement(pair, references[:1])
        self.say("Δ through llama.cpp against the exact derivative:")
        self.say("         ε  median  p10     slope")
        steps = sweep(start, measure) if self.options.eps is None else iter([measure(self.options.eps)])
        return Sweep(list(tqdm(steps, desc="sweep", unit="ε")), scales)

    def _bundle(self, direction: Mixture, candidate: Candidate, found: Sweep) -> Bundle:
        """The bundle in `staging`, with all that is known of it."""
        options, best = self.options, found.best
        linear = {t.name: t.n_weights for t in self.proxy.tensors if t.is_linear}
        bundle = Bundle(
            directory=self.staging,
            format_version=FORMAT_VERSION,
            format=candidate.format,
            id="",
            converter=f"adlocal {adlocal.__version__}",
            epsilon=best.epsilon,
            delta_scale=found.scales[best.epsilon],
            guard=DEFAULT_GUARD,
            **gradient_fields(direction, self.capabilities),
            params=str(options.params),
            params_excluded=self.excluded,
            quality=options.quality if options.carriers is None and options.rank is None else "custom",
            adapter_rank=candidate.rank,
            carriers=candidate.names,
            carrier_fraction=sum(linear.get(name, 0) for name in candidate.names) / sum(linear.values()),
            carrier_energy=candidate.energy,
            carriers_sha256=candidate.sha256(best.epsilon),
            **fidelity_fields(found, _least_fidelity(options)),
            base_sha256=self.base_sha256,
            base_bytes=self.proxy.path.stat().st_size,
        )
        return dataclasses.replace(bundle, id=bundle_id(bundle))


def select(proxy: Proxy, params: str, format: str) -> tuple[list[Tensor], list[str]]:
    """The tensors that the direction is over, and the names of those among `params` that the format cannot carry.

    llama.cpp's adapters hold no vectors, and in a tied model multiply with the table in one of its two places only.
    """
    selected = [t for t in proxy.tensors if _selected(t, params)]
    if format != ADAPTER:
        return selected, []
    excluded = [t.name for t in selected if proxy.is_tied and t.name == TABLE]
    return [t for t in selected if t.name not in excluded], excluded


def _selected(tensor: Tensor, params: str) -> bool:
    return params == "all" or tensor.is_linear == (params == "linear")


def _base(options: Options, staging: Path, say: Say) -> Path:
    """The GGUF that is differentiated."""
    source = resolve(options.proxy, options.teacher, staging, say)
    header = GGUFHeader(source)
    architecture_of(source, header.get("general.architecture", "none"))
    if header.get("adlocal.format_version") is not None:
        raise ModelError(f"{source} is itself part of a bundle; give the proxy's own GGUF")
    if options.teacher is not None:
        _check_vocabulary(options.teacher, source)
    if options.quant is None:
        return source
    target = staging / f"{source.stem}.{options.quant.upper()}.gguf"
    say(f"quantizing {source.name} to {options.quant.upper()} with llama.cpp")
    quantize(source, target, options.quant, options.n_threads)
    return target


def _check_vocabulary(teacher: Path, proxy: Path) -> None:
    """Raises VocabularyError, naming the first token, unless both number their tokens alike, as the runtime asks."""
    lib = native.library()
    with closing(open_vocabulary(teacher)) as theirs, closing(open_vocabulary(proxy)) as ours:
        native.check(lib.adl_vocab_shared(ctypes.byref(native.llama_table(lib)), theirs.model, ours.model))


def _note(base: Path, options: Options) -> str | None:
    """What the proxy's type costs a pair that runs on this CPU."""
    wide = is_mostly_wide(QUALITIES[options.quality], options.carriers, str(options.params), options.format)
    return None if wide or options.n_gpu_layers else Batching.of(GGUFHeader(base).tensors).note


def _capabilities(base: Path, options: Options) -> list[Capability]:
    n_ctx = context_length(base, options.n_ctx)
    parse_mix(options.mix, list(options.traces))  # before minutes of work
    with closing(open_vocabulary(base)) as vocabulary:
        encoder = TraceEncoder(vocabulary, raw=options.raw)
        return [Capability.read(name, path, encoder, n_ctx, options.loss_on) for name, path in options.traces.items()]


def _open(base: Path, options: Options) -> Proxy:
    with tqdm(desc=f"reading {base.name}", unit="tensor", delay=1) as bar:
        return Proxy(base, n_threads=options.n_threads, device=_device(options.device), progress=bar.update)


def _device(name: str) -> str:
    """What `--device` means on this machine."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise InputError(f"--device {name}: PyTorch finds none here; say auto, or install a PyTorch that has it")
    return name


def _least_fidelity(options: Options) -> float:
    return QUALITIES[options.quality].least_fidelity


def _check_fidelity(found: Sweep, options: Options) -> None:
    """Refuses a bundle that would mislead the sampling."""
    best, least = found.best, _least_fidelity(options)
    if not (best.median >= least or options.force):
        auto = "" if options.eps is None else "--eps auto, "
        more = "" if options.quality == "exact" else "--quality exact, "
        raise ConversionError(
            f"fidelity {best.median:.3f} is under {least}: Δ would mislead the sampling. Try {auto}{more}"
            "a wider proxy (--quant Q8_0 or F16 from a float GGUF); --force writes the bundle all the same"
        )
    if not found.scales[best.epsilon] > 0:
        raise ConversionError("Δ is zero on every plausible token of the held-out traces; give other traces")
