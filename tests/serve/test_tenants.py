"""Keys beside each other: nothing of one comes to another, and each pays for itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.gateway import Gateway, add_key, gateway

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
]
ONE_SLOT = ["-np", 1, "-c", 4096]
PROMPT = "the same long prompt of two tenants, which is read again for each of them"


class Tenants:
    """A gateway with one slot, and the keys of two owners."""

    def __init__(self, found: Gateway, alice: str, bob: str) -> None:
        self.gateway, self.alice, self.bob = found, alice, bob


@pytest.fixture(scope="module")
def tenants(long_llama: Path, long_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    directory = tmp_path_factory.mktemp("tenants")
    alice, bob = add_key(directory, "alice"), add_key(directory, "bob", "--tier", "strong")
    config = "[policy.default]\nstrength = 1.0\n[policy.tiers.strong]\nstrength = 6.0\n"
    with gateway(long_llama, long_bundle, directory, *ONE_SLOT, config=config) as found:
        yield Tenants(found, alice, bob)


def test_what_is_left_of_a_cancelled_request_keeps_its_settings(tenants: Tenants) -> None:
    """The next tenant asks at once: its rows are its own, and they alone are protected as it is."""
    served = tenants.gateway
    n = served.n_records()
    long = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, "temperature": 0, "stream": True}
    with served.client(tenants.bob) as client, client.stream("POST", "/v1/chat/completions", json=long) as response:
        next(response.iter_raw())
    assert served.chat(n=20, key=tenants.alice, temperature=0).status_code == 200
    left, answered = served.wait_for_record(n + 2)[n:]
    assert (left["status"], left["answers"][0]["strength"]) == (499, 6.0)
    assert (answered["status"], answered["answers"][0]["strength"]) == (200, 1.0)
    assert answered["answers"][0]["rows"] == answered["answers"][0]["tokens"]


def test_a_prompt_is_read_again_for_another_key_and_not_for_the_same(tenants: Tenants) -> None:
    served, control = tenants.gateway, tenants.gateway.control()

    def decoded(key: str) -> int:
        before = control.counters(0).n_decoded
        found = served.chat(PROMPT, 1, key=key)
        assert found.json()["usage"]["prompt_tokens"] > len(PROMPT)
        assert "cached" not in found.text
        return control.counters(0).n_decoded - before

    first, again, others, back = (decoded(key) for key in (tenants.alice, tenants.alice, tenants.bob, tenants.alice))
    assert again < 10
    assert min(first, others, back) > len(PROMPT)


def test_who_leaves_before_the_usage_is_told_pays(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    """What was generated is charged, and the next request sees the limit."""
    key = add_key(tmp_path, "carol", "--budget", "600")
    with gateway(long_llama, long_bundle, tmp_path, *ONE_SLOT) as served:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 550, "temperature": 0}
        with served.client(key) as client:
            with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                lines = (line for line in response.iter_lines() if line.startswith("data: {"))
                for _ in range(60):
                    next(lines)
            served.wait_for_record(1)
            (record,) = served.records()
            assert record["status"] == 499
            used = record["answers"][0]["tokens"] + record["answers"][0]["prompt_tokens"]
            assert used >= 60
            refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 403
        assert refused.json()["error"]["type"] == "insufficient_quota"
        assert served.chat(n=20, key=key).status_code == 200  # what is left of it is enough for less


def test_limits_and_keys_survive_kill_9(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    key = add_key(tmp_path)
    config = "[policy.default]\nrequests_per_minute = 2\n"
    with gateway(long_llama, long_bundle, tmp_path, *ONE_SLOT, config=config) as served:
        assert served.chat(n=1, key=key).status_code == 200
        engine = served.control().pid
        served.end(signal.SIGKILL)
    os.kill(engine, signal.SIGKILL)
    with gateway(long_llama, long_bundle, tmp_path, *ONE_SLOT, config=config) as served:
        assert [served.chat(n=1, key=key).status_code for _ in range(2)] == [200, 429]


def test_a_revoked_key_is_refused_while_the_gateway_runs(tenants: Tenants) -> None:
    served = tenants.gateway
    key = add_key(served.directory, "dave")
    assert served.chat(n=1, key=key).status_code == 200
    command = [sys.executable, "-m", "adlocal", "keys", "revoke", key.split("_")[1]]
    subprocess.run([*command, "--state", str(served.directory / "state")], check=True, timeout=60)
    served.wait_until(lambda: served.chat(n=1, key=key).status_code == 401, 5)


def test_the_watch_raises_a_harvest_and_nobody_beside_it(long_llama: Path, long_bundle: Path, tmp_path: Path) -> None:
    """Many problems in one template: the strength rises from request to request, and the neighbour's does not."""
    harvester, neighbour = add_key(tmp_path, "harvest"), add_key(tmp_path, "neighbour")
    config = "[policy.default]\nstrength = 1.0\nmax_strength = 4.0\n[watch]\nlong_answer = 100\n"
    config += "[watch.ramp]\nrise_per_minute = 60.0\n"
    template = "Solve this step by step and show all reasoning. A train goes {} miles in {} hours. How fast is it?"
    with gateway(long_llama, long_bundle, tmp_path, "-np", 2, "-c", 4096, config=config) as served:
        for i in range(150):
            served.chat(template.format(i * 7, i), 120, key=harvester, temperature=0)
            if i % 30 == 0:
                served.chat("Good morning! What shall I cook?", 4, key=neighbour)
        strengths: dict[str, list[float]] = {"harvest": [], "neighbour": []}
        for record in served.wait_for_record(155):
            strengths[record["owner"]].append(record["answers"][0]["strength"])
        assert strengths["harvest"][0] == 1.0
        assert strengths["harvest"][-1] > 1.0, json.dumps(served.records()[-1]["watch"])
        assert max(strengths["harvest"]) <= 4.0
        assert set(strengths["neighbour"]) == {1.0}
