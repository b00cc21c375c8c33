"""`adlocal score --html`: one page that needs nothing else, every token shaded by its Δ − E[Δ].

The text is anybody's: it is escaped, the page's policy lets nothing but its own style and script run, and characters
that would not be seen, or would turn the text around, are shown by their code points.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

from ..files import written_whole
from .histogram import svg_histogram
from .style import LEVELS, SCRIPT, STYLE
from .trace_score import Score, TokenDose

#: Share of the tokens that the shades tell apart; beyond it a shade is the darkest.
_SCALE_QUANTILE = 0.98
#: Traces that are unfolded when the page opens. A browser lays out the others when they are asked for.
_N_OPEN = 5
# Controls but tab and line feed, marks and overrides of direction, spaces of no width, separators of lines.
_UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]")


def write_page(path: Path, scores: Sequence[Score], title: str) -> None:
    """Writes the page.

    Raises:
        AdlocalError: it cannot be written; an older file is left as it was.
    """
    with (
        written_whole(path) as partial,
        # The name of a trace file may hold bytes that are no UTF-8.
        partial.open("w", encoding="utf-8", errors="replace", newline="\n") as file,
    ):
        file.writelines(page(scores, title))


def page(scores: Sequence[Score], title: str) -> Iterator[str]:
    """The page in parts, a trace each, for it may be many megabytes long."""
    doses = np.concatenate([s.target_doses for s in scores])
    scale = float(np.quantile(np.abs(doses), _SCALE_QUANTILE))
    yield _head(title)
    yield (
        f"<h1>Dose of {escape(title)}</h1>\n<p><strong>{doses.sum():+,.2f}</strong> in all, "
        f"<strong>{doses.mean():+.4f}</strong> a token, over {len(scores):,} traces with {len(doses):,} tokens.</p>\n"
    )
    yield _legend(scale)
    per_trace = np.array([s.dose_per_token for s in scores])
    yield '<div class="charts">\n'
    yield svg_histogram(per_trace, "Dose per token of a trace", "traces")
    yield svg_histogram(doses, "Dose of a token", "tokens")
    yield "</div>\n"
    yield from _table(scores, scale)
    for n, score in enumerate(scores, 1):
        yield _trace(n, score, scale)
    yield f"<script>{SCRIPT}</script>\n</body>\n</html>\n"


def _head(title: str) -> str:
    policy = f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Dose of {escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    )


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _legend(scale: float) -> str:
    shades = "".join(f"<b{_class(level)}></b>" for level in range(-LEVELS, LEVELS + 1))
    ends = f"<span>{-scale:+.3g} and below</span><span>0</span><span>{scale:+.3g} and above</span>"
    return (
        '<section class="legend">\n'
        "<div class=\"ends\"><span>lowers the student's loss</span><span>raises the student's loss</span></div>\n"
        f'<div class="scale">{shades}</div>\n<div class="ends">{ends}</div>\n'
        "<p>A token's shade is its dose, Δ − E[Δ]: to first order, how much a training step on it changes the "
        "student's loss. A model's own text has a dose of about zero. The scale ends at the 98th percentile of "
        "|Δ − E[Δ]|. <i>Grey</i> text is given, not counted: the prompt. Point at a token for its value. "
        "The page tells Δ: keep it where you keep the bundle.</p>\n</section>\n"
    )


def _table(scores: Sequence[Score], scale: float) -> Iterator[str]:
    yield '<div class="table"><table>\n<thead><tr>'
    yield '<th class="sort" scope="col">trace</th>'
    yield from (f'<th class="sort n" scope="col">{name}</th>' for name in ("dose", "dose per token", "tokens"))
    yield '<th scope="col">most loaded</th><th scope="col">least loaded</th></tr></thead>\n<tbody>\n'
    for n, score in enumerate(scores, 1):
        most, least = (_chips(tokens, scale) for tokens in (score.most_loaded(), score.least_loaded()))
        yield (
            f'<tr><td><a href="#t{n}">{_name(score)}</a><td>{score.dose:+.2f}<td>{score.dose_per_token:+.4f}'
            f"<td>{score.n_tokens}<td>{most}<td>{least}</tr>\n"
        )
    yield "</tbody>\n</table></div>\n"


def _chips(tokens: Sequence[TokenDose], scale: float) -> str:
    return " ".join(_token(token.token.replace("\n", "↵"), [token.dose], scale) for token in tokens)


def _name(score: Score) -> str:
    return escape(Path(score.where).name)


def _trace(n: int, score: Score, scale: float) -> str:
    """A trace, folded; the link's target lies inside, so that browsers unfold it."""
    figures = f"{score.dose:+.2f} · {score.dose_per_token:+.4f} a token · {score.n_tokens:,} tokens"
    text = "".join(_token(text, doses, scale) for text, doses in _runs(score))
    return (
        f"<details{' open' if n <= _N_OPEN else ''}><summary>{_name(score)} <span>{figures}</span></summary>"
        f'<div id="t{n}">{text}</div></details>\n'
    )


def _runs(score: Score) -> Iterator[tuple[str, list[float]]]:
    """(text, doses) of what is shown as one.

    That is a token; or the tokens that a character is spread over; or, without doses, tokens in a row that don't count.
    """
    given, doses = "", list[float]()
    for text, dose in zip(score.texts, score.doses.tolist(), strict=True):
        if np.isfinite(dose):
            doses.append(dose)
        if not doses:
            given += text
        elif text:
            if given:
                yield given, []
            yield text, doses
            given, doses = "", []
    if given:
        yield given, []


def _token(text: str, doses: Sequence[float], scale: float) -> str:
    shown = _shown(text)
    if not doses:
        return f"<i>{shown}</i>"
    title = f"{doses[0]:+.3g}" if len(doses) == 1 else f'"{sum(doses):+.3g} in {len(doses)} tokens"'
    return f"<b{_class(shade(sum(doses), scale))} title={title}>{shown.replace(chr(10), '<u>' + chr(10) + '</u>')}</b>"


def shade(dose: float, scale: float) -> int:
    """The level of a dose, -LEVELS to LEVELS: its share of the scale, zero if the scale is."""
    return round(LEVELS * min(max(dose / scale, -1.0), 1.0)) if scale > 0 else 0


def _class(level: int) -> str:
    return f" class={'n' if level < 0 else 'p'}{abs(level)}" if level else ""


def _shown(text: str) -> str:
    return _UNSEEN.sub(lambda found: f"<s>{ord(found[0]):04X}</s>", escape(text, quote=False))
