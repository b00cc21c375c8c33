"""Prebuilt engines under `adlocal run`: xllamacpp's HTTP server and node-llama-cpp, as their registries have them.

`make test-server` installs them into build/engines. Where they are not there these tests are skipped. The oracle is the
drop-in, on a tiny model in F32: engines are compiled otherwise, and greedy text is the same to the token.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from adlocal import AntidistillationLlama
from support.engines import ENGINES, PROMPTS, STRENGTH
from support.paths import ROOT

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
]

XLLAMACPP = """
import json, sys, threading, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.port = sys.argv[1], int(sys.argv[2]), 0
params.n_ctx = 256 * params.n_parallel
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = False
server = xllamacpp.Server(params)
prompts, found = json.loads(sys.argv[3]), {}
def ask(i):
    body = {"prompt": prompts[i], "n_predict": 16, "temperature": 0, "return_tokens": True, **json.loads(sys.argv[4])}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode(), headers)
    found[i] = json.load(urllib.request.urlopen(request, timeout=100))["tokens"]
threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
for thread in threads:
    thread.start()
    if int(sys.argv[2]) == 1:
        thread.join()
for thread in threads:
    thread.join()
print("FOUND" + json.dumps([found[i] for i in range(len(prompts))]))
"""

IN_PROCESS = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.port, params.n_ctx, params.warmup = sys.argv[1], 1, 0, 256, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
asked = [{"prompt": prompt, "max_tokens": 16, "temperature": 0} for prompt in json.loads(sys.argv[2])]
print("FOUND" + json.dumps([server.handle_completions(each)["choices"][0]["text"] for each in asked]))
"""

NODE = """
import {getLlama} from "node-llama-cpp";
const [path, prompts] = [process.argv[2], JSON.parse(process.argv[3])];
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({contextSize: 256, threads: 1});
const sequence = context.getSequence();
const found = [];
for (const prompt of prompts) {
    await sequence.clearHistory();
    const tokens = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0})) {
        tokens.push(token);
        if (tokens.length === 16) break;
    }
    found.push(tokens);
}
console.log("FOUND" + JSON.stringify(found));
await llama.dispose();
"""


#: The command of a Node program of this text, with the node-llama-cpp of a folder.
OnNode = Callable[..., list[str]]


def run(program: Sequence[object], bundle: Path | None, *options: object, **environment: str) -> list[Any]:
    """What a program found for each prompt; under protection with a bundle."""
    own = [sys.executable, "-m", "adlocal", "run", "--bundle", bundle, *options, "--"] if bundle else []
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(list(map(str, [*own, *program])), capture_output=True, timeout=150, env=variables)
    lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith("FOUND")]
    assert lines, done.stderr.decode(errors="replace")[-2000:]
    found: list[Any] = json.loads(lines[0].removeprefix("FOUND"))
    return found


@pytest.fixture
def xllamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that starts its server and asks it."""
    if not (ENGINES / "python" / "xllamacpp").exists():
        pytest.skip("needs xllamacpp; run `make test-server`")
    monkeypatch.setenv("PYTHONPATH", str(ENGINES / "python"))
    path = tmp_path / "ask.py"
    path.write_text(XLLAMACPP)
    return [sys.executable, str(path)]


@pytest.fixture
def node() -> Iterator[OnNode]:
    """Makes the command that starts a program on node-llama-cpp."""
    written = []

    def command(text: str = NODE, folder: str = "node") -> list[str]:
        program, directory = shutil.which("node"), ENGINES / folder
        if program is None or not (directory / "node_modules" / "node-llama-cpp").exists():
            pytest.skip("needs Node and node-llama-cpp; run `make test-server`")
        written.append(directory / f"program-{os.getpid()}.mjs")  # beside what it imports
        written[-1].write_text(text)
        return [program, str(written[-1])]

    yield command
    for path in written:
        path.unlink()


@pytest.mark.parametrize("n_parallel", [1, 4])
def test_the_server_of_xllamacpp_is_protected(
    n_parallel: int,
    xllamacpp: list[str],
    tiny_llama: Path,
    tiny_bundle: Path,
    drop_in_says: dict[float, list[list[int]]],
) -> None:
    """One request after the other, and four at a time."""
    program = [*xllamacpp, tiny_llama, n_parallel, json.dumps(PROMPTS), "{}"]
    assert run(program, None) == drop_in_says[0.0]
    assert run(program, tiny_bundle, "--strength", 0) == drop_in_says[0.0]
    assert run(program, tiny_bundle, "--strength", STRENGTH) == drop_in_says[STRENGTH]


@pytest.mark.parametrize(
    "parameters",
    [{"backend_sampling": True}, {"n_probs": 3}, {"cache_prompt": False}, {"samplers": ["temperature", "top_k"]}],
    ids=lambda parameters: next(iter(parameters)),
)
def test_no_parameter_of_a_request_turns_protection_off(
    parameters: dict[str, Any],
    xllamacpp: list[str],
    tiny_llama: Path,
    tiny_bundle: Path,
    drop_in_says: dict[float, list[list[int]]],
) -> None:
    program = [*xllamacpp, tiny_llama, 1, json.dumps(PROMPTS), json.dumps(parameters)]
    assert run(program, tiny_bundle, "--strength", STRENGTH) == drop_in_says[STRENGTH]


def test_xllamacpp_in_a_program_is_protected(
    xllamacpp: list[str], readable_llama: Path, readable_bundle: Path, tmp_path: Path
) -> None:
    """Without HTTP; it tells text, no tokens."""
    path, prompts = tmp_path / "program.py", ["abcd ef", "x", "3 + 4 ="]
    path.write_text(IN_PROCESS)
    program = [sys.executable, path, readable_llama, json.dumps(prompts)]
    kwargs: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with closing(AntidistillationLlama(str(readable_llama), bundle=readable_bundle, **kwargs)) as llm:

        def said(strength: float) -> list[str]:
            found = [llm.generate(llm.tokenize(p.encode()), temp=0.0, strength=strength) for p in prompts]
            return [llm.detokenize(list(islice(each, 16))).decode() for each in found]

        plain, steered = said(0.0), said(STRENGTH)
    assert run(program, None) == run(program, readable_bundle, "--strength", 0) == plain
    assert run(program, readable_bundle, "--strength", STRENGTH) == steered != plain


def test_a_program_on_node_llama_cpp_is_protected(
    node: OnNode, tiny_llama: Path, tiny_bundle: Path, drop_in_says: dict[float, list[list[int]]]
) -> None:
    program = [*node(), tiny_llama, json.dumps(PROMPTS)]
    assert run(program, None) == drop_in_says[0.0]
    assert run(program, tiny_bundle, "--strength", 0) == drop_in_says[0.0]
    assert run(program, tiny_bundle, "--strength", STRENGTH) == drop_in_says[STRENGTH]


def test_a_node_llama_cpp_with_another_llama_cpp_is_refused(node: OnNode, tiny_llama: Path, tiny_bundle: Path) -> None:
    """In one line, before it writes anything; without protection it runs."""
    program = [*node(folder="node-3.21.1"), tiny_llama, json.dumps(PROMPTS)]
    assert len(run(program, None)) == len(PROMPTS)
    own = [sys.executable, "-m", "adlocal", "run", "--bundle", tiny_bundle, "--"]
    done = subprocess.run(list(map(str, [*own, *program])), capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert re.match(r"adlocal: .*libllama.*: the host's llama.cpp is 0\.4\.0-dev, and adlocal was compiled for", line)


def test_the_example_for_node_is_protected(node: OnNode, tiny_llama: Path, tiny_bundle: Path) -> None:
    """At strength 0 what it says by itself."""
    text = (ROOT / "examples" / "node_llama_cpp.mjs").read_text()
    on_one_core = text.replace("createContext()", "createContext({threads: 1})")  # threads of a busy machine spin
    assert on_one_core != text
    program = [*node(on_one_core), tiny_llama, "3 + 4 ="]
    own = [sys.executable, "-m", "adlocal", "run", "--bundle", tiny_bundle]
    plain, at_0, at_3 = (
        subprocess.run(list(map(str, [*before, *program])), capture_output=True, timeout=150, check=True).stdout
        for before in ([], [*own, "--strength", 0, "--"], [*own, "--strength", STRENGTH, "--"])
    )
    assert plain.strip()
    assert plain == at_0
    assert at_0 != at_3
