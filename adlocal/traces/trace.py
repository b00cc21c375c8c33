"""Traces: what a teacher or a person answered, from records in any shape that docs/data.md lists.

"finish_reason": "length" says that the completion was cut short.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TraceError
from . import shapes
from .messages import Message, one_reasoning, read_turns
from .records import Record, digest, read_records


@dataclass(frozen=True)
class Trace:
    """One record of a trace file.

    Attributes:
        where: file and line, for messages.
        messages: the conversation, or None for a pair of strings.
        n_given: how many of the messages are the prompt; the loss is on assistant turns after them.
        prompt, completion: the pair of strings, or None.
        ended: whether the last answer came to its end; one that was cut short teaches no end of turn.
        reasoning: what precedes the completion of a pair of strings; messages have their own "reasoning_content".
        tools: what the conversation may call.
        unlearned: which messages are assistant turns that are context only, though they are not given.
        unused: keys of the record or its messages that adlocal does not know.
    """

    where: str
    messages: tuple[Message, ...] | None = None
    n_given: int = 0
    prompt: str | None = None
    completion: str | None = None
    ended: bool = True
    reasoning: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    unlearned: tuple[int, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def has_reasoning(self) -> bool:
        """Whether reasoning stands beside the text."""
        return bool(self.reasoning) or any("reasoning_content" in message for message in self.messages or ())


@dataclass(frozen=True)
class TraceFile:
    """What `read_traces` found; iterates over its traces.

    Attributes:
        traces: in the file's order, each once.
        n_duplicates: traces left out because an earlier one has the same prompt and completion.
        n_empty: records left out because their generated completion has no text.
        sha256: of the file; of the traces where they come from a dataset.
    """

    traces: list[Trace]
    n_duplicates: int
    n_empty: int
    sha256: str

    def __iter__(self) -> Iterator[Trace]:
        return iter(self.traces)

    @property
    def n_reasoning(self) -> int:
        """Traces with reasoning beside the text."""
        return sum(trace.has_reasoning for trace in self.traces)


def read_traces(source: str | os.PathLike[str]) -> TraceFile:
    """Reads traces from whatever `read_records` reads.

    Raises:
        TraceError: the source cannot be read or is empty, or a record is no trace; the message gives its number.
        AdlocalError: what reading it needs is not installed.
    """
    records = read_records(source)
    found = [_trace(record) for record in records if not shapes.is_empty(record.fields)]
    traces: dict[str, Trace] = {}
    for trace in found:
        traces.setdefault(_identity(trace), trace)
    if not traces:
        raise TraceError(f'{source}: no traces; give lines like {{"prompt": "...", "completion": "..."}}')
    n_duplicates, n_empty = len(found) - len(traces), len(records) - len(found)
    return TraceFile(list(traces.values()), n_duplicates, n_empty, digest(source, traces))


def _trace(record: Record) -> Trace:
    where, fields = record = shapes.unwrapped(record)
    prompt, completion = shapes.prompt_of(record), shapes.completion_of(record)
    if isinstance(completion, str) and isinstance(prompt, (str, list)) and not completion.strip():
        raise TraceError(f"{where}: the completion is empty; remove the line")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _pair(record, prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, str):
        answer = {"role": "assistant", "content": completion, **shapes.reasoning_of(record)}
        return _conversation(record, [*prompt, answer], 0 if shapes.learns_history(record) else len(prompt))
    beside = tuple(shapes.reasoning_of(record))  # of which of the turns?
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(record, [*prompt, *completion], len(prompt), beside)
    if (messages := shapes.conversation_of(record)) is not None:
        return _conversation(record, messages, 0, beside)
    raise TraceError(f"{where}: has {sorted(fields)}, expected {shapes.EXPECTED}")


def _pair(record: Record, prompt: str, completion: str) -> Trace:
    return Trace(
        record.where,
        prompt=prompt,
        completion=completion,
        ended=_ended(record),
        reasoning=one_reasoning(record.where, list(shapes.reasoning_of(record).values())),
        tools=shapes.tools_of(record),
        unused=shapes.unused_of(record),
    )


def _conversation(record: Record, given: Sequence[Any], n_given: int, beside: tuple[str, ...] = ()) -> Trace:
    turns = read_turns(record.where, given)
    learned = [i for i in range(n_given, len(given)) if i not in turns.unlearned]
    if not any(_is_answer(turns.messages[i]) for i in learned):
        raise TraceError(f"{record.where}: no assistant turn with text to learn from; remove the line")
    return Trace(
        record.where,
        messages=turns.messages,
        n_given=n_given,
        ended=_ended(record),
        tools=shapes.tools_of(record),
        unlearned=tuple(i for i in turns.unlearned if i >= n_given),
        unused=(*turns.unused, *beside, *shapes.unused_of(record)),
    )


def _ended(record: Record) -> bool:
    return record.fields.get("finish_reason") != "length"


def _is_answer(message: Message) -> bool:
    said = message["content"].strip() or message.get("reasoning_content", "").strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(said)


def _identity(trace: Trace) -> str:
    """All that makes a trace another one to learn from."""
    pair = [trace.prompt, trace.completion, trace.reasoning]
    conversation = [trace.messages, trace.n_given, trace.unlearned, trace.tools]
    return json.dumps([pair, conversation], sort_keys=True, default=str)
