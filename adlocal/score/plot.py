"""`adlocal score --plot`: how the doses of traces and of tokens are spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import plotting
from .histogram import Values, histogram
from .trace_score import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_plot(path: Path, scores: Sequence[Score]) -> None:
    """Writes a PNG of two histograms: dose per token over the traces, dose over their target tokens.

    Raises:
        AdlocalError: it cannot be written, or matplotlib is missing; an older file is left as it was.
    """
    fig, (traces, tokens) = plotting.figure(2)
    _draw(traces, np.array([s.dose_per_token for s in scores]), "traces")
    traces.set_xlabel("dose per token of a trace")
    _draw(tokens, np.concatenate([s.target_doses for s in scores]), "tokens")
    tokens.set_xlabel("dose of a token, Δ − E[Δ]; the outermost bars count what lies beyond")
    plotting.save(fig, path)


def _draw(axes: Axes, values: Values, unit: str) -> None:
    counts, edges = histogram(values)
    colours = [plotting.BLUE if left < 0 else plotting.ORANGE for left in edges[:-1]]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.5)
    mean = float(values.mean())
    axes.axvline(mean, color="black", linewidth=1, linestyle="--")
    axes.set_title(f"{len(values):,} {unit}, mean {mean:+.3g} (broken line)", loc="left", fontsize="medium")
    axes.locator_params(axis="y", integer=True)
    axes.set_ylabel(unit)
