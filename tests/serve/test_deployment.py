"""What examples/serve gives to whoever runs the gateway: the systemd unit, the container's files, and clients.

Containers are not built here: their files are read, and compared with what they name.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adlocal.commands.parser import make_parser
from adlocal.serve import config
from support.engines import ENGINES, PROMPTS, STRENGTH, N, serving
from support.paths import ROOT

yaml: Any = pytest.importorskip("yaml")

SERVE = ROOT / "examples" / "serve"
CLIENTS = SERVE / "clients"
UNIT = SERVE / "adlocal.service"
INSTALLED = "/opt/adlocal/bin/adlocal"
KEY = "of-a-client"
WORDS = ["Rays ", "of blue ", "scatter."]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="for Linux")
with_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def unit() -> dict[str, list[str]]:
    """What the unit says, by directive."""
    said: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            said.setdefault(name, []).append(value)
    return said


def analyzed(*argv: object) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "--no-pager", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def is_accepted(words: list[str]) -> bool:
    """Whether the command line is one of adlocal's."""
    try:
        return bool(make_parser().parse_args(words))
    except SystemExit:
        return False


# systemd


@on_linux
@with_systemd
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """With a program that there is in the place of the one that will be installed."""
    text = UNIT.read_text(encoding="utf-8")
    assert text.count(f"ExecStart={INSTALLED} ") == 1
    (tmp_path / UNIT.name).write_text(text.replace(f"ExecStart={INSTALLED} ", f"ExecStart={sys.executable} "))
    done = analyzed("verify", tmp_path / UNIT.name)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@on_linux
@with_systemd
def test_systemd_finds_little_that_is_open() -> None:
    """Under 2 of 10: the rest is the network, and privileged calls and devices that no setting takes away."""
    done = analyzed("security", "--offline=true", "--threshold=20", UNIT)
    assert done.returncode == 0, done.stdout
    assert re.search(r"exposure level for adlocal.service: [01]\.\d", done.stdout)


def test_the_unit_starts_what_there_is() -> None:
    (start,) = unit()["ExecStart"]
    program, *words = shlex.split(start)
    assert program == INSTALLED
    assert words[-2:] == ["--config", "/etc/adlocal/serve.toml"]
    assert is_accepted(words)


def test_the_unit_lets_the_configured_state_be_written() -> None:
    said = unit()
    assert config.read(SERVE / "serve.toml").state == f"/var/lib/{said['StateDirectory'][0]}"
    assert f"TMPDIR=/run/{said['RuntimeDirectory'][0]}" in said["Environment"]


@pytest.mark.server
@on_linux
def test_the_engine_is_protected_without_rights_and_executable_memory(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, drop_in_says: dict[float, list[list[int]]]
) -> None:
    """As NoNewPrivileges and MemoryDenyWriteExecute take them away, which the plugin is preloaded under."""
    if not (ENGINES / "python" / "xllamacpp").exists():
        pytest.skip("needs xllamacpp; run `make test-server`")
    assert unit()["MemoryDenyWriteExecute"] == unit()["NoNewPrivileges"] == ["yes"]
    deny = (
        "import ctypes, mmap, os, sys\n"
        "prctl = ctypes.CDLL(None).prctl\n"
        "if prctl(38, 1, 0, 0, 0) or prctl(65, 1, 0, 0, 0):\n    sys.exit('this kernel knows no PR_SET_MDWE')\n"
        "try:\n    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "except PermissionError:\n    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
        "sys.exit('nothing is denied')\n"
    )
    probe = subprocess.run([sys.executable, "-c", deny, "-c", ""], capture_output=True, text=True, timeout=60)
    if "PR_SET_MDWE" in probe.stderr:
        pytest.skip("needs Linux 6.3")
    command = [sys.executable, "-c", deny, "-m", "adlocal", "engine", "-m", tiny_llama, "--bundle", tiny_bundle]
    options = ["--strength", STRENGTH, "-np", 1, "-c", 256, "-t", 1, "--port", 0, "--no-warmup"]
    environment = {"PYTHONPATH": str(ENGINES / "python")}
    with serving([*command, *options], tmp_path / "log", environment) as server:
        assert [server.complete(prompt, N) for prompt in PROMPTS] == drop_in_says[STRENGTH]


# Containers


@pytest.fixture
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((SERVE / "compose.yaml").read_text(encoding="utf-8"))
    return found


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of each one of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (SERVE / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


@pytest.mark.parametrize(("name", "n_commands"), [("adlocal.service", 1), ("compose.yaml", 2)])
def test_the_ways_to_make_a_key_are_commands(name: str, n_commands: int) -> None:
    found = re.findall(r"^#.* (keys add .*)$", (SERVE / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == n_commands
    assert all(is_accepted(shlex.split(words)) for words in found)


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml"])
def test_what_was_not_tried_says_so(name: str) -> None:
    assert re.match(r"# NOT (BUILT|RUN) HERE: ", (SERVE / name).read_text(encoding="utf-8"))


def test_the_image_has_all_that_the_project_asks_for_but_llama_cpp_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = {*project["dependencies"], *extras["serve"], *extras["engine"], *extras["redis"]}
    needed = {each.partition(";")[0].strip() for each in asked if not each.startswith(("llama-cpp-python", "adlocal["))}
    (run,) = (rest for name, rest in instructions() if name == "RUN" and "xllamacpp" in rest)
    words = shlex.split(run.partition("pip install --no-cache-dir --no-compile  ")[2].partition("&&")[0])
    assert sorted(word for word in words if not word.startswith("-")) == sorted(needed)


def test_the_image_starts_what_there_is() -> None:
    said = dict(instructions())
    assert json.loads(said["ENTRYPOINT"]) == ["adlocal"]
    assert is_accepted(json.loads(said["CMD"]))
    check = json.loads(said["HEALTHCHECK"].partition(" CMD ")[2])
    ast.parse(check[2])
    assert said["USER"] == "adlocal"


def test_compose_names_files_and_services_that_there_are(compose: dict[str, Any]) -> None:
    services, made_by_hand = compose["services"], {"./pepper"}
    for service in services.values():
        for other in service.get("depends_on", []):
            assert set(services[other].get("profiles", [])) <= set(service.get("profiles", []))
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{MODELS:-.*?\}", "", volume).partition(":")[0]
            assert not source or source in compose["volumes"] or (SERVE / source).exists(), volume
        for secret in service.get("secrets", []):
            assert compose["secrets"][secret]["file"] in made_by_hand
    build = services["one"]["build"]
    assert (SERVE / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).samefile(SERVE / "Dockerfile")


def test_compose_publishes_nothing_beyond_this_machine(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_nodes_share_their_state_and_their_pepper(compose: dict[str, Any]) -> None:
    a, b = compose["services"]["a"], compose["services"]["b"]
    assert a == b
    mounted = dict(volume.rpartition(":")[0].rpartition(":")[::2][::-1] for volume in a["volumes"])
    node = config.read(SERVE / mounted["/etc/adlocal/serve.toml"])
    assert node.state is not None
    assert re.match(r"redis://(\w+):", node.state)[1] in compose["services"]  # type: ignore[index]
    assert node.pepper == Path("/run/secrets/pepper")
    balanced = re.findall(r"^ +server (\w+):8080 ", (SERVE / "balancer.conf").read_text(encoding="utf-8"), re.MULTILINE)
    assert balanced == ["a", "b"]


@pytest.mark.parametrize("name", ["serve.toml", "container.toml", "node.toml"])
def test_configurations_are_read(name: str) -> None:
    """Whoever listens to others asks for keys."""
    found = config.read(SERVE / name)
    assert (found.model, found.bundle) == (Path("/srv/adlocal/teacher.gguf"), Path("/srv/adlocal/bundle"))
    assert found.listen.host == "127.0.0.1" or found.keys


def test_the_balancer_waits_for_longer_than_the_nodes() -> None:
    text = (SERVE / "balancer.conf").read_text(encoding="utf-8")
    limits = config.read(SERVE / "node.toml").limits
    assert int(re.findall(r"proxy_read_timeout (\d+)s;", text)[0]) > limits.total_seconds
    assert int(re.findall(r"client_max_body_size (\d+)m;", text)[0]) * 2**20 == limits.body_bytes
    assert "proxy_buffering off;" in text


# Clients


class Stub(BaseHTTPRequestHandler):
    """Answers in the three protocols that the clients speak, to the right key alone."""

    asked: list[tuple[str, dict[str, Any]]]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer(json.dumps({"object": "list", "data": [{"id": "teacher", "object": "model"}]}), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        parts = messages() if self.path == "/v1/messages" else chat()
        self._answer("".join(parts), "text/event-stream")

    def _answer(self, text: str, content_type: str) -> None:
        keys = {self.headers.get("X-Api-Key"), (self.headers.get("Authorization") or "").removeprefix("Bearer ")}
        self.send_response(200 if KEY in keys else 401)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


def chat() -> Iterator[str]:
    """A stream of OpenAI's chat completions."""
    for word in [*WORDS, None]:
        delta, reason = ({"content": word}, None) if word else ({}, "stop")
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "teacher", "choices": [choice]}
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


def messages() -> Iterator[str]:
    """A stream of Anthropic's messages."""
    message = {"id": "m", "type": "message", "role": "assistant", "model": "teacher", "content": []}
    usage = {"input_tokens": 1, "output_tokens": 1}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**message, "stop_reason": None, "stop_sequence": None, "usage": usage}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": w}} for w in WORDS),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]
    for event in events:
        yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


@contextmanager
def stub() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Its address, and what it was asked."""
    asked: list[tuple[str, dict[str, Any]]] = []
    handler = type("Handler", (Stub,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def llm_program(tmp_path: Path) -> dict[str, str]:
    """Variables with which a shell finds `llm`."""
    if not (ENGINES / "llm" / "llm").exists():
        pytest.skip("needs llm; run `make test-server`")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "llm"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m llm "$@"\n')
    program.chmod(0o700)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ENGINES / "llm")}


def ask(name: str, url: str, key: str = KEY, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a client."""
    program = [sys.executable] if name.endswith(".py") else ["sh"]
    environment = {**os.environ, "ADLOCAL_URL": url, "ADLOCAL_KEY": key, "NO_PROXY": "127.0.0.1", **variables}
    return subprocess.run(
        [*program, str(CLIENTS / name), "Why?"], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize(
    ("name", "path"), [("openai_client.py", "/v1/chat/completions"), ("anthropic_client.py", "/v1/messages")]
)
def test_a_client_prints_the_answer(name: str, path: str) -> None:
    with stub() as (url, asked):
        done = ask(name, url)
    assert (done.returncode, done.stdout) == (0, "".join(WORDS) + "\n"), done.stderr
    ((asked_path, body),) = asked
    assert asked_path == path
    assert body["stream"]
    assert body["messages"][-1]["content"] == "Why?"


def test_curl_prints_the_stream() -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    with stub() as (url, asked):
        done = ask("curl.sh", url)
        refused = ask("curl.sh", url, key="another")
    assert (done.returncode, done.stdout) == (0, "".join(chat())), done.stderr
    assert refused.returncode == 22
    assert asked[0][1]["stream"]


@pytest.mark.server
def test_llm_prints_the_answer(llm_program: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    with stub() as (url, asked):
        done = ask("llm.sh", url, TMPDIR=str(tmp_path / "tmp"), **llm_program)
    assert (done.returncode, done.stdout) == (0, "".join(WORDS) + "\n"), done.stderr
    assert asked[0][1]["messages"][-1]["content"] == "Why?"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_every_client_is_tried() -> None:
    tried = {"openai_client.py", "anthropic_client.py", "curl.sh", "llm.sh"}
    assert {path.name for path in CLIENTS.iterdir() if path.is_file()} == tried
