"""Which JSON schemas and grammars are let through to the engine."""

from __future__ import annotations

import time
from typing import Any

import pytest

from adlocal.serve.events import Failed
from adlocal.serve.protocols import limits
from adlocal.serve.protocols.schemas import check_grammar, check_schema


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


GOOD: list[dict[str, Any]] = [
    {},
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 10}}, "required": ["a"]},
    {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
    {"anyOf": [{"const": 1}, {"enum": ["a", None]}]},
    {"type": "string", "pattern": "^(?:ab){1,20}$"},
    {"type": "integer", "minimum": 0, "exclusiveMaximum": 10},
    {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": limits.REPEATS_MAX},
    {"type": "object", "additionalProperties": False, "title": "t", "x-order": 1},
    {"properties": {"not": {"type": "string"}, "pattern": {"type": "string"}}},
    nested(limits.SCHEMA_DEPTH_MAX),
]

#: Of answers and of tools: what brings llama.cpp down, or keeps it busy.
HOSTILE: list[tuple[dict[str, Any], str]] = [
    (nested(limits.SCHEMA_DEPTH_MAX + 1), "levels deep"),
    ({"allOf": [{"$ref": "#"}]}, "defined by itself"),
    ({"$ref": "#"}, "defined by itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "defined by itself"),
    ({"$ref": "#/$defs/none"}, "nothing of this name"),
    ({"$ref": "https://example.org/schema"}, "within the schema"),
    ({"$ref": 1}, "within the schema"),
    ({"type": "array", "maxItems": limits.REPEATS_MAX + 1}, "from 0 to"),
    ({"type": "array", "minItems": -1}, "from 0 to"),
    ({"type": "string", "maxLength": 1e9}, "from 0 to"),
    ({"type": "string", "pattern": "^a{1,99999}$"}, "repetitions"),
    ({"type": "string", "pattern": "^" + "a" * limits.PATTERN_LENGTH_MAX + "$"}, "characters"),
    ({"type": "string", "pattern": 3}, "characters"),
    ({"properties": {str(i): {} for i in range(limits.SCHEMA_PROPERTIES_MAX + 1)}}, "properties"),
    ({"properties": {str(i): {"maxItems": 2000} for i in range(11)}}, "add up"),
    ({"description": "x" * limits.SCHEMA_BYTES_MAX}, "bytes"),
    ({"enum": list(range(limits.ENUM_MAX + 1))}, "values"),
    ({"enum": []}, "values"),
    ({"properties": []}, "object of JSON schemas"),
    ({"properties": 3}, "object of JSON schemas"),
    ({"$ref": "#/const", "const": {"$ref": 3, "anyOf": 3}}, "within the schema"),
    ({"anyOf": {}}, "list of JSON schemas"),
    ({"items": 3}, "which is an object"),
    ({"required": "a"}, "list of names"),
    ({"type": "integer", "minimum": "x"}, "number"),
    ({"type": "integer", "maximum": 1e300}, "number"),
]

#: Of answers: what would be promised and not kept.
NOT_KEPT: list[dict[str, Any]] = [
    {"not": {"type": "string"}},
    {"type": "object", "patternProperties": {"^a": {}}},
    {"type": "array", "uniqueItems": True},
    {"type": "number", "minimum": 1},
    {"type": "number", "multipleOf": 2},
    {"type": "string", "pattern": "^(?=a)b$"},
    {"type": "string", "pattern": "^(a)\\1$"},
    {"if": {}, "then": {}},
    {"properties": {"deep": {"items": {"contains": {}}}}},
]


@pytest.mark.parametrize("schema", GOOD)
def test_usable_schemas(schema: dict[str, Any]) -> None:
    check_schema(schema, "schema", enforced=True)


@pytest.mark.parametrize(("schema", "words"), HOSTILE)
@pytest.mark.parametrize("enforced", [True, False])
def test_hostile_schemas_are_refused_at_once(schema: dict[str, Any], words: str, enforced: bool) -> None:
    begun = time.process_time()
    with pytest.raises(Failed) as found:
        check_schema(schema, "schema", enforced)
    assert words in found.value.message
    assert found.value.param is not None
    assert found.value.param.startswith("schema")
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("schema", NOT_KEPT)
def test_answers_are_promised_no_more_than_is_kept(schema: dict[str, Any]) -> None:
    with pytest.raises(Failed):
        check_schema(schema, "schema", enforced=True)
    check_schema(schema, "schema")


def test_circles_are_found_without_following_every_path() -> None:
    """Each level refers to the next one twice: 2^30 paths."""
    defs: dict[str, Any] = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(30)
    }
    begun = time.process_time()
    check_schema({"$defs": defs | {"d30": {"type": "null"}}, "$ref": "#/$defs/d0"}, "schema", enforced=True)
    assert time.process_time() - begun < 1


def test_a_long_chain_of_references() -> None:
    """As long as fits into the allowed bytes, which is more than Python's stack holds."""
    defs: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1500)}
    schema = {"$defs": defs | {"d1500": {"type": "null"}}, "$ref": "#/$defs/d0"}
    with pytest.raises(Failed):
        check_schema(schema, "schema")


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("%llguidance {}\nstart: /a/", "GBNF"),
        ("root ::= " + "(" * 65 + '"a"' + ")" * 65, "levels"),
        ('root ::= "a"{1,99999}', "repetitions"),
        ('root ::= "' + "a" * limits.GRAMMAR_BYTES_MAX + '"', "bytes"),
        ("root ::= \0", "GBNF"),
    ],
)
def test_hostile_grammars(grammar: str, words: str) -> None:
    with pytest.raises(Failed) as found:
        check_grammar(grammar)
    assert words in found.value.message
    assert found.value.param == "grammar"


def test_a_grammar() -> None:
    check_grammar('root ::= ("a" | "b"){1,20} [0-9]*')
