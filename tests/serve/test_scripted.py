"""Whatever the engine says and however it ends: of hidden reasoning nothing goes out, and the rest is what it said.

The engine is a scripted one, which thinks in letters that stand nowhere else. Everything that the gateway sends, logs
and counts is searched for them.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adlocal.serve import logs
from adlocal.serve.app import make_app
from adlocal.serve.config import Config
from adlocal.serve.gateway import Gateway
from adlocal.serve.policy import Policy
from adlocal.serve.protocols import PATHS
from adlocal.serve.protocols.fields import ROUTES
from support.recorded import Recorded, post
from support.scripted_cases import CLOSE, OPEN, TAGS, Case, body_of, prompt, seen
from support.scripted_engine import BROKEN, End, Part, Script, ScriptedEngine, scripted
from support.scripted_oracle import Expected, expected

NONCE = "QXZJKVW"
SECRET = re.compile(rb"[QXZJKVW]{4}")
#: Stops that hidden text holds as well, or its tags do.
STOPS = ["end", "</think>", "<think>", "QX", "a b", "\n\n", "s of"]


class Served:
    """A gateway in this process, before a scripted engine."""

    def __init__(self, gateway: Gateway, runner: asyncio.Runner, log: io.StringIO) -> None:
        self.gateway, self.runner, self.log = gateway, runner, log
        self.app = make_app(gateway)
        engine: Any = gateway.engine
        self.engine: ScriptedEngine = engine

    def ask(self, case: Case, stream: bool, leave_after: int | None = None) -> Recorded:
        """Everything that goes out for it."""
        rule = {"disclosure": case.disclosure, "raw": True, "logprobs": True}
        policy = Policy.model_validate({"default": rule})
        self.gateway.config = self.gateway.config.model_copy(update={"policy": policy})
        tags = TAGS[case.tags]
        self.gateway.model = replace(self.gateway.model, tags=tags, control=frozenset({OPEN, CLOSE}))
        self.engine.tags, self.engine.scripts, self.engine.said = tags, case.scripts, {}
        self.engine.template = lambda body: prompt(case)
        self.log.seek(0)
        self.log.truncate()
        body = body_of(case, stream)
        return self.runner.run(post(self.app, PATHS[case.route], body, leave_after=leave_after))

    @contextmanager
    def limits(self, **limits: float) -> Iterator[None]:
        """Others are in force meanwhile."""
        before = self.gateway.config
        self.gateway.config = before.model_copy(update={"limits": before.limits.model_copy(update=limits)})
        try:
            yield
        finally:
            self.gateway.config = before

    def traces(self, recorded: Recorded) -> bytes:
        """What was sent, logged and counted."""
        return recorded.all + self.log.getvalue().encode() + self.gateway.measured()


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = str(tmp_path_factory.mktemp("state"))
    config = Config(model=tiny_llama, bundle=tiny_bundle, state=state)
    log = io.StringIO()
    logs.set_up("json", verbose=False)
    logger = logging.getLogger("adlocal.serve")
    handler: Any = logger.handlers[0]
    handler.setStream(log)
    with scripted(), asyncio.Runner() as runner:
        gateway = Gateway(config)
        runner.run(gateway.__aenter__())
        yield Served(gateway, runner, log)
        runner.run(gateway.__aexit__())
    logger.handlers, logger.propagate = [], True


# What the engine says

words = st.sampled_from(["a b", " and", "end", "\n", "\n\n", "Yes.", "é", "🙂", "s of", "</", "<thi", "`", " <", "nk>"])
visible = st.lists(words, max_size=4).map("".join)
nonces = st.text(NONCE, min_size=8, max_size=20)
closed_forms = st.sampled_from(
    ["{n}</think>", "<think>{n}</think>", "{v} <think>\n{n}\n</think>\n\n", "<think>{n}<think>{n}</think>", "</think>"]
)
open_forms = st.sampled_from(["", "<think>{n}", "\n<think>{n}<think>{n}", "<think>{n}</thin"])


def said_tokens(draw: st.DrawFn, form: str, whole: bool) -> list[str]:
    """A form's tokens: its tags are whole ones, or cut as anything is."""
    text = re.sub(r"\{(n|v)\}", lambda found: draw(nonces if found[1] == "n" else visible), form)
    tokens = []
    for piece in re.split(f"({OPEN}|{CLOSE})", text) if whole else [text]:
        while piece:
            tag = whole and piece in (OPEN, CLOSE)
            size = len(piece) if tag else draw(st.integers(1, 6))
            tokens.append(piece[:size])
            piece = piece[size:]
    return tokens


def forms_of(draw: st.DrawFn, bans: bool, opens: bool) -> list[tuple[str, bool]]:
    """What the answer consists of, and whether tags in it are tokens.

    Nothing hidden follows a close that is a token where that forbids the tags: it would be the answer.
    """
    spelled = [(form, False) for form in draw(st.lists(closed_forms, max_size=2))]
    whole = [(form, True) for form in draw(st.lists(closed_forms, max_size=1 if bans else 2))]
    last = "" if bans and whole else draw(open_forms)
    shown = "{v}" if spelled or whole or not opens else "{n}"
    return [*spelled, *whole, (shown, False), (last, draw(st.booleans()))]


@st.composite
def script_of(draw: st.DrawFn, case: dict[str, Any], end: st.SearchStrategy[End]) -> Script:
    """An answer that hides its nonces, if anything does."""
    bans = case["disclosure"] != "show" and case["tags"] == "single tokens"
    tokens = [token for form in forms_of(draw, bans, case["opens"]) for token in said_tokens(draw, *form)]
    alone = draw(st.booleans())
    parts = []
    while tokens:
        size = 1 if alone else draw(st.integers(1, 3))
        parts.append(Part(tuple(tokens[:size])))
        tokens = tokens[size:]
    if case["calls"]:
        parts = [*with_calls(draw, parts, bans, case["opens"])]
    if case["disclosure"] != "show" and draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), Part((), reasoning=draw(nonces)))
    return Script(parts, draw(end), draw(st.lists(st.integers(1, 400), min_size=1, max_size=5)))


def with_calls(draw: st.DrawFn, parts: Sequence[Part], bans: bool, opens: bool) -> Iterator[Part]:
    """The engine has parsed a call out of the text, perhaps out of the reasoning: then it holds a nonce."""
    at = draw(st.integers(0, len(parts)))
    tokens = [token for part in parts for token in part.tokens]
    n = sum(len(part.tokens) for part in parts[:at])
    before, after = OPEN * opens + "".join(tokens[:n]), "".join(tokens[n:])
    told = bans and CLOSE in tokens[:n]  # what comes now is the answer
    hidden = not told and (CLOSE in after or before.rfind(OPEN) > before.rfind(CLOSE))
    value = draw(nonces) if hidden else draw(st.sampled_from(["x", "and"]))
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"q":"'}}
    rest = {"index": 0, "function": {"arguments": f'{value}"}}'}}
    yield from parts[:at]
    yield Part((), (call, rest))
    yield from parts[at:]


@st.composite
def cases(draw: st.DrawFn, disclosures: Sequence[str], ends: st.SearchStrategy[End], tags: Sequence[str]) -> Case:
    """A request and its answers."""
    route = draw(st.sampled_from(ROUTES))
    calls = route != "completions" and draw(st.booleans())
    found: dict[str, Any] = {
        "route": route,
        "disclosure": draw(st.sampled_from(disclosures)),
        "tags": draw(st.sampled_from(tags)),
        "opens": draw(st.booleans()),
        "thinks": draw(st.sampled_from([None, True, False])),
        "stop": draw(st.lists(st.sampled_from(STOPS), max_size=2)) if route != "responses" and not calls else [],
        "logprobs": not calls and draw(st.booleans()),
        "calls": calls,
    }
    n = draw(st.integers(1, 3)) if route in ("chat", "completions") else 1
    return Case([draw(script_of(found, ends)) for _ in range(n)], **found)


HIDING = ["answer-only", "summary"]
WHOLE: st.SearchStrategy[End] = st.sampled_from(["stop", "length", "tool_calls"])
ANY_END: st.SearchStrategy[End] = st.sampled_from(["stop", "length", "tool_calls", *BROKEN])
MANY = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def hides(case: Case) -> bool:
    """Whether the nonces of its scripts are hidden: not where the model was told not to think, and tags are banned."""
    unthinking = case.thinks is False and case.tags == "single tokens" and case.route != "completions"
    return TAGS[case.tags] is not None and not (unthinking and not case.opens)


@MANY
@given(cases(HIDING, ANY_END, ["single tokens", "several tokens"]).filter(hides), st.booleans(), st.data())
def test_nothing_hidden_goes_out(served: Served, case: Case, stream: bool, data: st.DataObject) -> None:
    """No four letters of a nonce in any byte, header, line of the log or number, however the answer ends."""
    leave_after = data.draw(st.none() | st.integers(0, 12))
    found = served.ask(case, stream, leave_after)
    assert not SECRET.search(served.traces(found))
    if leave_after is None and not case.stop and any(script.end in BROKEN for script in case.scripts):
        assert b"error" in found.body
        assert b"[DONE]" not in found.body


@MANY
@given(cases(["show", *HIDING], WHOLE, [*TAGS]))
def test_what_is_shown(served: Served, case: Case) -> None:
    """The answer is what a plain reading of the whole text says, streamed or not, in every protocol."""
    found = [(stream, served.ask(case, stream)) for stream in (False, True)]
    for stream, recorded in found:
        assert recorded.status == 200, recorded.body
        answers, usage = seen(case, recorded, stream)
        wanted = [expected(case, number, served.engine.said[number]) for number in range(len(case.scripts))]
        for answer, want in zip(answers, wanted, strict=True):
            assert answer.text == want.text
            if case.disclosure != "summary" and case.route != "completions":
                assert answer.reasoning == want.reasoning
            assert answer.arguments.replace('": "', '":"') == want.arguments
            assert answer.reason == reason_of(case.route, want, bool(answer.arguments))
        if case.disclosure == "answer-only" and not any(want.stopped for want in wanted):
            assert usage == sum(want.n_shown for want in wanted)
    (_, whole), (_, parts) = found
    assert [each.tokens for each in seen(case, whole, False)[0]] == [each.tokens for each in seen(case, parts, True)[0]]


def reason_of(route: str, want: Expected, called: bool) -> str:
    """A reason in a protocol's words."""
    if route == "messages":
        if want.reason == "length":
            return "max_tokens"
        return "tool_use" if called else "stop_sequence" if want.stopped else "end_turn"
    if route in ("completions", "responses"):
        return "length" if want.reason == "length" else "stop"
    return want.reason


# Single traps


def case_of(script: Script, **fields: Any) -> Case:
    """A chat's request, whose model opens its block itself and closes it."""
    plain: dict[str, Any] = {"route": "chat", "disclosure": "answer-only", "tags": "single tokens", "opens": False}
    rest: dict[str, Any] = {"thinks": None, "stop": [], "logprobs": False, "calls": False}
    return Case([script], **{**plain, **rest, **fields})


THOUGHT = Script([Part((token,)) for token in (OPEN, "QXZJ", "KVWQ", CLOSE, "Yes", " and", " no")])


def test_the_engine_is_told_of_no_stop(served: Served) -> None:
    """In hidden text a client's stop counts for nothing, so that the engine must not end there."""
    found = served.ask(case_of(THOUGHT, stop=["QX", CLOSE, "and"]), stream=False)
    assert found.json["choices"][0]["message"]["content"] == "Yes "
    path, body = served.engine.bodies[-1]
    assert path == "/v1/chat/completions"
    assert "stop" not in body
    assert body["reasoning_format"] == "none"


def test_a_form_is_not_asked_for_where_the_model_thinks_first(served: Served) -> None:
    """The engine's grammar holds from the first token on: what it lets through in an open block is no reasoning."""
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string"}}}}
    said = Script([Part(('"QXZJ"',))])
    for fields, status in (({"opens": True, "thinks": True}, 400), ({"opens": False}, 200)):
        case = case_of(said, **fields)
        served.ask(case, stream=False)
        found = served.runner.run(post(served.app, PATHS["chat"], {**body_of(case, False), **form}))
        assert found.status == status, found.body
    assert served.engine.bodies[-1][1]["chat_template_kwargs"] == {"enable_thinking": False}
    case = case_of(said, disclosure="show", opens=True, thinks=True)
    served.ask(case, stream=False)
    found = served.runner.run(post(served.app, PATHS["chat"], {**body_of(case, False), **form}))
    message = found.json["choices"][0]["message"]
    assert message["content"] == '"QXZJ"'
    assert "reasoning_content" not in message


def test_a_silent_stream_is_kept_open(served: Served) -> None:
    """With comments, as often as the operator says, and from before the first token."""
    with served.limits(ping_seconds=0.05):
        found = served.ask(case_of(replace(THOUGHT, seconds=0.4)), stream=True)
    assert found.body.count(b": ping\n\n") >= 3
    assert found.sent[1].startswith(b": ping") or b'"role"' in found.sent[0]
    assert found.body.endswith(b"data: [DONE]\n\n")


def test_an_answer_that_takes_too_long_ends_with_an_error(served: Served) -> None:
    with served.limits(total_seconds=0.2):
        found = served.ask(case_of(replace(THOUGHT, seconds=5)), stream=False)
    assert (found.status, found.json["error"]["type"]) == (504, "timeout_error")


def test_a_body_that_is_too_large_is_not_read(served: Served) -> None:
    found = served.runner.run(post(served.app, PATHS["chat"], b'{"x": "' + b"x" * 2**22))
    assert (found.status, found.json["error"]["type"]) == (413, "request_too_large")


def test_a_body_that_does_not_come_is_given_up(served: Served) -> None:
    with served.limits(body_seconds=0.1):
        found = served.runner.run(post(served.app, PATHS["chat"], None))
    assert (found.status, found.json["error"]["type"]) == (408, "timeout_error")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("end", BROKEN)
def test_an_engine_that_ends_in_the_middle_makes_up_no_end(served: Served, route: str, end: End) -> None:
    """After three chunks, in each protocol's own form."""
    script = Script([Part((token,)) for token in ("a b", " and", "end")], end)
    found = served.ask(case_of(script, route=route, disclosure="show"), stream=True)
    kinds = {"chat": "error", "completions": "error", "messages": "error", "responses": "response"}
    last = found.events[-1]
    assert kinds[route] in last
    for made_up in (b"[DONE]", b"message_stop", b"response.completed", b'"finish_reason":"'):
        assert made_up not in found.body
