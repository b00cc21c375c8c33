"""The README's program runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.paths import ROOT


def test_the_program_on_the_first_screen(
    tiny_llama: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    program = found[1].replace("teacher.gguf", str(tiny_llama)).replace("bundle/", str(tiny_bundle))
    exec(program.replace("n_ctx=2048", "n_ctx=256"), {})
    assert "Dose(strength=1.0" in capsys.readouterr().out
