"""Messages in one form, whoever's shape they came in: ShareGPT's, OpenAI's, those of trainers and servers.

What comes out has a "role" that templates know and a "content" that is text. Where a turn has them, it also has
"reasoning_content" and "tool_calls" whose arguments are objects. Other keys are handed to the template. Those that
adlocal does not know are named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TraceError

Message = dict[str, Any]

_ALIASES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model", "ai", "bot", "chatbot"),
    "tool": ("tool", "function", "observation", "tool_response", "function_response", "ipython"),
    # Turns of an assistant whose content is the JSON of a call, as LLaMA-Factory writes them.
    "call": ("function_call", "tool_call"),
}
_ROLES = {alias: role for role, aliases in _ALIASES.items() for alias in aliases}
REASONING = ("reasoning_content", "reasoning", "thinking")
# OpenAI; axolotl; ms-swift.
_TRAINING = ("weight", "train", "training", "train_turn", "train_on_turn", "loss")
_KNOWN = ("name", "tool_call_id", "id")
_TEXT_PARTS, _REASONING_PARTS = ("text", "input_text", "output_text"), ("thinking", "reasoning")


@dataclass(frozen=True)
class Turns:
    """Messages in adlocal's form.

    Attributes:
        messages: with "role" and "content", both text.
        unlearned: which of them are assistant turns that are context only.
        unused: keys whose meaning adlocal does not know.
    """

    messages: tuple[Message, ...]
    unlearned: tuple[int, ...] = ()
    unused: tuple[str, ...] = ()


def read_turns(where: str, given: Sequence[Any]) -> Turns:
    """Messages as a record has them, in adlocal's form.

    Raises:
        TraceError: one is no message, its role is unknown, or part of it is no text.
    """
    turns = [_read(where, message) for message in given]
    unlearned = tuple(i for i, turn in enumerate(turns) if turn.unlearned)
    unused = tuple(dict.fromkeys(key for turn in turns for key in turn.unused))
    return Turns(tuple(message for turn in turns for message in turn.messages), unlearned, unused)


def listed(where: str, key: str, value: Any) -> list[Any]:
    """A list, or the list that a text holds as JSON: tables and some trainers keep it so.

    Raises:
        TraceError: it is neither.
    """
    found = _from_json(value)
    if not isinstance(found, list):
        raise TraceError(f'{where}: "{key}" is {_shown(value)}; expected a list, or a list as JSON text')
    return found


def _read(where: str, given: Any) -> Turns:
    """One message."""
    fields: dict[str, Any] = {}
    if isinstance(given, dict):
        fields = {key: value for key, value in given.items() if value is not None}
    name = fields.pop("role", None) or fields.pop("from", None)
    if not isinstance(name, str) or not _says_something(given):
        raise TraceError(f'{where}: a message needs "role" and "content", found {str(given)[:80]}')
    role = _ROLES.get(name.strip().lower())
    if role is None:
        raise TraceError(f'{where}: unknown role "{name}"; expected system, user, assistant or tool; rename it')
    content, reasoning = _texts(where, fields.pop("content", fields.pop("value", "")))
    if role == "call":
        fields["tool_calls"] = [_call_in(where, content)]
        role, content = "assistant", ""
    if role == "assistant":
        reasoning = one_reasoning(where, [*_popped_reasoning(where, fields), *([reasoning] if reasoning else [])])
    learned = _learned(where, role, fields)
    said = {"reasoning_content": reasoning, "tool_calls": _calls(where, fields)}
    unused = tuple(key for key in fields if key not in _KNOWN)
    message = {"role": role, "content": content, **{key: value for key, value in said.items() if value}, **fields}
    return Turns((message,), () if learned else (0,), unused)


def _says_something(given: dict[str, Any]) -> bool:
    return bool({"content", "value"} & given.keys()) or any(
        given.get(key) for key in (*REASONING, "tool_calls", "function_call")
    )


# Text


def _texts(where: str, content: Any) -> tuple[str, str]:
    """What a content says, and what it says as reasoning."""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise TraceError(f"{where}: a message's content is {_shown(content)}; expected text, or a list of text parts")
    parts = [_part(where, part) for part in content]
    said, thought = ("".join(text for text, is_thought in parts if is_thought == kind) for kind in (False, True))
    return said, thought


def _part(where: str, part: Any) -> tuple[str, bool]:
    """The text of a part, and whether it is reasoning."""
    if isinstance(part, str):
        return part, False
    type_ = part.get("type", "text") if isinstance(part, dict) else None
    if type_ in _REASONING_PARTS:
        text, inner = _texts(where, part.get(type_) or part.get("text") or "")
        return text + inner, True
    if type_ not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        named = f'of type "{type_}"' if type_ else _shown(part)
        raise TraceError(f"{where}: part of a message's content is {named}, which is no text; leave the part out")
    return str(part["text"]), False


def _popped_reasoning(where: str, fields: dict[str, Any]) -> list[str]:
    texts = [_texts(where, fields.pop(key)) for key in REASONING if key in fields]
    return [text + inner for text, inner in texts if text + inner]


def one_reasoning(where: str, reasonings: list[str]) -> str:
    """The reasoning of a turn, which servers repeat under several names.

    Raises:
        TraceError: it is told in two ways.
    """
    if len(set(reasonings)) > 1:
        raise TraceError(f"{where}: two different reasonings for one turn, under {', '.join(REASONING)}; keep one")
    return reasonings[0] if reasonings else ""


# What is learned


def _learned(where: str, role: str, fields: dict[str, Any]) -> bool:
    """Whether a turn is to be learned from; of other roles' turns nothing is, whatever a trainer would do."""
    if fields.pop("train_detail", None) or fields.pop("training_detail", None):
        raise TraceError(f'{where}: "train_detail" marks parts of a turn; adlocal learns from whole turns; split it')
    learned = True
    for key in [key for key in _TRAINING if key in fields]:
        value = fields[key]
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise TraceError(f'{where}: "{key}" of a turn is {_shown(value)}; expected 0 (context) or 1 (learned)')
        if role == "assistant" or not value:
            del fields[key]
        learned = learned and bool(value)
    return learned or role != "assistant"


# Calls of tools


def _calls(where: str, fields: dict[str, Any]) -> list[Any]:
    """A turn's calls, each in OpenAI's envelope, with its arguments as an object where they are one."""
    calls = [{"function": fields.pop("function_call")}] if "function_call" in fields else []
    return [_call(call) for call in (*listed(where, "tool_calls", fields.pop("tool_calls", [])), *calls)]


def _call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if "function" not in call and "name" in call:
        function = {key: call[key] for key in ("name", "arguments", "parameters") if key in call}
        call = {**{k: v for k, v in call.items() if k not in function}, "function": function}
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments", function.get("parameters", {}))
    rest = {key: value for key, value in function.items() if key not in ("arguments", "parameters")}
    return {"type": "function", **call, "function": {**rest, "arguments": _object(arguments)}}


def _object(arguments: Any) -> Any:
    """Arguments as templates expect them: OpenAI sends JSON text, which a template's `tojson` would encode again."""
    found = _from_json(arguments) if arguments != "" else {}
    return found if isinstance(found, dict) else arguments


def _call_in(where: str, content: str) -> dict[str, Any]:
    """The call that is a turn's whole content."""
    found = _from_json(content)
    if not isinstance(found, dict) or "name" not in found:
        raise TraceError(f'{where}: a turn of "function_call" says {_shown(content)}; expected JSON with "name"')
    return found


def _from_json(value: Any) -> Any:
    """What a text holds as JSON, else the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}" if not isinstance(value, str) else repr(value[:40])


def tools_in(where: str, given: Any) -> tuple[dict[str, Any], ...]:
    """The tools that a conversation may call, each in OpenAI's envelope.

    Raises:
        TraceError: they are no list of objects.
    """
    tools = listed(where, "tools", given) if given else []
    for tool in tools:
        if not isinstance(tool, dict):
            raise TraceError(f'{where}: "tools" holds {_shown(tool)}; expected objects that describe functions')
    return tuple(
        {"type": "function", "function": tool} if "function" not in tool and "name" in tool else tool for tool in tools
    )
