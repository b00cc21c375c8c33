"""Prompts to generate from: one reader for every verb. docs/data.md lists the shapes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..errors import TraceError
from . import shapes
from .messages import Message, read_turns
from .records import Record, read_records


@dataclass(frozen=True)
class Prompt:
    """A record to answer.

    Attributes:
        record: as it was read; what a trace of it keeps.
        prompt: a user's message, or a conversation that ends where the model is to answer.
        tools: what the conversation may call.
        answer: the record's "answer" as text, None if it has none.
        unused: keys of the record or its messages that adlocal does not know.
    """

    record: Record
    prompt: str | tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    answer: str | None = None
    unused: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return self.record.where

    @property
    def id(self) -> str | None:
        """The record's "id", for answers that are given apart."""
        return str(self.record.fields["id"]) if "id" in self.record.fields else None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation; none where the prompt is a text."""
        return () if isinstance(self.prompt, str) else self.prompt


def read_prompts(source: str | os.PathLike[str]) -> list[Prompt]:
    """Reads prompts from whatever `read_records` reads.

    Raises:
        TraceError: the source cannot be read or is empty, or a record of it has no prompt; the message says which.
    """
    records = read_records(source)
    if not records:
        raise TraceError(f'{source}: no prompts; give lines like {{"prompt": "..."}}')
    return [read_prompt(record) for record in records]


def read_prompt(record: Record) -> Prompt:
    """The prompt of a record.

    Raises:
        TraceError: it has none.
    """
    where, fields = inner = shapes.unwrapped(record)
    given = shapes.prompt_of(inner)
    if not isinstance(given, (str, list)):
        raise TraceError(f"{where}: has {sorted(fields)}, expected {shapes.EXPECTED_PROMPT}")
    if not (given.strip() if isinstance(given, str) else given):
        raise TraceError(f"{where}: the prompt is empty; remove the line")
    prompt: str | tuple[Message, ...] = given if isinstance(given, str) else ()
    unused = shapes.unused_of(inner)
    if isinstance(given, list):
        turns = read_turns(where, given)
        prompt, unused = turns.messages, (*turns.unused, *unused)
        if (role := prompt[-1]["role"]) not in ("user", "tool"):
            raise TraceError(f'{where}: the messages end with a turn of "{role}"; let them end with the user\'s')
    answer = fields.get("answer")
    is_plain = isinstance(answer, (str, int, float))
    return Prompt(record, prompt, shapes.tools_of(inner), str(answer) if is_plain else None, unused)
