"""From a proxy student and traces to a bundle."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import adlocal
from adlocal._gguf import GGUFHeader
from adlocal.bundle import DEFAULT_GUARD, FORMAT_VERSION, MINUS_NAME, PLUS_NAME, Bundle
from adlocal.errors import ConversionError, InputError, ModelError
from adlocal.pair import ProxyPair, context_params
from adlocal.traces import EncodedTrace, TraceEncoder, encode_all, open_vocabulary, read_traces, sha256

from .fidelity import TOP_K, Fidelity, Reference, delta_scale, sweep
from .gradient import Gradient
from .perturb import Selection, bundle_id, move_carriers, write_half
from .proxy import Proxy, check_architecture
from .quantize import quantize

LEAST_FIDELITY = 0.90


@dataclass(frozen=True)
class Options:
    """What `adlocal convert` takes.

    Attributes:
        proxy: GGUF of the proxy student.
        traces: JSON lines; the last few are held out to measure fidelity.
        out: directory of the bundle.
        quant: llama.cpp type to requantize the proxy to first, or None.
        carriers: largest share of the linear weights that carry the perturbation.
        eps: step along ĝ, or None to sweep.
        raw: concatenate string pairs instead of using the chat template.
        n_ctx: longest trace in tokens; longer ones are cut.
        n_threads: for PyTorch and llama.cpp.
        n_gpu_layers: for llama.cpp, while it measures fidelity.
        force: write a bundle whose fidelity is under LEAST_FIDELITY.
        overwrite: replace a bundle that lies in `out`.
    """

    proxy: Path
    traces: Path
    out: Path
    quant: str | None = None
    carriers: float = 0.05
    eps: float | None = None
    raw: bool = False
    n_ctx: int = 2048
    n_threads: int = os.cpu_count() or 1
    n_gpu_layers: int = 0
    force: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Traces:
    """Encoded traces, split: `learned` give the gradient, `held_out` measure fidelity and delta_scale."""

    learned: list[EncodedTrace]
    held_out: list[EncodedTrace]
    n_cut: int
    n_skipped: int


def convert(options: Options, say: Callable[[str], None]) -> Bundle:
    """Writes a bundle to `options.out` and returns what it says of itself.

    Args:
        options: see `Options`.
        say: told each line of the report.

    Raises:
        InputError: proxy, traces or an option cannot be used.
        ConversionError: gradient or fidelity are no good, or the bundle cannot be written. Nothing is left behind.
    """
    _check(options)
    torch.set_num_threads(options.n_threads)
    traces = _encode(options)
    say(_describe(traces))
    try:
        with _staging(options.out) as staging:
            base = _base(options, staging, say)
            bundle = _build(base, traces, options, staging, say)
            _publish(staging, options.out)
    except OSError as error:
        reason = error.strerror or f"{error}; is the disk full?"  # numpy's short writes carry no reason
        raise ConversionError(f"cannot write the bundle to {options.out}: {reason}") from None
    say(f"wrote {options.out}")
    return bundle


def _build(base: Path, traces: Traces, options: Options, staging: Path, say: Callable[[str], None]) -> Bundle:
    with tqdm(total=3, desc=f"reading {base.name}", unit="step") as bar:
        proxy = Proxy(base, bar.update)
    with tqdm(total=len(traces.learned), desc="gradient", unit="trace") as bar:
        gradient = Gradient.of(proxy.model, traces.learned, _counting(bar, "loss"))
    say(f"loss {gradient.loss:.4f} nats a token, ‖g‖ = {gradient.norm:.4f}")
    selection = Selection.of(proxy, gradient, options.carriers)
    say(
        f"carriers: {len(selection.carriers)} tensors with {selection.fraction:.1%} of the linear weights "
        f"and {selection.energy:.0%} of ‖g‖²"
    )
    references = [
        Reference.of(proxy, gradient, t) for t in tqdm(traces.held_out, desc="exact derivative", unit="trace")
    ]
    provisional = _provisional(base, gradient, selection, traces, options)
    measured, scales = _sweep(provisional, proxy, selection, references, options, staging, say)
    best = max(measured, key=lambda fidelity: fidelity.median)
    _check_fidelity(best, options)
    bundle = _final(provisional, best, scales[best.epsilon], measured, selection)
    for name, sign in ((PLUS_NAME, 1), (MINUS_NAME, -1)):
        write_half(staging / name, proxy.reader, selection.carriers, sign * best.epsilon, bundle.metadata(sign))
    Bundle.open(staging)
    return bundle


def _check(options: Options) -> None:
    if not 0 <= options.carriers <= 1:
        raise InputError(f"--carriers {options.carriers}: give a share of the linear weights, 0 to 1, for example 0.05")
    if options.eps is not None and not (np.isfinite(options.eps) and options.eps > 0):
        raise InputError(f"--eps {options.eps}: give a positive step, or auto")
    if options.n_ctx < 2:
        raise InputError(f"--ctx-size {options.n_ctx}: give at least 2 tokens")
    if (options.out / PLUS_NAME).exists() and not options.overwrite:
        raise InputError(f"{options.out} holds a bundle already; give another --out, or say --overwrite")
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"{options.out} is a file; give a directory for --out")


def _encode(options: Options) -> Traces:
    read = read_traces(options.traces)
    header = GGUFHeader(options.proxy)
    architecture = header.get("general.architecture", "none")
    check_architecture(options.proxy, architecture)
    if header.get("adlocal.format_version") is not None:
        raise ModelError(f"{options.proxy} is itself half of a bundle; give the proxy's own GGUF")
    vocabulary = open_vocabulary(options.proxy)
    n_ctx = min(options.n_ctx, header.n_ctx_train or options.n_ctx)
    encoded, n_cut, n_skipped = encode_all(read, TraceEncoder(vocabulary, raw=options.raw), n_ctx)
    if len(encoded) < 2:
        raise InputError(f"{options.traces}: {len(encoded)} usable trace; give at least 2, one is held out; better 50")
    n_held_out = min(4, max(1, len(encoded) // 5))
    return Traces(encoded[:-n_held_out], encoded[-n_held_out:], n_cut, n_skipped)


def _describe(traces: Traces) -> str:
    n_tokens = sum(t.n_targets for t in traces.learned)
    line = f"{len(traces.learned)} traces with {n_tokens:,} tokens to learn from, {len(traces.held_out)} held out"
    cut = f"; {traces.n_cut} cut to the context" if traces.n_cut else ""
    return line + cut + (f"; {traces.n_skipped} skipped, their prompts fill it" if traces.n_skipped else "")


def _base(options: Options, staging: Path, say: Callable[[str], None]) -> Path:
    if options.quant is None:
        return options.proxy
    target = staging / f"{options.proxy.stem}.{options.quant.upper()}.gguf"
    say(f"quantizing {options.proxy.name} to {options.quant.upper()} with llama.cpp")
    quantize(options.proxy, target, options.quant, options.n_threads)
    return target


def _sweep(
    provisional: Bundle,
    proxy: Proxy,
    selection: Selection,
    references: Sequence[Reference],
    options: Options,
    staging: Path,
    say: Callable[[str], None],
) -> tuple[list[Fidelity], dict[float, float]]:
    """Fidelity and delta_scale of each ε tried, through llama.cpp on the backend that will run the pair."""
    plus, minus = staging / "sweep-plus.gguf", staging / "sweep-minus.gguf"
    for path in (plus, minus):
        write_half(path, proxy.reader, selection.carriers, 0.0, [])
    scales: dict[float, float] = {}
    longest = max(len(reference.trace.tokens) for reference in references)
    params = context_params(n_ctx=longest, n_threads=options.n_threads)

    def measure(epsilon: float) -> Fidelity:
        move_carriers(plus, selection.carriers, epsilon)
        move_carriers(minus, selection.carriers, -epsilon)
        moved = dataclasses.replace(provisional, epsilon=epsilon)
        with ProxyPair.load(plus, minus, moved, params, options.n_gpu_layers) as pair:
            fidelity = Fidelity.measure(pair, references)
            scales[epsilon] = delta_scale(pair, references, DEFAULT_GUARD)
        say(f"{epsilon:10.4g}  {fidelity.median:.4f}  {fidelity.p10:.4f}  {fidelity.slope:.3f}")
        return fidelity

    say("Δ through llama.cpp against the exact derivative:")
    say("         ε  median  p10     slope")
    steps = sweep(_start(references), measure) if options.eps is None else iter([measure(options.eps)])
    measured = list(tqdm(steps, desc="sweep", unit="ε"))
    for path in (plus, minus):
        path.unlink()
    return measured, scales


def _start(references: Sequence[Reference]) -> float:
    """The ε that moves a top token's logit by about one nat, where the linear range begins to end."""
    rms = float(np.sqrt(np.mean([np.mean(np.square(reference.derivative)) for reference in references])))
    if not rms > 0:
        raise ConversionError("the exact derivative is zero on every held-out trace; give other traces")
    return 1.0 / rms


def _check_fidelity(best: Fidelity, options: Options) -> None:
    if not best.median >= LEAST_FIDELITY and not options.force:
        more = f"--carriers {min(1.0, 2 * options.carriers or 0.05):g}, " if options.carriers < 1 else ""
        auto = "" if options.eps is None else "--eps auto, "
        raise ConversionError(
            f"fidelity {best.median:.3f} is under {LEAST_FIDELITY}: Δ would mislead the sampling. Try {more}{auto}"
            "a wider proxy (--quant Q8_0 or F16 from a float GGUF); --force writes the bundle all the same"
        )


def _provisional(base: Path, gradient: Gradient, selection: Selection, traces: Traces, options: Options) -> Bundle:
    """The bundle's metadata with everything that is known before the sweep; what is not is zero or empty."""
    return Bundle(
        format_version=FORMAT_VERSION,
        id="",
        converter=f"adlocal {adlocal.__version__}",
        epsilon=0.0,
        gradient_norm=gradient.norm,
        gradient_loss=gradient.loss,
        gradient_traces=len(traces.learned),
        gradient_tokens=sum(t.n_targets for t in traces.learned),
        delta_scale=0.0,
        guard=DEFAULT_GUARD,
        params="all",
        carriers=[carrier.name for carrier in selection.carriers],
        carrier_fraction=selection.fraction,
        carrier_energy=selection.energy,
        plus_sha256="",
        minus_sha256="",
        fidelity_median=0.0,
        fidelity_p10=0.0,
        fidelity_slope=0.0,
        fidelity_positions=0,
        fidelity_top_k=TOP_K,
        forced=False,
        sweep_epsilon=[],
        sweep_median=[],
        sweep_p10=[],
        sweep_slope=[],
        base_sha256=sha256(base),
        base_bytes=base.stat().st_size,
        traces_sha256=sha256(options.traces),
    )


def _final(
    provisional: Bundle, best: Fidelity, scale: float, measured: Sequence[Fidelity], selection: Selection
) -> Bundle:
    if not scale > 0:
        raise ConversionError("Δ is zero on every plausible token of the held-out traces; give other traces")
    ordered = sorted(measured, key=lambda fidelity: fidelity.epsilon)
    bundle = dataclasses.replace(
        provisional,
        epsilon=best.epsilon,
        delta_scale=scale,
        plus_sha256=selection.sha256(best.epsilon),
        minus_sha256=selection.sha256(-best.epsilon),
        fidelity_median=best.median,
        fidelity_p10=best.p10,
        fidelity_slope=best.slope,
        fidelity_positions=best.n_positions,
        forced=not best.median >= LEAST_FIDELITY,
        sweep_epsilon=[f.epsilon for f in ordered],
        sweep_median=[f.median for f in ordered],
        sweep_p10=[f.p10 for f in ordered],
        sweep_slope=[f.slope for f in ordered],
    )
    return dataclasses.replace(bundle, id=bundle_id(bundle))


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A private directory beside `out`, on the same file system, removed whatever happens."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out: Path) -> None:
    """Moves both halves into place. Should the second move fail, the ids differ and the runtime refuses the bundle."""
    out.mkdir(mode=0o700, exist_ok=True)
    for name in (PLUS_NAME, MINUS_NAME):
        os.replace(staging / name, out / name)


def _counting(bar: tqdm[object], label: str) -> Callable[[float], None]:
    def count(value: float) -> None:
        bar.update()
        bar.set_postfix({label: f"{value:.4f}"})

    return count
