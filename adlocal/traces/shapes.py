"""Shapes: which keys of a record hold its prompt and its completion. docs/data.md lists them.

A conversation lies under "messages" or "conversations". A pair is a prompt, text or messages, with its completion.
"""

from __future__ import annotations

from typing import Any

from ..errors import TraceError
from .messages import REASONING, listed, tools_in
from .records import Record

_CONVERSATIONS = ("messages", "conversations", "conversation")
# A prompt's key, and where its completion may lie. The completion of a teacher comes before the answer that a person
# gave, and a worked solution before the bare answer.
_PAIRS = {
    "prompt": ("completion", "response"),
    "messages": ("completion",),
    "conversations": ("completion",),
    "conversation": ("completion",),
    "question": ("completion", "response", "solution", "answer"),
    "problem": ("completion", "response", "solution"),
    "instruction": ("completion", "output", "response"),
    "query": ("completion", "response"),
    "input": ("completion", "output"),
}
_SYSTEM = ("system", "system_prompt")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
#: Keys of a record that say how to render it or to learn from it, and that adlocal does not follow.
_UNUSED = ("chat_template_kwargs", "documents", "weight", "sample_weight", "loss", "train", "non_preferred_output")

EXPECTED = (
    '"prompt" and "completion", both strings or both lists of messages, or a list "messages" or "conversations", or '
    '"question" and "answer", "problem" and "solution", "instruction" and "output"'
)
EXPECTED_PROMPT = (
    '"prompt", a string or a list of messages, or a list "messages" or "conversations", or "question", "problem" or '
    '"instruction"'
)


def unwrapped(record: Record) -> Record:
    """The record without the envelope that OpenAI puts around messages: "body" in a batch, "input" in fine-tuning."""
    for key in ("body", "input"):
        inner = record.fields.get(key)
        if isinstance(inner, dict) and "messages" in inner:
            outer = {k: v for k, v in record.fields.items() if k != key}
            return Record(record.where, {**outer, **inner})
    return record


def prompt_of(record: Record) -> Any:
    """What an unwrapped record asks: text, or messages in its own shape; None if it asks nothing.

    Raises:
        TraceError: its messages are no list, or it has two system prompts.
    """
    key = _prompt_key(record.fields)
    given = None if key is None else record.fields[key]
    if key in _CONVERSATIONS:
        given = listed(record.where, key, given)
    if key == "instruction" and isinstance(given, str):
        given = _instruction(given, record.fields)
    history = _history(record)
    if not isinstance(given, (str, list)) or not (history or _system(record)):
        return given
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return _after_system(record, [*history, *turns])


def completion_of(record: Record) -> Any:
    """What answers the prompt of an unwrapped record: text, or messages; None if nothing does."""
    fields = record.fields
    keys = ("completion",) if _conversation_key(fields) else _PAIRS.get(_prompt_key(fields) or "", ())
    return next((fields[key] for key in keys if fields.get(key) is not None), None)


def conversation_of(record: Record) -> list[Any] | None:
    """The whole conversation of an unwrapped record that is no pair; None if it has none."""
    key = _conversation_key(record.fields)
    return None if key is None else _after_system(record, listed(record.where, key, record.fields[key]))


def learns_history(record: Record) -> bool:
    """Whether the turns before an instruction are to be learned too, as Alpaca's trainers do; a teacher's are not."""
    return bool(_history(record)) and record.fields.get("completion") is None


def reasoning_of(record: Record) -> dict[str, str]:
    """The reasoning that stands beside a completion, under its key; what a prompt had before a teacher answered it is
    not the teacher's."""
    if "generated_by" in record.fields:
        return {}
    return {key: text for key in REASONING if isinstance(text := record.fields.get(key), str) and text.strip()}


def tools_of(record: Record) -> tuple[dict[str, Any], ...]:
    """The tools of an unwrapped record, "functions" in OpenAI's older shape.

    Raises:
        TraceError: they are no list of objects.
    """
    return tools_in(record.where, record.fields.get("tools") or record.fields.get("functions"))


def unused_of(record: Record) -> tuple[str, ...]:
    """Keys of a record that would change how it is rendered or learned, and that adlocal does not follow.

    Raises:
        TraceError: it has pictures, sound or film, which no text can stand for.
    """
    fields = record.fields
    if media := next((key for key in _MEDIA if fields.get(key)), None):
        raise TraceError(f'{record.where}: has "{media}", and adlocal reads text only; remove the line')
    return tuple(key for key in _UNUSED if fields.get(key) is not None)


def is_empty(fields: dict[str, Any]) -> bool:
    """Whether a generated completion has no text: some teachers end their turn at once."""
    completion = fields.get("completion")
    parts = completion if isinstance(completion, list) else [{"content": completion}]
    text = "".join(str(part.get("content") or "") for part in parts if isinstance(part, dict))
    return {"completion", "finish_reason"} <= fields.keys() and not text.strip()


def _prompt_key(fields: dict[str, Any]) -> str | None:
    return next((key for key in _PAIRS if fields.get(key) is not None), None)


def _conversation_key(fields: dict[str, Any]) -> str | None:
    return next((key for key in _CONVERSATIONS if fields.get(key) is not None), None)


def _instruction(instruction: str, fields: dict[str, Any]) -> str:
    """Alpaca's: the instruction, a blank line, and what it is about; Dolly calls that "context"."""
    about = fields.get("input") or fields.get("context")
    return "\n\n".join(part for part in (instruction, about) if isinstance(part, str) and part.strip())


def _after_system(record: Record, turns: list[Any]) -> list[Any]:
    system, first = _system(record), turns[0] if turns else None
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    if system and str(role).lower() in ("system", "developer"):
        raise TraceError(f"{record.where}: has two system prompts, one of them beside the messages; keep one")
    return [*system, *turns]


def _system(record: Record) -> list[dict[str, Any]]:
    texts = [record.fields.get(key) for key in _SYSTEM]
    return [{"role": "system", "content": text} for text in texts if isinstance(text, str) and text.strip()][:1]


def _history(record: Record) -> list[dict[str, Any]]:
    """Earlier turns beside an instruction: pairs of what was asked and answered."""
    given = record.fields.get("history")
    if not given or _prompt_key(record.fields) != "instruction":
        return []
    pairs = listed(record.where, "history", given)
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise TraceError(f'{record.where}: "history" is {str(pairs)[:40]}; expected pairs of a question and an answer')
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
