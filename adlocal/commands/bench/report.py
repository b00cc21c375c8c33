"""What bench found, for machines and for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .gaps import Gaps, predicted
from .row import N_LARGE
from .shape import Shape
from .single import batch_of

#: What both runs of one sequence and of many tell of the pair.
_SHARES = ("share_of_choices", "passes_per_token", "proxy_tokens_per_token")


@dataclass(frozen=True)
class Bench:
    """What was measured. Times are seconds, medians over rounds.

    Attributes:
        settings: what it was measured with.
        single: the figures of `Single.measure`.
        gaps: when the pair was evaluated in it.
        many: the figures of `many.measure`, by number of sequences.
        shape: what the shape of batches changes.
        peak_bytes: resident memory with plain and protected model loaded; 0 where the system does not tell.
    """

    settings: Mapping[str, float]
    single: Mapping[str, float]
    gaps: Gaps
    many: Mapping[int, Mapping[str, float]]
    shape: Shape
    peak_bytes: int

    def report(self) -> dict[str, Any]:
        """Every figure and ratio. Ratios are of speeds, but for those named `time_of_...`."""
        return {
            "settings": dict(self.settings),
            "single": self._single(),
            "sequences": [{"n_sequences": n, **_of_bare(figures)} for n, figures in self.many.items()],
            "batch_shape": asdict(self.shape),
            "adjustment": self.single["adjustment"],
            "adjustment_numpy": self.single["adjustment_numpy"],
            "native_of_numpy": self.single["adjustment"] / self.single["adjustment_numpy"],
            "peak_bytes": self.peak_bytes,
        }

    def _single(self) -> dict[str, Any]:
        found, counts = self.single, self.gaps.counts
        costs = {size: found[batch_of(size)] for size in counts}
        expected = predicted(found["bare"], counts, costs, int(self.settings["n_predict"]))
        of_plain = {f"{name}_of_plain": found["plain"] / found[name] for name in ("protected", "full", "strength_0")}
        times = ("plain", "bare", "protected", "full", "strength_0")
        return {
            **{name: found[name] for name in times},
            **of_plain,
            "plain_of_bare": found["bare"] / found["plain"],
            **{name: found[name] for name in _SHARES},
            "rows_before_choice": self.gaps.rows_before_choice,
            "pair_decodes_before_choice": self.gaps.decodes_before_choice,
            "batches": [{"size": size, "n": n, "seconds": costs[size]} for size, n in counts.items()],
            "predicted": expected,
            "predicted_of_plain": found["bare"] / expected,
            "of_predicted": of_plain["protected_of_plain"] / (found["bare"] / expected),
        }


def _of_bare(figures: Mapping[str, float]) -> dict[str, float]:
    return {
        **figures,
        "protected_of_plain": figures["plain"] / figures["protected"],
        "time_of_bare_plain": figures["plain"] / figures["bare_plain"],
        "time_of_bare_protected": figures["protected"] / figures["bare_protected"],
    }


def describe(report: Mapping[str, Any]) -> str:
    """Tables for people."""
    parts = [_speeds(report["single"]), _pair(report["single"]), _batches(report["single"])]
    if report["sequences"]:
        parts.append(_sequences(report["sequences"]))
    return "\n\n".join("\n".join(lines) for lines in (*parts, _rest(report)))


def _speeds(single: Mapping[str, Any]) -> list[str]:
    names = {
        "plain": "plain llama_cpp.Llama.generate",
        "bare": "bare llama_decode of the teacher",
        "protected": "AntidistillationLlama",
        "predicted": "  predicted from batches and their costs",
        "full": "AntidistillationLlama, every row evaluated",
        "strength_0": "AntidistillationLlama, strength 0",
    }
    lines = [f"{'one sequence':44} {'tokens/s':>9} {'of plain':>9}"]
    for name, words in names.items():
        of_plain = single["predicted_of_plain"] if name == "predicted" else single["plain"] / single[name]
        lines.append(f"{words:44} {1 / single[name]:9.1f} {of_plain:9.3f}")
    return lines


def _pair(single: Mapping[str, Any]) -> list[str]:
    rows = {
        "protected, of what was predicted": f"{single['of_predicted']:9.3f}",
        "rows with a choice": f"{single['share_of_choices']:9.1%}",
        "batches of the pair per token": f"{single['passes_per_token']:9.3f}",
        "tokens in them per token": f"{single['proxy_tokens_per_token']:9.3f}",
        "rows before the first with a choice": f"{single['rows_before_choice']:9}",
        "batches of the pair before it": f"{single['pair_decodes_before_choice']:9}",
    }
    return [f"{words:44} {value}" for words, value in rows.items()]


def _batches(single: Mapping[str, Any]) -> list[str]:
    lines = [f"{'batch of the pair, tokens':44} {'times':>9} {'ms':>9}"]
    lines += [f"{each['size']:<44} {each['n']:9} {each['seconds'] * 1e3:9.2f}" for each in single["batches"]]
    return lines if single["batches"] else ["the pair was not evaluated: no row had a choice"]


def _sequences(sequences: Sequence[Mapping[str, Any]]) -> list[str]:
    titles = ("plain/s", "protected/s", "of plain", "choices", "batches", "plain/bare", "protected/bare")
    lines = [f"{'sequences':>9}" + "".join(f"  {title:>11}" for title in titles[:-1]) + f"  {titles[-1]}"]
    for each in sequences:
        cells = (
            f"{1 / each['plain']:.1f}",
            f"{1 / each['protected']:.1f}",
            f"{each['protected_of_plain']:.3f}",
            f"{each['share_of_choices']:.1%}",
            f"{each['passes_per_token']:.3f}",
            f"{each['time_of_bare_plain']:.3f}",
        )
        line = f"{each['n_sequences']:9}" + "".join(f"  {cell:>11}" for cell in cells)
        lines.append(f"{line}  {each['time_of_bare_protected']:14.3f}")
    return [
        *lines,
        "batches: of the pair, per token; plain/bare, protected/bare: time, of the decodes that were issued",
    ]


def _rest(report: Mapping[str, Any]) -> list[str]:
    shape = report["batch_shape"]
    lines = [
        f"a token at a time or in one batch: the teacher's logits move by {shape['logits']:.3g} nats (median of the "
        f"largest), Δ has cosine {shape['cosine']:.3f} (10th percentile {shape['cosine_p10']:.3f})"
    ]
    for name, key in (("native", "adjustment"), ("numpy", "adjustment_numpy")):
        lines.append(f"{f'adjustment of {N_LARGE} logits, {name}':44} {report[key] * 1e3:9.3f} ms")
    peak = f"{report['peak_bytes'] / 2**20:9.0f} MiB" if report["peak_bytes"] else "  unknown"
    return [*lines, f"{'peak resident memory, plain + protected':44} {peak}"]


def peak_bytes() -> int:
    """Peak resident memory of this process; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
