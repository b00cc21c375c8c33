"""Anthropic's messages: what clients send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..asked import Asked
from . import limits
from .chat import TemplateArguments, reasoning_of
from .common import Body, bad, read
from .fields import Unknown
from .history import Function, Message, check_choice, complete, function_tool, prefilled, tool_call
from .samplers import max_tokens, sampling


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    """Reasoning of an earlier turn, which is not read again."""

    type: Literal["thinking", "redacted_thinking"]


class ToolUseBlock(Body):
    """A call that the model has made."""

    type: Literal["tool_use"]
    id: limits.Name | None = None
    name: limits.ToolName
    input: dict[str, Any] | str | None = None


class ToolResultBlock(Body):
    """What a tool has answered."""

    type: Literal["tool_result"]
    tool_use_id: limits.Name | None = None
    content: str | Annotated[list[TextBlock], Field(max_length=limits.PARTS_MAX)] | None = None
    is_error: bool | None = None


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class AnthropicMessage(Body):
    """What the user or the model has said."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(max_length=limits.PARTS_MAX)]


class AnthropicTool(Body):
    """A tool."""

    type: Literal["custom"] | None = None
    name: limits.ToolName
    description: limits.Description | None = None
    input_schema: dict[str, Any]


class AnyChoice(Body):
    """Which tools may be, or have to be, called."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Body):
    """The tool that has to be called."""

    type: Literal["tool"]
    name: limits.ToolName
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model is to think first."""

    type: Literal["enabled", "disabled", "adaptive"]


class Metadata(Body):
    """Who the end user is."""

    user_id: limits.Name | None = None


class CountRequest(Body):
    """The body of POST /v1/messages/count_tokens."""

    model: limits.Name | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=limits.MESSAGES_MAX)]
    system: str | Annotated[list[TextBlock], Field(max_length=limits.PARTS_MAX)] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=limits.TOOLS_MAX)] | None = None
    tool_choice: Annotated[AnyChoice | NamedChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateArguments | None = None


class MessagesRequest(CountRequest):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=limits.INT_MAX)]
    stream: bool | None = None
    temperature: limits.Temperature | None = None
    top_k: limits.TopK | None = None
    top_p: limits.Share | None = None
    stop_sequences: limits.Stops | None = None
    metadata: Metadata | None = None


def asked_of(body: Mapping[str, Any], unknown: Unknown = "ignore") -> Asked:
    """What a client asks for by a body; arguments and errors as for `common.read`."""
    request = read(MessagesRequest, body, "messages", unknown)
    return Asked(
        **_conversation(request),
        sampling=sampling(request, ["temperature", "top_k", "top_p"]),
        max_tokens=max_tokens(request, "max_tokens"),
        stop=request.stop_sequences or [],
        stream=bool(request.stream),
        include_usage=True,
        user=request.metadata.user_id if request.metadata else None,
    )


def counted_of(body: Mapping[str, Any], unknown: Unknown = "ignore") -> Asked:
    """The conversation whose tokens a client wants counted.

    Raises:
        Failed: 400, with the field that is at fault.
    """
    return Asked(**_conversation(read(CountRequest, body, "messages", unknown)))


def _conversation(request: CountRequest) -> dict[str, Any]:
    messages = [{"role": "system", "content": _system(request.system)}] if request.system else []
    for i, message in enumerate(request.messages):
        messages += _openai(message, f"messages[{i}].content")
    if not messages:
        raise bad("messages", "there is nothing but reasoning in them")
    tools = [
        function_tool(
            Function(name=tool.name, description=tool.description, parameters=tool.input_schema),
            f"tools[{i}].input_schema",
        )
        for i, tool in enumerate(request.tools or ())
    ]
    choice = _choice(request.tool_choice)
    check_choice(choice, tools)
    alone = request.tool_choice.disable_parallel_tool_use if request.tool_choice else None
    thinking = None if request.thinking is None else request.thinking.type != "disabled"
    return {
        "kind": "chat",
        "model": request.model,
        "messages": complete(messages),
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": None if alone is None else not alone,
        "reasoning": reasoning_of(thinking, request.chat_template_kwargs),
        "prefill": prefilled(messages),
    }


def _system(system: str | Sequence[TextBlock]) -> str:
    return system if isinstance(system, str) else "\n".join(block.text for block in system)


def _choice(choice: AnyChoice | NamedChoice | None) -> str | Message:
    if choice is None:
        return "auto"
    if isinstance(choice, NamedChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _openai(message: AnthropicMessage, param: str) -> list[Message]:
    """The same in OpenAI's form, where each tool's answer is a message of its own, before the user's text."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts, calls, results = [], [], []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append({"type": "text", "text": block.text})
        elif isinstance(block, ToolUseBlock):
            calls.append(tool_call(block.name, block.input, block.id))
        elif isinstance(block, ToolResultBlock):
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
    if (calls and message.role == "user") or (results and message.role == "assistant"):
        raise bad(param, "the assistant's messages call tools, and the user's have their answers")
    if not texts and not calls:
        return results
    said: Message = {"role": message.role, "content": texts or ""}
    return [*results, said | {"tool_calls": calls} if calls else said]


def _result(block: ToolResultBlock) -> str:
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    return "".join(part.text for part in block.content)
