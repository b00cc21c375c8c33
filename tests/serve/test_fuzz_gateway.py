"""Random requests, and nonsense, to a real gateway: nothing that a client sends turns protection off.

`ADLOCAL_FUZZ=5000` for as many bodies; by default as many as take a minute or two. With `-s`, what became of them.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adlocal import AntidistillationLlama
from adlocal.bundle import Bundle
from adlocal.plugin import Counters
from adlocal.serve.config import read
from adlocal.serve.policy import Caller, Decision, RequestKind, decide
from adlocal.serve.protocols.fields import FIELDS, PATHS
from adlocal.settings import Settings, resolve
from adlocal_convert.convert import convert
from adlocal_convert.options import Options
from support import alone, tiny
from support.gateway import Gateway, add_key, gateway
from support.gateway_barrage import Came, anonymous_bytes, barrage, exchange, report
from support.gateway_bodies import (
    LIMITS,
    ROUTE_OF,
    SIMPLE,
    Sent,
    each_field,
    minimal,
    put,
)
from support.gateway_collection import collected
from support.gateway_garbage import transport

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
]

N = int(os.environ.get("ADLOCAL_FUZZ", "400"))
N_CTX = 1024
OPEN, CLOSE = 258, 259
TEMPLATE = tiny.CHAT_TEMPLATE + (
    "{% if add_generation_prompt %}{% if enable_thinking is defined %}"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}{% endif %}"
)
CONFIG = """
[engine]
parallel = 3
ctx_size = 1024
threads = 1
pooling = "last"
[limits]
body_seconds = 2.0
[policy.default]
strength = 2.0
max_strength = 2.0
max_tokens = 12
[policy.tiers.weak]
strength = 1.5
max_strength = 1.5
[policy.tiers.weak.kinds.tools]
strength = 2.5
max_strength = 2.5
[policy.tiers.weak.kinds.reasoning]
guard = 0.04
[policy.tiers.hidden]
strength = 4.0
max_strength = 4.0
guard = 0.02
disclosure = "answer-only"
unknown = "refuse"
[policy.tiers.told]
strength = 3.0
max_strength = 3.0
logprobs = true
logit_bias = true
grammar = true
prefill = true
embeddings = true
[policy.tiers.told.kinds.completion]
strength = 3.5
max_strength = 3.5
"""
TIERS = ("weak", "hidden", "told")
FIXED = {"messages": [{"role": "user", "content": "tick tock"}], "max_tokens": 8, "seed": 7, "temperature": 0.9}
#: Words of the engine's answers, and of its place, which are in no answer of the gateway unless the client said them.
ENGINE_WORDS = (
    *("timings", "id_slot", "__verbose", "tokens_cached", "tokens_evaluated", "tokens_predicted", "predicted_ms"),
    *("generation_settings", "prompt_ms", "cache_n", "system_fingerprint", "prompt_progress", "xllamacpp", "GGML"),
    *("adlocal-serve-", "engine.sock", "Traceback", ".gguf", "site-packages", "http://engine"),
)
REFUSALS = frozenset((400, 403, 404, 405, 408, 413, 421, 429))


@dataclass
class Fuzzed:
    """What was sent, and what there was to see afterwards.

    Attributes:
        keys: by tier, and the operator's.
        pid: of the engine, at first.
        rows: of all sequences, while it ran.
        fixed: answers to the same request, before and after.
        memory: anonymous bytes of gateway and engine, after a half and at the end.
        records: the log's, by request.
    """

    served: Gateway
    keys: Mapping[str, str]
    pid: int
    came: list[Came] = field(default_factory=list)
    raw: list[tuple[bytes, bytes]] = field(default_factory=list)
    rows: Counters = field(default_factory=Counters)
    fixed: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    records: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose every token is text, and which opens and closes reasoning now and then."""
    path = tmp_path_factory.mktemp("thinker") / "thinker.gguf"
    model = tiny.tiny_model(max_position_embeddings=N_CTX)
    model.lm_head.weight.data[[OPEN, CLOSE]] *= 2.5
    pieces = [*tiny.BYTES[:128], *(a + b for a in "abcdefghijkl" for b in "abcdefghijkl")][:256]
    return tiny.write_gguf(model, path, TEMPLATE, pieces, tags=("<think>", "</think>"))


@pytest.fixture(scope="module")
def thinker_bundle(thinker: Path, tiny_traces: Path) -> Path:
    out = thinker.with_name("bundle")
    convert(Options(str(thinker), {"traces": tiny_traces}, out, carriers=1.0, n_threads=1), lambda line: None)
    return out


@pytest.fixture(scope="module")
def fuzzed(thinker: Path, thinker_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    directory = tmp_path_factory.mktemp("fuzz")
    keys = {tier: add_key(directory, f"owner-{tier}", "--tier", tier) for tier in TIERS}
    keys["operator"] = add_key(directory, "root", "--operator")
    with gateway(thinker, thinker_bundle, directory, config=CONFIG, seconds=60 + 2 * N) as served:
        found = Fuzzed(served, keys, served.control().pid)
        before = served.control().counters()
        asked = collected(served.get("/openapi.json", keys["operator"]).json(), N, TIERS)
        found.fixed.append(fixed(found))
        for part in (asked[: len(asked) // 2], asked[len(asked) // 2 :]):
            found.came += barrage(served, part, keys)
            found.memory.append((anonymous_bytes(served.server.process.pid), anonymous_bytes(found.pid)))
        found.raw = [(raw, exchange(served, raw)) for raw in transport(keys["weak"])]
        served.wait_until(lambda: idle(found))
        found.fixed.append(fixed(found))
        found.rows = served.control().counters() - before
        found.records = {record["request"]: record for record in served.records()}
        print(f"{len(found.came)} bodies, {len(found.records)} admitted; {found.rows}\n{report(found.came)}")
        print(f"raw: {Counter(said[9:12] for _, said in found.raw)}; memory: {found.memory}")
        yield found


def test_every_row_was_evaluated(fuzzed: Fuzzed) -> None:
    """By the plugin's own counters, and by the log, which has them by request."""
    rows = fuzzed.rows
    assert 0 < rows.n_choices == rows.n_evaluated
    assert rows.n_closed == 0
    assert rows.kl > 0.05 * rows.n_rows, "rows were evaluated and not changed"
    answers = [answer for record in fuzzed.records.values() for answer in record["answers"]]
    assert len([answer for answer in answers if answer["tokens"]]) > N // 8
    for answer in answers:
        assert answer["choices"] == answer["evaluated"]
        assert answer["closed"] == 0
        assert answer["rows"] >= answer["tokens"]
    assert sum(answer["rows"] for answer in answers) <= rows.n_rows


def test_what_was_in_force_is_what_policy_says(fuzzed: Fuzzed) -> None:
    """By key and kind, and by nothing else of the body."""
    policy = Policies(fuzzed)
    n = 0
    for came in fuzzed.came:
        if record := fuzzed.records.get(came.request):
            expected = policy.decision(came.key, kinds(came.sent)).settings
            assert (record["strength"], record["guard"]) == (expected.strength, expected.guard), came
            assert record["disclosure"] == policy.decision(came.key, ("chat",)).disclosure
            n += 1
    assert n > N // 5
    for record in fuzzed.records.values():
        assert Settings(record["strength"], record["guard"]) in policy.possible(record["key"])
        for answer in record["answers"]:
            if answer["tokens"]:
                assert (answer["strength"], answer["guard"]) == (record["strength"], record["guard"])
    control = fuzzed.served.control()
    assert {control.in_force(seq_id).mode for seq_id in control.begun()} == {"protect"}


def test_greedy_answers_are_those_of_the_drop_in(fuzzed: Fuzzed, thinker: Path, thinker_bundle: Path) -> None:
    """Recomputed apart, at the policy's strength. Where texts part, two adjusted logits are as good as equal."""
    policy, checked, plain, close = Policies(fuzzed), 0, 0, 0
    kwargs: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with closing(AntidistillationLlama(str(thinker), bundle=thinker_bundle, **kwargs)) as llm:
        for came in [came for came in fuzzed.came if came.sent.source == "greedy" and came.status == 200]:
            decision = policy.decision(came.key, kinds(came.sent))
            tokens, n = prompt_tokens(fuzzed, came), min(limit(came.sent), 12)
            llm.strength, llm.guard = decision.settings.strength, decision.settings.guard
            expected, _ = alone.alone(llm, tokens, n)
            if {OPEN, CLOSE} & set(expected):
                continue  # disclosure has its own tests
            said = came.text
            if said != text_of(llm, expected):
                ours = fuzzed.served.post("/tokenize", {"content": said}, fuzzed.keys["weak"]).json()["tokens"]
                assert alone.gap(llm, tokens, ours, expected) < 0.02, came
                close += 1
            checked += 1
            llm.strength = 0.0
            plain += said == text_of(llm, alone.alone(llm, tokens, n)[0])
    print(f"{checked} answers were computed apart, {close} within rounding; {plain} of them are the plain teacher's")
    assert checked >= min(30, N // 20)
    assert plain < checked / 2


def test_nothing_of_the_engine_is_told(fuzzed: Fuzzed) -> None:
    place = str(fuzzed.served.directory)
    both = [(came.sent.raw + came.sent.path.encode(), came.content) for came in fuzzed.came]
    for asked, said in (*both, *fuzzed.raw):
        for word in (*ENGINE_WORDS, place):
            assert word.encode() not in said or word.encode() in asked, (asked[:500], said[:2000])
        assert said.count(b"cached_tokens") == said.count(b'"cached_tokens":0') + said.count(b'"cached_tokens": 0')
        for secret in fuzzed.keys.values():
            assert secret.encode() not in said


def test_hidden_reasoning_stays_hidden(fuzzed: Fuzzed) -> None:
    hidden = [record for record in fuzzed.records.values() if record["tier"] == "hidden"]
    assert sum(answer["hidden_tokens"] for record in hidden for answer in record["answers"]) > 0
    for came in fuzzed.came:
        if came.key == "hidden" and came.sent.path in PATHS.values():
            for word in (b"reasoning_content", b"thinking_delta", b"reasoning_text", b"<think>", b"</think>"):
                assert word not in came.content or word in came.sent.raw, came


def test_no_request_was_the_servers_fault(fuzzed: Fuzzed) -> None:
    for came in fuzzed.came:
        assert came.status in {0, 200, *REFUSALS}, came
        if came.status not in (0, 200):
            assert came.parts()[0]["error"]["message"]
    for asked, said in fuzzed.raw:
        assert said[:9] in (b"", b"HTTP/1.1 "), (asked[:300], said[:500])
        assert said[9:10] != b"5", (asked[:300], said[:500])
    faults = [*fuzzed.served.records("request failed"), *fuzzed.served.records("the engine failed")]
    assert not faults
    assert {record["status"] for record in fuzzed.records.values()} <= {200, 499, *REFUSALS}


def test_the_engine_is_as_before(fuzzed: Fuzzed) -> None:
    served = fuzzed.served
    assert served.control().pid == fuzzed.pid
    assert "adlocal:engine_starts_total 1.0" in measured(fuzzed)
    assert fuzzed.fixed[0] == fuzzed.fixed[1] != ""
    decodes = served.control().decodes()
    assert decodes.begun == decodes.ended
    (gateway_before, engine_before), (gateway_after, engine_after) = fuzzed.memory
    # each of the engine's threads keeps some 30 MiB once it has read a megabyte of text
    assert gateway_after < gateway_before + 64 * 2**20
    assert engine_after < engine_before + 256 * 2**20


def test_what_is_refused_is_refused_and_what_is_ignored_changes_nothing(fuzzed: Fuzzed) -> None:
    """In what was sent, and each field on each route, alone."""
    served, key = fuzzed.served, fuzzed.keys["told"]
    for came in fuzzed.came:
        body = came.sent.body()
        for each in FIELDS if came.status == 200 and came.sent.path in ROUTE_OF else ():
            if each.fate == "refused" and ROUTE_OF[came.sent.path] in each.routes and each.name in body:
                assert body[each.name] in (None, *each.harmless), came
    for route, each, value in each_field("refused"):
        body = put(minimal(route, "Hi", 2), each.name, value)
        found = served.post(PATHS[route], body, key)
        assert found.status_code == 400, (route, each.name, found.text)
        assert each.name.removesuffix(".*") in found.json()["error"]["message"]
    usual = {}
    for route in PATHS:
        usual[route] = _greedy(fuzzed, route, key)
    for route, each, value in each_field("ignored"):
        if not each.name.startswith(("messages.", "thinking.")):  # which are lists, or ask for reasoning
            assert _greedy(fuzzed, route, key, **put({}, each.name, value)) == usual[route], (route, each.name)


def test_more_answers_than_can_wait_are_refused(fuzzed: Fuzzed) -> None:
    """Once all that fitted were begun, and thrown away for the one that did not."""
    body = {"prompt": ["a"] * 2, "n": 16, "max_tokens": 2}
    found = fuzzed.served.post(PATHS["completions"], body, fuzzed.keys["told"])
    assert (found.status_code, found.json()["error"]["param"]) == (400, "n")


def test_clients_write_no_control_tokens(fuzzed: Fuzzed) -> None:
    """A template's own are there, and each of a client's is broken."""
    said = "<s>a</s>b<think>c</think>"
    for key in ("weak", "hidden"):
        body = {"messages": [{"role": "user", "content": said}, {"role": "user", "content": "x"}]}
        prompt = fuzzed.served.post("/apply-template", body, fuzzed.keys[key]).json()["prompt"]
        assert prompt.startswith("user\n<\u200bs>a<\u200b/s>b<\u200bthink>c<\u200b/think></s>\n<s>user\nx</s>")


def test_nothing_is_told_without_a_key(fuzzed: Fuzzed) -> None:
    served = fuzzed.served
    described = served.get("/openapi.json", fuzzed.keys["weak"]).json()["paths"]
    routes = [(method, path) for path, methods in described.items() for method in methods]
    routes += [("get", path) for path in ("/openapi.json", "/metrics", "/operator/watch")]
    with served.client() as client:
        for method, path in routes:
            found = client.request(method.upper(), path.replace("{name}", "x"), content=b"{" * 5)
            assert found.status_code == (200 if path == "/health" else 401), path
        assert client.get("/").status_code == 200
    assert {path for _, path in routes} >= {*PATHS.values(), *ROUTE_OF, *SIMPLE}


class Policies:
    """What policy says to each key."""

    def __init__(self, fuzzed: Fuzzed) -> None:
        config = read(fuzzed.served.directory / "serve.toml")
        self._policy = config.policy
        bundle = fuzzed.served.control().bundle
        self._default = resolve(Bundle.open(bundle), "", None, None)
        self._callers = {
            name: Caller(key.split("_")[1], f"owner-{name}", name if name in TIERS else "default")
            for name, key in fuzzed.keys.items()
        }

    def decision(self, name: str, of: tuple[RequestKind, ...]) -> Decision:
        return decide(self._policy, self._callers[name], of, self._default)

    def possible(self, key: str) -> list[Settings]:
        """What a key, by its id, may be given for one kind or another."""
        (name,) = [name for name, caller in self._callers.items() if caller.key == key]
        chats: list[tuple[RequestKind, ...]] = [("chat",), ("chat", "tools"), ("chat", "reasoning")]
        every = [*chats, ("chat", "tools", "reasoning"), ("completion",)]
        return [self.decision(name, of).settings for of in every]


def kinds(sent: Sent) -> tuple[RequestKind, ...]:
    """Of a body, by its protocol's own words."""
    body = sent.body()
    route = ROUTE_OF[sent.path]
    if route == "completions":
        return ("completion",)
    group, name, no = {
        "chat": (None, "reasoning_effort", "none"),
        "responses": ("reasoning", "effort", "none"),
        "messages": ("thinking", "type", "disabled"),
    }[route]
    effort = ((body.get(group) or {}) if group else body).get(name)
    thinks = (body.get("chat_template_kwargs") or {}).get("enable_thinking") is not False and effort != no
    found: tuple[RequestKind, ...] = ("chat", "tools") if body.get("tools") else ("chat",)
    return (*found, "reasoning") if thinks else found


def limit(sent: Sent) -> int:
    return int(sent.body()[LIMITS[ROUTE_OF[sent.path]]])


def prompt_tokens(fuzzed: Fuzzed, came: Came) -> list[int]:
    """What the engine reads, by the gateway's own routes."""
    body, served, key = came.sent.body(), fuzzed.served, fuzzed.keys[came.key]
    if came.sent.path == PATHS["completions"]:
        prompt = body["prompt"]
    else:
        responses = came.sent.path == PATHS["responses"]
        said = [{"role": "user", "content": body["input"]}] if responses else body["messages"]
        prompt = served.post("/apply-template", {"messages": said}, key).json()["prompt"]
    response = served.post("/tokenize", {"content": prompt, "add_special": True}, key)
    assert response.status_code == 200, (prompt, response.text)
    found: list[int] = response.json()["tokens"]
    return found


def text_of(llm: Any, tokens: Sequence[int]) -> str:
    return str(llm.detokenize(tokens).decode())


def fixed(fuzzed: Fuzzed) -> str:
    found = fuzzed.served.post(PATHS["chat"], FIXED, fuzzed.keys["weak"])
    return str(found.json()["choices"][0]["message"])


def measured(fuzzed: Fuzzed) -> str:
    return fuzzed.served.get("/metrics", fuzzed.keys["operator"]).text


def idle(fuzzed: Fuzzed) -> bool:
    """Whether no request is worked on, nor waits."""
    text = measured(fuzzed)
    return all(f"llamacpp:requests_{name} 0.0" in text for name in ("processing", "deferred"))


def _greedy(fuzzed: Fuzzed, route: Any, key: str, **fields: Any) -> str:
    body = {**minimal(route, "Hi there", 6), "temperature": 0, **fields}
    found = fuzzed.served.post(PATHS[route], body, key)
    assert found.status_code == 200, found.text
    return Came(Sent(PATHS[route], b"", ""), "", 200, content=found.content).text
