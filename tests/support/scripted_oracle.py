"""What is to be shown of an answer, from its whole text at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from support.scripted_cases import CLOSE, OPEN, TAGS, Case
from support.scripted_engine import Part


@dataclass(frozen=True)
class Expected:
    """Of one answer: what is shown, whether the stop or the engine ended it, and tokens that are not hidden."""

    text: str
    reasoning: str
    arguments: str
    reason: str
    n_shown: int
    stopped: bool


def expected(case: Case, number: int, said: Sequence[Part]) -> Expected:
    """From the whole answer at once."""
    text = "".join(token for part in said for token in part.tokens)
    calls = "".join(map(arguments_of, said))
    tags, hides = TAGS[case.tags], case.disclosure != "show"
    bans = hides and tags is not None and tags.bannable
    thinks = case.thinks is not False or case.route == "completions" or case.opens
    reasons = tags is not None and (thinks or not bans)
    reasoning, answer, n_hidden = "", text, 0
    if reasons and hides:
        answer, calls, n_hidden = after_reasoning(text, said, case.opens, bans)
    elif reasons:
        answer, calls, reasoning = apart(text, said, case.opens)
    at = min((answer.find(stop) for stop in case.stop if stop in answer), default=None)
    end = case.scripts[number].end
    reason = "stop" if at is not None or (end == "tool_calls" and not calls) else end
    return Expected(
        answer if at is None else answer[:at],
        reasoning,
        calls,
        reason,
        sum(len(part.tokens) for part in said) - n_hidden,
        at is not None,
    )


def after_reasoning(text: str, said: Sequence[Part], opens: bool, bans: bool) -> tuple[str, str, int]:
    """The answer where reasoning is hidden, the calls that belong to it, and how many tokens do not.

    A ban holds from the first close that is one token. The gateway can tell where it comes alone.
    """
    calls, n_hidden, n, before, n_closes, inside = "", 0, 0, "", 0, opens
    for i, part in enumerate(said):
        n += len(part.tokens)
        before += "".join(part.tokens)
        inside = (OPEN * opens + before).rfind(OPEN) > (OPEN * opens + before).rfind(CLOSE)
        if before.count(CLOSE) > n_closes:
            calls, n_hidden, n_closes = "", n, before.count(CLOSE)
        if inside:
            n_hidden = n
        if bans and part.tokens == (CLOSE,):
            calls += "".join(arguments_of(each) for each in said[i:])
            return without_blank_lines(text[len(before) :], True), calls, n_hidden
        calls += arguments_of(part) * (not inside)
    if opens and not n_closes:
        return "", calls, n_hidden
    answer = text.rpartition(CLOSE)[2].partition(OPEN)[0]
    blank = not answer.strip(" \t\r\n") and (n_closes or inside)
    return "" if blank else without_blank_lines(answer, bool(n_closes)), calls, n_hidden


def arguments_of(part: Part) -> str:
    """Of the calls in a part."""
    return "".join(call["function"]["arguments"] for call in part.calls)


def apart(text: str, said: Sequence[Part], opens: bool) -> tuple[str, str, str]:
    """The answer, its calls and its reasoning where all is shown: a block at the beginning is reasoning."""
    begun = re.match(rf"[ \t\r\n]*(?:{OPEN})?" if opens else rf"[ \t\r\n]*{OPEN}", text)
    if begun is None:
        bare = re.match(rf"[ \t\r\n]*{CLOSE}", text)
        answer = text if bare is None else without_blank_lines(text[bare.end() :], True)
        return answer, "".join(map(arguments_of, said)), ""
    reasoning, closed, answer = text[begun.end() :].partition(CLOSE)
    kept, before = "", ""
    for part in said:
        before += "".join(part.tokens)
        in_block = (opens or OPEN in before) and CLOSE not in before
        kept += "" if in_block else arguments_of(part)
    return without_blank_lines(answer, bool(closed)), kept, reasoning.strip(" \t\r\n")


def without_blank_lines(text: str, closed: bool) -> str:
    if closed and not text.strip(" \t\r\n"):
        return ""
    return re.sub(r"\A(?:[ \t\r]*\n)+", "", text) if closed else text
