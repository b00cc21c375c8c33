"""`adlocal inspect`: what a bundle is, and whether its halves fit together."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .bundle import MINUS_NAME, PLUS_NAME, Bundle, verify


def run(args: argparse.Namespace) -> None:
    """Reads the whole bundle, then prints what it is."""
    bundle = Bundle.open(args.bundle)
    sizes = {name: (Path(args.bundle) / name).stat().st_size for name in (PLUS_NAME, MINUS_NAME)}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="verifying", file=sys.stderr, delay=1) as bar:
        verify(args.bundle, bar.update)
    print(json.dumps(as_json(bundle, sizes)) if args.json else describe(bundle, sizes))


def as_json(bundle: Bundle, sizes: dict[str, int]) -> dict[str, Any]:
    """Every stored key under its field's name, and what follows from them."""
    derived = {"bytes": sizes, "paper_lambda_at_strength_1": bundle.paper_lambda(1.0), "halves_fit": True}
    return {**dataclasses.asdict(bundle), **derived}


def describe(bundle: Bundle, sizes: dict[str, int]) -> str:
    """A page for people."""
    return "\n".join(
        [
            f"bundle        {bundle.id[:16]}  (format {bundle.format_version}, {bundle.converter})",
            "halves        fit together: same bundle, opposite signs, bulk identical, carriers as written",
            *(f"{name:13} {size:,} bytes, {size / bundle.base_bytes:.3f} of the base" for name, size in sizes.items()),
            f"gradient      ‖g‖ = {bundle.gradient_norm:.4f} at a loss of {bundle.gradient_loss:.4f} nats a token, "
            f"from {bundle.gradient_traces} traces ({bundle.gradient_tokens:,} tokens), parameters: {bundle.params}",
            f"carriers      {len(bundle.carriers)} tensors, {bundle.carrier_fraction:.1%} of the linear weights, "
            f"{bundle.carrier_energy:.0%} of ‖g‖²",
            f"fidelity      median cosine {bundle.fidelity_median:.4f}, 10th percentile {bundle.fidelity_p10:.4f}, "
            f"slope {bundle.fidelity_slope:.3f} over {bundle.fidelity_positions} held-out positions"
            + ("  FORCED: under the fidelity that convert asks for" if bundle.forced else ""),
            "sweep         ε           median  p10     slope",
            *_sweep_lines(bundle),
            f"strength      1 nat is λ = {bundle.lam(1.0):.4g} (delta_scale {bundle.delta_scale:.4g} at guard "
            f"{bundle.guard:g}); the paper's λ = {bundle.paper_lambda(1.0):.3g} / τ",
            f"base          sha256 {bundle.base_sha256[:16]}, traces sha256 {bundle.traces_sha256[:16]}",
        ]
    )


def _sweep_lines(bundle: Bundle) -> list[str]:
    rows = zip(bundle.sweep_epsilon, bundle.sweep_median, bundle.sweep_p10, bundle.sweep_slope, strict=True)
    return [
        f"{'*' if epsilon == bundle.epsilon else ' ':>13} {epsilon:<12.4g}  {median:.4f}  {p10:.4f}  {slope:.3f}"
        for epsilon, median, p10, slope in rows
    ]
