"""Traces: rows in TRL's conventions, rendered by the model's own chat template and tokenized by llama.cpp.

{"prompt": str, "completion": str}    {"prompt": [message, ...], "completion": [message, ...]}
{"messages": [message, ...]}          message: {"role": str, "content": str}

A question is a prompt too, and without a completion its answer is one, as in GSM8K. "finish_reason": "length" says that
the completion was cut short.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import files
from ..errors import TraceError
from .records import Row, check_messages, completion_of, is_empty, prompt_of, read_rows

Message = dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """One row of a trace file.

    Attributes:
        where: file and line, for messages.
        messages: the conversation, or None for a pair of strings.
        n_given: how many of the messages are the prompt; the loss is on assistant turns after them.
        prompt, completion: the pair of strings, or None.
        ended: whether the last answer came to its end; one that was cut short teaches no end of turn.
    """

    where: str
    messages: tuple[Message, ...] | None = None
    n_given: int = 0
    prompt: str | None = None
    completion: str | None = None
    ended: bool = True


@dataclass(frozen=True)
class TraceFile:
    """What `read_traces` found; iterates over its traces.

    Attributes:
        traces: in the file's order, each once.
        n_duplicates: traces left out because an earlier one has the same prompt and completion.
        n_empty: rows left out because their generated completion has no text.
        sha256: of the file; of the traces where they come from a dataset.
    """

    traces: list[Trace]
    n_duplicates: int
    n_empty: int
    sha256: str

    def __iter__(self) -> Iterator[Trace]:
        return iter(self.traces)


def read_traces(path: str | os.PathLike[str]) -> TraceFile:
    """Reads traces from JSON lines, Parquet (`*.parquet`) or a Hugging Face dataset, `owner/name[/config][:split]`.

    Raises:
        TraceError: the file is missing or empty, or a row is no trace; the message gives its number.
        AdlocalError: Parquet and datasets need the extra `adlocal[datasets]`.
    """
    rows = read_rows(path)
    found = [_trace(row) for row in rows if not is_empty(row.fields)]
    traces: dict[str, Trace] = {}
    for trace in found:
        traces.setdefault(_identity(trace), trace)
    if not traces:
        raise TraceError(f'{path}: no traces; give lines like {{"prompt": "...", "completion": "..."}}')
    digest = files.sha256(path) if os.path.isfile(path) else hashlib.sha256("\n".join(traces).encode()).hexdigest()
    return TraceFile(list(traces.values()), len(found) - len(traces), len(rows) - len(found), digest)


def _trace(row: Row) -> Trace:
    where, fields = row
    prompt, completion, messages = prompt_of(fields), completion_of(fields), fields.get("messages")
    ended = fields.get("finish_reason") != "length"
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise TraceError(f"{where}: the completion is empty; remove the line")
        return Trace(where, prompt=prompt, completion=completion, ended=ended)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(where, [*prompt, *completion], len(prompt), ended)
    if isinstance(messages, list):
        return _conversation(where, messages, 0, ended)
    raise TraceError(
        f'{where}: has {sorted(fields)}, expected "prompt" and "completion", both strings or both lists of messages, '
        'or a list "messages", or "question" and "answer"'
    )


def _identity(trace: Trace) -> str:
    return json.dumps([trace.prompt, trace.completion, trace.messages, trace.n_given], sort_keys=True, default=str)


def _conversation(where: str, messages: list[Any], n_given: int, ended: bool) -> Trace:
    check_messages(where, messages)
    answers = [m for m in messages[n_given:] if m["role"] == "assistant" and str(m["content"] or "").strip()]
    if not answers:
        raise TraceError(f"{where}: no assistant turn with text to learn from; remove the line")
    return Trace(where, messages=tuple(messages), n_given=n_given, ended=ended)
