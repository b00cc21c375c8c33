"""The programs of the README and the documents run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT


def test_the_program_on_the_first_screen(
    tiny_llama: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(program("README.md", tiny_llama, tiny_bundle).replace("n_ctx=2048", "n_ctx=256"), {})
    assert "Dose(strength=1.0" in capsys.readouterr().out


def test_the_program_with_many_sequences(
    tiny_llama: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    exec(program("docs/python.md", tiny_llama, tiny_bundle), names)
    names["llm"].close()
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    ended = [line for line in lines if line[1:] in (["length"], ["stop"])]
    assert sorted(id for id, _ in ended) == ["1", "2"]


def program(document: str, teacher: Path, bundle: Path) -> str:
    """The first one in a document, of these files."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    return str(found[0]).replace("teacher.gguf", str(teacher)).replace("bundle/", str(bundle))


def test_links_lead_somewhere() -> None:
    """Those to files of the project, and to headings of documents."""
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]:
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            found = (document.parent / path).resolve() if path else document
            assert found.exists(), f"{document}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target
