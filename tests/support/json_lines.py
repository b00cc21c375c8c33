"""Files of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_lines(path: Path, *rows: object) -> Path:
    """A row a line; a string stands as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Its rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
