"""Tables: CSV, TSV, Parquet and Hugging Face datasets, read by libraries that the extra `adlocal[datasets]` brings.

A table has every column in every row. A cell without a value is a key that the row does not have.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AdlocalError, TraceError

Rows = list[dict[str, Any]]


def separated_rows(text: str, path: Path, separator: str) -> Rows:
    """Rows of CSV or TSV with a header; every value is text, and an empty cell is none.

    Raises:
        TraceError: the text is no table, or its header names a column twice or not at all.
        AdlocalError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise _not_installed(path, error) from None
    if not text.strip():
        return []
    try:  # the header is read as a row: pandas would rename columns, and take one too many for an index
        table = pandas.read_csv(io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False)
    except (ValueError, pandas.errors.ParserError) as error:
        raise TraceError(f"{path}: cannot be read as a table ({_first_line(error)}); mend or remove the line") from None
    header, *rows = table.fillna("").values.tolist()
    if len(set(header)) < len(header) or not all(name.strip() for name in header):
        raise TraceError(f"{path}: its header is {header}; give each column a name of its own in the first line")
    return [{name: cell for name, cell in zip(header, row, strict=True) if cell} for row in rows]


def parquet_rows(path: Path) -> Rows:
    """Rows of a Parquet file.

    Raises:
        TraceError: it cannot be read.
        AdlocalError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _not_installed(path, error) from None
    try:
        return _without_nulls(parquet.ParquetFile(path).read().to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise TraceError(f"{path}: cannot be read as Parquet ({_first_line(error)}); give a whole file") from None


def dataset_rows(source: str, path: str, name: str | None, split: str | None) -> Rows:
    """Rows of a Hugging Face dataset, of "train" if no split is named; `source` is for messages.

    Raises:
        TraceError: it cannot be loaded.
        AdlocalError: datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise _not_installed(source, error) from None
    try:
        return _without_nulls([dict(row) for row in datasets.load_dataset(path, name, split=split or "train")])
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


def _without_nulls(rows: Sequence[dict[str, Any]]) -> Rows:
    """Takes out the nulls with which a table fills keys that a row does not have: chat templates ask whether a message
    has "tool_calls". A message without content says so with a null of its own."""
    return [_stripped(row) for row in rows]


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(v) for key, v in value.items() if v is not None or key == "content"}
    return [_stripped(v) for v in value] if isinstance(value, list) else value
