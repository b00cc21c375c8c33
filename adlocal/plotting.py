"""matplotlib, which only plots need: imported when one is asked for, without pyplot and its global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import AdlocalError
from .files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colour-blind-safe: what lowers the student's loss or was measured, what raises it or was chosen, and neither.
BLUE, ORANGE, GREY = "#2f7fc9", "#e07b2a", "#6b7280"
_DPI = 150


def require(option: str) -> None:
    """Refuses, before the work, a plot that could not be drawn.

    Raises:
        AdlocalError: matplotlib is not installed, or does not load.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise AdlocalError(f"{option} needs matplotlib, which {reason}; run: pip install 'adlocal[plot]'") from None


def figure(
    n_panels: int, width: float = 8.0, height: float = 3.0, *, beside: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `n_panels` panels, each `width` x `height` inches: one below the other, or beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = (1, n_panels) if beside else (n_panels, 1)
    fig = Figure(figsize=(width * columns, height * rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(fig)
    panels: list[Axes] = [fig.add_subplot(rows, columns, i + 1) for i in range(n_panels)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=GREY, alpha=0.2)
    return fig, panels


def save(fig: Figure, path: Path) -> None:
    """Writes a PNG.

    Raises:
        AdlocalError: it cannot be written; an older file is left as it was.
    """
    with written_whole(path) as partial:
        fig.savefig(partial, format="png")
