"""Verbs that start an engine, or stand before one, where llama-cpp-python is not installed: a container has no use for
it. The commands run in processes in which it, and what the converter needs, cannot be imported."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from adlocal.llamacpp.installed import LLAMA_CPP_PYTHON
from support.engines import ENGINES, PROMPTS, STRENGTH, N, serving
from support.gateway import gateway
from support.paths import ROOT

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"llama_cpp", "torch", "transformers", "gguf", "accelerate", "datasets"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
NEEDED = f"needs llama-cpp-python, which is not installed; run: pip install '{LLAMA_CPP_PYTHON}'"

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")


@dataclass(frozen=True)
class Command:
    """A verb that needs no llama-cpp-python.

    Attributes:
        words: after `adlocal`; {bundle}, {teacher} and {own} stand for files, {own} being an empty directory.
        says: some of what it writes, to either stream.
    """

    words: str
    says: str


COMMANDS = {
    "run": Command("run --bundle {bundle} -- /bin/true", "true made no context of a protected model: nothing of it"),
    "status": Command("status --control {own}", "no program runs under adlocal run"),
    "keys": Command("keys list --state {own}", "there are no keys; make one"),
    "watch": Command("watch --help", "whom the gateway's extraction watch suspects"),
    "serve": Command("serve --check -m {teacher} --bundle {bundle} --state {own}", "strength "),
    "inspect": Command("inspect {bundle}", "files         fit together"),
    "version": Command("--version", "adlocal 0"),
}
#: Those that run llama.cpp in their own process.
OTHERS = {
    "generate": "generate -m {teacher} --bundle {bundle} -p x",
    "traces": "traces -m {teacher} --prompts {prompts} -o {own}/traces.jsonl",
    "bench": "bench -m {teacher} --bundle {bundle}",
    "score": "score --bundle {bundle} {prompts}",
    "calibrate": "calibrate -m {teacher} --bundle {bundle} --prompts {prompts} --kl 0.1",
}


@pytest.fixture
def blocked(tmp_path: Path) -> dict[str, str]:
    """Variables of a process, and of its children, that cannot import it."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join([str(tmp_path / "blocked"), str(ENGINES / "python")])
    return {"PYTHONPATH": path, "XDG_RUNTIME_DIR": str(tmp_path)}


@pytest.fixture
def files(tiny_bundle: Path, tiny_llama: Path, tiny_traces: Path, tmp_path: Path) -> dict[str, Path]:
    """By the names that commands have for them."""
    (tmp_path / "own").mkdir(mode=0o700)
    return {"bundle": tiny_bundle, "teacher": tiny_llama, "prompts": tiny_traces, "own": tmp_path / "own"}


def start(argv: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=60, env={**os.environ, **variables}
    )


def adlocal(words: str, files: dict[str, Path], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return start(["-m", "adlocal", *(word.format(**files) for word in words.split())], variables)


def test_it_is_blocked(blocked: dict[str, str]) -> None:
    done = start(["-c", "import adlocal, llama_cpp"], blocked)
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'llama_cpp'\n")


@on_linux
@pytest.mark.parametrize("verb", COMMANDS)
def test_verbs_that_need_none(verb: str, blocked: dict[str, str], files: dict[str, Path]) -> None:
    done = adlocal(COMMANDS[verb].words, files, blocked)
    assert done.returncode == 0, done.stderr
    assert COMMANDS[verb].says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.server
@on_linux
def test_an_engine_that_serves(
    blocked: dict[str, str], files: dict[str, Path], drop_in_says: dict[float, list[list[int]]], tmp_path: Path
) -> None:
    """What it says is protected, as the drop-in's is."""
    if not (ENGINES / "python" / "xllamacpp").exists():
        pytest.skip("needs xllamacpp; run `make test-server`")
    command = [sys.executable, "-m", "adlocal", "engine", "-m", files["teacher"], "--bundle", files["bundle"]]
    options = ["--strength", STRENGTH, "-np", 1, "-c", 256, "-t", 1, "--port", 0, "--no-warmup"]
    with serving([*command, *options], tmp_path / "log", blocked) as server:
        assert [server.complete(prompt, N) for prompt in PROMPTS] == drop_in_says[STRENGTH]


@pytest.mark.parametrize("verb", OTHERS)
def test_other_verbs_tell_what_to_install(verb: str, blocked: dict[str, str], files: dict[str, Path]) -> None:
    done = adlocal(OTHERS[verb], files, blocked)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"adlocal {verb}: this verb {NEEDED}\n"


def test_an_engine_of_llama_cpp_python_tells_what_to_install(blocked: dict[str, str], files: dict[str, Path]) -> None:
    done = adlocal("engine -m {teacher} --bundle {bundle} --engine llama-cpp-python", files, blocked)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"adlocal engine: this verb {NEEDED}\n"


def test_the_package_tells_what_to_install(blocked: dict[str, str], files: dict[str, Path]) -> None:
    """When a name is asked for that runs llama.cpp, and not before."""
    program = """
import json, sys, adlocal
said = {}
for name in adlocal.__all__:
    try:
        getattr(adlocal, name)
    except ImportError as error:
        said[name] = str(error)
assert adlocal.Bundle.open(sys.argv[1]).id and not hasattr(adlocal, "nothing")
print(json.dumps(said))
from adlocal import AntidistillationLlama
"""
    done = start(["-c", program, str(files["bundle"])], blocked)
    said = json.loads(done.stdout)
    assert {"AntidistillationLlama", "ParallelLlama", "ProxyPair", "Scheduler"} <= said.keys()
    assert said.keys().isdisjoint({"Bundle", "Calibration", "Dose", "Settings", "InputError"})
    assert said == {name: f"adlocal.{name} {NEEDED}" for name in said}
    assert done.stderr.endswith(f"ImportError: adlocal.AntidistillationLlama {NEEDED}\n")


def test_what_is_named_is_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    assert LLAMA_CPP_PYTHON in {*project["dependencies"], *extras}


@pytest.mark.server
@on_linux
def test_the_gateway_serves(blocked: dict[str, str], long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    """It and its engine, in a container that has neither llama-cpp-python nor what the converter needs."""
    with gateway(long_llama, long_bundle, tmp_path, "-np", 1, "-c", 1024, environment=blocked) as found:
        assert found.chat(n=5).status_code == 200
        (record,) = found.wait_for_record(1)
        assert record["answers"][0]["rows"] > 0
        time.sleep(1)  # the watch writes twice a second
        files = {"own": tmp_path / "state"}
        assert "key:anyone" in adlocal("watch --state {own}", files, blocked).stdout
