"""Breaks control tokens in the text of clients: llama-server reads them in a rendered prompt, whoever wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

#: What is put into a control token, the first that is in none: characters without a width. What a user asks about
#: <|im_end|> still reads so, also where the answer quotes it; templates do not trim them, as they would spaces; and
#: the tokenizer looks for control tokens in the raw text, so that no normalization can bring one back.
MARKS = ("\u200b", "\u2060", "\u200c", "\ufffd")

_END = ""
_Trie = dict[str, Any]


def neutralize(text: str, control: Collection[str]) -> str:
    """The text with a mark after the first character of each control token; the same object if there is none.

    A template may put one text right behind another. So the beginning of a control token that `text` ends in, of at
    least two characters, is broken as well, and so is what lacks the first character, where `text` begins with it.

    Args:
        text: a message's whole content, a tool's description, ...: what a template renders in one place.
        control: texts of the control tokens, and of others that clients may not write, as the tags of reasoning.
    """
    return _neutralizer(control if isinstance(control, frozenset) else frozenset(control))(text)


def count(text: str, control: Collection[str]) -> int:
    """How many control tokens a text holds, those that it ends in the middle of included."""
    return _neutralizer(control if isinstance(control, frozenset) else frozenset(control)).count(text)


def neutralize_value(value: Any, control: Collection[str]) -> Any:
    """A JSON value, as tools and their schemas are, with every text in it neutralized, names of fields too."""
    if isinstance(value, str):
        return neutralize(value, control)
    if isinstance(value, list | tuple):
        return [neutralize_value(each, control) for each in value]
    if isinstance(value, dict):
        return {neutralize(name, control): neutralize_value(each, control) for name, each in value.items()}
    return value


def neutralize_json(text: str, control: Collection[str]) -> str:
    """JSON in a text, as arguments of calls are: templates render what it says, not how it is escaped."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return neutralize(text, control)
    found = neutralize_value(value, control)
    return neutralize(text, control) if found == value else json.dumps(found, ensure_ascii=False)


class _Neutralizer:
    def __init__(self, control: frozenset[str]) -> None:
        self._mark = next(mark for mark in MARKS if not any(mark in token for token in control))
        self._lone = re.compile("|".join(re.escape(token) for token in sorted(control) if len(token) == 1) or "(?!)")
        whole = _trie(token for token in control if len(token) > 1)
        rest = _trie(token[1:] for token in control if len(token) > 1)
        self._within = re.compile(f"(?={_pattern(whole, 2)}).", re.S) if whole else re.compile("(?!)")
        self._front = re.compile(_pattern(rest, 2)) if rest else re.compile("(?!)")

    def __call__(self, text: str) -> str:
        found, n = self._within.subn(rf"\g<0>{self._mark}", text)
        front = self._mark if self._front.match(text) else ""
        found, n_lone = self._lone.subn(self._mark, found)
        return front + found if n or n_lone or front else text

    def count(self, text: str) -> int:
        return sum(1 for pattern in (self._within, self._lone) for _ in pattern.finditer(text))


@lru_cache(maxsize=16)
def _neutralizer(control: frozenset[str]) -> _Neutralizer:
    return _Neutralizer(control - {""})


def _trie(texts: Iterable[str]) -> _Trie:
    """Texts by their characters; one that another begins stands for both."""
    trie: _Trie = {}
    for text in texts:
        node = trie
        for character in text:
            node = node.setdefault(character, {})
        node[_END] = None
    return trie


def _pattern(trie: _Trie, depth: int) -> str:
    """A regular expression of the texts, and of their first `depth` characters or more where the text ends.

    It takes time by the length of a text, not by the number of texts, which is a thousand in some vocabularies.
    """
    if _END in trie:
        return ""
    branches = [re.escape(character) + _pattern(below, depth - 1) for character, below in sorted(trie.items())]
    if depth <= 0:
        branches.append(r"\Z")
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
