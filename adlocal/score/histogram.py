"""Histograms of doses: bins for every drawing, and the drawing that a page holds."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
_MOST_BINS = 40
#: Share of the values, on either side, that may lie beyond the drawn range.
_BEYOND = 0.005
# The drawing, in its own units: the whole, and the room above the bars, below them, and at either side.
_WIDTH, _HEIGHT, _ABOVE, _BELOW, _SIDE = 480, 170, 18, 22, 16


def histogram(values: Values) -> tuple[npt.NDArray[np.intp], Values]:
    """Counts and edges of bins, forty or, for few values, less, that take in every value. Zero is an edge.

    The range leaves out the outermost 0.5% on either side, so that one odd token does not squeeze all others into a
    bin; the outermost bins count what lies beyond it.

    Args:
        values: (n,) finite numbers, n at least 1.
    """
    low, high = (float(q) for q in np.quantile(values, [_BEYOND, 1 - _BEYOND]))
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / min(_MOST_BINS, 8 + math.isqrt(len(values))) or 1.0
    first = math.floor(low / width)
    edges: Values = width * np.arange(first, max(math.ceil(high / width), first + 1) + 1, dtype=np.float64)
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)[0]
    return counts.astype(np.intp), edges


def svg_histogram(values: Values, caption: str, unit: str) -> str:
    """A figure with an inline SVG: bars, their counts as tooltips, the mean as a broken line, a few ticks."""
    counts, edges = histogram(values)
    mean, floor = float(values.mean()), _HEIGHT - _BELOW
    at = min(max(_x(mean, edges), _SIDE), _WIDTH - _SIDE)
    side = "start" if at < _WIDTH / 2 else "end"
    return (
        f'<figure><figcaption>{caption}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{caption}: mean {mean:+.3g} over {len(values):,} {unit}">\n'
        f"{_bars(counts, edges, unit)}\n{_ticks(edges)}\n"
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{floor}" y2="{floor}"/>'
        f'<line class="mean" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{floor}"/>'
        f'<text x="{at + (6 if side == "start" else -6):.1f}" y="12" text-anchor="{side}">mean {mean:+.3g}, '
        f"{len(values):,} {unit}</text>\n</svg></figure>\n"
    )


def _x(value: float, edges: Values) -> float:
    return _SIDE + (_WIDTH - 2 * _SIDE) * (value - float(edges[0])) / float(edges[-1] - edges[0])


def _bars(counts: npt.NDArray[np.intp], edges: Values, unit: str) -> str:
    floor = _HEIGHT - _BELOW
    heights = (floor - _ABOVE) * counts / counts.max()
    width = _x(float(edges[1]), edges) - _x(float(edges[0]), edges) - 0.7  # a gap between neighbours
    bars = zip(counts.tolist(), heights.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return "".join(
        f'<rect class="{"low" if left < 0 else "high"}" x="{_x(left, edges):.1f}" y="{floor - height:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}">'
        f"<title>{count:,} {unit} from {left:+.3g} to {right:+.3g}</title></rect>"
        for count, height, left, right in bars
        if count
    )


def _ticks(edges: Values) -> str:
    """Labels at multiples of 1, 2 or 5 times a power of ten, at least three of them and at most eight."""
    low, high = float(edges[0]), float(edges[-1])
    decade = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(decade * m for m in (10, 5, 2, 1) if (high - low) / (decade * m) >= 3)
    labels = [(n * step, f"{n * step:+.3g}" if n else "0") for n in range(math.ceil(low / step), int(high / step) + 1)]
    return "".join(
        f'<text x="{_x(value, edges):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{label}</text>'
        for value, label in labels
    )
