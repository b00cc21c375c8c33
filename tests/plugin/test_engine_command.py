"""`adlocal engine`: a whole server under protection, asked over HTTP.

The oracle is the drop-in, on a tiny model in F32, and at strength 0 the same server without the plugin. What needs
xllamacpp or llama-cpp-python's server has them from `make test-server`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from llama_cpp.llama_grammar import LlamaGrammar

from adlocal import AntidistillationLlama, Settings
from adlocal.commands.parser import make_parser
from adlocal.plugin import Think, controls
from adlocal.servers import xllamacpp_server
from support import tiny
from support.cli import Cli, only_line
from support.engines import ENGINES, PROMPTS, STRENGTH, N, Server, serving
from support.paths import ROOT

Engine = Callable[..., AbstractContextManager[Server]]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")

COMMAND = [sys.executable, "-m", "adlocal", "engine"]
ALONE = ["-t", 1, "--port", 0, "--no-warmup"]


@pytest.fixture
def engine(tiny_llama: Path, tiny_bundle: Path, tmp_path: Path) -> Engine:
    """Starts it with options, at a free port."""
    if not (ENGINES / "python" / "xllamacpp").exists():
        pytest.skip("needs xllamacpp; run `make test-server`")

    @contextmanager
    def start(
        *options: object, teacher: Path = tiny_llama, bundle: Path = tiny_bundle, **variables: str
    ) -> Iterator[Server]:
        command = [*COMMAND, "-m", teacher, "--bundle", bundle, *ALONE, *options]
        environment = {"PYTHONPATH": str(ENGINES / "python"), **variables}
        with serving(command, tmp_path / "log", environment) as server:
            yield server

    return start


def plain(teacher: Path, log: Path, **values: Any) -> AbstractContextManager[Server]:
    """The same server without the plugin."""
    told = {"model.path": str(teacher), "port": 0, "warmup": False, "cpuparams.n_threads": 1, **values}
    environment = {"PYTHONPATH": str(ENGINES / "python"), xllamacpp_server.VARIABLE: json.dumps(told)}
    return serving([sys.executable, xllamacpp_server.__file__], log, environment)


# Text


@pytest.mark.server
@on_linux
@pytest.mark.parametrize("n_parallel", [1, 4])
def test_what_it_says_is_protected(
    n_parallel: int, engine: Engine, tiny_llama: Path, tmp_path: Path, drop_in_says: dict[float, list[list[int]]]
) -> None:
    """One request after the other, and four at once; at strength 0 the plain server's tokens."""

    def said(server: Server) -> list[list[int]]:
        return (
            server.complete_at_once(PROMPTS, N)
            if n_parallel > 1
            else [server.complete(prompt, N) for prompt in PROMPTS]
        )

    with plain(tiny_llama, tmp_path / "plain.log", n_parallel=n_parallel, n_ctx=256 * n_parallel) as server:
        unprotected = said(server)
    context = ["-np", n_parallel, "-c", 256 * n_parallel]
    with engine("--strength", 0, *context) as server:
        assert said(server) == unprotected == drop_in_says[0.0]
    with engine("--strength", STRENGTH, *context) as server:
        assert said(server) == drop_in_says[STRENGTH]
    with engine("--strength", STRENGTH, "--observe", *context) as server:
        assert said(server) == unprotected


@pytest.mark.server
@on_linux
def test_four_requests_share_the_context_by_default(engine: Engine, drop_in_says: dict[float, list[list[int]]]) -> None:
    with engine("--strength", STRENGTH) as server:
        assert server.ask("/props")["total_slots"] == 4
        assert server.complete_at_once(PROMPTS, N) == drop_in_says[STRENGTH]


@pytest.mark.server
@on_linux
def test_a_slot_that_is_saved_goes_on_under_protection(
    engine: Engine, tmp_path: Path, drop_in_says: dict[float, list[list[int]]]
) -> None:
    (tmp_path / "slots").mkdir()
    with engine("--strength", STRENGTH, "-np", 1, "-c", 256, "--slot-save-path", tmp_path / "slots") as server:
        for prompt, after in zip(PROMPTS[:2], drop_in_says[STRENGTH], strict=False):
            assert server.complete(prompt, N) == after
            assert server.ask("/slots/0?action=save", {"filename": "first"})["n_saved"] > len(prompt)
            server.complete(PROMPTS[2], N)
            assert server.ask("/slots/0?action=restore", {"filename": "first"})["n_restored"] > len(prompt)
            assert server.complete(prompt, N) == after
    assert [path.name for path in (tmp_path / "slots").iterdir()] == ["first"]


@pytest.mark.server
@on_linux
def test_a_grammar_that_refuses_the_first_choice(
    engine: Engine, tiny_llama: Path, tiny_bundle: Path, drop_in_says: dict[float, list[list[int]]]
) -> None:
    """The server then runs its chain of samplers twice for one token. The row is adjusted once."""
    letters = "root ::= [a-z ]+"
    with closing(drop_in(tiny_llama, tiny_bundle)) as llm:
        within = [
            list(itertools.islice(llm.generate(prompt, temp=0.0, strength=STRENGTH, grammar=grammar(letters)), N))
            for prompt in PROMPTS
        ]
    assert within != drop_in_says[STRENGTH]
    with engine("--strength", STRENGTH, "-np", 1, "-c", 256) as server:
        assert [server.complete(prompt, N, grammar=letters) for prompt in PROMPTS] == within


def drop_in(teacher: Path, bundle: Path) -> AntidistillationLlama:
    return AntidistillationLlama(str(teacher), bundle=bundle, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)


def grammar(text: str) -> LlamaGrammar:
    return LlamaGrammar.from_string(text, verbose=False)


@pytest.mark.server
@on_linux
def test_its_control_file_counts_every_row(engine: Engine, tmp_path: Path) -> None:
    """None of them closed, and none but protected. It goes when the server ends."""
    with engine("--strength", STRENGTH, "-np", 1, "-c", 256, "--control", tmp_path / "control") as server:
        (control,) = controls(tmp_path / "control")
        before = control.counters()  # the server has tried its context
        said = [server.complete(prompt, N) for prompt in PROMPTS]
        found, in_force = control.counters() - before, control.in_force(0)
        assert control.pid == server.process.pid
        assert (in_force.strength, in_force.mode) == (STRENGTH, "protect")
        assert (found.n_begun, found.n_rows, found.n_closed) == (len(PROMPTS), sum(map(len, said)), 0)
        assert 0 < found.n_evaluated <= found.n_choices <= found.n_rows
        assert server.end() == 0
    assert controls(tmp_path / "control") == []


@pytest.mark.server
@on_linux
def test_its_requests_get_what_was_asked_for_them(engine: Engine, tmp_path: Path) -> None:
    """Each is given its own, however little it adds to what the slot holds; a ban is one of the settings."""
    with engine("--strength", 0, "-np", 1, "-c", 256, "--control", tmp_path / "control") as server:
        (control,) = controls(tmp_path / "control")
        prompt, before = PROMPTS[1], control.counters(0)
        for n in (N, 1, 3):
            epoch = control.ask(0, Settings(0.0))
            prompt = prompt + server.complete(prompt, n, ignore_eos=True)
            assert control.in_force(0).epoch == epoch
        found = control.counters(0) - before
        assert (found.n_begun, found.n_decoded) == (3, len(prompt) - 1)
        assert control.decodes().begun == control.decodes().ended
        opened, *_, close = free = prompt[len(PROMPTS[1]) :][:N]
        control.ask(0, Settings(0.0), think=Think(opened, close, from_start=True))
        assert not {opened, close} & set(server.complete(PROMPTS[1], N))
        control.ask(0, Settings(0.0))
        assert server.complete(PROMPTS[1], N) == free


@pytest.mark.server
@on_linux
@pytest.mark.parametrize("kind", ["draft-simple", "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod"])
def test_drafts_are_verified_by_what_is_protected(
    kind: str, engine: Engine, tiny_bundle: Path, drop_in_says: dict[float, list[list[int]]], tmp_path: Path
) -> None:
    """By a copy of a proxy, which is named and so left alone, and by what the text repeats."""
    draft = shutil.copy(tiny_bundle / "proxy-plus.gguf", tmp_path / "draft.gguf")
    named = ["-md", draft, "--spec-draft-n-max", 4, "--spec-draft-p-min", 0] if kind == "draft-simple" else []
    for strength in (0, STRENGTH):
        with engine("--strength", strength, "-np", 1, "-c", 256, "--spec-type", kind, *named) as server:
            assert [server.complete(prompt, N) for prompt in PROMPTS] == drop_in_says[strength]
            if named:
                drafted = server.ask("/completion", {"prompt": PROMPTS[0], "n_predict": 16, "temperature": 0})
                assert drafted["timings"]["draft_n"] > 0


def test_the_teacher_itself_is_no_draft(given: list[object], tiny_llama: Path, tmp_path: Path, cli: Cli) -> None:
    """It would be left alone under that name."""
    (tmp_path / "link.gguf").symlink_to(tiny_llama)
    done = cli(*given, "-md", tmp_path / "link.gguf")
    assert (done.status, done.out) == (2, "")
    assert "link.gguf: it is the teacher itself, whose text is protected; give a smaller model" in done.message()
    only_line(done)


# Keys and the end


@pytest.mark.server
@on_linux
def test_a_request_without_the_key_is_refused(engine: Engine, tmp_path: Path) -> None:
    """Those of a file are not seen in the list of processes."""
    (tmp_path / "keys").write_text("# of the cellar\nfrom-a-file\n")
    with engine("-np", 1, "-c", 256, "--api-key", "one,two", "--api-key-file", tmp_path / "keys") as server:
        body = {"prompt": PROMPTS[0], "n_predict": 1}
        assert [server.status("/completion", body, key) for key in (None, "three", "#", "")] == [401] * 4
        assert [server.status("/completion", body, key) for key in ("one", "two", "from-a-file")] == [200] * 3
        assert b"from-a-file" not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        assert b"two" not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()


@pytest.mark.server
@on_linux
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT], ids=lambda by: by.name)
def test_a_signal_ends_it_and_frees_the_port(by: signal.Signals, engine: Engine) -> None:
    """Requests that run end with it, streams and others, whose clients wait."""
    with engine("-np", 2, "-c", 512) as server, ExitStack() as stack:
        port = int(server.address.rpartition(":")[2])
        for stream in (True, False):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            body = json.dumps({"prompt": PROMPTS[1], "n_predict": 10**6, "stream": stream, "ignore_eos": True})
            client.sendall(
                f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            if stream:
                assert client.recv(16)
        began = time.monotonic()
        assert server.end(by) == 0
        assert time.monotonic() - began < 10
        said = server.log.read_text(encoding="utf-8", errors="replace")
        assert "nothing of it was protected" not in said
        assert "Traceback" not in said
    with engine("-np", 1, "-c", 256, "--port", port) as server:
        assert server.address == f"http://127.0.0.1:{port}"
        assert server.status("/health") == 200


# Flags


@pytest.fixture
def adapter(adapter_bundle: Path) -> Path:
    """A LoRA of the tiny model."""
    (path,) = adapter_bundle.glob("*adapter*.gguf")
    return path


@pytest.mark.server
@on_linux
def test_every_flag_goes_to_an_attribute_that_there_is(engine: Engine) -> None:
    """A name that CommonParams has not would be set on it without a word, or stop the server."""
    args = make_parser().parse_args(["engine", "-m", "m", "--bundle", "b"])
    look = (
        "import functools, sys, xllamacpp\n"
        "params = xllamacpp.CommonParams()\n"
        "for path in sys.argv[1:]:\n    functools.reduce(getattr, path.split('.'), params)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ENGINES / "python")}
    subprocess.run([sys.executable, "-c", look, *args.flags], check=True, timeout=60, env=environment)
    assert len(args.flags) > 30


@pytest.mark.server
@on_linux
def test_flags_of_the_model_and_its_context(engine: Engine) -> None:
    """As the server's log and its answers show them."""
    of_the_model = "-a big,small -t 2 -tb 1 -ngl 0"
    of_the_context = "-c 200 -np 2 -b 96 -ub 48 -kvu -fa on -ctk bf16 -ctv f32"
    options = f"{of_the_model} {of_the_context} -n 5 --metrics -lv 10"
    with engine(*options.split()) as server:
        log = server.log.read_text(encoding="utf-8", errors="replace")
        props = server.ask("/props")
        assert props["total_slots"] == 2
        assert props["default_generation_settings"]["n_ctx"] in (200, 256)
        assert {model["id"] for model in server.ask("/v1/models")["data"]} <= {"big", "small"}
        assert len(server.ask("/completion", {"prompt": PROMPTS[0], "return_tokens": True})["tokens"]) == 5
        assert "llamacpp:prompt_tokens_total" in server.ask("/metrics")
    for words in (
        "n_threads = 2 (n_threads_batch = 1)",
        "n_batch               = 96",
        "n_ubatch              = 48",
        "flash_attn            = enabled",
        "kv_unified            = true",
        "K (bf16)",
        "V (f32)",
    ):
        assert words in log
    assert "warming up" not in log, "as ALONE asks for"


@pytest.mark.server
@on_linux
def test_adapters_of_the_teacher(engine: Engine, adapter: Path, drop_in_says: dict[float, list[list[int]]]) -> None:
    """At their scales, which a request may change. What the server has cached is from before, so it is not used."""
    with engine("--strength", 0, "-np", 1, "-c", 256, "--lora", adapter, "--lora-scaled", f"{adapter}:40.5") as server:
        assert [each["scale"] for each in server.ask("/lora-adapters")] == [1.0, 40.5]
        assert [server.complete(prompt, N, cache_prompt=False) for prompt in PROMPTS] != drop_in_says[0.0]
        server.ask("/lora-adapters", [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}])
        assert [server.complete(prompt, N, cache_prompt=False) for prompt in PROMPTS] == drop_in_says[0.0]


@pytest.mark.server
@on_linux
def test_a_unix_socket(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "at.sock"
    with engine("-np", 1, "-c", 256, "--host", path) as server, socket.socket(socket.AF_UNIX) as client:
        assert server.address == f"unix://{path}"
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.recv(64).startswith(b"HTTP/1.1 200")


@pytest.mark.server
@on_linux
def test_flags_of_requests(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "template").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ ending }}")
    options = "-c 256 -np 1 --temp 0.25 --top-k 7 --top-p 0.5 --min-p 0.125 -s 11 --reasoning-format none --no-slots"
    template = ["--chat-template-file", tmp_path / "template", "--chat-template-kwargs", '{"ending": "!"}']
    with engine(*options.split(), *template, "--api-prefix", "/under") as server:
        params = server.ask("/under/props")["default_generation_settings"]["params"]
        assert [params[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")] == [
            0.25,
            7,
            0.5,
            0.125,
            11,
        ]
        assert params["reasoning_format"] == "none"
        messages = {"messages": [{"role": "user", "content": "hello"}]}
        assert server.ask("/under/apply-template", messages)["prompt"] == "[hello]!"
        assert server.status("/under/slots") == 501
        assert server.status("/under/metrics") == 501
        assert server.status("/props") == 404


@pytest.mark.server
@on_linux
def test_what_is_given_goes_before_what_the_model_recommends(engine: Engine, tmp_path: Path) -> None:
    recommended = {"temp": 0.5, "top_p": 0.75, "min_p": 0.25}
    teacher = tiny.write_gguf(tiny.tiny_model(), tmp_path / "teacher.gguf", sampling=recommended)
    with engine("-np", 1, "-c", 256, "--temp", 0, "--min-p", 0, teacher=teacher) as server:
        params = server.ask("/props")["default_generation_settings"]["params"]
        assert [params[name] for name in ("temperature", "top_p", "min_p")] == [0.0, 0.75, 0.0]


@pytest.mark.server
@on_linux
def test_a_prompt_is_kept_or_not(engine: Engine) -> None:
    """In its slot, and in memory when another one took the slot."""

    def read(server: Server, prompt: list[int]) -> int:
        """As many tokens of it as the server had not."""
        return int(server.ask("/completion", {"prompt": prompt, "n_predict": 1})["timings"]["prompt_n"])

    first, other = PROMPTS[1], PROMPTS[0]
    for options, again, later in ([], 1, 1), (["-cram", 0], 1, len(first) - 1), (["--no-cache-prompt"], 34, 34):
        with engine("-np", 1, "-c", 256, *options) as server:
            found = [read(server, prompt) for prompt in (first, first, other, first)]
            assert (found[1], found[3]) == (again, later), options


@pytest.mark.server
@on_linux
@pytest.mark.parametrize("jinja", ["--jinja", "--no-jinja"])
def test_a_template_by_its_name_with_and_without_jinja(jinja: str, engine: Engine) -> None:
    messages = {"messages": [{"role": "user", "content": "hello"}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with engine("-np", 1, "-c", 256, "--chat-template", "chatml", jinja) as server:
        found = server.ask("/apply-template", messages)["prompt"]
        assert found == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        status = server.status("/apply-template", {**messages, "tools": [tool]})
        assert (status == 200) == (jinja == "--jinja")


# Refusals


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """With nothing on stdout, and these words in the last line."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    for each in words:
        assert each in done.stderr, done.stderr[-3000:]


def start(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ENGINES / "python"), **environment}
    return subprocess.run(
        list(map(str, [*COMMAND, *options])), capture_output=True, text=True, timeout=120, env=variables
    )


@pytest.mark.server
@on_linux
def test_a_model_of_another_vocabulary_is_refused(engine: Engine, tiny_bundle: Path, tmp_path: Path) -> None:
    pieces = list(tiny.BYTES)
    pieces[65], pieces[66] = pieces[66], pieces[65]
    stranger = tiny.write_gguf(tiny.tiny_model(), tmp_path / "stranger.gguf", pieces=pieces)
    done = start("-m", stranger, "--bundle", tiny_bundle, *ALONE, "-c", 256)
    refused(done, 1, f"adlocal: {stranger} has another vocabulary than the bundle (token 65", "--allow-model")
    with engine("-c", 256, "-np", 1, "--allow-model", stranger, teacher=stranger) as server:
        assert server.status("/completion", {"prompt": PROMPTS[0], "n_predict": 1}) == 200


@pytest.mark.server
@on_linux
def test_a_port_in_use_is_told_before_the_model_is_read(engine: Engine, tiny_llama: Path, tiny_bundle: Path) -> None:
    with engine("-c", 256, "-np", 1) as server:
        port = server.address.rpartition(":")[2]
        done = start("-m", tiny_llama, "--bundle", tiny_bundle, "--port", port)
        refused(
            done, 2, f"adlocal engine: --port {port}: another program listens at 127.0.0.1:{port}; give another one"
        )
        assert done.stderr.count("\n") == 1


@pytest.mark.server
@on_linux
def test_a_server_that_does_not_start_says_so(engine: Engine, tiny_llama: Path, tiny_bundle: Path) -> None:
    """An address that is found free and is not: a Unix socket in no directory."""
    done = start("-m", tiny_llama, "--bundle", tiny_bundle, "-c", 256, "--host", "/nowhere/at.sock")
    refused(done, 1, "adlocal engine: the server did not start; llama.cpp's log says why")


@pytest.mark.server
@on_linux
def test_variables_of_llama_server_have_no_say(engine: Engine) -> None:
    told = {"LLAMA_ARG_N_PARALLEL": "3", "LLAMA_ARG_PORT": "1", "LLAMA_SERVER_ROUTER_PORT": "1", "OTHER_ARG": "4"}
    with engine("-c", 256, **told) as server:
        names = {
            each.partition(b"=")[0] for each in Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")
        }
        assert not {name for name in names if name.startswith((b"LLAMA_ARG_", b"LLAMA_SERVER_"))}
        assert b"OTHER_ARG" in names
        assert server.ask("/props")["total_slots"] == 4


@pytest.mark.server
@on_linux
@pytest.mark.parametrize("n_gpu_layers", [[], ["--proxy-gpu-layers", 0]], ids=["on the device", "on the CPU"])
def test_a_fit_leaves_room_for_the_proxies(n_gpu_layers: list[object], engine: Engine, tiny_bundle: Path) -> None:
    """As much more as their weights take. What xllamacpp makes of it needs a GPU to be seen."""
    sizes = 0 if n_gpu_layers else sum(path.stat().st_size for path in tiny_bundle.iterdir())
    with engine("-c", 256, *n_gpu_layers) as server:
        variables = Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")
        (told,) = (json.loads(each.partition(b"=")[2]) for each in variables if each.startswith(b"ADLOCAL_ENGINE="))
    assert told["fit_params_target"] == sizes
    look = (
        "import json, runpy, sys, xllamacpp\n"
        "params = runpy.run_path(sys.argv[1])['common_params'](xllamacpp, json.loads(sys.argv[2]))\n"
        "print(json.dumps([params.fit_params_target, xllamacpp.CommonParams().fit_params_target]))\n"
    )
    command = [sys.executable, "-c", look, xllamacpp_server.__file__, json.dumps(told)]
    environment = {**os.environ, "PYTHONPATH": str(ENGINES / "python")}
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, env=environment)
    found, usual = json.loads(done.stdout)
    assert found == [each + sizes for each in usual]


@pytest.fixture
def given(tiny_llama: Path, tiny_bundle: Path) -> list[object]:
    """What every call needs."""
    return ["engine", "-m", tiny_llama, "--bundle", tiny_bundle]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-c", "-1"], "-c/--ctx-size: -1: give a whole number from 0 up"),
        (["-np", "0"], "-np/--parallel: 0: give a whole number from 1 up"),
        (["-ngl", "some"], "-ngl/--gpu-layers/--n-gpu-layers: some: give a whole number from 0 up"),
        (["--port", "70000"], "--port: 70000: give a port, from 0 to 65535"),
        (["--host", ","], "--host: ',': give one or more, with commas between them"),
        (["--lora", "nowhere.gguf"], "--lora: nowhere.gguf: no such file"),
        (["--lora-scaled", f"{__file__}:much"], ":much: give FILE:SCALE"),
        (["--lora-scaled", __file__], "give FILE:SCALE"),
        (["--slot-save-path", "nowhere"], "--slot-save-path: nowhere: no such directory"),
        (["--api-key-file", os.devnull], "--api-key-file: /dev/null: there is no key in it; give one a line"),
        (["--chat-template-file", "nowhere"], "--chat-template-file: nowhere: cannot be read"),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs: {: no JSON"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs: [1]: give a JSON object"),
        (["-fa", "maybe"], "-fa/--flash-attn: maybe: give one of on, off, auto"),
        (["-ctk", "f8"], "-ctk/--cache-type-k: f8: give one of f32, f16"),
        (["--reasoning-format", "loud"], "loud: give one of auto, none, deepseek, deepseek-legacy"),
        (["--context-shift"], "unrecognized arguments: --context-shift"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values_are_refused(options: list[str], words: str, given: list[object], cli: Cli) -> None:
    done = cli(*given, *options)
    assert (done.status, done.out) == (2, "")
    assert words in done.message()
    only_line(done)


def test_a_missing_model_is_refused(tiny_bundle: Path, cli: Cli) -> None:
    done = cli("engine", "-m", "nowhere.gguf", "--bundle", tiny_bundle)
    assert done.status == 2
    assert "nowhere.gguf: no such file" in done.message()
    only_line(done)


@on_linux
def test_without_xllamacpp_it_says_how_to_install_it(
    given: list[object], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    done = cli(*given)
    assert (done.status, done.out) == (1, "")
    assert "pip install 'adlocal[engine]'" in done.message()
    only_line(done)


def test_elsewhere_it_names_the_other_engine(given: list[object], cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    done = cli(*given)
    assert (done.status, done.out) == (2, "")
    assert "on Linux alone, not on darwin; use adlocal engine --engine llama-cpp-python" in done.message()
    only_line(done)


# examples/llama_server.md


GUIDE = (ROOT / "examples" / "llama_server.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The guide's programs."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_the_commands_of_the_guide_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.txt").write_text("key")
    commands = [shlex.split(block) for block in blocks("sh") if block.startswith("adlocal")]
    parsed = [make_parser().parse_args(command[1:]) for command in commands]
    assert [args.verb for args in parsed] == ["engine", "run", "engine"]
    assert parsed[1].program == ["llama-server", *commands[1][commands[1].index("llama-server") + 1 :]]


@pytest.mark.server
@on_linux
@pytest.mark.parametrize("language", ["sh", "python"])
def test_the_guides_clients_are_answered(
    language: str, engine: Engine, readable_llama: Path, readable_bundle: Path
) -> None:
    """By curl, and by the client of openai, which llm brings."""
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("needs curl")
    if language == "python" and not (ENGINES / "llm" / "openai").exists():
        pytest.skip("needs openai; run `make test-server`")
    own = {"teacher": readable_llama, "bundle": readable_bundle}
    with engine("-np", 1, "-c", 256, "--strength", STRENGTH, "--api-key", "secret", **own) as server:
        (text,) = [block for block in blocks(language) if "http://127.0.0.1:8080" in block]
        text = text.replace("http://127.0.0.1:8080", server.address)
        command = ["sh", "-ec", text] if language == "sh" else [sys.executable, "-c", text]
        variables = {**os.environ, "KEY": "secret", "PYTHONPATH": str(ENGINES / "llm")}
        done = subprocess.run(command, capture_output=True, timeout=100, env=variables)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)["choices"][0]["message"]["content"] if language == "sh" else done.stdout
        assert said.strip()


# llama-cpp-python's own server


@pytest.fixture
def python_engine(readable_llama: Path, readable_bundle: Path, tmp_path: Path) -> Engine:
    """Starts it, at a free port."""
    if not (ENGINES / "server" / "uvicorn").exists():
        pytest.skip("needs what llama-cpp-python's server needs; run `make test-server`")

    @contextmanager
    def start(*options: object) -> Iterator[Server]:
        own = [
            "--engine",
            "llama-cpp-python",
            "-m",
            readable_llama,
            "--bundle",
            readable_bundle,
            "-t",
            1,
            "--port",
            0,
            "-c",
            256,
        ]
        environment = {"PYTHONPATH": str(ENGINES / "server"), "CONFIG_FILE": "/nowhere", "MODEL": "/nowhere"}
        with serving([*COMMAND, *own, *options], tmp_path / "log", environment) as server:
            yield server

    return start


@pytest.mark.server
def test_llama_cpp_pythons_server_is_protected(
    python_engine: Engine, readable_llama: Path, readable_bundle: Path
) -> None:
    """Whatever a request asks for."""
    body: dict[str, Any] = {"prompt": "3 + 4 =", "max_tokens": 16, "temperature": 0, "repeat_penalty": 1.0}
    with closing(drop_in(readable_llama, readable_bundle)) as llm:
        texts = {
            strength: llm.create_completion(**body, strength=strength)["choices"][0]["text"]
            for strength in (0.0, STRENGTH)
        }
    assert texts[0.0] != texts[STRENGTH]
    for strength, text in texts.items():
        with python_engine("--strength", strength, "--api-key", "secret", "-a", "mine") as server:
            assert server.status("/v1/completions", body) == 401
            for more in ({}, {"logit_bias": {"65": 0.0}}, {"top_k": 1}, {"strength": 0}, {"seed": 3}):
                assert server.ask("/v1/completions", {**body, **more}, "secret")["choices"][0]["text"] == text
            assert [each["id"] for each in server.ask("/v1/models", key="secret")["data"]] == ["mine"]
            assert "answers one request at a time" in server.log.read_text()
            assert server.end() == 0


@pytest.mark.parametrize(
    "options",
    [
        ["-np", "4"],
        ["--metrics"],
        ["--observe"],
        ["--allow-model", "m.gguf"],
        ["--control", "d"],
        ["--api-key", "one,two"],
    ],
    ids=lambda options: options[0],
)
def test_what_llama_cpp_pythons_server_has_not_is_refused(options: list[str], given: list[object], cli: Cli) -> None:
    done = cli(*given, "--engine", "llama-cpp-python", *options)
    assert (done.status, done.out) == (2, "")
    assert "llama-cpp-python" in done.message()
    only_line(done)


def test_without_what_llama_cpp_pythons_server_needs(
    given: list[object], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = cli(*given, "--engine", "llama-cpp-python")
    assert (done.status, done.out) == (1, "")
    assert "pip install 'llama-cpp-python[server]'" in done.message()
    only_line(done)
