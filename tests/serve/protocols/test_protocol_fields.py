"""The table of fields against llama-server's source, against the models, and as a check."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from adlocal.serve.events import Failed
from adlocal.serve.protocols import PROTOCOLS, as_markdown, check
from adlocal.serve.protocols.fields import FIELDS, ROUTES, Route
from support.paths import ROOT

SOURCE = ROOT / "build/engines/llama_cpp_python-0.3.36/vendor/llama.cpp/tools/server"
NO_SOURCE = pytest.mark.skipif(not SOURCE.is_dir(), reason="llama-server's source was not unpacked")

#: What the source reads from bodies of other routes, or documents of its own answers.
ELSEWHERE = {
    *("action", "add_special", "documents", "embd_normalize", "encoding_format", "id", "language", "parse_special"),
    *("query", "texts", "tokens", "top_n", "with_pieces"),
    *("completion_probabilities", "generation_settings", "stop_type", "stopping_word", "timings", "tokens_cached"),
    *("tokens_evaluated", "truncated"),
}


def names_in_source() -> set[str]:
    """Every field that llama-server reads from a body, by its source and its documentation."""
    names: set[str] = set()
    schema = (SOURCE / "server-schema.cpp").read_text()
    names |= set(re.findall(r"new field_\w+\(\"([\w.]+)\"", schema))
    names |= set(re.findall(r"add_alias\(\"([\w.]+)\"\)", schema))
    names |= set(re.findall(r"json_value\(data, \"(\w+)\"", schema))
    for file in ("server-common.cpp", "server-chat.cpp", "server-context.cpp", "server-task.cpp"):
        names |= set(read_from_bodies((SOURCE / file).read_text()))
    return names | set(documented((SOURCE / "README.md").read_text()))


def read_from_bodies(source: str) -> Iterator[str]:
    variables = "body|response_body|chatcmpl_body|data|oai_body|llama_params|inp_body"
    yield from re.findall(rf"json_value\((?:{variables}), \"(\w+)\"", source)
    yield from re.findall(rf"\b(?:{variables})\.(?:contains|at)\(\"(\w+)\"\)", source)
    yield from re.findall(r"llama_params\[\"(\w+)\"\]", source)
    for listed in re.findall(r"for \(const auto & key : \{([^}]*)\}", source):
        yield from re.findall(r"\"(\w+)\"", listed)
    for listed in re.findall(r"unsupported_params \{([^}]*)\}", source):
        yield from re.findall(r"\"(\w+)\"", listed)


def documented(readme: str) -> Iterator[str]:
    """Options of the routes that answer with text."""
    sections = re.split(r"^### ", readme, flags=re.MULTILINE)
    for section in sections:
        if re.match(
            r"POST `/(completion|v1/completions|v1/chat/completions|v1/responses|v1/messages|infill)`", section
        ):
            yield from re.findall(r"^(?:- )?`(\w+)` ?:", section, flags=re.MULTILINE)


@NO_SOURCE
def test_every_field_of_the_source_is_in_the_table() -> None:
    known = {part for field in FIELDS for part in (field.name, *field.name.split("."))}
    found = {name for name in names_in_source() if f"{name.partition('.')[0]}.*" not in known}
    assert len(found) > 100
    assert sorted(found - known - ELSEWHERE) == []
    assert sorted(ELSEWHERE - found) == []


@pytest.mark.parametrize("route", ROUTES)
def test_the_models_and_the_table_agree(route: Route) -> None:
    table = {field.name: field.fate for field in FIELDS if route in field.routes and "." not in field.name}
    model = {each.alias or name for name, each in PROTOCOLS[route].request.model_fields.items()}
    used = {name for name, fate in table.items() if fate in ("obeyed", "policy")}
    assert used == model


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_knows_every_field(route: Route) -> None:
    known = {field.name for field in FIELDS if route in field.routes}
    assert sorted({field.name for field in FIELDS if "." not in field.name} - known) == []


@pytest.mark.parametrize("route", ROUTES)
def test_no_field_has_two_fates(route: Route) -> None:
    names = [field.name for field in FIELDS if route in field.routes]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("field", [field for field in FIELDS if field.fate == "refused"], ids=lambda field: field.name)
def test_what_is_refused_is_refused_everywhere(field: Any) -> None:
    group, _, inner = field.name.partition(".")
    for route in field.routes:
        name = f"{group}.{inner.replace('*', 'anything')}" if inner else group
        nested = {group: {inner.replace("*", "anything"): "x"}} if inner else {group: "x"}
        for body in (nested, {name: "x"}):
            with pytest.raises(Failed) as refused:
                check(body, route)
            assert (refused.value.status, refused.value.type) == (400, "invalid_request_error")
            assert refused.value.param is not None
            assert refused.value.param in refused.value.message
        for harmless in (None, *field.harmless):
            check({group: harmless}, route)


def test_harmless_is_meant_by_type() -> None:
    for body in ({"mirostat": False}, {"mirostat": 2}, {"lora": [{"id": 0}]}, {"id_slot": 0}, {"ignore_eos": True}):
        with pytest.raises(Failed):
            check(body, "chat")


@pytest.mark.parametrize("route", ROUTES)
def test_unknown_fields_are_ignored_or_refused(route: Route) -> None:
    check({"nobody_knows": 1}, route)
    with pytest.raises(Failed) as refused:
        check({"nobody_knows": 1}, route, unknown="refuse")
    assert refused.value.param == "nobody_knows"
    check({"model": "m", "stream": True}, route, unknown="refuse")


def test_parts_that_the_table_does_not_list_are_the_models_business() -> None:
    check({"response_format": {"type": "text"}, "logit_bias": {"1": 2}}, "chat", unknown="refuse")
    with pytest.raises(Failed) as refused:
        check({"stream_options": {"other": 1}}, "chat", unknown="refuse")
    assert refused.value.param == "stream_options.other"


def test_the_table_as_markdown() -> None:
    lines = as_markdown().splitlines()
    assert len(lines) == len(FIELDS) + 2
    assert all(line.count(" | ") == 3 for line in lines if not line.startswith("|---"))
    assert "| `id_slot` | all | 400 | slots are the gateway's: another tenant's may be in it (except `-1`) |" in lines
