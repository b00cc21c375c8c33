"""The plot of a calibration, drawn by matplotlib where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .. import plotting
from ..bundle.calibration import Calibration
from ..files import check_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVE, _MEASURED, _CHOSEN = plotting.GREY, plotting.BLUE, plotting.ORANGE


def check(path: Path) -> None:
    """Finds out before long work whether a plot can be drawn there.

    Raises:
        AdlocalError: matplotlib is not installed.
        InputError: the file cannot be written, or its name does not end in .png.
    """
    plotting.require("--plot")
    check_target("--plot", path, ".png")


def draw(calibration: Calibration, path: Path) -> None:
    """Strength against KL, dose and, where answers were given, accuracy, as a PNG.

    Raises:
        AdlocalError: the file cannot be written.
    """
    c = calibration
    n = 3 if c.measured_accuracy else 2
    figure, axes = plotting.figure(n, 4.6, 4.2, beside=True)
    for ax in axes[1:]:
        ax.sharex(axes[0])
    _panel(axes[0], c, "KL to the teacher, nats a token", c.measured_kl, c.curve_kl)
    _panel(axes[1], c, "dose a token (Δ − E[Δ])", c.measured_dose, c.curve_dose)
    if c.budget_kind == "kl":
        axes[0].axhline(c.budget, color=_CHOSEN, linewidth=1, linestyle="--", label=f"budget {c.budget:g}")
    if n == 3:
        percent = [100 * accuracy for accuracy in c.measured_accuracy]
        _panel(axes[2], c, "accuracy, %", percent, None)
        axes[2].set_ylim(-4, 104)
        if c.budget_kind == "accuracy-drop":
            floor = percent[0] - c.budget
            axes[2].axhline(
                floor, color=_CHOSEN, linewidth=1, linestyle="--", label=f"budget, {c.budget:g} points down"
            )
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"strength {c.strength:.3g} nats at guard {c.guard:g}  "
        f"({c.n_prompts} prompts, {c.n_tokens:,} tokens, temperature {c.temperature:g})",
        fontsize=11,
    )
    plotting.save(figure, path)


def _panel(ax: Axes, c: Calibration, label: str, measured: list[float], curve: list[float] | None) -> None:
    chosen = measured[c.measured_strength.index(c.strength)]
    most = max(2.0, 4 * max(c.measured_strength))  # beyond it the curve dwarfs what was measured
    if curve is not None:
        shown = [(s, value) for s, value in zip(c.curve_strength, curve, strict=True) if s <= most]
        ax.plot(*zip(*shown, strict=True), color=_CURVE, linewidth=1.5, label="along the plain text")
    ax.plot(c.measured_strength, measured, "o", color=_MEASURED, markersize=5, label="protected text")
    ax.plot([c.strength], [chosen], "o", markerfacecolor="none", color=_CHOSEN, markersize=12, label="chosen")
    ax.set_xscale("symlog", linthresh=0.25, linscale=0.5, base=2)  # strengths double, and the plain teacher is at 0
    ticks = [tick for tick in (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if tick <= most]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.margins(x=0.04)
    ax.set_xlabel("strength, nats")
    ax.set_ylabel(label)
