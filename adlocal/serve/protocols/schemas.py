"""JSON schemas and grammars of clients: refused here where the engine would crash, hang, or answer in free text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote

from . import limits
from .common import bad
from .sse import dumps

_COUNTS: Final = ("minItems", "maxItems", "minLength", "maxLength")
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_MAPS: Final = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE: Final = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
#: What llama.cpp turns into a grammar. Another assertion would be silently dropped.
_ENFORCED: Final = frozenset(
    (
        *("$ref", "$defs", "definitions", "type", "properties", "required", "additionalProperties", "items"),
        *("pattern", "enum", "const", *_COUNTS, *_BOUNDS, *_LISTS),
    )
)
#: What asserts nothing.
_ANNOTATIONS: Final = frozenset(
    (
        *("title", "description", "default", "example", "examples", "format", "$schema", "$id", "$comment"),
        *("deprecated", "readOnly", "writeOnly", "nullable"),
    )
)
#: Regular expressions that llama.cpp takes for "any string".
_BEYOND_GRAMMARS: Final = re.compile(r"\(\?(?!:)|\\[1-9bBpPkucAZ]")
_REPETITION: Final = re.compile(r"\{\s*(\d+)?\s*(?:,\s*(\d+)?\s*)?\}")

Schema = Mapping[str, Any]


def check_schema(schema: Schema, param: str, enforced: bool = False) -> None:
    """Refuses what would become no grammar, or too big a one.

    Args:
        schema: of the answer, or of a tool's arguments.
        param: the field that holds it.
        enforced: whether the answer is promised to follow it; a keyword that has no effect is refused then.

    Raises:
        Failed: 400.
    """
    _check_size(schema, param)
    repeats = properties = 0
    for path, part in _parts(schema, param, 0):
        held = part.get("properties")
        properties += len(held) if isinstance(held, Mapping) else 0
        repeats += _check_part(part, path, enforced)
    if properties > limits.SCHEMA_PROPERTIES_MAX:
        raise bad(param, f"{properties} properties: at most {limits.SCHEMA_PROPERTIES_MAX} are allowed")
    if repeats > limits.REPEATS_SUM_MAX:
        raise bad(param, f"its repetitions add up to {repeats}: at most {limits.REPEATS_SUM_MAX} are allowed")
    _check_cycles(schema, param)


def check_grammar(grammar: str, param: str = "grammar") -> None:
    """Refuses a GBNF grammar that is too big, nests too deeply, or is of another kind.

    Raises:
        Failed: 400.
    """
    n_bytes = len(grammar.encode())
    if n_bytes > limits.GRAMMAR_BYTES_MAX:
        raise bad(param, f"{n_bytes} bytes: at most {limits.GRAMMAR_BYTES_MAX} are allowed")
    if grammar.lstrip().startswith("%llguidance") or "\0" in grammar:
        raise bad(param, "expected a grammar in GBNF")
    depth = deepest = 0
    for character in grammar:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > limits.GRAMMAR_DEPTH_MAX:
        raise bad(param, f"{deepest} levels of brackets: at most {limits.GRAMMAR_DEPTH_MAX} are allowed")
    _repetitions(grammar, param)


def _check_size(schema: Schema, param: str) -> None:
    try:
        n_bytes = len(dumps(schema))
    except (RecursionError, ValueError):
        raise bad(param, "expected a JSON schema of finite numbers and few levels") from None
    if n_bytes > limits.SCHEMA_BYTES_MAX:
        raise bad(param, f"{n_bytes} bytes of JSON schema: at most {limits.SCHEMA_BYTES_MAX} are allowed")


def _parts(schema: Any, path: str, depth: int) -> Iterator[tuple[str, Schema]]:
    """Every schema within a schema, and where it stands."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise bad(path, f"{_brief(schema)}: expected a JSON schema, which is an object")
    if depth > limits.SCHEMA_DEPTH_MAX:
        raise bad(path, f"more than {limits.SCHEMA_DEPTH_MAX} levels deep")
    yield path, schema
    for name, child in _children(schema, path):
        yield from _parts(child, name, depth + 1)


def _children(schema: Schema, path: str) -> Iterator[tuple[str, Any]]:
    for keyword in _MAPS:
        if keyword in schema:
            held = schema[keyword]
            if not isinstance(held, Mapping):
                raise bad(f"{path}.{keyword}", "expected an object of JSON schemas")
            yield from ((f"{path}.{keyword}.{name}", child) for name, child in held.items())
    for keyword in (*_LISTS, *_SINGLE):
        if keyword not in schema:
            continue
        held = schema[keyword]
        if isinstance(held, list):
            yield from ((f"{path}.{keyword}[{i}]", child) for i, child in enumerate(held))
        elif keyword in _LISTS:
            raise bad(f"{path}.{keyword}", "expected a list of JSON schemas")
        else:
            yield f"{path}.{keyword}", held


def _check_part(part: Schema, path: str, enforced: bool) -> int:
    """Checks one schema without what is in it; returns how much it repeats."""
    if enforced:
        _check_enforced(part, path)
    _check_types(part, path)
    repeats = 0
    for keyword in _COUNTS:
        count = part.get(keyword, 0)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= limits.REPEATS_MAX:
            raise bad(f"{path}.{keyword}", f"{_brief(count)}: expected an integer from 0 to {limits.REPEATS_MAX}")
        repeats += count
    pattern = part.get("pattern", "")
    if not isinstance(pattern, str) or len(pattern) > limits.PATTERN_LENGTH_MAX:
        raise bad(f"{path}.pattern", f"expected a text of at most {limits.PATTERN_LENGTH_MAX} characters")
    if enforced and _BEYOND_GRAMMARS.search(pattern):
        raise bad(f"{path}.pattern", f"{_brief(pattern)}: look-around, references and \\b cannot be enforced")
    return repeats + _repetitions(pattern, f"{path}.pattern")


def _check_enforced(part: Schema, path: str) -> None:
    for keyword in part:
        if keyword not in _ENFORCED and keyword not in _ANNOTATIONS and not keyword.startswith("x-"):
            raise bad(f"{path}.{keyword}", "this keyword cannot be enforced here; leave it out")
    for keyword in _BOUNDS:
        if keyword in part and part.get("type") != "integer":
            raise bad(f"{path}.{keyword}", 'bounds are enforced for "type": "integer" alone; leave it out')


def _check_types(part: Schema, path: str) -> None:
    """Kinds of values that the engine reads without looking."""
    for keyword in _BOUNDS:
        bound = part.get(keyword, 0)
        if not isinstance(bound, int | float) or isinstance(bound, bool) or abs(bound) > 2**53:
            raise bad(f"{path}.{keyword}", f"{_brief(bound)}: expected a number of at most 2^53")
    enum = part.get("enum", [None])
    if not isinstance(enum, list) or not 0 < len(enum) <= limits.ENUM_MAX:
        raise bad(f"{path}.enum", f"expected a list of 1 to {limits.ENUM_MAX} values")
    required = part.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise bad(f"{path}.required", "expected a list of names")


def _repetitions(text: str, path: str) -> int:
    total = 0
    for found in _REPETITION.finditer(text):
        for digits in filter(None, found.groups()):
            if len(digits) > 9 or int(digits) > limits.REPEATS_MAX:
                raise bad(path, f"{found.group()[:40]}: at most {limits.REPEATS_MAX} repetitions are allowed")
            total += int(digits)
    return total


def _check_cycles(schema: Schema, param: str) -> None:
    """Follows what stands for a schema itself (`$ref`, `allOf`, ...): llama.cpp would follow a circle for ever."""
    done: set[int] = set()
    for path, part in _parts(schema, param, 0):
        _follow(schema, part, path, done, set())


def _follow(root: Schema, part: Any, path: str, done: set[int], above: set[int]) -> None:
    if not isinstance(part, Mapping) or id(part) in done:
        return
    if id(part) in above:
        raise bad(path, "this schema is defined by itself")
    if len(above) >= limits.REFERENCES_MAX:
        raise bad(path, f"more than {limits.REFERENCES_MAX} references lead from one to the next")
    above.add(id(part))
    if "$ref" in part:
        _follow(root, _resolve(root, part["$ref"], f"{path}.$ref"), path, done, above)
    for keyword in ("allOf", "anyOf", "oneOf"):
        alternatives = part.get(keyword)  # of what a reference leads to, which may be no schema
        for child in alternatives if isinstance(alternatives, list) else ():
            _follow(root, child, path, done, above)
    above.discard(id(part))
    done.add(id(part))


def _resolve(root: Schema, reference: Any, path: str) -> Any:
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise bad(path, f"{_brief(reference)}: expected a reference within the schema, such as #/$defs/name")
    found: Any = root
    for step in reference.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isascii() and name.isdigit() and int(name[:9]) < len(found):
            found = found[int(name[:9])]
        elif isinstance(found, Mapping) and name in found:
            found = found[name]
        else:
            raise bad(path, f"{_brief(reference)}: the schema has nothing of this name")
    return found


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
