"""Stop texts end the answer where they would end its whole text, however it is chunked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from adlocal.serve.aligned import Piece
from adlocal.serve.events import Logprob
from adlocal.serve.stops import Cutter


def token(text: str) -> Logprob:
    return Logprob(text, text.encode(), -1.0)


def cut(text: str, places: Sequence[int]) -> list[str]:
    bounds = sorted({0, len(text), *(min(place, len(text)) for place in places)})
    return [text[a:b] for a, b in pairwise(bounds)]


def run(stops: list[str], pieces: Sequence[Piece]) -> tuple[list[Piece], str | None]:
    cutter = Cutter(stops)
    shown: list[Piece] = []
    for piece in pieces:
        more, stop = cutter.feed([piece])
        shown += more
        if stop is not None:
            assert cutter.feed([piece]) == ([], None)
            assert cutter.end() == ([], None)
            return shown, stop
    more, stop = cutter.end()
    return [*shown, *more], stop


def oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The whole text before the earliest stop; of several there, the shortest."""
    for end in range(len(text)):
        for stop in sorted(stops, key=len):
            if text.startswith(stop, end):
                return text[:end], stop
    return text, None


letters = st.text("ab.é")


@settings(deadline=None)
@given(letters, st.lists(st.text("ab.é", min_size=1, max_size=4), max_size=4), st.lists(st.integers(0, 40)))
def test_any_chunking_is_cut_as_the_whole_text(text: str, stops: list[str], places: list[int]) -> None:
    expected = oracle(text, stops)
    logprobs = []
    for chunks in (cut(text, places), list(text), [text]):
        pieces, stop = run(stops, [Piece.of(chunk, [token(chunk)]) for chunk in chunks])
        assert ("".join(piece.text for piece in pieces), stop) == expected
        assert all(logprob.token == piece.text[a:b] for piece in pieces for a, b, logprob in piece.tokens)
        logprobs.append([logprob.token for piece in pieces for _, _, logprob in piece.tokens])
    assert logprobs[1] == list(expected[0])  # every token that is shown keeps its own


@settings(deadline=None)
@given(letters, st.lists(st.text("ab.é", min_size=1, max_size=4), max_size=4), st.lists(st.integers(0, 40)))
def test_tokens_do_not_depend_on_chunks(text: str, stops: list[str], places: list[int]) -> None:
    tokens = cut(text, places)
    one_by_one, _ = run(stops, [Piece.of(each, [token(each)]) for each in tokens])
    at_once, _ = run(stops, [Piece.of(text, [token(each) for each in tokens])])
    assert [each for piece in one_by_one for _, _, each in piece.tokens] == [
        each for piece in at_once for _, _, each in piece.tokens
    ]


def test_no_more_is_held_back_than_a_stop_may_begin_in() -> None:
    cutter = Cutter(["\nUser:"])
    fed = [
        [piece.text for piece in cutter.feed([Piece(text)])[0]] for text in ["One", "\nUs", "e it", "\n", "User", ":"]
    ]
    assert fed == [["One"], [], ["\nUse it"], [], [], []]


def test_stops_are_for_the_answer_not_for_reasoning() -> None:
    reasoning = Piece("a stop here", reasoning=True)
    assert run(["stop", "op"], [Piece("It st"), reasoning, Piece("ops")]) == ([Piece("It "), reasoning], "stop")


def test_a_stop_that_began_earlier_is_waited_for() -> None:
    assert run(["abcd", "bc"], [Piece(each) for each in "xabce"]) == ([Piece("x"), Piece("a")], "bc")
    assert run(["abcd", "bc"], [Piece(each) for each in "xabcd"]) == ([Piece("x")], "abcd")
    assert run(["abcd", "bc"], [Piece(each) for each in "xabc"]) == ([Piece("x"), Piece("a")], "bc")


def test_a_token_that_a_stop_might_have_begun_in_stays_whole() -> None:
    tokens = [token("xa"), token("c")]
    pieces, _ = run(["ab"], [Piece.of(each.token, [each]) for each in tokens])
    assert [each for piece in pieces for _, _, each in piece.tokens] == tokens


def test_many_long_stops_do_not_slow_an_answer_down() -> None:
    began = time.process_time()
    run(["a" * 200 + str(i) for i in range(16)], [Piece("a")] * 2000)
    assert time.process_time() - began < 20
