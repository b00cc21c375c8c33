"""`adlocal inspect`: what a bundle is, and whether its files fit together."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from ..bundle import ADAPTER, Bundle
from ..bundle.calibration import Calibration
from ..bundle.verify import verified_files, verify
from ..llamacpp.batching import Batching


def run(args: argparse.Namespace) -> None:
    """Reads the whole bundle, then prints what it is."""
    bundle = Bundle.open(args.bundle)
    sizes = sizes_of(bundle)
    total = sum(path.stat().st_size for path in verified_files(bundle))
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", file=sys.stderr, delay=1) as bar:
        verify(bundle, bar.update)
    calibration = Calibration.open(bundle)
    print(json.dumps(as_json(bundle, sizes, calibration)) if args.json else describe(bundle, sizes, calibration))


def sizes_of(bundle: Bundle) -> dict[str, int]:
    """Bytes of each file, by its name."""
    return {path.name: path.stat().st_size for path in bundle.files}


def as_json(bundle: Bundle, sizes: dict[str, int], calibration: Calibration | None = None) -> dict[str, Any]:
    """Every stored key under its field's name, and what follows from them, on this CPU too."""
    derived = {"bytes": sizes, "paper_lambda_at_strength_1": bundle.paper_lambda(1.0), "files_fit": True}
    here = {"batching": asdict(Batching.of(bundle.headers()[0].tensors))}
    stored = calibration and calibration.as_dict()
    return {**bundle.as_dict(), **derived, **here, "calibration": stored}


def describe(bundle: Bundle, sizes: dict[str, int], calibration: Calibration | None = None) -> str:
    """A page for people."""
    return "\n".join(
        [
            f"bundle        {bundle.id[:16]}  ({bundle.format}, {bundle.quality}, format {bundle.format_version}, "
            f"{bundle.converter})",
            f"files         fit together: {_fit(bundle)}",
            *(f"{name:13} {size:,} bytes, {size / bundle.base_bytes:.3f} of the base" for name, size in sizes.items()),
            f"batches       {_batching(Batching.of(bundle.headers()[0].tensors))}",
            f"gradient      ‖g‖ = {bundle.gradient_norm:.4f} at a loss of {bundle.gradient_loss:.4f} nats a token, "
            f"from {bundle.gradient_traces} traces ({bundle.gradient_tokens:,} tokens)",
            *_capability_lines(bundle),
            f"parameters    {bundle.params}"
            + (f", but for {', '.join(bundle.params_excluded)}" if bundle.params_excluded else ""),
            f"carriers      {len(bundle.carriers)} tensors, {bundle.carrier_fraction:.1%} of the linear weights, "
            f"{bundle.carrier_energy:.0%} of ‖g‖²"
            + (f", in an adapter of rank {bundle.adapter_rank} or less" if bundle.format == ADAPTER else ""),
            f"fidelity      median cosine {bundle.fidelity_median:.4f}, 10th percentile {bundle.fidelity_p10:.4f}, "
            f"slope {bundle.fidelity_slope:.3f} over {bundle.fidelity_positions} held-out positions"
            + ("  FORCED: under the fidelity that convert asks for" if bundle.forced else ""),
            "sweep         ε           median  p10     slope",
            *_sweep_lines(bundle),
            f"strength      1 nat is λ = {bundle.lam(1.0):.4g} (delta_scale {bundle.delta_scale:.4g} at guard "
            f"{bundle.guard:g}); the paper's λ = {bundle.paper_lambda(1.0):.3g} / τ",
            f"calibration   {calibration.summary() if calibration else 'none: strength is 1 by default'}",
            f"base          sha256 {bundle.base_sha256[:16]}",
        ]
    )


def _fit(bundle: Bundle) -> str:
    if bundle.format == ADAPTER:
        return "same bundle, adapter as written (the weights of the base are not read)"
    return "same bundle, opposite signs, bulk identical, carriers as written"


def _batching(found: Batching) -> str:
    if found.batched:
        return f"most weights are {found.type}, for which llama.cpp has a batched CPU kernel here"
    return found.note or f"most weights are {found.type}; what llama.cpp has for it on this CPU is not known"


def _capability_lines(bundle: Bundle) -> list[str]:
    """A line a capability; where there are several, the cosines of its gradient with theirs at the end."""
    rows = zip(
        bundle.capability_names,
        bundle.capability_weights,
        bundle.capability_norms,
        bundle.capability_losses,
        bundle.capability_traces,
        bundle.capability_sha256,
        strict=True,
    )
    k = len(bundle.capability_names)
    cosines = [bundle.capability_cosines[i * k : (i + 1) * k] for i in range(k)] if k > 1 else [[]] * k
    lines = [
        f"  {name:12}  {weight:<6.3g}  {norm:<9.4g}  {loss:<7.4f}  {n:<6}  {sha256[:16]}  "
        + " ".join(f"{cosine:+.3f}" for cosine in row)
        for (name, weight, norm, loss, n, sha256), row in zip(rows, cosines, strict=True)
    ]
    title = f"{'capabilities':14}  weight  ‖g‖        loss     traces  {'sha256':16}  {'cosines' if k > 1 else ''}"
    return [title.rstrip(), *(line.rstrip() for line in lines)]


def _sweep_lines(bundle: Bundle) -> list[str]:
    rows = zip(bundle.sweep_epsilon, bundle.sweep_median, bundle.sweep_p10, bundle.sweep_slope, strict=True)
    return [
        f"{'*' if epsilon == bundle.epsilon else ' ':>13} {epsilon:<12.4g}  {median:.4f}  {p10:.4f}  {slope:.3f}"
        for epsilon, median, p10, slope in rows
    ]
