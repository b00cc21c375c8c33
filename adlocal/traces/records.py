"""Rows of a data source: a JSON lines file, a Parquet file, or a Hugging Face datasets id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AdlocalError, TraceError

# owner/name, owner/name/config, either with :split. A known ending makes it a file, which is then missing.
_DATASET = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<name>[\w.-]+))?(?::(?P<split>\w+))?")
_FILE_ENDINGS = (".csv", ".gguf", ".gz", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".zst")


class Row(NamedTuple):
    """One row and where it stands, for messages: `FILE:LINE`, or `FILE:ROW` where there are no lines."""

    where: str
    fields: dict[str, Any]


def read_rows(source: str | os.PathLike[str]) -> list[Row]:
    """Reads JSON lines, Parquet (`*.parquet`), or a dataset, `owner/name[/config][:split]`, if there is no such file.

    Raises:
        TraceError: the source cannot be read, or a line is no JSON object.
        AdlocalError: what Parquet and datasets need is not installed.
    """
    path, text = Path(source), os.fspath(source)
    dataset = _DATASET.fullmatch(text)
    if dataset and not path.is_file() and not text.lower().endswith(_FILE_ENDINGS):
        return _numbered(text, _dataset_rows(text, **dataset.groupdict()))
    if path.suffix.lower() == ".parquet":
        return _numbered(text, _parquet_rows(path))
    return read_json_lines(path)


def read_json_lines(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a JSON lines file; blank lines are passed over and counted.

    Raises:
        TraceError: the file cannot be read, or a line is no JSON object; the message gives its number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read as UTF-8 text ({error}); give a JSON lines file") from None
    return parse_json_lines(text, path)


def parse_json_lines(text: str, path: str | os.PathLike[str]) -> list[Row]:
    """Rows of JSON lines that were read already; `path` is for messages. Raises as `read_json_lines` does."""
    lines = text.split("\n")  # splitlines() would also break at U+2028 and others, which JSON allows in a string
    return [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, where: str) -> Row:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise TraceError(
            f"{where}: broken JSON at column {error.colno} ({error.msg}); mend or remove the line"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's limits
        raise TraceError(f"{where}: JSON that Python cannot hold ({error}); remove the line") from None
    if not isinstance(fields, dict):
        raise TraceError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    return Row(where, fields)


def prompt_of(fields: dict[str, Any]) -> Any:
    """What a row asks: its "prompt", else its "messages", else its "question", else None."""
    return fields.get(_prompt_key(fields))


def completion_of(fields: dict[str, Any]) -> Any:
    """What answers a row's prompt: its "completion", else the "answer" to its "question", else None."""
    return fields.get("completion", fields.get("answer") if _prompt_key(fields) == "question" else None)


def _prompt_key(fields: dict[str, Any]) -> str:
    return next((key for key in ("prompt", "messages") if fields.get(key) is not None), "question")


def is_empty(fields: dict[str, Any]) -> bool:
    """Whether a generated completion has no text: some teachers end their turn at once."""
    completion = fields.get("completion")
    parts = completion if isinstance(completion, list) else [{"content": completion}]
    text = "".join(str(part.get("content") or "") for part in parts if isinstance(part, dict))
    return {"completion", "finish_reason"} <= fields.keys() and not text.strip()


def check_messages(where: str, messages: list[Any]) -> None:
    """Refuses a list with anything but messages in it."""
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            raise TraceError(f'{where}: a message needs "role" and "content", found {str(message)[:80]}')


def _parquet_rows(path: Path) -> Iterable[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _not_installed(path, error) from None
    try:
        rows: list[dict[str, Any]] = parquet.ParquetFile(path).read().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise TraceError(f"{path}: cannot be read as Parquet ({_first_line(error)}); give a whole file") from None
    return rows


def _dataset_rows(source: str, path: str, name: str | None, split: str | None) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise _not_installed(source, error) from None
    try:
        return [dict(row) for row in datasets.load_dataset(path, name, split=split or "train")]
    except Exception as error:  # it runs code of many libraries, each with its own exceptions
        raise TraceError(f"{source}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What went wrong in `load_dataset`, and the remedy."""
    said = _first_line(error)
    if type(error).__name__ in ("DatasetNotFoundError", "GatedRepoError", "RepositoryNotFoundError"):
        return f"no such file, and no dataset that you may read ({said}); check the name, or run `hf auth login`"
    if isinstance(error, OSError):
        return f"no such file, and the dataset cannot be fetched ({said}); check the network, or give a local file"
    return f"datasets cannot load it ({said}); give owner/name, owner/name:split or owner/name/config:split"


def _not_installed(source: str | os.PathLike[str], error: ImportError) -> AdlocalError:
    return AdlocalError(
        f"{source}: reading it needs {error.name}, which is not installed; run: pip install 'adlocal[datasets]'"
    )


def _first_line(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split("\n")[0].split())


def _numbered(source: str, rows: Iterable[dict[str, Any]]) -> list[Row]:
    return [Row(f"{source}:{n}", _without_nulls(fields)) for n, fields in enumerate(rows, 1)]


def _without_nulls(value: Any) -> Any:
    """Takes out the nulls with which a table fills keys that a row does not have: chat templates ask whether a message
    has "tool_calls". A message without content says so with a null of its own."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None or key == "content"}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
