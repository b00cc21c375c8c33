"""`adlocal run`: programs that know nothing of adlocal, here scripts on llama-cpp-python, which ctypes leads past any
preload. The oracle is the drop-in, and at strength 0 the program without protection."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from adlocal import AntidistillationLlama
from adlocal.plugin.build import declared
from support import tiny
from support.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")

STRENGTH, GUARD, N = 3.0, 0.05, 16
PROMPTS = ["3 + 4 =", "a longer one, of some more tokens", "x"]

OPEN = """
import json, sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
def greedy(prompt, n=16, **kwargs):
    found = []
    for token in llm.generate(llm.tokenize(prompt.encode()), temp=0.0, **kwargs):
        found.append(token)
        if len(found) == n:
            return found
"""
GENERATE = OPEN + "print(json.dumps([greedy(prompt) for prompt in sys.argv[2:]]))\n"


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def start(argv: Sequence[object], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=120, env=variables)


def protected(bundle: Path, program: Sequence[object], *options: object, **environment: str) -> Any:
    own = [sys.executable, "-m", "adlocal", "run", "--bundle", bundle, "--guard", GUARD, *options, "--"]
    return start([*own, *program], **environment)


def said(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tiny_bundle: Path) -> dict[float, list[list[int]]]:
    """What the drop-in says, by strength."""
    return {strength: drop_in(tiny_llama, {"bundle": tiny_bundle}, strength) for strength in (0.0, STRENGTH)}


def drop_in(teacher: Path, own: dict[str, Any], strength: float) -> list[list[int]]:
    """What it says to each prompt."""
    kwargs: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **own}
    with closing(AntidistillationLlama(str(teacher), guard=GUARD, strength=strength, **kwargs)) as llm:
        return [list(itertools.islice(llm.generate(llm.tokenize(p.encode()), temp=0.0), N)) for p in PROMPTS]


def test_a_script_that_nobody_changed_is_protected(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, expected: dict[float, list[list[int]]]
) -> None:
    program = [*script(tmp_path, GENERATE), tiny_llama, *PROMPTS]
    assert said(start(program)) == expected[0.0]
    assert said(protected(tiny_bundle, program, "--strength", 0)) == expected[0.0]
    done = protected(tiny_bundle, program, "--strength", STRENGTH)
    assert said(done) == expected[STRENGTH]
    assert "adlocal:" not in done.stderr
    assert expected[STRENGTH] != expected[0.0]
    assert said(protected(tiny_bundle, program, "--strength", STRENGTH, "--observe")) == expected[0.0]


def test_an_adapter_bundle_protects_at_the_epsilon_that_is_asked_for(
    tiny_llama: Path, adapter_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """One so large that it shows; halves have their own."""
    program, own = [*script(tmp_path, GENERATE), tiny_llama, *PROMPTS], {"bundle": adapter_bundle}
    by_default, large = drop_in(tiny_llama, own, STRENGTH), drop_in(tiny_llama, {**own, "epsilon": 20.0}, STRENGTH)
    assert by_default != large
    assert said(protected(adapter_bundle, program, "--strength", STRENGTH)) == by_default
    assert said(protected(adapter_bundle, program, "--strength", STRENGTH, "--epsilon", 20)) == large
    refused = protected(tiny_bundle, program, "--epsilon", 20)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "epsilon=20: these halves were written at" in refused.stderr


def test_several_contexts_share_one_pairs_weights(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, expected: dict[float, list[list[int]]]
) -> None:
    """The second one is made while the first lives, and goes on when that has gone."""
    text = OPEN + (
        "first, llm = llm, llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)\n"
        "second = [greedy(prompt) for prompt in sys.argv[2:]]\n"
        "llm, other = first, llm\n"
        "assert [greedy(prompt) for prompt in sys.argv[2:]] == second\n"
        "llm.close()\n"
        "llm = other\n"
        "print(json.dumps([greedy(prompt) for prompt in sys.argv[2:]]))\n"
    )
    program = [*script(tmp_path, text), tiny_llama, *PROMPTS]
    assert said(protected(tiny_bundle, program, "--strength", STRENGTH)) == expected[STRENGTH]


# States


def test_a_saved_state_goes_on_under_protection(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, expected: dict[float, list[list[int]]]
) -> None:
    """Whole states, as `save_state` takes them: what waits is evaluated when it is needed."""
    text = OPEN + (
        "prompt = sys.argv[2]\n"
        "whole = greedy(prompt)\n"
        "tokens = llm.tokenize(prompt.encode())\n"
        "llm.reset(); llm.eval(tokens + whole[:5])\n"
        "state = llm.save_state()\n"
        "greedy('something else')\n"
        "llm.load_state(state)\n"
        "llm.eval(whole[5:6])\n"
        "rest = [llm.sample(temp=0.0)]\n"
        "print(json.dumps([whole, rest]))\n"
    )
    program = [*script(tmp_path, text), tiny_llama, PROMPTS[1]]
    whole, rest = said(protected(tiny_bundle, program, "--strength", STRENGTH))
    assert whole == expected[STRENGTH][1]
    assert rest == whole[6:7]


SEQUENCE_STATES = """
import ctypes
ctx = llm._ctx.ctx
tokens = llm.tokenize(sys.argv[2].encode())
llm.eval(tokens)
size = llama_cpp.llama_state_seq_get_size(ctx, 0)
buffer = (ctypes.c_uint8 * size)()
assert llama_cpp.llama_state_seq_get_data(ctx, buffer, size, 0) == size
path = sys.argv[3].encode()
ids = (llama_cpp.llama_token * len(tokens))(*tokens)
assert llama_cpp.llama_state_seq_save_file(ctx, path, 0, ids, len(tokens)) > 0
assert llama_cpp.llama_state_save_file(ctx, path + b".all", ids, len(tokens))
def row():
    llm.eval([65])
    return list(llm._ctx.get_logits()[:264])
expected = row()
out, n = (llama_cpp.llama_token * 128)(), ctypes.c_size_t()
found = []
for restore in (
    lambda: llama_cpp.llama_state_seq_set_data(ctx, buffer, size, 0),
    lambda: llama_cpp.llama_state_seq_load_file(ctx, path, 0, out, 128, ctypes.byref(n)),
    lambda: llama_cpp.llama_state_load_file(ctx, path + b".all", out, 128, ctypes.byref(n)),
):
    llm.reset()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    assert restore()
    llm.n_tokens = len(tokens)
    found.append(max(abs(a - b) for a, b in zip(row(), expected)) < 0.05)
buffer[size // 2] ^= 1
own = bytes(buffer)[: size // 2]
damaged = (ctypes.c_uint8 * len(own)).from_buffer_copy(own)
print(json.dumps([found, llama_cpp.llama_state_seq_set_data(ctx, damaged, len(own), 0)]))
"""


def test_states_of_sequences_and_files_are_followed_and_strange_ones_refused(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Rows to 0.05, of shifts of some nats: what waited is evaluated in a batch of another shape, in an F16 cache."""
    program = [*script(tmp_path, OPEN + SEQUENCE_STATES), tiny_llama, PROMPTS[1], tmp_path / "state"]
    done = protected(tiny_bundle, program, "--strength", STRENGTH)
    assert said(done) == [[True, True, True], 0]
    assert "says nothing of its tokens" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if "state" in path.name) == ["state", "state.all"]


def test_asking_a_file_how_many_tokens_it_holds_restores_nothing(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """As llama-server does before it restores a slot."""
    text = OPEN + (
        "import ctypes\n"
        "ctx, path, n = llm._ctx.ctx, sys.argv[3].encode(), ctypes.c_size_t()\n"
        "other, tokens = (llm.tokenize(text.encode()) for text in ('something else', sys.argv[2]))\n"
        "llm.eval(other)\n"
        "ids = (llama_cpp.llama_token * len(other))(*other)\n"
        "assert llama_cpp.llama_state_seq_save_file(ctx, path, 0, ids, len(other)) > 0\n"
        "whole = greedy(sys.argv[2])\n"
        "llm.reset(); llm.eval(tokens)\n"
        "assert llama_cpp.llama_state_seq_load_file(ctx, path, 0, None, 0, ctypes.byref(n)) > 0\n"
        "assert n.value == len(other)\n"
        "llm.eval(whole[:1])\n"
        "print(json.dumps([whole[1], llm.sample(temp=0.0)]))\n"
    )
    program = [*script(tmp_path, text), tiny_llama, PROMPTS[1], tmp_path / "state"]
    whole, going_on = said(protected(tiny_bundle, program, "--strength", STRENGTH))
    assert going_on == whole


# What would let the teacher's own logits out


LOCKED = {
    "embeddings": (
        "llama_cpp.llama_set_embeddings(ctx, True)\nllm.eval(tokens)\n"
        "row = llama_cpp.llama_get_logits_ith(ctx, -1)\n"
        "print(json.dumps([row[65], bool(llama_cpp.llama_get_logits(ctx)), bool(llama_cpp.llama_get_embeddings(ctx)),"
        "bool(llama_cpp.llama_get_embeddings_ith(ctx, 0))]))",
        [-1e9, False, False, False],
    ),
    "before any decode": (
        "print(json.dumps([bool(llama_cpp.llama_get_logits(ctx)), llama_cpp.llama_get_logits_ith(ctx, 0)[65]]))",
        [False, -1e9],
    ),
    "what the device would have sampled": (
        "llm.eval(tokens)\nget = [getattr(llama_cpp, f'llama_get_sampled_{name}_ith') for name in "
        "('token', 'probs', 'logits', 'candidates', 'logits_count', 'probs_count', 'candidates_count')]\n"
        "token, probs, logits, candidates, *counts = [each(ctx, -1) for each in get]\n"
        "print(json.dumps([token, bool(probs), bool(logits), bool(candidates), *counts]))",
        [-1, False, False, False, tiny.N_VOCAB, 0, 0],  # rows are as long as the vocabulary
    ),
    "shift": (
        "llm.eval(tokens)\nmemory = llama_cpp.llama_get_memory(ctx)\n"
        "can = llama_cpp.llama_memory_can_shift(memory)\n"
        "llama_cpp.llama_memory_seq_rm(memory, 0, 1, 2)\nllama_cpp.llama_memory_seq_add(memory, 0, 2, -1, -1)\n"
        "try:\n    llm.eval([65])\n    print('null')\n"
        "except RuntimeError:\n    print(json.dumps([can, llama_cpp.llama_get_logits_ith(ctx, 0)[65]]))",
        [False, -1e9],
    ),
    "non-causal attention": (
        "def works():\n"
        "    try:\n        return llm.eval(tokens) is None\n    except RuntimeError:\n        return False\n"
        "llama_cpp.llama_set_causal_attn(ctx, False)\n"
        "found = [works()]\nllm.reset()\nllama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)\n"
        "found.append(works())\nllama_cpp.llama_set_causal_attn(ctx, True)\n"
        "print(json.dumps([*found, works()]))",
        [False, False, True],
    ),
    "encode": (
        "llm._batch.set_batch(tokens, 0, True)\nprint(json.dumps([llama_cpp.llama_encode(ctx, llm._batch.batch)]))",
        [-3],
    ),
}


@pytest.mark.parametrize(("text", "expected_of"), LOCKED.values(), ids=LOCKED)
def test_what_would_show_the_teachers_own_is_closed(
    text: str, expected_of: list[Any], tiny_llama: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    begin = OPEN + "ctx = llm._ctx.ctx\ntokens = llm.tokenize(sys.argv[2].encode())\n"
    program = [*script(tmp_path, begin + text), tiny_llama, PROMPTS[1]]
    assert said(protected(tiny_bundle, program, "--strength", STRENGTH)) == expected_of


def test_a_watched_computation_is_refused(tiny_llama: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    text = (
        "import ctypes, sys, llama_cpp\n"
        "model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())\n"
        "params = llama_cpp.llama_context_default_params()\n"
        "watch = llama_cpp.ggml_backend_sched_eval_callback(lambda *_: True)\n"
        "params.cb_eval = watch\n"
        "llama_cpp.llama_init_from_model(model, params)\n"
        "print('went on')\n"
    )
    done = protected(tiny_bundle, [*script(tmp_path, text), tiny_llama])
    assert (done.returncode, done.stdout) == (1, "")
    assert "adlocal: the program watches the computation (cb_eval)" in done.stderr


# Models


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another vocabulary."""
    pieces = list(tiny.BYTES)
    pieces[65], pieces[66] = pieces[66], pieces[65]
    return tiny.write_gguf(tiny.tiny_model(), tmp_path_factory.mktemp("stranger") / "stranger.gguf", pieces=pieces)


def test_a_model_of_another_vocabulary_generates_only_where_it_is_allowed(
    stranger: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    program = [*script(tmp_path, GENERATE), stranger, *PROMPTS]
    refused = protected(tiny_bundle, program)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"{stranger} has another vocabulary than the bundle" in refused.stderr
    assert "token 65" in refused.stderr
    assert said(protected(tiny_bundle, program, "--allow-model", stranger)) == said(start(program))


EMBED = """
import json, sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, embedding=True)
found = llm.embed("some text")
ctx = llm._ctx.ctx
print(json.dumps([bool(found), bool(llama_cpp.llama_get_logits(ctx)), bool(llama_cpp.llama_get_logits_ith(ctx, -1))]))
"""


def test_a_model_of_another_vocabulary_may_embed_and_has_no_logits(
    stranger: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    program = [*script(tmp_path, EMBED), stranger]
    assert said(start(program)) == [True, True, True]
    assert said(protected(tiny_bundle, program)) == [True, False, False]


def test_a_model_without_weights_is_left_alone(stranger: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Programs make such to measure memory."""
    text = (
        "import sys, llama_cpp\n"
        "params = llama_cpp.llama_model_default_params()\n"
        "params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE\n"  # it maps no file of theirs
        "model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)\n"
        "context = llama_cpp.llama_init_from_model(model, llama_cpp.llama_context_default_params())\n"
        "print('true' if context else 'false')\n"
    )
    assert said(protected(tiny_bundle, [*script(tmp_path, text), stranger])) is True


def test_the_bundles_own_files_are_left_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    program = [*script(tmp_path, GENERATE), tiny_bundle / "proxy-plus.gguf", *PROMPTS]
    assert said(protected(tiny_bundle, program)) == said(start(program))


# Programs


def test_other_programs_are_themselves(tiny_bundle: Path) -> None:
    """With their own exit status. What never made a context is told so when it ends, its children are not."""
    child = "import subprocess, sys; subprocess.run(['/bin/sh', '-c', '/bin/echo one']); sys.exit(3)"
    done = protected(tiny_bundle, [sys.executable, "-c", child])
    assert (done.returncode, done.stdout) == (3, "one\n")
    (told,) = done.stderr.splitlines()
    assert told.endswith("made no context of a protected model: nothing of it was protected")


def test_a_child_decides_for_itself(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, expected: dict[float, list[list[int]]]
) -> None:
    program = [*script(tmp_path, GENERATE), tiny_llama, *PROMPTS]
    shell = ["/bin/sh", "-c", '"$@"', "sh", *program]
    assert said(protected(tiny_bundle, shell, "--strength", STRENGTH)) == expected[STRENGTH]


def test_another_preloaded_library_stays(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, expected: dict[float, list[list[int]]]
) -> None:
    source, other = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text("int adlocal_test_other(void) { return 42; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", other, source], check=True, timeout=60)
    text = GENERATE + "import ctypes; assert ctypes.CDLL(None).adlocal_test_other() == 42\n"
    program = [*script(tmp_path, text), tiny_llama, *PROMPTS]
    done = protected(tiny_bundle, program, "--strength", STRENGTH, LD_PRELOAD=str(other))
    assert said(done) == expected[STRENGTH]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bundle", "nowhere"], "nowhere: no such bundle directory"),
        (["--strength", "-1"], "-1"),
        (["--guard", "2"], "guard=2.0: give a share"),
        (["--strength", "calibrated"], "has no calibration"),
    ],
    ids=["bundle", "strength", "guard", "calibrated"],
)
def test_wrong_options_are_refused_before_the_program_starts(options: list[str], words: str, tiny_bundle: Path) -> None:
    done = protected(tiny_bundle, ["/bin/echo", "started"], *options)
    assert done.returncode == 2
    assert "started" not in done.stdout
    assert words in done.stderr.splitlines()[-1]


def test_a_program_that_is_not_there(tiny_bundle: Path) -> None:
    done = protected(tiny_bundle, ["no-such-program"])
    assert (done.returncode, done.stderr) == (
        2,
        "adlocal run: no-such-program: no such program; give one that can be run, after --\n",
    )


def test_a_context_beyond_the_proxies_stops_the_program(tiny_bundle: Path, tmp_path: Path) -> None:
    teacher = tiny.write_gguf(tiny.tiny_model(max_position_embeddings=1024), tmp_path / "teacher.gguf")
    text = GENERATE.replace("n_ctx=128", "n_ctx=512")
    done = protected(tiny_bundle, [*script(tmp_path, text), teacher, *PROMPTS])
    assert (done.returncode, done.stdout) == (1, "")
    assert "n_ctx=512 exceeds the 256 tokens that the proxy was trained for" in done.stderr


@pytest.mark.parametrize(("before", "after"), [(None, "1025"), ("2048", "2049"), ("512,100", "513,101"), ("x", "x")])
def test_a_server_that_fits_its_model_leaves_room_for_the_proxies(
    before: str | None, after: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files take less than a MiB here. Off the device they need no room there."""
    monkeypatch.delenv("LLAMA_ARG_FIT_TARGET", raising=False)
    if before is not None:
        monkeypatch.setenv("LLAMA_ARG_FIT_TARGET", before)
    print_it = [sys.executable, "-c", "import os; print(os.environ.get('LLAMA_ARG_FIT_TARGET'))"]
    assert protected(tiny_bundle, print_it).stdout.strip() == after
    assert protected(tiny_bundle, print_it, "--proxy-gpu-layers", 0).stdout.strip() == str(before)


# The list


def test_every_function_of_llama_h_has_its_fate() -> None:
    """A llama.h with a function more fails this."""
    of_llama_h, _, _ = (ROOT / "native" / "plugin" / "fates.hpp").read_text().partition("ADL_EXTENSIONS")
    listed = re.findall(r"X\((llama_\w+)", of_llama_h)
    assert len(listed) == len(set(listed)), "each once"
    assert set(listed) == declared((Path(llama_cpp.__file__).parents[1] / "include" / "llama.h").read_text())
