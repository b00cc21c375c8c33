"""Traps of servers, of theirs and of others before: each is a test here or elsewhere, or is answered in a sentence."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adlocal import InputError
from adlocal.serve.config import Config
from adlocal.serve.model import read_model
from support.gateway import Gateway, gateway
from support.paths import ROOT

TABLE = ROOT / "docs" / "serve-traps.md"
N_CTX = 256
server = pytest.mark.server
linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")


@pytest.fixture(scope="module")
def served(long_llama: Path, long_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Two slots of 256 tokens, where policy allows all that it may."""
    config = "[policy.default]\ngrammar = true\nlogprobs = true\n[policy.default.kinds.completion]\nmax_tokens = 20\n"
    directory = tmp_path_factory.mktemp("traps")
    with gateway(long_llama, long_bundle, directory, "-np", 2, "-c", N_CTX, config=config) as found:
        yield found


def at_once(ask: Any, n: int) -> list[httpx2.Response]:
    """The answers to as many requests at once."""
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(ask, range(n)))


def test_every_test_of_the_table_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TABLE.read_text(encoding="utf-8"))
    assert len(named) > 40
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M)
    ]
    assert not missing


def test_another_template_needs_its_tags_named(tiny_llama: Path) -> None:
    """Where reasoning is hidden, it has to be known where it stands."""
    given: dict[str, Any] = {"model": tiny_llama, "engine": {"flags": ["--chat-template-file", "other.jinja"]}}
    hidden = {**given, "policy": {"default": {"disclosure": "answer-only"}}}
    with pytest.raises(InputError, match=r"--chat-template-file.*reasoning_tags"):
        read_model(Config.model_validate(hidden))
    named = {**hidden, "reasoning_tags": {"open": "<r>", "close": "</r>"}}
    tags = read_model(Config.model_validate(named)).tags
    assert tags is not None
    assert (tags.open, tags.close) == ("<r>", "</r>")
    assert read_model(Config.model_validate(given)).tags is None


@server
@linux
def test_more_streams_than_slots_all_end(served: Gateway) -> None:
    """A stream takes no thread, and who waits for a slot is served."""
    found = at_once(lambda i: served.chat(f"Hi {i}", n=20, stream=True, temperature=0), 16)
    assert [each.status_code for each in found] == [200] * 16
    assert all(each.text.endswith("data: [DONE]\n\n") for each in found)


@server
@linux
def test_oversize_prompts_at_once_harm_nobody(served: Gateway) -> None:
    pid = served.control().pid
    found = at_once(lambda i: served.chat("x" * 2000 if i < 8 else "Hi", n=20, stream=i % 2 == 0, temperature=0), 12)
    assert [each.status_code for each in found] == [400] * 8 + [200] * 4
    assert {each.json()["error"]["code"] for each in found[:8]} == {"context_length_exceeded"}
    assert served.control().pid == pid


@server
@linux
def test_a_full_context_ends_each_answer_by_its_length(served: Gateway) -> None:
    """Each slot has its own: what one writes takes nothing from another."""
    found = at_once(lambda i: served.chat("x" * (20 * i + 1), n=100_000, temperature=0), 4)
    assert [each.status_code for each in found] == [200] * 4
    for each in found:
        body = each.json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert N_CTX - 2 <= body["usage"]["total_tokens"] <= N_CTX + 1


@server
@linux
def test_no_length_is_the_policys(served: Gateway) -> None:
    for fields in ({}, {"max_tokens": -1}, {"max_tokens": 10_000}):
        found = served.post("/v1/completions", {"prompt": "Hi", "temperature": 0, **fields})
        assert found.json()["usage"]["completion_tokens"] == 20


@server
@linux
def test_a_seed_gives_the_same_text_again(served: Gateway) -> None:
    texts = [
        served.chat(n=30, seed=seed, temperature=1.0).json()["choices"][0]["message"]["content"] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


HOSTILE: list[dict[str, Any]] = [
    {"temperature": 999999},
    {"top_p": -1},
    {"repeat_penalty": 0},
    {"grammar": "%llguidance {}\nstart: /a{1,999999999}/"},
    {"grammar": "root ::= root root | "},
    {"grammar": 'root ::= "a"{1,999999999}'},
    {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "maxLength": 10**9}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"patternProperties": {"a": {}}}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}},
    {"response_format": {"type": "no_such_type"}},
    {"stop": [""]},
    {"n_cmpl": 10_000},
]


@server
@linux
@pytest.mark.parametrize("fields", HOSTILE, ids=[f"{i}-{next(iter(each))}" for i, each in enumerate(HOSTILE)])
def test_hostile_parameters_are_refused_at_once(served: Gateway, fields: dict[str, Any]) -> None:
    """Before the engine has seen them: never free text instead of the form that was asked for."""
    pid, began = served.control().pid, time.monotonic()
    found = served.chat(**fields)
    assert found.status_code == 400, found.text
    assert time.monotonic() - began < 2
    assert served.control().pid == pid


@server
@linux
def test_what_follows_a_refusal_is_answered(served: Gateway) -> None:
    """A conversation with a broken call in its history is refused or read, and not stuck."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ]
    assert served.post("/v1/chat/completions", {"messages": messages, "max_tokens": 3}).status_code in (200, 400)
    assert served.chat(n=3).status_code == 200
