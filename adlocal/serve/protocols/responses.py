"""OpenAI's responses, without their memory: what clients send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..asked import Asked
from . import limits
from .chat import ChosenFunction, Effort, TemplateArguments, reasoning_of
from .common import Body, bad, read
from .fields import Unknown
from .history import Content, Function, Message, check_choice, complete, function_tool, prefilled, text_parts, tool_call
from .samplers import max_tokens, sampling
from .schemas import check_schema

_LOGPROBS = "message.output_text.logprobs"


class MessageItem(Body):
    """A message. `type` may be left out."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class CallItem(Body):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: limits.Name | None = None
    name: limits.ToolName
    arguments: str | dict[str, Any] | None = None


class OutputItem(Body):
    """What a tool has answered."""

    type: Literal["function_call_output"]
    call_id: limits.Name | None = None
    output: Content | None = None


class ReasoningItem(Body):
    """Reasoning of an earlier turn, which is not read again."""

    type: Literal["reasoning"]


def _kind(item: Any) -> str | None:
    kind = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    return "message" if kind is None else kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FlatTool(Function):
    """A tool, which is a function."""

    type: Literal["function"]


class FlatChoice(ChosenFunction):
    """The tool that has to be called."""

    type: Literal["function"]


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: limits.Name | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class Text(Body):
    """How the answer is written."""

    format: TextFormat | None = None


class Reasoning(Body):
    """Whether the model is to think first."""

    effort: Effort | None = None


class ResponsesRequest(Body):
    """The body of POST /v1/responses."""

    model: limits.Name | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=limits.MESSAGES_MAX)]
    instructions: str | None = None
    tools: Annotated[list[FlatTool], Field(max_length=limits.TOOLS_MAX)] | None = None
    tool_choice: Literal["auto", "none", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateArguments | None = None
    max_output_tokens: limits.MaxTokens | None = None
    temperature: limits.Temperature | None = None
    top_p: limits.Share | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.LOGPROBS_MAX)] | None = None
    include: Annotated[list[limits.Name], Field(max_length=16)] | None = None
    stream: bool | None = None
    user: limits.Name | None = None
    safety_identifier: limits.Name | None = None


def asked_of(body: Mapping[str, Any], unknown: Unknown = "ignore") -> Asked:
    """What a client asks for by a body; arguments and errors as for `common.read`."""
    request = read(ResponsesRequest, body, "responses", unknown)
    messages = _messages(request)
    tools = [function_tool(tool, f"tools[{i}].parameters") for i, tool in enumerate(request.tools or ())]
    choice = request.tool_choice
    if isinstance(choice, FlatChoice):
        named: Any = {"type": "function", "function": {"name": choice.name}}
    else:
        named = choice or "auto"
    check_choice(named, tools)
    effort = request.reasoning.effort if request.reasoning else None
    logprobs = _LOGPROBS in (request.include or ())
    return Asked(
        kind="chat",
        model=request.model,
        messages=complete(messages),
        tools=tools,
        tool_choice=named,
        parallel_tool_calls=request.parallel_tool_calls,
        sampling=sampling(request, ["temperature", "top_p"]),
        max_tokens=max_tokens(request, "max_output_tokens"),
        schema=_schema(request.text.format if request.text else None),
        top_logprobs=(request.top_logprobs or 0) if logprobs else None,
        reasoning=reasoning_of(None if effort is None else effort != "none", request.chat_template_kwargs),
        prefill=prefilled(messages, "input"),
        stream=bool(request.stream),
        include_usage=True,
        user=request.user or request.safety_identifier,
    )


def _messages(request: ResponsesRequest) -> list[Message]:
    messages: list[Message] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for item in request.input:
        _append(messages, item)
    if not messages:
        raise bad("input", "there is nothing but reasoning in it")
    return messages


def _append(messages: list[Message], item: MessageItem | CallItem | OutputItem | ReasoningItem) -> None:
    """Adds an item. Calls belong to the assistant's message before them."""
    if isinstance(item, MessageItem):
        messages.append({"role": item.role, "content": text_parts(item.content)})
    elif isinstance(item, CallItem):
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        calls = messages[-1].setdefault("tool_calls", [])
        calls.append(tool_call(item.name, item.arguments, item.call_id))
    elif isinstance(item, OutputItem):
        output = "" if item.output is None else text_parts(item.output)
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})


def _schema(wanted: TextFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" or not wanted.schema_:
        return {"type": "object"}
    check_schema(wanted.schema_, "text.format.schema", enforced=True)
    return wanted.schema_
