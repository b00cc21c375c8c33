"""Pictures of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adlocal import plotting

from .results import CHOSEN, METHOD, RANDOMS, Result, accuracy, costs, given, mean

# What is compared at every cost, in Okabe and Ito's colours, which colour-blind people can tell apart, and a marker.
# More than these no reader tells apart: other defences are rows of their own in the picture of all.
LOOKS = {
    "clean": ("#000000", "o"),
    "guard alone": ("#e69f00", "s"),
    "temperature": ("#009e73", "D"),
    "antidistillation": ("#56b4e9", "^"),
    METHOD: ("#0072b2", "v"),
    "permuted": ("#cc79a7", "P"),
    "permuted, guarded": ("#d55e00", "X"),
    RANDOMS: (plotting.GREY, "<"),
    CHOSEN: ("#661100", "*"),
}
_SMOOTHED = 20  # steps


def tradeoff(results: Sequence[Result], path: Path) -> None:
    """Teacher accuracy across, student accuracy up, a line a defence; lower and to the right is better."""
    naive = [r for r in results if r.attack == "naive"]
    fig, (axes,) = plotting.figure(1, 9.0, 5.6)
    axes.grid(axis="both", color=plotting.GREY, alpha=0.2)
    for name, own in _families(naive).items():
        _line(axes, name, own)
    for text, at in _references(results).items():
        axes.axhline(at, color=plotting.GREY, linestyle=":", linewidth=1)
        axes.annotate(
            text, (1.01, at), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=plotting.GREY
        )  # outside: bars may be anywhere within
    axes.set_xlabel("teacher accuracy, %")
    axes.set_ylabel("student accuracy, % (bars: 95%)")
    fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    plotting.save(fig, path)


def _families(naive: Sequence[Result]) -> dict[str, list[Result]]:
    """Students of the defences that are compared at every cost; the guarded random directions are one family."""
    found = {name: [r for r in naive if r.family == name] for name in LOOKS}
    return {name: own for name, own in found.items() if own}


def _references(results: Sequence[Result]) -> dict[str, float]:
    """What a student has at most and at least, in percent."""
    clean = [r for r in results if (r.defence, r.attack) == ("clean", "naive")]
    found = {"before fine-tuning": 100 * given(results, "base")}
    return {**found, "clean traces": 100 * mean(clean)} if clean else found


def _line(axes: Any, name: str, own: Sequence[Result]) -> None:
    points = []
    for key in dict.fromkeys((r.cost, r.defence) for r in own):
        group = [r for r in own if (r.cost, r.defence) == key]
        at = accuracy(group)
        points.append((100 * float(np.mean([r.teacher for r in group])), 100 * at.value, 100 * at.low, 100 * at.high))
    x, y, low, high = (np.array(values) for values in zip(*sorted(points), strict=True))
    colour, marker = LOOKS[name]
    axes.errorbar(
        x, y, (np.maximum(y - low, 0), np.maximum(high - y, 0)), label=name, color=colour, marker=marker,
        linestyle="none" if name == RANDOMS else "-", linewidth=1.2, markersize=6, elinewidth=0.8, capsize=2,
        zorder=3 if name == METHOD else 2,
    )  # fmt: skip


def defences(results: Sequence[Result], path: Path) -> None:
    """Student accuracy under every defence, a naive student, cost by cost, with intervals."""
    rows: list[tuple[str, list[Result]]] = []
    for cost in (None, *reversed(costs(results))):
        at = [r for r in results if (r.cost, r.attack) == (cost, "naive")]
        groups = {r.defence: [other for other in at if other.defence == r.defence] for r in at}
        rows += [(own[0].label, own) for own in sorted(groups.values(), key=mean, reverse=True)]
    _dots(results, rows, path)


def attackers(results: Sequence[Result], path: Path) -> None:
    """Student accuracy of every attack on every defence, defence by defence and the naive one first, with intervals."""
    attacked = dict.fromkeys(r.label for r in results if r.attack != "naive")
    rows: list[tuple[str, list[Result]]] = []
    for label in attacked:
        of = [r for r in results if r.label == label]
        attacks = sorted(dict.fromkeys(r.attack for r in of), key=lambda attack: attack != "naive")
        rows += [(f"{label}: {attack}", [r for r in of if r.attack == attack]) for attack in attacks]
    _dots(results, rows, path)


def _dots(results: Sequence[Result], rows: Sequence[tuple[str, list[Result]]], path: Path) -> None:
    """A dot and its interval a row, the first on top."""
    fig, (axes,) = plotting.figure(1, 8.5, 1.3 + 0.24 * len(rows))
    for row, (_, own) in enumerate(reversed(rows)):
        at = accuracy(own)
        colour, marker = LOOKS.get(own[0].family, (plotting.GREY, "o"))
        axes.plot([100 * at.low, 100 * at.high], [row, row], color=colour, linewidth=1.5)
        axes.plot([100 * at.value], [row], marker, color=colour, markersize=5.5)
    axes.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    for text, at_percent in _references(results).items():
        axes.axvline(at_percent, color=plotting.GREY, linestyle=":", linewidth=1)
        axes.annotate(
            text, (at_percent, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=8, ha="center", color=plotting.GREY,
        )  # fmt: skip
    axes.set_xlabel("student accuracy, % (lines: 95%)")
    plotting.save(fig, path)


def losses(results: Sequence[Result], path: Path) -> None:
    """Training loss of the naive students of the first seed, a running mean; not to be compared across defences."""
    first, cost = min(r.seed for r in results), max(costs(results), default=None)
    shown = [r for r in results if (r.seed, r.attack) == (first, "naive") and r.cost in (None, cost)]
    fig, (axes,) = plotting.figure(1, 9.0, 4.8)
    for name, own in _families(shown).items():
        for j, r in enumerate(own):
            n = min(_SMOOTHED, len(r.losses))
            smooth = np.convolve(r.losses, np.ones(n) / n, mode="valid")
            colour, marker = LOOKS[name]
            axes.plot(
                np.arange(len(smooth)) + n / 2, smooth, color=colour, linewidth=0.7 if name == RANDOMS else 1.3,
                marker=marker, markersize=4, markevery=0.1, label=None if j else name,
                zorder=1 if name == RANDOMS else 2,
            )  # fmt: skip
    axes.set_xlabel(f"step of fine-tuning (seed {first}, mean of {_SMOOTHED} steps)")
    axes.set_ylabel("loss, nats a token")
    fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    plotting.save(fig, path)
