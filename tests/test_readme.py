"""The README's programs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT


def test_the_program_on_the_first_screen(
    tiny_llama: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(program(0, tiny_llama, tiny_bundle).replace("n_ctx=2048", "n_ctx=256"), {})
    assert "Dose(strength=1.0" in capsys.readouterr().out


def test_the_program_with_many_sequences(
    tiny_llama: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    exec(program(1, tiny_llama, tiny_bundle), names)
    names["llm"].close()
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    ended = [line for line in lines if line[1:] in (["length"], ["stop"])]
    assert sorted(id for id, _ in ended) == ["1", "2"]


def program(n: int, teacher: Path, bundle: Path) -> str:
    """The nth one, of these files."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return str(found[n]).replace("teacher.gguf", str(teacher)).replace("bundle/", str(bundle))
