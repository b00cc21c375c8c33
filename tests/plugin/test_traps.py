"""What preloading and samplers are known to trip over, from public reports: each a program on llama-cpp-python.

The oracle is the drop-in. That two libraries may be preloaded, and what a shell is told, stands in test_run.py; a
grammar that refuses the first choice in test_engine_command.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.engines import PROMPTS, STRENGTH

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")


def run(text: str, tmp_path: Path, bundle: Path, *arguments: object) -> Any:
    """What a script under protection prints, as JSON."""
    path = tmp_path / "program.py"
    path.write_text(text)
    own = [sys.executable, "-m", "adlocal", "run", "--bundle", bundle, "--strength", STRENGTH, "--"]
    command = [*own, sys.executable, path, *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


OPENED = """
import ctypes, os
class Opened(ctypes.CDLL):
    def __init__(self, name, mode=0, **kwargs):
        super().__init__(name, mode=os.RTLD_NOW | os.{mode}, **kwargs)
ctypes.CDLL = Opened
"""
GREEDY = """
import json, sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
def greedy(prompt, n=16, **kwargs):
    found = []
    for token in llm.generate(prompt, temp=0.0, **kwargs):
        found.append(token)
        if len(found) == n:
            return found
prompts = json.loads(sys.argv[2])
"""


@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL", "RTLD_DEEPBIND"])
def test_however_llama_cpp_is_opened(
    mode: str, tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, drop_in_says: dict[float, list[list[int]]]
) -> None:
    """Locally, where no other object sees its symbols, or deep, where its own come before a preloaded one's."""
    text = OPENED.format(mode=mode) + GREEDY + "print(json.dumps([greedy(prompt) for prompt in prompts]))\n"
    assert run(text, tmp_path, tiny_bundle, tiny_llama, json.dumps(PROMPTS)) == drop_in_says[STRENGTH]


SAMPLED = """
import ctypes, json, sys
import llama_cpp as c
c.llama_backend_init()
model = c.llama_model_load_from_file(sys.argv[1].encode(), c.llama_model_default_params())
params = c.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
c.llama_sampler_chain_add(chain, c.llama_sampler_init_greedy())
told = []
{before}
ctx = c.llama_init_from_model(model, params)
{after}
memory = c.llama_get_memory(ctx)
found = []
for prompt in json.loads(sys.argv[2]):
    c.llama_memory_clear(memory, True)
    c.llama_sampler_reset(chain)
    tokens, said = list(prompt), []
    while len(said) < 16:
        ids = (c.llama_token * len(tokens))(*tokens)
        assert c.llama_decode(ctx, c.llama_batch_get_one(ids, len(tokens))) == 0
        token = c.llama_sampler_sample(chain, ctx, -1)
        {then}
        said.append(token)
        tokens = [token]
    found.append(said)
print(json.dumps([told, found]))
"""
ON_THE_DEVICE = {
    "by the CPU": ("", "", [], ""),
    "accepted once more": ("", "", [], "c.llama_sampler_accept(chain, token)"),
    "on the device": (
        "own = (c.llama_sampler_seq_config * 1)(c.llama_sampler_seq_config(0, ctypes.cast(chain, ctypes.c_void_p)))\n"
        "params.samplers, params.n_samplers = own, 1",
        "",
        [-1],
        "told or told.append(c.llama_get_sampled_token_ith(ctx, -1))",
    ),
    "on the device, later": ("", "told.append(c.llama_set_sampler(ctx, 0, chain))", [False], ""),
}


@pytest.mark.parametrize(("before", "after", "told", "then"), ON_THE_DEVICE.values(), ids=ON_THE_DEVICE)
def test_the_same_text_however_it_is_sampled(
    before: str,
    after: str,
    told: list[Any],
    then: str,
    tiny_llama: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    drop_in_says: dict[float, list[list[int]]],
) -> None:
    """`llama_sampler_sample` accepts what it samples; some hosts accept once more. Devices would sample too early."""
    text = SAMPLED.format(before=before, after=after, then=then or "pass")
    found = run(text, tmp_path, tiny_bundle, tiny_llama, json.dumps(PROMPTS))
    assert found == [told, drop_in_says[STRENGTH]]
