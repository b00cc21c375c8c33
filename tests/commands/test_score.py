"""`adlocal score`: its numbers against an independent sum, its page against a parser, its files against a full disk."""

from __future__ import annotations

import base64
import errno
import hashlib
import itertools
import json
import os
import re
import struct
import sys
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adlocal import ProxyError, ProxyPair, adjust
from adlocal.bundle import PLUS_NAME
from adlocal.llamacpp.model import open_vocabulary
from adlocal.llamacpp.tokens import token_pieces, token_texts
from adlocal.score import Score, score_trace
from adlocal.score.histogram import histogram
from adlocal.score.page import page
from adlocal.score.style import LEVELS, SCRIPT, STYLE
from adlocal.traces import EncodedTrace, TraceEncoder, read_traces
from support import tiny
from support.cli import Cli, Done, only_line, refused
from support.faults import Faults
from support.json_lines import write_lines

ODD = [
    ("1 + 1 =", " 2"),
    ("<script>alert(1)</script>", '</div></details><script>alert("it\'s")</script> &amp; <b title=x onclick=y>'),
    ("\n\nx\ty", "\n  z \r\n\x00\x1b[31m \u202eabc\u202c\ufeff\x85"),
    ("café", "日本語 😀 né"),
]


@pytest.fixture(scope="session")
def odd_traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces that would break a page which does not escape them; in the tiny vocabulary every byte is a token."""
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ODD]
    return write_lines(tmp_path_factory.mktemp("odd") / "o<d>d.jsonl", *rows)


def rendered(prompt: str, completion: str) -> str:
    """What tiny.CHAT_TEMPLATE makes of a trace."""
    return f"<s>user\n{prompt}</s>\n<s>assistant\n{completion}</s>\n"


# Numbers


@pytest.fixture
def found(cli: Cli, tiny_bundle: Path, odd_traces: Path) -> dict[str, Any]:
    status, out, _ = cli("score", "--bundle", tiny_bundle, odd_traces, "-c", 256, "-t", 1, "--json", "--tokens")
    assert status == 0
    report: dict[str, Any] = json.loads(out)
    return report


def test_a_tokens_dose_is_its_delta_less_the_expected_one(
    found: dict[str, Any], tiny_bundle: Path, odd_traces: Path
) -> None:
    """Against float64 over the pair's logits. The core takes exponentials in float32, hence 1e-4 of Δ's spread."""
    with (
        ProxyPair.open(tiny_bundle, n_ctx=256, n_threads=1) as pair,
        closing(open_vocabulary(tiny_bundle / PLUS_NAME)) as vocabulary,
    ):
        for score, trace in zip(found["scores"], read_traces(odd_traces), strict=True):
            encoded = TraceEncoder(vocabulary).encode(trace)
            deltas = pair.delta(encoded.tokens).astype(np.float64)
            middle = np.concatenate([(plus + minus) / 2 for plus, minus in pair.logits(encoded.tokens)])
            following = zip(deltas[:-1], middle[:-1], encoded.tokens[1:], encoded.targets[1:], strict=True)
            expected = [row[token] - mean(row, z) if counts else None for row, z, token, counts in following]
            assert [d is None for d in score["doses"]] == [True, *(d is None for d in expected)]
            given, wanted = (np.array([d for d in doses if d is not None]) for doses in (score["doses"], expected))
            tolerance = 1e-4 * float(deltas.std())
            assert np.allclose(given, wanted, rtol=0, atol=tolerance)
            assert wanted.std() > 1000 * tolerance, "the tokens' doses hardly differ: nothing was compared"
            assert score["n_tokens"] == len(wanted)
            assert score["dose"] == pytest.approx(wanted.sum(), abs=tolerance * len(wanted))


def mean(delta: Any, z: Any) -> float:
    """E[Δ] under softmax(z), in float64, and as adlocal.adjust has it."""
    p = np.exp(z.astype(np.float64) - z.max())
    value = float(p @ delta / p.sum())
    assert adjust.expectation(z, z, delta) == pytest.approx(value, abs=1e-5 * float(np.abs(delta).max()))
    return value


def test_the_most_and_the_least_loaded_tokens_are_told(
    found: dict[str, Any], cli: Cli, tiny_bundle: Path, odd_traces: Path
) -> None:
    table = cli("score", "--bundle", tiny_bundle, odd_traces, "-c", 256, "-t", 1).out.splitlines()
    for score, row in zip(found["scores"], table[1:], strict=False):
        counted = sorted((dose, i) for i, dose in enumerate(score["doses"]) if dose is not None)
        n = min(3, len(counted))
        assert [(t["dose"], t["index"]) for t in score["least"]] == counted[:n]
        assert [(t["dose"], t["index"]) for t in score["most"]] == counted[::-1][:n]
        for token in (*score["most"], *score["least"]):
            assert score["tokens"][token["index"]] in ("", token["token"])
            assert token["token"], "a part of a character is told by its bytes"
            assert f"{token['token']!r} {token['dose']:+.2f}" in row
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", "".join(table)), "a trace sent controls to the terminal"


def test_tokens_come_only_where_asked_for(cli: Cli, tiny_bundle: Path, odd_traces: Path) -> None:
    status, out, _ = cli("score", "--bundle", tiny_bundle, odd_traces, "-c", 256, "-t", 1, "--json")
    assert status == 0
    assert set(json.loads(out)["scores"][0]) == {"where", "n_tokens", "dose", "dose_per_token", "most", "least"}


def test_the_texts_of_the_tokens_are_the_trace(found: dict[str, Any]) -> None:
    assert ["".join(score["tokens"]) for score in found["scores"]] == [rendered(*trace) for trace in ODD]


def test_a_dose_that_is_no_number_is_an_error(tiny_bundle: Path, faults: Faults) -> None:
    trace = EncodedTrace("t:1", [tiny.BOS, 65, 66], [False, True, True])
    with ProxyPair.open(tiny_bundle, n_ctx=64, n_threads=1) as pair:
        assert np.isfinite(score_trace(pair, trace).dose)
        with faults.computing(pair.contexts[1], np.nan), pytest.raises(ProxyError, match="t:1: the dose of token 1"):
            score_trace(pair, trace)


# Text of tokens


@pytest.mark.parametrize("seed", range(5))
def test_texts_joined_are_the_decoded_whole(seed: int) -> None:
    """UTF-8 with broken bytes in it, cut anywhere, against Python's decoder over the whole."""
    rng = np.random.default_rng(seed)
    data = bytearray("añ日😀\r\n\u2028".encode() * 20)
    for at in rng.integers(len(data), size=8):
        data[at] = rng.integers(256)
    cuts = [0, *np.sort(rng.integers(len(data), size=60)).tolist(), len(data)]
    pieces = [bytes(data[a:b]) for a, b in itertools.pairwise(cuts)]
    texts = token_texts(pieces)
    assert len(texts) == len(pieces)
    assert "".join(texts) == data.decode("utf-8", "replace")


def test_a_split_character_belongs_to_the_token_that_completes_it() -> None:
    assert token_texts([b"a\xf0\x9f", b"\x98", b"\x80b", b"\xe6"]) == ["a", "", "😀b", "�"]


def test_pieces_of_any_length_and_kind_are_whole(tmp_path: Path) -> None:
    long = ["x" * 31, "y" * 32, "z" * 500]
    path = tiny.write_gguf(tiny.tiny_model(), tmp_path / "long.gguf", pieces=[*tiny.BYTES[:-3], *long])
    with closing(open_vocabulary(path)) as vocabulary:
        pieces = token_pieces(vocabulary.vocab, [65, 10, 253, 254, 255, tiny.EOS, 260])
    assert pieces == [b"A", b"\n", *(text.encode() for text in long), b"</s>", b"[PAD260]"]


# The page


class Page(HTMLParser):
    """What a browser would find: tags, addresses, and each trace's text and shaded tokens."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.sources: dict[str, str] = {}  # of style and script
        self.traces: dict[str, str] = {}
        self.tokens: dict[str, list[tuple[str, str, str]]] = {}  # (text, class, title)
        self._open: list[str] = []
        self._trace = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)
        if tag == "div":
            self._trace = found.get("id", "")
        if tag == "b" and self._trace:
            self.tokens.setdefault(self._trace, []).append(("", found.get("class", ""), found["title"]))

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop() != tag:  # HTML lets some tags stay open
            pass
        self._trace = "" if tag == "div" else self._trace

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.sources[self._open[-1]] = data
        if not self._trace:
            return
        shown = chr(int(data, 16)) if self._open[-1] == "s" else data
        self.traces[self._trace] = self.traces.get(self._trace, "") + shown
        if "b" in self._open:
            text, level, title = self.tokens[self._trace].pop()
            self.tokens[self._trace].append((text + shown, level, title))


@pytest.fixture
def source(cli: Cli, tiny_bundle: Path, odd_traces: Path, tmp_path: Path) -> str:
    path = tmp_path / "scores.html"
    path.write_text("an older page")
    argv = ["score", "--bundle", tiny_bundle, odd_traces, "-c", 256, "-t", 1]
    status, out, _ = cli(*argv, "--html", path)
    assert (status, out) == (0, cli(*argv).out)
    assert os.listdir(tmp_path) == ["scores.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_holds_every_trace_exactly(source: str) -> None:
    found = Page(source)
    assert [found.traces[f"t{n}"] for n in range(1, 5)] == [rendered(*trace) for trace in ODD]
    for n, (_, completion) in enumerate(ODD, 1):  # the end of the turn is sampled too, what the template adds is not
        assert "".join(text for text, _, _ in found.tokens[f"t{n}"]) == completion + "</s>"
    assert ("href", "#t4") in found.attributes
    assert "o&lt;d&gt;d.jsonl:4" in source


def test_a_traces_text_stays_text(source: str) -> None:
    """No tag or attribute but the page's own; one script, and a policy that allows this one alone."""
    found = Page(source)
    own = (
        *("html", "head", "meta", "title", "style", "body", "script", "h1", "p", "strong", "section", "div", "span"),
        *("table", "thead", "tbody", "tr", "th", "td", "a", "figure", "figcaption", "svg", "rect", "line", "text"),
        *("details", "summary", "b", "i", "s", "u"),
    )
    assert set(found.tags) == set(own)
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert found.sources == {"script": SCRIPT, "style": STYLE}
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "style")]
    policy = next(str(value) for name, value in found.attributes if "default-src" in str(value))
    assert policy.startswith("default-src 'none'; ")
    for kind, text in found.sources.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_page_needs_nothing_else(source: str) -> None:
    found = Page(source)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", source)
    assert all(str(value).startswith("#") for name, value in found.attributes if name == "href")


def test_controls_are_shown_by_their_code_points(source: str) -> None:
    for code in ("0000", "001B", "202E", "202C", "FEFF", "000D", "0085"):
        assert f"<s>{code}</s>" in source
    assert not re.search("[\0\x1b\r\x85\u202e\u202c\ufeff]", source)
    assert "<u>\n</u>" in source, "a line feed that is a token needs something to shade"


def test_a_split_character_is_shaded_by_the_sum_of_its_tokens(source: str, found: dict[str, Any]) -> None:
    text, _, title = next(token for token in Page(source).tokens["t4"] if token[0] == "😀")
    score = found["scores"][3]
    at = score["tokens"].index(text)
    assert title == f"{sum(score['doses'][at - 3 : at + 1]):+.3g} in 4 tokens"


def shades(doses: list[float]) -> list[tuple[int, str]]:
    """(level, title) of each token of a trace with these doses."""
    score = Score("t:1", [b"p", *[b"x"] * len(doses)], np.array([np.nan, *doses]))
    found = Page("".join(page([score], "t"))).tokens["t1"]
    return [(int(c[1:] or 0) * (-1 if c.startswith("n") else 1), title) for _, c, title in found]


def test_shades_follow_the_dose() -> None:
    """Monotone, symmetric, all 33 of them, white at zero, at their end from the 98th percentile of |dose| on."""
    doses = np.linspace(-1, 1, 401)
    levels = np.array([level for level, _ in shades(doses.tolist())])
    assert np.all(np.diff(levels) >= 0)
    assert np.array_equal(levels, -levels[::-1])
    assert set(levels) == set(range(-LEVELS, LEVELS + 1))
    assert levels[200] == 0
    full = np.abs(levels) == LEVELS
    assert np.all(full[np.abs(doses) >= 0.98])
    assert not np.any(full[np.abs(doses) <= 0.94])
    assert shades([0.0, 0.0]) == [(0, "+0"), (0, "+0")]
    assert shades([-0.012345]) == [(-LEVELS, "-0.0123")]


@pytest.mark.parametrize(("scheme", "ink"), [(0, "#16181b"), (1, "#eef0f2")], ids=["light", "dark"])
def test_every_shade_is_a_step_further_and_stays_readable(scheme: int, ink: str) -> None:
    """Text on every shade has the contrast of WCAG's level AA, 4.5."""
    styles = STYLE.split("@media")[scheme]
    assert f"--ink: {ink}" in styles
    colours = dict(re.findall(r"\.([np]\d+)\{background:(#\w{6})\}", styles))
    assert len(colours) == 2 * LEVELS
    for sign in "np":
        contrasts = [contrast(ink, colours[f"{sign}{level}"]) for level in range(1, LEVELS + 1)]
        assert np.all(np.diff(contrasts) < 0)
        assert contrasts[-1] >= 4.5


def contrast(a: str, b: str) -> float:
    """WCAG 2's contrast of two colours."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted([luminance(a), luminance(b)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    "values",
    [[0.0], [0.3], [-2.0, -2.0], [0.0, 1e-12], [*np.linspace(-1, 2, 1000), 1e6], np.linspace(5, 6, 50).tolist()],
    ids=["zero", "one", "same", "tiny", "outlier", "all above"],
)
def test_a_histogram_counts_every_value(values: list[float]) -> None:
    counts, edges = histogram(np.array(values))
    assert counts.sum() == len(values)
    assert len(edges) == len(counts) + 1 <= 44
    assert 0.0 in edges
    assert counts[-1] + counts[0] >= 1
    assert edges[-1] < 10


# Files


def test_the_plot_is_a_picture(cli: Cli, tiny_bundle: Path, odd_traces: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "scores.PNG"
    assert cli("score", "--bundle", tiny_bundle, odd_traces, "-c", 256, "-t", 1, "--plot", path).status == 0
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1200, 900)
    assert 10_000 < len(data) < 300_000
    assert os.listdir(tmp_path) == ["scores.PNG"]


def refused_at_once(done: Done, *words: str, status: int = 2) -> None:
    refused(done, "score", *words, status=status)
    only_line(done)


def test_a_missing_matplotlib_is_told_before_anything_else(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = cli("score", "--bundle", tmp_path / "none", tmp_path / "none.jsonl", "--plot", tmp_path / "a.png")
    refused_at_once(done, "--plot needs matplotlib, which is not installed; run: pip install 'adlocal[plot]'", status=1)


@pytest.mark.parametrize(("option", "suffix"), [("--plot", ".png"), ("--html", ".html")])
@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere/a{}", "there is no directory"),
        ("dir{}", "a directory lies there; give another name"),
        ("traces.jsonl", "give a file name that ends in {}"),
        ("/proc/a{}", "give another place"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_anything_else(
    option: str, suffix: str, place: str, words: str, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / f"dir{suffix}").mkdir()
    target = tmp_path / place.format(suffix)
    done = cli("score", "--bundle", tmp_path / "none", tmp_path / "none.jsonl", option, target)
    refused_at_once(done, f"{option} {target}: ", words.format(suffix))
    assert [path.name for path in tmp_path.iterdir()] == [f"dir{suffix}"]


def test_tokens_without_json_are_refused(cli: Cli, tmp_path: Path) -> None:
    refused_at_once(cli("score", "--bundle", tmp_path, tmp_path / "t.jsonl", "--tokens"), "--tokens", "give --json too")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_page_that_cannot_be_finished_leaves_the_older_one(
    error: BaseException, cli: Cli, tiny_bundle: Path, odd_traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is printed nevertheless: it took minutes."""

    def stop(*_: object) -> str:
        raise error

    monkeypatch.setattr("adlocal.score.page.svg_histogram", stop)
    path = tmp_path / "scores.html"
    path.write_text("older")
    status, out, err = cli("score", "--bundle", tiny_bundle, odd_traces, "-c", 256, "-t", 1, "--html", path)
    assert status == (1 if isinstance(error, OSError) else 130)
    assert "all 4 (0 cut, 0 skipped)" in out
    assert "Traceback" not in err
    assert (f"cannot write {path}: No space left on device; give another place" in err) == isinstance(error, OSError)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("scores.html", "older")]
