"""Conversations as clients keep them, made such that every chat template can render them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from . import limits
from .common import Body, bad
from .schemas import check_schema
from .sse import dumps

Message = dict[str, Any]


class TextPart(Body):
    """A part of a message, by any of the names that clients have for text."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Refusal(Body):
    """What OpenAI's models say instead of an answer."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | Refusal, Field(discriminator="type")]
Content = str | Annotated[list[Part], Field(max_length=limits.PARTS_MAX)]


class Function(Body):
    """A function that the model may call."""

    name: limits.ToolName
    description: limits.Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def text_parts(content: str | Sequence[TextPart | Refusal]) -> str | list[dict[str, str]]:
    """Content as OpenAI writes it for models that read."""
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.refusal if isinstance(part, Refusal) else part.text} for part in content]


def function_tool(function: Function, param: str) -> Message:
    """OpenAI's form of a tool.

    Raises:
        Failed: 400, its parameters are no schema that can be used.
    """
    parameters = function.parameters or {"type": "object", "properties": {}}
    check_schema(parameters, param)
    described: Message = {"name": function.name, "parameters": parameters}
    if function.description is not None:
        described["description"] = function.description
    return {"type": "function", "function": described}


def tool_call(name: str, arguments: Any, identity: str | None) -> Message:
    """OpenAI's form of a call that the model has made. Its arguments are an object, which templates iterate over."""
    return {
        "id": identity or "",
        "type": "function",
        "function": {"name": name, "arguments": dumps(_as_object(arguments))},
    }


def _as_object(arguments: Any) -> Any:
    """Arguments that are no object, because they were cut off or made up, as an object that holds them."""
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments, parse_constant=str) if arguments.strip() else {}
            dumps(value).encode("utf-8")
        except (ValueError, RecursionError):
            value = arguments
    return value if isinstance(value, Mapping) else {} if value is None else {"raw": value}


def complete(messages: Sequence[Message]) -> list[Message]:
    """The messages with the numbers of calls that clients left out: answers come in the order of calls."""
    completed, open_calls, n_calls = [], list[str](), 0
    for message in messages:
        message = dict(message)
        calls = message.get("tool_calls", ())
        for call in calls:
            call["id"] = call["id"] or f"call_{n_calls}"
            n_calls += 1
        if calls:
            open_calls = [call["id"] for call in calls]
        if message["role"] == "tool":
            identity = message.get("tool_call_id") or (open_calls[0] if open_calls else "call_0")
            message["tool_call_id"] = identity
            if identity in open_calls:
                open_calls.remove(identity)
        completed.append(message)
    return completed


def prefilled(messages: Sequence[Message], param: str = "messages") -> bool:
    """Whether the last message is an answer that the client began.

    Raises:
        Failed: 400, it is one that cannot be continued.
    """
    if not messages or messages[-1]["role"] != "assistant":
        return False
    if messages[-1].get("tool_calls"):
        raise bad(param, "the last message calls tools: send their answers after it")
    if len(messages) > 1 and messages[-2]["role"] == "assistant":
        raise bad(param, "the last two messages are the assistant's: join them, or send the user's after them")
    return True


def check_choice(choice: Any, tools: Sequence[Message]) -> None:
    """Refuses a choice of tools that there are not.

    Args:
        choice: OpenAI's form.

    Raises:
        Failed: 400.
    """
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise bad("tools", "two tools have the same name")
    if choice == "required" and not tools:
        raise bad("tool_choice", "required: there are no tools to choose from")
    if isinstance(choice, Mapping) and choice["function"]["name"] not in names:
        raise bad("tool_choice", f"{choice['function']['name']}: no tool has this name")
