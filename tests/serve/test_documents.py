"""The gateway's documents: pages made from its code are up to date, and the example is one that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

import serve_reference
from adlocal.serve.config import read
from support.paths import ROOT


@pytest.mark.parametrize(
    ("page", "text"),
    [("serve-settings.md", serve_reference.settings), ("serve-fields.md", serve_reference.fields)],
)
def test_reference_pages_are_made_anew_when_the_code_changes(page: str, text: object) -> None:
    assert callable(text)
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == text(), "run `make serve-reference`"


def test_every_setting_has_a_meaning() -> None:
    lines = serve_reference.settings().splitlines()
    assert [line for line in lines if line.startswith("| `") and line.endswith("|  |")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "serve").glob("*.toml")), ids=lambda path: path.name)
def test_examples_can_be_read(path: Path) -> None:
    assert read(path).model is not None
