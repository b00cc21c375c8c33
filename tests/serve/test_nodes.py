"""Two nodes over one Redis: keys, limits and the watch are theirs together. And what else an operator sets up."""

from __future__ import annotations

import ssl
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx2
import pytest

from llama_server import server
from support.gateway import Gateway, gateway
from support.stores import redis_server

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
]
FLAGS = ["-np", 1, "-c", 1024]
MESSAGES = [{"role": "user", "content": "Hi"}]


def test_two_nodes_share_keys_limits_and_the_watch(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    with redis_server() as state, ExitStack() as exits:
        pepper = tmp_path / "pepper"
        told = [sys.executable, "-m", "adlocal", "keys", "add", "--owner", "alice", "--operator", "--state", state]
        done = subprocess.run([*told, "--pepper", str(pepper)], capture_output=True, text=True, timeout=60, check=True)
        key = done.stdout.strip()
        config = f'pepper = "{pepper}"\n[policy.default]\nrequests_per_minute = 3\n'
        nodes: list[Gateway] = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            started = gateway(long_llama, long_bundle, tmp_path / name, "--state", state, *FLAGS, config=config)
            nodes.append(exits.enter_context(started))
        statuses = [nodes[i % 2].chat(n=2, key=key).status_code for i in range(4)]
        assert statuses == [200, 200, 200, 429]
        for node in nodes:
            node.wait_until(partial(_has_seen, node, key, 4), 10)  # the watch counts what a limit refused as well
        subprocess.run(
            [
                sys.executable,
                "-m",
                "adlocal",
                "keys",
                "revoke",
                key.split("_")[1],
                "--state",
                state,
                "--pepper",
                pepper,
            ],
            timeout=60,
            check=True,
        )
        for node in nodes:
            node.wait_until(partial(_is_refused, node, key), 5)


def _has_seen(node: Gateway, key: str, n: int) -> bool:
    rows = node.get("/operator/watch", key).json()
    return bool(sum(row["requests"] for row in rows if row["subject"].startswith("key:")) == n)


def _is_refused(node: Gateway, key: str) -> bool:
    return bool(node.chat(n=1, key=key).status_code == 401)


def test_state_in_redis_needs_a_pepper(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="every node needs the same pepper file"),
        gateway(long_llama, long_bundle, tmp_path, "--state", "redis://127.0.0.1:1", *FLAGS),
    ):
        pass


def test_an_open_door_is_refused(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="others could ask without a key"),
        gateway(long_llama, long_bundle, tmp_path, "--host", "0.0.0.0", *FLAGS),
    ):
        pass


def test_https(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    cert, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(private), "-out", str(cert)]
    subprocess.run(made, capture_output=True, timeout=60, check=True)
    tls = ["--ssl-cert-file", cert, "--ssl-key-file", private]
    with gateway(long_llama, long_bundle, tmp_path, *tls, *FLAGS) as found:
        assert found.url.startswith("https://")
        with httpx2.Client(verify=ssl.create_default_context(cafile=str(cert)), trust_env=False) as client:
            assert client.get(f"{found.url}/health").json() == {"status": "ok"}


def test_embeddings_where_policy_allows_them(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    """Pooled ones, and chats beside them are protected as ever."""
    config = '[engine]\npooling = "last"\n[policy.default]\nembeddings = true\n'
    with gateway(long_llama, long_bundle, tmp_path, *FLAGS, config=config) as found:
        body = {"input": ["one text", "another"], "model": "m"}
        data = found.post("/v1/embeddings", body).json()["data"]
        assert len(data) == 2
        assert any(data[0]["embedding"])
        assert data[0]["embedding"] != data[1]["embedding"]
        assert found.chat(n=5).status_code == 200
        control = found.control()
        before = control.counters(0).n_decoded
        n_prompt = [found.chat("x" * 200, 1).json()["usage"]["prompt_tokens"] for _ in range(2)]
        assert control.counters(0).n_decoded - before >= sum(n_prompt)  # nothing is reused: whose text lay there?
        counters = control.counters()
        assert counters.n_closed == 0
        assert counters.n_evaluated == counters.n_choices > 0


def test_a_llama_server_of_ones_own(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    """In xllamacpp's place: it is asked and protected alike."""
    if not server().exists():
        pytest.skip("needs llama-server; run `make test-server`")
    with gateway(long_llama, long_bundle, tmp_path, "--engine", server(), *FLAGS) as found:
        assert found.chat(n=6, temperature=0).status_code == 200
        assert found.post("/v1/messages", {"model": "m", "max_tokens": 3, "messages": MESSAGES}).status_code == 200
        first, second = (record["answers"][0] for record in found.wait_for_record(2))
        assert first["rows"] >= first["tokens"] > 0
        assert first["choices"] == first["evaluated"] > 0
        assert second["strength"] == 1.0


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """Without the extra, one line says what to install."""
    block = "import sys; sys.modules['fastapi'] = None; from adlocal.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", block, "serve", "-m", "teacher.gguf", "--bundle", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install 'adlocal[serve]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
