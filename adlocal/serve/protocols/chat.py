"""OpenAI's chat completions: what clients send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ..asked import Asked
from . import limits
from .common import Body, bad, read
from .fields import Unknown
from .history import Content, Function, Message, check_choice, complete, function_tool, prefilled, text_parts, tool_call
from .samplers import Sampled, sampled_fields, schema_of

Effort = Annotated[str, Field(min_length=1, max_length=32)]


class TemplateArguments(Body):
    """What may be said to the chat template."""

    enable_thinking: bool | None = None


class CalledFunction(Body):
    """A call's function and arguments."""

    name: limits.ToolName
    arguments: str | dict[str, Any] | None = None


class Call(Body):
    """A call that the model has made."""

    id: limits.Name | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class SystemMessage(Body):
    """What the operator of a chat says first."""

    role: Literal["system", "developer"]
    content: Content
    name: limits.Name | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: limits.Name | None = None


class AssistantMessage(Body):
    """What the model has said."""

    role: Literal["assistant"]
    content: Content | None = None
    name: limits.Name | None = None
    tool_calls: Annotated[list[Call], Field(max_length=limits.TOOL_CALLS_MAX)] | None = None


class ToolMessage(Body):
    """What a tool has answered."""

    role: Literal["tool"]
    content: Content | None = None
    name: limits.Name | None = None
    tool_call_id: limits.Name | None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Tool(Body):
    """A tool, which is a function."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    """A function's name."""

    name: limits.ToolName


class ToolChoice(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


class NamedSchema(Body):
    """A JSON schema of the answer."""

    name: limits.Name | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ChatRequest(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=limits.MESSAGES_MAX)]
    tools: Annotated[list[Tool], Field(max_length=limits.TOOLS_MAX)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.LOGPROBS_MAX)] | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateArguments | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    safety_identifier: limits.Name | None = None


def asked_of(body: Mapping[str, Any], unknown: Unknown = "ignore") -> Asked:
    """What a client asks for by a body; arguments and errors as for `common.read`."""
    request = read(ChatRequest, body, "chat", unknown)
    messages = complete([_message(each) for each in request.messages])
    tools = [
        function_tool(tool.function, f"tools[{i}].function.parameters") for i, tool in enumerate(request.tools or ())
    ]
    choice = request.tool_choice.model_dump() if isinstance(request.tool_choice, ToolChoice) else request.tool_choice
    check_choice(choice, tools)
    if tools and request.grammar:
        raise bad("grammar", "this field and tools exclude each other: give one of them")
    effort = request.reasoning_effort
    return Asked(
        kind="chat",
        messages=messages,
        tools=tools,
        tool_choice=choice or "auto",
        parallel_tool_calls=request.parallel_tool_calls,
        schema=schema_of(request, _wanted_schema(request.response_format), "response_format"),
        top_logprobs=_top_logprobs(request),
        reasoning=reasoning_of(None if effort is None else effort != "none", request.chat_template_kwargs),
        prefill=_prefill(request, messages),
        **sampled_fields(request) | {"user": request.user or request.safety_identifier},
    )


def reasoning_of(asked: bool | None, template: TemplateArguments | None) -> bool | None:
    """Whether the model is to think first, by the protocol's own field and by llama-server's.

    Raises:
        Failed: 400, they disagree.
    """
    thinking = template.enable_thinking if template else None
    if thinking is None or asked is None:
        return asked if thinking is None else thinking
    if asked != thinking:
        raise bad(
            "chat_template_kwargs.enable_thinking", "this field contradicts the effort asked for: give one of them"
        )
    return asked


def _message(message: SystemMessage | UserMessage | AssistantMessage | ToolMessage) -> Message:
    content = "" if message.content is None else text_parts(message.content)
    plain: Message = {"role": message.role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = [
            tool_call(call.function.name, call.function.arguments, call.id) for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _wanted_schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return wanted.schema_ or {}
    if wanted.json_schema is None:
        raise bad("response_format.json_schema", "this field is required")
    return wanted.json_schema.schema_ or {}


def _top_logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs and not request.logprobs:
        raise bad("top_logprobs", "this field needs logprobs to be true")
    if request.logprobs:
        return request.top_logprobs if request.top_logprobs is not None else request.n_probs or 0
    return request.n_probs or None


def _prefill(request: ChatRequest, messages: list[Message]) -> bool:
    """llama-server continues an answer that ends the messages, unless it is told that a new one begins."""
    wanted = request.continue_final_message
    began = messages[-1]["role"] == "assistant"
    if wanted and not began:
        raise bad("continue_final_message", "true: the last message is not the assistant's")
    if wanted and request.add_generation_prompt:
        raise bad("add_generation_prompt", "true: this field and continue_final_message exclude each other")
    if request.add_generation_prompt is False and not began:
        raise bad(
            "add_generation_prompt", "false: the last message is not the assistant's, so there is nothing to add to"
        )
    return prefilled(messages)
