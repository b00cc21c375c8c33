"""A real engine whose model reasons: the plugin forbids the tags, and the answer streams after the first close."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adlocal.plugin import Think
from adlocal_convert.convert import convert
from adlocal_convert.options import Options
from support import tiny
from support.gateway import Gateway, gateway

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
]
OPEN, CLOSE = "<think>", "</think>"
OPEN_ID, CLOSE_ID = tiny.N_PIECES, tiny.N_PIECES + 1
OPENED = (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}" + OPENED + "{% endif %}"
    "{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n" + OPENED + "{% endif %}"
)
#: The random model writes tags often, and hardly ever ends its turn.
BIAS = {str(OPEN_ID): 4, str(CLOSE_ID): 4, str(tiny.EOS): -5}
THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
UNTHINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
N = 400
CONFIG = """
log_text = true
[policy.default]
disclosure = "answer-only"
logit_bias = true
logprobs = true
"""


@pytest.fixture(scope="module")
def thinking_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = ["".join(pair) for pair in itertools.product("abcdefghijkl", repeat=2)]
    path = tmp_path_factory.mktemp("thinking") / "llama.gguf"
    model = tiny.tiny_model(max_position_embeddings=4096)
    return tiny.write_gguf(model, path, TEMPLATE, [*tiny.BYTES[:128], *pairs[:128]], tags=[OPEN, CLOSE])


@pytest.fixture(scope="module")
def bundle(thinking_llama: Path, tiny_traces: Path) -> Path:
    out = thinking_llama.with_name("bundle")
    convert(Options(str(thinking_llama), {"traces": tiny_traces}, out, carriers=1.0, n_threads=1), lambda line: None)
    return out


@pytest.fixture(scope="module")
def served(thinking_llama: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory = tmp_path_factory.mktemp("serve")
    with gateway(thinking_llama, bundle, directory, "-np", 2, "-c", 2048, config=CONFIG) as found:
        yield found


def asked(served: Gateway, seed: int, **fields: Any) -> tuple[list[dict[str, Any]], Mapping[str, Any], str]:
    """The parts that come, the log's record, and all that the model wrote."""
    n = served.n_records()
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": N, "seed": seed, "temperature": 1.0}
    body |= {"logit_bias": BIAS, "stream": True, "logprobs": True, "top_logprobs": 3, **fields}
    found: httpx2.Response = served.post("/v1/chat/completions", body)
    assert found.status_code == 200, found.text
    lines = [line.removeprefix("data: ") for line in found.text.splitlines() if line.startswith("data: {")]
    record = served.wait_for_record(n + 1)[-1]
    return [json.loads(line)["choices"][0] for line in lines], record, record["texts"][0]


def content(parts: list[dict[str, Any]]) -> str:
    return "".join(part["delta"].get("content") or "" for part in parts)


@pytest.mark.parametrize("opened", [True, None])
@pytest.mark.parametrize("seed", range(3))
def test_the_answer_streams_after_the_first_close(served: Gateway, seed: int, opened: bool | None) -> None:
    """Whether the prompt opens a block, or the model does."""
    parts, record, said = asked(served, seed, **(THINKING if opened else {}))
    assert CLOSE in said, "the model closed nothing: take another seed"
    answer = said.partition(CLOSE)[2]
    assert OPEN not in answer
    assert CLOSE not in answer
    assert len(answer) > 100
    assert content(parts) == answer.lstrip(" \t\r\n") or content(parts) in answer
    assert sum(bool(part["delta"].get("content")) for part in parts) > 50
    tokens = [each["token"] for part in parts for each in (part["logprobs"] or {}).get("content") or ()]
    assert "".join(tokens) in answer
    assert record["answers"][0]["hidden_tokens"] < record["answers"][0]["tokens"]
    in_force = served.control().in_force(record["answers"][0]["slot"])
    assert in_force.think == Think(OPEN_ID, CLOSE_ID)


def test_who_must_not_think_writes_no_tags(served: Gateway) -> None:
    said = [asked(served, seed, **UNTHINKING)[2] for seed in range(3)]
    assert not any(OPEN in each or CLOSE in each for each in said)
    in_force = [served.control().in_force(slot).think for slot in served.control().begun()]
    assert Think(OPEN_ID, CLOSE_ID, from_start=True) in in_force


@pytest.mark.parametrize("route", ["/v1/messages", "/v1/responses", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_that_is_cut_off_is_not_shown(served: Gateway, route: str, stream: bool) -> None:
    n = served.n_records()
    messages = [{"role": "user", "content": "Hi"}]
    length = (
        {"max_output_tokens": 30, "input": messages}
        if "responses" in route
        else {"max_tokens": 30, "messages": messages}
    )
    found = served.post(route, {**length, **THINKING, "stream": stream, "temperature": 0})
    record = served.wait_for_record(n + 1)[-1]
    said = record["texts"][0]
    assert CLOSE not in said
    assert len(said) > 30
    assert not any(said[i : i + 8] in found.text for i in range(len(said) - 8))
    assert record["answers"][0]["hidden_tokens"] == record["answers"][0]["tokens"] == 30


def test_prefill_and_history_bring_no_tags_back(served: Gateway) -> None:
    """Reasoning that a client made up does not reach the prompt."""
    messages = [
        {"role": "user", "content": "What is <think>?"},
        {"role": "assistant", "content": "<think>made up</think>It is.", "reasoning_content": "made up as well"},
        {"role": "user", "content": "Go on </think> now"},
    ]
    prompt = served.post("/apply-template", {"messages": messages, **THINKING}).json()["prompt"]
    assert "made up" not in prompt
    assert prompt.count(CLOSE) == 0
    assert prompt.endswith("assistant\n<think>\n")


def test_without_a_ban_the_same_model_goes_on_thinking(thinking_llama: Path, bundle: Path, tmp_path: Path) -> None:
    """What the plugin prevents, and where nothing is banned, `show` shows it."""
    config = CONFIG.replace("answer-only", "show")
    with gateway(thinking_llama, bundle, tmp_path, "-np", 2, "-c", 2048, config=config) as found:
        said = asked(found, 0, **THINKING)[2]
        assert said.count(CLOSE) > 1
        assert said.count(OPEN) > 1
