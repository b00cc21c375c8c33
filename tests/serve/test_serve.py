"""`adlocal serve` before a real engine with a tiny model: what official clients see, and what is in force."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from support.gateway import Gateway, add_key, gateway

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
]
CONTEXT = ["-np", 2, "-c", 4096]


@pytest.fixture(scope="module")
def served(long_llama: Path, long_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One without keys, whose policy has a kind with another strength."""
    config = "[policy.default]\nstrength = 2.0\n[policy.default.kinds.tools]\nstrength = 3.5\n"
    with gateway(long_llama, long_bundle, tmp_path_factory.mktemp("serve"), *CONTEXT, config=config) as found:
        yield found


@pytest.fixture
def oai(served: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_openai_chat_whole_and_in_parts(oai: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "seed": 3}
    whole = oai.chat.completions.create(**how)
    parts = list(oai.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 9
    assert parts[-1].choices == []
    assert [part.usage for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert len({part.id for part in parts}) == 1


def test_openai_completions_of_several_prompts(oai: openai.OpenAI) -> None:
    found = oai.completions.create(model="m", prompt=["ab", "cd"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert all(choice.finish_reason in ("length", "stop") for choice in found.choices)
    assert found.usage is not None
    assert found.usage.completion_tokens <= 16


def test_openai_responses(oai: openai.OpenAI) -> None:
    whole = oai.responses.create(model="m", input="Hi", max_output_tokens=6, store=False)
    assert whole.output_text
    with oai.responses.stream(model="m", input="Hi", max_output_tokens=6, store=False) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_anthropic_messages(served: Gateway) -> None:
    client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
    how: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6}
    whole = client.messages.create(**how)
    assert whole.content[0].type == "text"
    with client.messages.stream(**how) as stream:
        last = stream.get_final_message()
    assert last.usage.output_tokens == whole.usage.output_tokens == 6
    assert client.messages.count_tokens(model="m", messages=how["messages"]).input_tokens == whole.usage.input_tokens


def test_every_answer_is_protected_as_policy_says(served: Gateway) -> None:
    """By the plugin's own counters: what the log says is theirs, and they are what policy says."""
    control = served.control()
    before = control.counters()
    n = served.n_records()
    served.chat(n=12, temperature=1.0)
    served.chat(n=7, stream=True)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    served.chat(n=5, tools=[tool])
    found = served.wait_for_record(n + 3)[n:]
    rows = control.counters() - before
    assert [each["answers"][0]["strength"] for each in found] == [2.0, 2.0, 3.5]
    assert sum(each["answers"][0]["rows"] for each in found) == rows.n_rows
    assert rows.n_choices == rows.n_evaluated
    assert rows.n_closed == 0
    assert rows.n_rows >= sum(each["answers"][0]["tokens"] for each in found)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"samplers": ["top_k"]}, "samplers"),
        ({"id_slot": 1}, "id_slot"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ({"backend_sampling": True}, "backend_sampling"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_policy_does_not_allow_is_refused(served: Gateway, body: dict[str, Any], param: str) -> None:
    found = served.chat(**body)
    assert found.status_code == 400
    assert found.json()["error"]["param"] == param


def test_an_answer_tells_nothing_of_the_engine(served: Gateway) -> None:
    for stream in (False, True):
        text = served.chat(verbose=True, timings_per_token=True, return_tokens=True, stream=stream).text
        assert not {"timings", "cached", "__verbose", "id_slot", str(served.directory)} & set(text.split('"'))


@pytest.mark.parametrize(
    "path", ["/props", "/slots", "/completion", "/v1/nothing", "/docs", "/lora-adapters", "/infill"]
)
def test_nothing_else_exists(served: Gateway, path: str) -> None:
    assert served.get(path).status_code == 404
    assert served.post(path, {}).status_code == 404


def test_simple_routes(served: Gateway) -> None:
    tokens = served.post("/tokenize", {"content": "abc"}).json()["tokens"]
    assert served.post("/detokenize", {"tokens": tokens}).json()["content"] == "abc"
    prompt = served.post("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]}).json()["prompt"]
    assert "Hi" in prompt
    assert served.get("/v1/models").json()["data"][0]["object"] == "model"
    assert served.post("/v1/embeddings", {"input": "x"}).status_code == 403
    assert served.get("/health").json() == {"status": "ok"}
    assert b"llamacpp:tokens_predicted_total" in served.get("/metrics").content


def test_a_long_prompt_is_refused_before_a_stream_begins(served: Gateway) -> None:
    for stream in (False, True):
        found = served.chat("x" * 5000, stream=stream)
        assert (found.status_code, found.json()["error"]["type"]) == (400, "exceed_context_size_error")


def test_pages_of_other_sites_are_refused(served: Gateway) -> None:
    with served.client(host="evil.example") as client:
        assert client.get("/v1/models").status_code == 421
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for origin, status in {"http://evil.example": 403, "null": 403, served.url: 200}.items():
        with served.client(origin=origin) as client:
            assert client.post("/v1/chat/completions", json=body).status_code == status


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_is_charged_and_frees_the_slot(served: Gateway, stream: bool) -> None:
    control = served.control()
    n = served.n_records()
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, "temperature": 0, "stream": stream}
    with served.client() as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_raw())
        else:
            client.timeout = 1.0
            with pytest.raises(Exception, match="timed out"):
                client.post("/v1/chat/completions", json=body)
    (found,) = served.wait_for_record(n + 1)[n:]
    assert found["status"] == 499
    assert 0 < found["answers"][0]["tokens"] < 40000
    served.wait_until(lambda: control.decodes().begun == control.decodes().ended)
    n_rows = control.counters().n_rows
    time.sleep(0.3)
    assert control.counters().n_rows == n_rows  # the engine has stopped as well


def test_who_hangs_up_while_waiting_takes_no_slot(served: Gateway) -> None:
    long = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3900, "temperature": 0}
    n = served.n_records()
    threads = [threading.Thread(target=served.post, args=("/v1/chat/completions", long)) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)  # both slots are taken
    with served.client() as client, pytest.raises(Exception, match="timed out"):
        client.post("/v1/chat/completions", json=long, timeout=0.4)
    for thread in threads:
        thread.join()
    found = served.wait_for_record(n + 3)[n:]
    assert sorted(each["status"] for each in found) == [200, 200, 499]
    (left,) = [each for each in found if each["status"] == 499]
    assert left["answers"][0]["tokens"] == 0


def test_the_engine_dies_and_comes_back(served: Gateway) -> None:
    """The stream ends with an error and no made-up end; the next request is answered by a new engine, protected."""
    pid = served.control().pid
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, "temperature": 0, "stream": True}
    with served.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        seen = [next(lines) for _ in range(6)]
        os.kill(pid, signal.SIGKILL)
        seen += list(lines)
    events = [line for line in seen if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "unavailable_error"
    assert "data: [DONE]" not in events
    served.wait_until(lambda: served.get("/health").status_code == 200)
    served.wait_until(lambda: served.control().pid != pid)
    n = served.n_records()
    assert served.chat(n=3).status_code == 200
    assert served.wait_for_record(n + 1)[-1]["answers"][0]["strength"] == 2.0


def test_a_frozen_engine_is_not_well(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    config = "[engine]\nstall_seconds = 1.0\n"
    with gateway(long_llama, long_bundle, tmp_path, *CONTEXT, config=config) as found:
        pid = found.control().pid
        asking = threading.Thread(target=found.chat, kwargs={"n": 4000, "temperature": 0})
        asking.start()
        found.wait_until(lambda: found.control().counters().n_rows > 3)
        os.kill(pid, signal.SIGSTOP)
        try:
            found.wait_until(lambda: found.get("/health").status_code == 503, 20)
        finally:
            os.kill(pid, signal.SIGCONT)
        asking.join()
        found.wait_until(lambda: found.get("/health").status_code == 200, 20)


def test_reload(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    """Another policy is in force from the next request on; a broken or weaker one changes nothing."""
    with gateway(long_llama, long_bundle, tmp_path, *CONTEXT, config="[policy.default]\nstrength = 1.5\n") as found:
        path = tmp_path / "serve.toml"

        def reloaded(text: str, event: str) -> None:
            n = len(found.records(event))
            path.write_text(text)
            os.kill(found.server.process.pid, signal.SIGHUP)
            found.wait_for_record(n + 1, event)

        reloaded("[policy.default]\nstrength = 4.0\n", "configuration reloaded")
        found.chat(n=2)
        for broken in ("[policy.default\n", "[policy.default]\nstrenght = 1\n", "[policy.default]\nstrength = 0.5\n"):
            reloaded(broken, "configuration kept as it was")
            found.chat(n=2)
        assert [each["strength"] for each in found.wait_for_record(4)] == [4.0] * 4


def test_reload_under_load(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    """Every request has one policy from its beginning to its end, and none fails."""
    config = "[policy.default]\nstrength = {}\n"
    with gateway(long_llama, long_bundle, tmp_path, *CONTEXT, config=config.format(1.0)) as found:
        until = time.monotonic() + 6
        statuses: list[int] = []

        def ask() -> None:
            while time.monotonic() < until:
                statuses.append(found.chat(n=30, temperature=0, stream=True).status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(10):
            (tmp_path / "serve.toml").write_text(config.format(1.0 + i % 2))
            os.kill(found.server.process.pid, signal.SIGHUP)
            time.sleep(0.4)
        for thread in threads:
            thread.join()
        records = found.wait_for_record(len(statuses))
        assert set(statuses) == {200}
        assert {record["strength"] for record in records} == {1.0, 2.0}
        assert all(record["answers"][0]["strength"] == record["strength"] for record in records)


def test_who_reads_nothing_is_cut_off(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    config = "[limits]\nstall_seconds = 1.0\n"
    with gateway(long_llama, long_bundle, tmp_path, *CONTEXT, config=config) as found:
        host, port = found.url.removeprefix("http://").split(":")
        message = [{"role": "user", "content": "Hi"}]
        body = {"messages": message, "max_tokens": 4000, "stream": True, "temperature": 0, "n": 4}
        data = json.dumps(body).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect((host, int(port)))
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            connection.sendall(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            (record,) = found.wait_for_record(1)
        assert record["status"] == 499
        assert sum(answer["tokens"] for answer in record["answers"]) < 4 * 4000
        assert found.chat(n=3).status_code == 200


def test_keys(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    key = add_key(tmp_path)
    other = add_key(tmp_path, "bob", "--tier", "paid")
    config = "[policy.tiers.paid]\nstrength = 5.0\nrequests_per_minute = 2\n"
    with gateway(long_llama, long_bundle, tmp_path, *CONTEXT, config=config) as found:
        assert found.chat().status_code == 401
        assert found.chat(key=key[:-1] + ("A" if key[-1] != "A" else "B")).status_code == 401
        assert found.chat(n=2, key=key).status_code == 200
        assert found.post("/v1/messages", {}, **{"x-api-key": "adl_wrong"}).json()["type"] == "error"
        assert found.post("/v1/messages", {}, key=other, **{"x-api-key": key}).status_code == 401
        twice = [("authorization", f"Bearer {key}"), ("authorization", f"Bearer {other}")]
        assert httpx2.get(f"{found.url}/v1/models", headers=twice, trust_env=False).status_code == 401
        assert found.get("/metrics", key=key).status_code == 403
        statuses = [found.chat(n=2, key=other).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert [each["strength"] for each in found.wait_for_record(3)] == [1.0, 5.0, 5.0]
        last = found.chat(n=2, key=other)
        assert int(last.headers["retry-after"]) >= 1


def test_the_operator_is_told_what_was_steered(served: Gateway) -> None:
    """The parts' sums are the log's, but for the dose of the last token, which nobody decodes."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "stream": True, "seed": 5}
    n = served.n_records()
    with served.client(**{"x-adlocal-steering": "1"}) as client:
        lines = client.post("/v1/chat/completions", json=body).text.splitlines()
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    told = [part["choices"][0]["adlocal"] for part in parts if "adlocal" in part["choices"][0]]
    (record,) = served.wait_for_record(n + 1)[n:]
    (answer,) = record["answers"]
    assert sum(each["rows"] for each in told) == answer["rows"]
    assert sum(each["choices"] for each in told) == answer["choices"]
    assert sum(each["kl"] for each in told) == pytest.approx(answer["kl"], abs=1e-4)
    assert "adlocal" not in served.chat(stream=True).text.replace('"owned_by":"adlocal"', "")
    with served.client(**{"x-adlocal-steering": "1", "x-forwarded-for": "10.0.0.1"}) as client:
        assert '"adlocal"' not in client.post("/v1/chat/completions", json=body).text


def test_the_engine_ends_with_a_gateway_that_is_killed(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    with gateway(long_llama, long_bundle, tmp_path, *CONTEXT) as found:
        pid = found.control().pid
        found.end(signal.SIGKILL)
        found.wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), 20)


def _is_zombie(pid: int) -> bool:
    """Whether it has ended, and nobody has asked how."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_requests_that_wait_go_on_after_a_restart(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    """And soon: the slots of the engine that died are free at once."""
    with gateway(long_llama, long_bundle, tmp_path, "-np", 1, "-c", 4096) as found:
        statuses: dict[str, int] = {}

        def ask(name: str, n: int) -> None:
            statuses[name] = found.chat(n=n, temperature=0).status_code

        running = threading.Thread(target=ask, args=("running", 3900))
        running.start()
        found.wait_until(lambda: found.control().counters().n_rows > 3)
        waiting = threading.Thread(target=ask, args=("waiting", 5))
        waiting.start()
        found.wait_until(lambda: "llamacpp:requests_deferred 1.0" in found.get("/metrics").text)
        os.kill(found.control().pid, signal.SIGKILL)
        began = time.monotonic()
        running.join()
        waiting.join()
        assert statuses == {"running": 503, "waiting": 200}
        assert time.monotonic() - began < 25


def test_an_engine_that_only_observes_sends_nothing(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    """Whatever an operator's flags do to it: its control file says what is in force."""
    config = '[engine]\nflags = ["--observe"]\n'
    with gateway(long_llama, long_bundle, tmp_path, *CONTEXT, config=config) as found:
        answered = found.chat(n=3, stream=True)
        assert answered.status_code == 500
        assert "could not be verified" in answered.json()["error"]["message"]


def test_heads_of_requests_are_bounded(served: Gateway) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        n_sent = 0
        with contextlib.suppress(ConnectionError):
            while n_sent < 2**20:
                n_sent += connection.send(b"X-A: " + b"a" * 4000 + b"\r\n")
                time.sleep(0.01)
    assert n_sent < 2**19
