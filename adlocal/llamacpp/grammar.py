"""Grammars that constrain sampling: made from JSON schemas, and tried before they are used.

llama-cpp-python hands a grammar that llama.cpp cannot parse to the sampler all the same, and the process crashes.
"""

from __future__ import annotations

import json
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from ..errors import InputError
from .log import captured_log, last_line

_FORMATS = ("text", "json_object", "json_schema")


def grammar_of(response_format: Any) -> LlamaGrammar | None:
    """The grammar that a `response_format` with a schema asks for; None where it has none.

    Args:
        response_format: {"type": "json_schema", "json_schema": {"schema": S}}, which is OpenAI's; or
            {"type": "json_object", "schema": S}, which is llama-cpp-python's.

    Raises:
        InputError: the type is unknown, or llama.cpp has no grammar for the schema.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, dict) or response_format.get("type") not in _FORMATS:
        raise InputError(f"response_format={response_format!r}: give a type, one of {', '.join(_FORMATS)}")
    if response_format["type"] == "json_schema":
        envelope = response_format.get("json_schema")
        schema = envelope.get("schema") if isinstance(envelope, dict) else None
        if schema is None:
            raise InputError(
                f'response_format={response_format!r}: a json_schema needs its schema; give {{"type": "json_schema", '
                '"json_schema": {"schema": ...}}'
            )
        return _from_schema(schema, "response_format")
    return _from_schema(response_format["schema"], "response_format") if "schema" in response_format else None


def check_tool(tools: Any, tool_choice: Any) -> None:
    """Tries the schema of a tool that has to be called, where llama-cpp-python falls back on any JSON.

    Args:
        tools: OpenAI's list of tools, or of functions.
        tool_choice: {"type": "function", "function": {"name": NAME}}, or {"name": NAME}; anything else forces no call.

    Raises:
        InputError: llama.cpp has no grammar for its parameters.
    """
    if not isinstance(tool_choice, dict):
        return
    name = (tool_choice.get("function") or tool_choice).get("name")
    functions = [tool.get("function", tool) for tool in tools or ()]
    for function in functions:
        if function.get("name") == name:
            _from_schema(function.get("parameters"), f"tool {name}")


def _from_schema(schema: Any, of: str) -> LlamaGrammar:
    if not isinstance(schema, dict):
        raise InputError(f"the schema {str(schema)[:80]!r} of {of} is no JSON schema; give an object")
    try:
        return LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)
    except Exception as error:  # the translator raises whatever it stumbles over
        raise InputError(
            f"the schema of {of} cannot be made a grammar ({type(error).__name__}: {error}); simplify it"
        ) from None


def check_grammar(vocab: Any, grammar: LlamaGrammar) -> None:
    """Lets llama.cpp parse a grammar.

    Args:
        vocab: `llama_model_get_vocab` of the model.

    Raises:
        InputError: it cannot; the message has llama.cpp's reason.
    """
    if not isinstance(grammar, LlamaGrammar):
        raise InputError(f"grammar={str(grammar)[:80]!r}: give a LlamaGrammar, LlamaGrammar.from_string(...)")
    text, root = grammar._grammar.encode("utf-8"), grammar._root.encode("utf-8")
    with captured_log() as log:
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, text, root)
    if not sampler:
        raise InputError(f"llama.cpp cannot parse the grammar ({last_line(log)}); mend the grammar, or its schema")
    llama_cpp.llama_sampler_free(sampler)
