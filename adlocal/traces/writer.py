"""A file of traces that grows row by row, and that an interrupted run finds its place in again.

A row is written as soon as it and all before it are done, in the order of the prompts: the file does not depend on what
ended first, and its length tells where to go on. Each row says by what it was made, so that there is no second file to
be lost or to belong to another run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.sequences import Completion
from ..errors import TraceError
from .prompts import Prompt
from .records import Record, holds_json_lines, parse_json_lines
from .shapes import is_empty

#: What a trace has beside the fields of its prompt.
OURS = ("completion", "finish_reason", "n_tokens", "generated_by")


def check_unanswered(prompts: Sequence[Prompt]) -> None:
    """Refuses prompts whose records have a key that a trace gets.

    Raises:
        TraceError: naming the first.
    """
    for where, fields in (prompt.record for prompt in prompts):
        if taken := [name for name in OURS if name in fields]:
            raise TraceError(
                f'{where}: has "{taken[0]}" already, which is to be generated; rename it, to "answer" perhaps'
            )


class TraceWriter:
    """The file of traces. Making one checks what an earlier run left there; nothing is changed before `__enter__`.

    Args:
        path: of the file.
        prompts: to answer, in order.
        made_by: what the text depends on besides the prompt: the teacher, and the settings by name.
        overwrite: start again, whatever lies there.

    Attributes:
        n_rows: rows in the file.
        n_resumed: how many of them an earlier run wrote.
        counts: rows by finish reason, and "empty" ones.

    Raises:
        TraceError: the file was made by another teacher, from other prompts or with other settings.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], made_by: dict[str, Any], overwrite: bool) -> None:
        if not holds_json_lines(path):
            raise TraceError(f"{path}: traces are written as JSON lines; give a name that ends in .jsonl")
        self._path, self._prompts, self._made_by = path, prompts, made_by
        self._waiting: dict[int, bytes] = {}
        self.counts: Counter[str] = Counter()
        self.n_rows = 0
        self._n_bytes = 0 if overwrite else self._read()
        self.n_resumed = self.n_rows

    def __enter__(self) -> TraceWriter:
        self._file = open(self._path, "ab")
        self._file.truncate(self._n_bytes)
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add(self, completion: Completion, text: str) -> int:
        """Takes a completion and returns how many rows could be written then."""
        prompt = self._prompts[completion.index]
        said = text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
        row = {
            **prompt.record.fields,
            "completion": said,
            "finish_reason": completion.finish_reason,
            "n_tokens": len(completion.tokens),
            "generated_by": self._made_by,
        }
        self._count(row)
        self._waiting[completion.index] = _json(row) + b"\n"
        n_before = self.n_rows
        while line := self._waiting.pop(self.n_rows, None):
            self._file.write(line)
            self.n_rows += 1  # before anybody sees the line: closing writes it too
            self._file.flush()
        return self.n_rows - n_before

    def _count(self, row: dict[str, Any]) -> None:
        self.counts[row["finish_reason"]] += 1
        self.counts["empty"] += is_empty(row)

    def _read(self) -> int:
        """Counts the complete rows of an earlier run and returns their length in bytes."""
        try:
            data = self._path.read_bytes() if self._path.exists() else b""
            kept = data[: data.rfind(b"\n") + 1]
            rows = parse_json_lines(kept.decode("utf-8"), self._path)
        except (OSError, UnicodeDecodeError) as error:
            raise TraceError(f"{self._path}: no file of traces ({error}); give another -o") from None
        if len(rows) > len(self._prompts):
            raise self._refusal(f"{self._path}: has {len(rows)} rows for {len(self._prompts)} prompts")
        for row, prompt in zip(rows, self._prompts, strict=False):
            self._check(row, prompt)
            self._count(row.fields)
        self.n_rows = len(rows)
        begun = b"".join(_json(prompt.record.fields)[:-1] for prompt in self._prompts[self.n_rows :][:1])
        rest = data[len(kept) :]
        if rest[: len(begun)] != begun[: len(rest)]:
            raise self._refusal(f"{self._path}: its last line is none of this run")
        return len(kept)

    def _check(self, row: Record, prompt: Prompt) -> None:
        """Refuses a row that this run would not have written for the prompt."""
        made_by = row.fields.get("generated_by")
        if not isinstance(made_by, dict) or any(name not in row.fields for name in OURS):
            raise self._refusal(f"{row.where}: was not written by adlocal traces")
        if made_by.get("teacher") != self._made_by["teacher"]:
            raise self._refusal(f"{row.where}: was made with another teacher")
        if made_by != self._made_by:
            name = next(k for k in {**self._made_by, **made_by} if made_by.get(k) != self._made_by.get(k))
            raise self._refusal(
                f"{row.where}: was made with {name} {made_by.get(name)}, this run has {self._made_by.get(name)}"
            )
        if _json({k: v for k, v in row.fields.items() if k not in OURS}) != _json(prompt.record.fields):
            raise self._refusal(f"{row.where}: answers another prompt than {prompt.where}")

    def _refusal(self, problem: str) -> TraceError:
        return TraceError(f"{problem}; give another -o, or say --overwrite to start again")


def _json(fields: dict[str, Any]) -> bytes:
    """One line of JSON in UTF-8; with escapes where a string holds half a surrogate pair, which UTF-8 cannot."""
    try:
        return json.dumps(fields, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(fields, default=str).encode("ascii")
