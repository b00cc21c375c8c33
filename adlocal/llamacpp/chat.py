"""Chat templates: messages as a model's own template writes them, and what of them the template has a place for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

from llama_cpp._internals import LlamaModel
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import InputError

Message = dict[str, Any]

# Names of the reasoning of a turn in templates: DeepSeek, Qwen, GLM; gpt-oss and Granite; others.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_ASKED, _SAID, _THOUGHT = "adlocal-asked", "adlocal-said", "adlocal-thought"
_CALLED, _FOUND = "adlocal_called", "adlocal-found"
_TOOL = {
    "type": "function",
    "function": {
        "name": _CALLED,
        "description": _CALLED,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "string", "description": "a"}},
            "required": ["a"],
        },
    },
}


class ChatTemplate:
    """A model's chat template.

    A message is {"role": str, "content": str}, and may have "reasoning_content", text, and "tool_calls" in OpenAI's
    envelope with their arguments as objects. The template is given both as it expects them.

    Args:
        text: the template, in Jinja.
        bos, eos: text of the special tokens.
        for_tools: the template that takes this one's place where there are tools.
    """

    def __init__(self, text: str, bos: str, eos: str, for_tools: ChatTemplate | None = None) -> None:
        self._for_tools = for_tools
        self._closed, self._open = (
            Jinja2ChatFormatter(template=text, eos_token=eos, bos_token=bos, add_generation_prompt=generate)
            for generate in (False, True)
        )

    @classmethod
    def of(cls, model: LlamaModel) -> ChatTemplate | None:
        """The template of a model; None if it has none.

        Raises:
            InputError: the template is no Jinja.
        """
        metadata = model.metadata()
        text, for_tools = (metadata.get(f"tokenizer.chat_template{name}") for name in ("", ".tool_use"))
        if text is None:
            return None
        ids = (model.token_bos(), model.token_eos())
        bos, eos = (model.token_get_text(token) if token >= 0 else "" for token in ids)
        try:
            return cls(text, bos, eos, cls(for_tools, bos, eos) if for_tools else None)
        except Exception as error:  # whatever Jinja says
            raise InputError(f"the model's chat template cannot be parsed: {error}; give a GGUF with another") from None

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool
    ) -> str:
        """The text of a conversation, open for the assistant's answer with `add_generation_prompt`.

        Raises:
            InputError: the template refuses the messages, or has no place for their tools.
        """
        if tools and self._for_tools:
            return self._for_tools.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        try:
            return self._text([self._prepared(m) for m in messages], tools, add_generation_prompt)
        except Exception as error:  # a template may raise anything
            if not self.knows_tool_calls and any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
                raise InputError(f"the model's chat template has no place for calls of tools: {error}") from None
            raise InputError(f"the model's chat template refuses the messages: {error}") from None

    def turn(
        self, messages: Sequence[Message], i: int, *, tools: Sequence[Any] | None = None, ended: bool = True
    ) -> tuple[str, str]:
        """The text before assistant turn `i`, open for it, and the text through it.

        Many templates drop what an earlier turn thought. Some drop it from the last turn too, whose thoughts they
        expect in its content; there the content is put in by hand.

        Raises:
            InputError: as `render` does.
        """
        if tools and self._for_tools:
            return self._for_tools.turn(messages, i, tools=tools, ended=ended)
        before = self.render(messages[:i], tools=tools, add_generation_prompt=True)
        said = self._said(messages[i])
        if not self.drops_thoughts or (ended and "</think>" not in said):
            return before, self.render(messages[: i + 1], tools=tools, add_generation_prompt=False)
        marked = {key: value for key, value in messages[i].items() if key != "reasoning_content"} | {"content": _SAID}
        whole = self.render([*messages[:i], marked], tools=tools, add_generation_prompt=False)
        head, _, tail = whole.rpartition(_SAID)
        opened = before.removeprefix(head)  # "<think>\n", where the template begins every answer so
        return before, before + said.removeprefix(opened).removeprefix(opened.rstrip()) + tail

    @cached_property
    def reasoning_field(self) -> str | None:
        """Under which name the template knows the reasoning of a turn; None if under none."""
        for name in _REASONING_FIELDS:
            if _THOUGHT in self._tried([_user(), {"role": "assistant", "content": _SAID, name: _THOUGHT}]):
                return name
        return None

    @cached_property
    def drops_thoughts(self) -> bool:
        """Whether the template leaves out what an answer has within <think>."""
        said = self._tried([_user(), {"role": "assistant", "content": thought(_THOUGHT) + _SAID}])
        return _SAID in said and _THOUGHT not in said

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template has a place for a list of tools."""
        if self._for_tools:
            return self._for_tools.knows_tools
        return _CALLED in self._tried([_user()], [_TOOL])

    @cached_property
    def knows_tool_calls(self) -> bool:
        """Whether the template has a place for the calls of an assistant."""
        return any(_CALLED in self._tried(_calling(arguments)) for arguments in ({"a": "b"}, '{"a": "b"}'))

    @cached_property
    def _wants_text(self) -> bool:
        """Whether the arguments of calls have to be JSON text: templates may join them, or write them bare."""
        arguments = {"a": "b"}
        said = self._tried(_calling(arguments))
        return self.knows_tool_calls and (_CALLED not in said or str(arguments) in said)

    @cached_property
    def _calls_without_text(self) -> bool:
        """Whether a turn that calls may have no content, as OpenAI sends it: templates may write an empty one."""
        said = self._tried(_calling('{"a": "b"}' if self._wants_text else {"a": "b"}, content=None))
        return _CALLED in said and "None" not in said

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether a content has to be a list of parts, as in templates of models that see."""
        return _ASKED not in self._tried([_user()]) and _ASKED in self._tried([_in_parts(_user())])

    def _said(self, message: Message) -> str:
        """The content, with the reasoning before it where the template has no field for that."""
        reasoning = "" if self.reasoning_field else message.get("reasoning_content", "")
        return (thought(reasoning) if reasoning else "") + str(message["content"])

    def _prepared(self, given: Message) -> Message:
        message = {**given, "content": self._said(given)}
        if message.get("tool_calls") and not message["content"] and self._calls_without_text:
            message["content"] = None
        if (reasoning := message.pop("reasoning_content", "")) and self.reasoning_field:
            message[self.reasoning_field] = reasoning
        if self._wants_parts and message["content"] is not None:
            message = _in_parts(message)
        if message.get("tool_calls") and self._wants_text:
            message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        return message

    def _text(self, messages: Sequence[Message], tools: Sequence[Any] | None, is_open: bool) -> str:
        formatter = self._open if is_open else self._closed
        return str(formatter(messages=cast(Any, messages), tools=cast(Any, list(tools) if tools else None)).prompt)

    def _tried(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """What the template makes of messages; nothing if it refuses them."""
        try:
            return self._text(messages, tools, False)
        except Exception:  # a template may raise anything
            return ""


def thought(reasoning: str) -> str:
    """Reasoning as it stands before an answer where a template has no field for it."""
    return f"<think>\n{reasoning}\n</think>\n\n"


def _user() -> Message:
    return {"role": "user", "content": _ASKED}


def _calling(arguments: Any, content: str | None = "") -> list[Message]:
    """A call of a tool with all that any template asks of one; Mistral's ask for an id of nine letters."""
    call = {"id": "adlocal01", "type": "function", "function": {"name": _CALLED, "arguments": arguments}}
    found = {"role": "tool", "name": _CALLED, "tool_call_id": "adlocal01", "content": _FOUND}
    return [_user(), {"role": "assistant", "content": content, "tool_calls": [call]}, found, _answer()]


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _answer() -> Message:
    return {"role": "assistant", "content": _SAID}


def _with_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
