"""Records: what a data file holds, whatever its format. Every text that adlocal reads as data comes in here."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import files
from ..errors import TraceError
from . import tables

# owner/name, owner/name/config, either with :split. A known ending makes it a file, which is then missing.
_DATASET = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<name>[\w.-]+))?(?::(?P<split>\w+))?")
_JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
#: Endings that say what a file is, and that it is nothing to read records from.
_REFUSED = (
    *(".7z", ".arrow", ".bz2", ".docx", ".feather", ".gguf", ".html", ".md", ".ods", ".pdf", ".pkl", ".tar", ".tgz"),
    *(".toml", ".txt", ".xls", ".xlsx", ".xml", ".xz", ".yaml", ".yml", ".zip", ".zst"),
)
_FILE_ENDINGS = (*_JSON_ENDINGS, *_SEPARATORS, *_REFUSED, ".gz", ".parquet")
_FORMATS = "JSON lines (.jsonl), a JSON array (.json), CSV, TSV, gzip of these (.gz), or Parquet"
_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = "\ufeff"


class Record(NamedTuple):
    """One record and where it stands, for messages: `FILE:LINE`, or `FILE:ROW` where there are no lines."""

    where: str
    fields: dict[str, Any]


def read_records(source: str | os.PathLike[str]) -> list[Record]:
    """Reads a file, or a dataset `owner/name[/config][:split]` if there is no such file.

    Text is UTF-8, with or without a byte-order mark: JSON lines, one JSON array, CSV or TSV with a header, each of them
    gzipped or not. `*.parquet` is read too.

    Raises:
        TraceError: the source cannot be read, or something in it is no record; the message gives its line or row.
        AdlocalError: what CSV, TSV, Parquet and datasets need is not installed.
    """
    path, text = Path(source), os.fspath(source)
    dataset = _DATASET.fullmatch(text)
    if dataset and not path.is_file() and not text.lower().endswith(_FILE_ENDINGS):
        return _numbered(text, tables.dataset_rows(text, **dataset.groupdict()))
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending in _REFUSED:
        raise TraceError(f"{path}: {ending} is no format that adlocal reads; give {_FORMATS}")
    if ending == ".parquet":
        return _numbered(text, tables.parquet_rows(path))
    content = _read_text(path)
    if ending in _SEPARATORS:
        return _numbered(text, tables.separated_rows(content, path, _SEPARATORS[ending]))
    return _json_array(content, path) if content.lstrip().startswith("[") else parse_json_lines(content, path)


def holds_json_lines(path: Path) -> bool:
    """Whether a file of JSON lines may have this name: `read_records` would take some endings for other formats."""
    ending = path.suffix.lower()
    return ending in _JSON_ENDINGS or ending not in _FILE_ENDINGS


def parse_json_lines(text: str, path: str | os.PathLike[str]) -> list[Record]:
    """Records of JSON lines that were read already; blank lines are passed over and counted. `path` is for messages.

    Raises:
        TraceError: a line is no JSON object; the message gives its number.
    """
    lines = text.split("\n")  # splitlines() would also break at U+2028 and others, which JSON allows in a string
    marked = [line.removeprefix(_BYTE_ORDER_MARK) for line in lines]  # files that were joined have several marks
    return [_record(_loads(line, f"{path}:{n}"), f"{path}:{n}") for n, line in enumerate(marked, 1) if line.strip()]


def digest(source: str | os.PathLike[str], parts: Iterable[str]) -> str:
    """SHA-256 of a file, or of `parts` where the source is a dataset."""
    if os.path.isfile(source):
        return files.sha256(source)
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        is_gzip = data.startswith(_GZIP_MAGIC)
        if path.suffix.lower() == ".gz" and not is_gzip:
            raise TraceError(f"{path}: is no gzip, whatever its name; unpack or rename it")
        return (_unpacked(data, path) if is_gzip else data).decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(
            f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8, or give a JSON lines file"
        ) from None


def _unpacked(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: broken gzip ({error}); give a whole file") from None


def _json_array(text: str, path: Path) -> list[Record]:
    rows = _loads(text, str(path), "give the whole array, or JSON lines")
    return [_record(row, f"{path}:{n}") for n, row in enumerate(rows, 1)]


def _loads(text: str, where: str, remedy: str = "mend or remove the line") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise TraceError(f"{where}: broken JSON at column {error.colno}{line} ({error.msg}); {remedy}") from None
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's limits
        raise TraceError(f"{where}: JSON that Python cannot hold ({error}); remove the line") from None


def _record(fields: Any, where: str) -> Record:
    if not isinstance(fields, dict):
        raise TraceError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    return Record(where, fields)


def _numbered(source: str, rows: Sequence[dict[str, Any]]) -> list[Record]:
    return [Record(f"{source}:{n}", fields) for n, fields in enumerate(rows, 1)]
