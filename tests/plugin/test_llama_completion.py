"""llama-completion under `adlocal run`: a program of llama.cpp's own with a loop of its own."""

from __future__ import annotations

import itertools
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adlocal import AntidistillationLlama
from llama_server import program

COMPLETION = program("llama-completion")
PROMPT, STRENGTH, N = "abcd ef", 3.0, 24

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
    pytest.mark.skipif(not COMPLETION.exists(), reason="needs llama-completion; run `make test-server`"),
]


def said(teacher: Path, *own: object) -> str:
    """What it writes after the prompt.

    It writes through a thread of its own and may end before that has written all, plain as well, where the machine is
    busy. So it is run several times, and the longest text counts: the others are its beginnings.
    """
    texts = [said_once(teacher, *own) for _ in range(10)]
    longest = max(texts, key=len)
    assert all(longest.startswith(text) for text in texts)
    return longest


def said_once(teacher: Path, *own: object) -> str:
    """The same, as far as it has written it."""
    alone = ["-t", 1, "-tb", 1, "-ngl", 0, "-c", 256, "--no-warmup", "--offline", "-no-cnv", "--no-display-prompt"]
    asked = ["-m", teacher, "-p", PROMPT, "-n", N, "--temp", 0, *alone]
    done = subprocess.run(list(map(str, [*own, COMPLETION, *asked])), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.rstrip("\n")


def test_its_text_is_the_drop_ins(readable_llama: Path, readable_bundle: Path) -> None:
    """At strength 0 it is the program's own."""
    kwargs: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with closing(
        AntidistillationLlama(str(readable_llama), bundle=readable_bundle, strength=STRENGTH, **kwargs)
    ) as llm:
        tokens = itertools.islice(llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0), N)
        expected = llm.detokenize(list(tokens)).decode()
    run = [sys.executable, "-m", "adlocal", "run", "--bundle", readable_bundle]
    plain = said(readable_llama)
    assert said(readable_llama, *run, "--strength", 0, "--") == plain
    assert said(readable_llama, *run, "--strength", STRENGTH, "--") == expected != plain
