"""`adlocal plugin build`: the plugin for another llama.cpp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from adlocal import Settings
from adlocal.bundle import Bundle
from adlocal.plugin import Protection, environment, library
from adlocal.plugin.build import ALIKE, kept
from support.cli import Cli, refused
from support.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")

INCLUDE = Path(llama_cpp.__file__).parents[1] / "include"
(LIBLLAMA,) = Path(llama_cpp.__file__).parent.rglob("libllama.so")
SCRIPT = """
import json, sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
text = llm.generate(llm.tokenize(b"3 + 4 ="), temp=0.0)
print(json.dumps([next(text) for _ in range(16)]))
"""


def test_the_known_versions_are_the_cores() -> None:
    source = (ROOT / "native" / "src" / "llama_table.cpp").read_text()
    assert "ALIKE[] = {" + ", ".join(f'"{version}"' for version in ALIKE) + "}" in source


def test_what_is_built_protects_as_the_one_that_came_along(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built for the very llama.cpp that is here: its text is that of the plugin that was installed."""
    monkeypatch.setenv("ADLOCAL_CACHE", str(tmp_path))
    done = cli("plugin", "build", "--include", INCLUDE, "--libllama", LIBLLAMA)
    assert done.status == 0, done.err
    (built,) = tmp_path.rglob("libadlocal-plugin.so")
    assert str(built) in done.out
    assert kept("0.5.0-dev") == built
    variables = environment(Protection(Bundle.open(tiny_bundle), Settings(3.0, 0.05)), os.environ)

    def says(**others: str) -> list[int]:
        argv = [sys.executable, "-c", SCRIPT, str(tiny_llama)]
        found = subprocess.run(argv, capture_output=True, text=True, timeout=60, env={**variables, **others})
        assert found.returncode == 0, found.stderr
        tokens: list[int] = json.loads(found.stdout)
        return tokens

    assert says(LD_PRELOAD=str(built)) == says() != says(LD_PRELOAD="")


def test_a_llama_h_with_unknown_functions_is_refused(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could let out what the others lock."""
    monkeypatch.setenv("ADLOCAL_CACHE", str(tmp_path / "cache"))
    header = (INCLUDE / "llama.h").read_text()
    (tmp_path / "llama.h").write_text(header + "LLAMA_API float * llama_get_raw_logits(struct llama_context * ctx);\n")
    done = cli("plugin", "build", "--include", tmp_path, "--llama-version", "0.7.0")
    refused(done, "plugin", str(tmp_path / "llama.h"), "llama_get_raw_logits", "use a later adlocal")
    refused(
        cli("plugin", "build", "--include", tmp_path / "cache", "--llama-version", "0.7.0"), "plugin", "no such file"
    )


def test_a_header_that_does_not_compile_leaves_nothing(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADLOCAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "llama.h").write_text("#error not this one\n")
    done = cli("plugin", "build", "--include", tmp_path, "--llama-version", "0.7.0")
    refused(done, "plugin", "cannot be compiled", "not this one", status=1)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_llama_cpp_without_a_plugin_is_refused_before_the_program_starts(
    tmp_path: Path, tiny_bundle: Path, cli: Cli
) -> None:
    """A library that tells another version."""
    source, other = tmp_path / "other.c", tmp_path / "libllama.so"
    source.write_text('const char * llama_version(void) { return "0.4.0"; }\n')
    subprocess.run(["cc", "-shared", "-fPIC", "-o", other, source], check=True, timeout=60)
    done = cli("run", "--bundle", tiny_bundle, "--libllama", other, "--", "/bin/echo", "started")
    refused(done, "run", f"{other} is llama.cpp 0.4.0", "adlocal plugin build")
    refused(
        cli("run", "--bundle", tiny_bundle, "--libllama", source, "--", "/bin/echo"),
        "run",
        "not a library of llama.cpp",
    )
    assert library(LIBLLAMA) == library()
