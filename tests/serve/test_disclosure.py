"""What is shown of an answer does not depend on its chunks, and of hidden reasoning nothing is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adlocal.serve.aligned import Piece
from adlocal.serve.disclosure import Disclosure, Splitter, scrub
from adlocal.serve.events import Delta, Logprob
from adlocal.serve.tags import PAIRS, Tags

THINK = Tags("<think>", "</think>", 1, 2)
HIDING: tuple[Disclosure, ...] = ("answer-only", "summary")

texts = st.lists(
    st.sampled_from(["<think>", "</think>", "a", " b", "\n", "\n\n", "é<", "</", "think>", "🙂", "<|", " <think", ">"])
).map("".join)


def token(text: str, data: bytes | None = None) -> Logprob:
    return Logprob(text, text.encode() if data is None else data, -1.0, (Logprob("rival of " + text, b"", -2.0),))


def cut(text: str, places: Sequence[int]) -> list[str]:
    bounds = sorted({0, len(text), *(min(place, len(text)) for place in places)})
    return [text[a:b] for a, b in pairwise(bounds)]


def run(splitter: Splitter, chunks: Sequence[Sequence[str]]) -> list[Piece]:
    """Of a chunk, each text is a token."""
    pieces: list[Piece] = []
    for chunk in chunks:
        pieces += splitter.feed("".join(chunk), [token(text) for text in chunk], len(chunk))
    return [*pieces, *splitter.end()]


def shown(pieces: Sequence[Piece]) -> tuple[str, str, list[str]]:
    """Text, reasoning, and tokens with log-probabilities."""
    deltas = [piece.delta(0) for piece in pieces]
    return (
        "".join(each.text for each in deltas),
        "".join(each.reasoning for each in deltas),
        [logprob.token for each in deltas for logprob in each.logprobs],
    )


def whole(text: str, tags: Tags, disclosure: Disclosure, starts_hidden: bool) -> tuple[str, str]:
    """The oracle: answer and reasoning of a text that is there at once."""
    o, c = re.escape(tags.open), re.escape(tags.close)
    if disclosure == "show":
        opened = rf"\A[ \t\r\n]*(?:{o})?" if starts_hidden else rf"\A[ \t\r\n]*{o}"
        found = re.match(rf"{opened}(.*?)(?:{c}(.*))?\Z", text, re.S)
        if found is None:
            bare = re.match(rf"\A[ \t\r\n]*{c}(.*)\Z", text, re.S)
            return (text, "") if bare is None else (unblank(bare[1]), "")
        return unblank(found[2] or ""), found[1].strip(" \t\r\n")
    *before, rest = text.rsplit(tags.close, 1)
    if before:
        return unblank(rest.split(tags.open)[0]), ""
    if starts_hidden:
        return "", ""
    outside, *inside = rest.split(tags.open, 1)
    return (outside if outside.strip(" \t\r\n") or not inside else ""), ""


def unblank(text: str) -> str:
    return re.sub(r"\A(?:[ \t\r]*\n)+", "", text) if text.strip(" \t\r\n") else ""


modes = st.tuples(st.sampled_from(["show", *HIDING]), st.booleans(), st.booleans())


@settings(deadline=None)
@given(texts, st.lists(st.integers(0, 80)), modes)
def test_every_chunking_gives_what_the_whole_text_gives(
    text: str, places: list[int], mode: tuple[Disclosure, bool, bool]
) -> None:
    """After a ban, everything: from the first close on that is one token."""
    disclosure, starts_hidden, banned = mode
    for chunks in (cut(text, places), list(text), [text]):
        expected = whole(text, THINK, disclosure, starts_hidden)
        told = [i for i, chunk in enumerate(chunks) if THINK.close in chunk]
        if banned and told and disclosure != "show":
            rest = "".join(chunks[told[0] :])
            expected = unblank(rest.split(THINK.close, 1)[1]), ""
        splitter = Splitter(THINK, disclosure, starts_hidden, banned)
        assert shown(run(splitter, [[chunk] for chunk in chunks]))[:2] == expected


@settings(deadline=None)
@given(texts, st.lists(st.integers(0, 80)), st.lists(st.integers(0, 80)), modes.map(lambda mode: (*mode[:2], False)))
@example("<think><think> b</think>", [14], [], ("show", False, False))
def test_log_probabilities_stay_with_their_text(
    text: str, places: list[int], bounds: list[int], mode: tuple[Disclosure, bool, bool]
) -> None:
    tokens = cut(text, places)
    ends = sorted({0, len(tokens), *(min(each, len(tokens)) for each in bounds)})
    chunked = [tokens[a:b] for a, b in pairwise(ends)]
    answers = []
    for chunks in ([[each] for each in tokens], chunked, [tokens]):
        pieces = run(Splitter(THINK, *mode), chunks)
        assert all(logprob.token == piece.text[a:b] for piece in pieces for a, b, logprob in piece.tokens)
        answers.append(shown(pieces))
    assert answers[0] == answers[1] == answers[2]


@settings(deadline=None)
@given(st.lists(st.integers(0, 60)), modes)
def test_without_a_tag_every_token_keeps_its_log_probability(
    places: list[int], mode: tuple[Disclosure, bool, bool]
) -> None:
    tokens = cut("An answer <b>with</b> < and > and a long, long end", places)
    disclosure, _, banned = mode
    pieces = run(Splitter(THINK, disclosure, False, banned), [[each] for each in tokens])
    assert shown(pieces) == ("".join(tokens), "", tokens)


closed = st.sampled_from(
    [
        "{n}</think>",
        "<think>{n}</think>",
        "Well. <think>\n{n}\n</think>\n\n",
        "<think>{n}<think>{n}</think>",
        "</think>",
    ]
)
unclosed = st.sampled_from(["", "<think>{n}", "\n<think>{n}<think>{n}", "<think>{n}</thin"])


@settings(deadline=None)
@given(st.lists(closed, min_size=1, max_size=5), unclosed, st.data(), st.sampled_from(HIDING), st.booleans())
def test_no_part_of_a_nonce_is_shown(
    blocks: list[str], last: str, data: st.DataObject, disclosure: Disclosure, banned: bool
) -> None:
    """Whatever blocks come: opened by the prompt or by nobody, several, nested, cut off by the length."""
    form = blocks[0] + "The answer." if banned else "Yes. ".join(blocks) + "The answer." + last
    text = hidden(form, data)
    for splitter, said in reasoned(text, disclosure, banned, data):
        assert said.strip() == "The answer."
        assert splitter.hidden_tokens > 0


@settings(deadline=None)
@given(st.booleans(), unclosed, st.data(), st.sampled_from(HIDING), st.booleans())
def test_an_answer_that_ends_within_its_reasoning_is_empty(
    opened: bool, last: str, data: st.DataObject, disclosure: Disclosure, banned: bool
) -> None:
    text = hidden("{n}" + last if opened else last, data)
    for _, said in reasoned(text, disclosure, banned, data, opened):
        assert said == ""


def hidden(form: str, data: st.DataObject) -> str:
    """A text whose reasoning nobody can guess."""
    nonce = st.text("0123456789", min_size=12, max_size=30)
    return re.sub(r"\{n\}", lambda _: data.draw(nonce), form)


def reasoned(
    text: str, disclosure: Disclosure, banned: bool, data: st.DataObject, opened: bool = False
) -> Iterator[tuple[Splitter, str]]:
    """What is shown of `text`, which is checked for digits, in several chunkings."""
    for chunks in (cut(text, data.draw(st.lists(st.integers(0, 200)))), list(text), [text]):
        splitter = Splitter(THINK, disclosure, opened, banned)
        pieces = run(splitter, [[chunk] for chunk in chunks])
        said = "".join(piece.text for piece in pieces)
        logprobs = [logprob for piece in pieces for _, _, logprob in piece.tokens]
        told = [each.token + each.bytes.decode() + each.top[0].token for each in logprobs]
        assert not re.search("[0-9]", "".join([said, *told]))
        yield splitter, said


def test_the_answer_streams_once_no_tag_can_follow() -> None:
    splitter = Splitter(THINK, "answer-only", starts_hidden=True, banned=True)
    fed = [splitter.feed(text) for text in ["12", "34", "</think>", "\n\n", "Yes", ", and", " <think> is", " a tag"]]
    assert [[piece.text for piece in each] for each in fed] == [[]] * 4 + [
        ["Yes"],
        [", and"],
        [" <think> is"],
        [" a tag"],
    ]
    assert splitter.end() == []


@pytest.mark.parametrize("spelled", [[("</th", 1), ("ink>", 1)], [("</think>", 8)], [("", 3), ("</think>", 1)]])
def test_a_close_that_the_model_spells_forbids_nothing(spelled: list[tuple[str, int]]) -> None:
    """The plugin forbids tags once the token has come; what follows a spelled one may be more reasoning."""
    splitter = Splitter(THINK, "answer-only", starts_hidden=True, banned=True)
    for text, n_tokens in [("12", 1), *spelled, ("34", 1), ("<think>", 1), ("56", 1)]:
        assert splitter.feed(text, n_tokens=n_tokens) == []
    assert splitter.feed("</think>") == []
    assert [piece.text for piece in splitter.feed("Yes")] == ["Yes"]


def test_without_a_ban_nothing_is_shown_before_the_end() -> None:
    splitter = Splitter(THINK, "answer-only", starts_hidden=True)
    assert not [each for text in ["12", "</think>", "No. 34", "</think>", "Yes"] for each in splitter.feed(text)]
    assert [piece.text for piece in splitter.end()] == ["Yes"]


def test_a_tag_in_the_code_of_an_answer_hides_a_part_of_it_rather_than_shows_reasoning() -> None:
    said = run(Splitter(THINK, "answer-only"), [["<think>12</think>Write `<think>` before and `</think>` after it."]])
    assert shown(said)[0] == "` after it."
    said = run(Splitter(THINK, "show"), [["<think>12</think>Write `<think>` before and `</think>` after it."]])
    assert shown(said)[:2] == ("Write `<think>` before and `</think>` after it.", "12")


def test_the_engine_may_repeat_what_the_prompt_has_opened_and_closed() -> None:
    assert shown(
        run(Splitter(THINK, "show", True), [["<think>\nI'm\nthinking\n</think>\n\n  Hello, world!\nWhat's up?"]])
    )[:2] == ("  Hello, world!\nWhat's up?", "I'm\nthinking")
    for disclosure in ("show", "answer-only"):
        assert shown(run(Splitter(THINK, disclosure), [["<think>\n\n</think>\n\nHello"]]))[:2] == ("Hello", "")


def test_reasoning_streams_where_it_is_shown() -> None:
    splitter = Splitter(THINK, "show")
    fed = [
        [piece.delta(3) for piece in splitter.feed(text)]
        for text in ["<think>\n", "One", "\n", "two", "</think>", "Yes"]
    ]
    assert fed == [[], [Delta(3, reasoning="One")], [], [Delta(3, reasoning="\ntwo")], [], [Delta(3, text="Yes")]]


@pytest.mark.parametrize("banned", [False, True])
def test_hidden_tokens_and_seconds_are_counted(banned: bool) -> None:
    splitter = Splitter(THINK, "summary", banned=banned)
    for i, text in enumerate(["<think>", "1", "2", "</think>", "Yes", "."]):
        splitter.feed(text, n_tokens=10 + i, now=100.0 + i * i)
    splitter.end()
    assert (splitter.hidden_tokens, splitter.hidden_seconds) == (10 + 11 + 12 + 13, 9.0)


def test_an_answer_without_reasoning_has_no_hidden_tokens() -> None:
    splitter = Splitter(THINK, "summary")
    run(splitter, [["Yes"], ["."]])
    assert (splitter.hidden_tokens, splitter.hidden_seconds) == (0, 0.0)
    splitter = Splitter(THINK, "summary", starts_hidden=True)
    run(splitter, [["12"], ["34"]])
    assert splitter.hidden_tokens == 2


def test_it_is_known_whether_a_block_is_open() -> None:
    for disclosure in ("show", "answer-only"):
        splitter = Splitter(THINK, disclosure)
        states = [
            splitter.feed(text) is not None and splitter.thinking for text in ["<think>", "12", "</think>", "Yes"]
        ]
        assert states == [True, True, False, False]


def test_a_token_that_reaches_into_hidden_text_is_dropped_with_its_rivals() -> None:
    pieces = run(Splitter(THINK, "answer-only", True, True), [["12</think>Y"], ["es"], ["</think", ">."]])
    assert shown(pieces) == ("Yes</think>.", "", ["es", "</think", ">."])
    pieces = run(Splitter(THINK, "answer-only", True), [["12</think>Y", "es", " <thi"], ["nk>34", "56"]])
    assert shown(pieces) == ("Yes ", "", ["es"])


def test_tokens_of_half_a_character_stay_with_it() -> None:
    first, second = token("\ufffd", b"\xc3"), token("\ufffd", b"\xa9")
    pieces = Splitter(None, "answer-only").feed("né", [token("n"), first, second])
    assert [piece.tokens for piece in pieces] == [((0, 1, token("n")), (1, 2, first), (1, 2, second))]
    assert Splitter(None, "answer-only").feed("é", [second]) == [Piece("é", ((0, 1, second),))]


def test_tokens_that_are_not_of_the_text_are_dropped() -> None:
    """They may be of hidden text that came before, or of none."""
    splitter = Splitter(THINK, "answer-only", starts_hidden=True, banned=True)
    splitter.feed("12</think>")
    assert splitter.feed("Yes", [token("12")]) == [Piece("Yes")]
    assert splitter.feed("Yes", [token("")]) == [Piece("Yes")]


def test_a_model_that_does_not_reason_answers_as_it_does() -> None:
    for disclosure in ("show", *HIDING):
        splitter = Splitter(None, disclosure)
        assert [piece.text for piece in splitter.feed("\n<think>1</th")] == ["\n<think>1</th"]
        assert splitter.end() == []


@settings(deadline=None)
@given(st.sampled_from(PAIRS), st.lists(st.integers(0, 80)))
def test_every_known_pair_is_hidden(pair: tuple[str, str], places: list[int]) -> None:
    text = f"\n{pair[0]}1234{pair[1]}\n\nYes"
    assert shown(run(Splitter(Tags(*pair), "answer-only"), [[each] for each in cut(text, places)]))[0] == "Yes"
    assert shown(run(Splitter(Tags(*pair), "show"), [[each] for each in cut(text, places)]))[:2] == ("Yes", "1234")


def test_reasoning_of_earlier_answers_is_taken_out() -> None:
    user = {"role": "user", "content": "What does <think> mean?", "reasoning_content": "kept: no template renders it"}
    messages: list[Mapping[str, Any]] = [
        user,
        {"role": "assistant", "content": "<think>12</think>\n\nYes", "reasoning_content": "34"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes<thi"}, {"type": "text", "text": "nk>56"}]},
        {"role": "assistant", "content": None, "tool_calls": [], "thinking": "78"},
    ]
    assert scrub(messages, THINK) == [
        user,
        {"role": "assistant", "content": "Yes"},
        {"role": "assistant", "content": "Yes"},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    assert scrub(messages, None)[1] == {"role": "assistant", "content": "<think>12</think>\n\nYes"}
