"""The output items of OpenAI's responses, and the response around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..asked import Asked
from ..events import Answer, Finished, Logprob, ToolCall, Usage
from .common import reasoning_tokens, summary_text
from .logprobs import with_rivals

Item = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


def response_body(asked: Asked, identity: str, model: str, created: int) -> dict[str, Any]:
    """A response that has nothing yet. Numbers that the client left open are OpenAI's defaults."""
    return {
        "id": f"resp_{identity}",
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "previous_response_id": None,
        "instructions": None,
        "output": [],
        "tools": [_tool(tool["function"]) for tool in asked.tools],
        "tool_choice": _choice(asked.tool_choice),
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "temperature": asked.sampling.get("temperature", 1.0),
        "top_p": asked.sampling.get("top_p", 1.0),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": asked.top_logprobs or 0,
        "text": {"format": {"type": "text" if asked.schema is None else "json_object"}},
        "reasoning": {"effort": None, "summary": None},
        "truncation": "disabled",
        "usage": None,
        "max_output_tokens": asked.max_tokens,
        "max_tool_calls": None,
        "store": False,
        "background": False,
        "service_tier": "default",
        "metadata": {},
        "safety_identifier": None,
        "prompt_cache_key": None,
        "user": None,
    }


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "name": function["name"],
        "description": function.get("description"),
        "parameters": function["parameters"],
        "strict": False,
    }


def _choice(choice: Any) -> Any:
    return choice if isinstance(choice, str) else {"type": "function", "name": choice["function"]["name"]}


def ended(
    response: dict[str, Any], output: Sequence[Item], cut: bool, usage: Usage, n_reasoning: int | None, now: int
) -> dict[str, Any]:
    """The response when its answer has ended: completed, or incomplete where it was cut off."""
    return {
        **response,
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else now,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": list(output),
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},  # never told: others asked them
            "output_tokens_details": {"reasoning_tokens": n_reasoning or 0},
        },
    }


def message_item(identity: str, text: str, logprobs: Sequence[Logprob], status: Status) -> Item:
    """The answer's text."""
    return {
        "id": identity,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [] if status == "in_progress" else [text_part(text, logprobs)],
    }


def text_part(text: str, logprobs: Sequence[Logprob] = ()) -> dict[str, Any]:
    """What a message consists of."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*map(with_rivals, logprobs)]}


def reasoning_item(identity: str, text: str, status: Status) -> Item:
    """Reasoning that is shown."""
    content = [] if status == "in_progress" else [{"type": "reasoning_text", "text": text}]
    return {"id": identity, "type": "reasoning", "summary": [], "content": content, "status": status}


def summary_item(identity: str, text: str, status: Status) -> Item:
    """What is told of reasoning that is hidden."""
    summary = [] if status == "in_progress" else [{"type": "summary_text", "text": text}]
    return {"id": identity, "type": "reasoning", "summary": summary, "status": status}


def call_item(identity: str, call: ToolCall, status: Status) -> Item:
    """A call."""
    return {
        "id": identity,
        "type": "function_call",
        "status": status,
        "call_id": call.id or f"call_{identity}",
        "name": call.name or "",
        "arguments": call.arguments,
    }


def item_id(kind: str, identity: str, index: int) -> str:
    """An item's number, by its place in the output."""
    prefix = {"message": "msg", "reasoning": "rs", "summary": "rs"}.get(kind, "fc")
    return f"{prefix}_{identity}_{index}"


def output_of(answer: Answer, identity: str) -> list[Item]:
    """All items of an answer: reasoning, text, calls, and a summary. The last one is incomplete if it was cut off."""
    output: list[Item] = []
    if answer.reasoning:
        output.append(reasoning_item(item_id("reasoning", identity, 0), answer.reasoning, "completed"))
    if answer.text:
        place = item_id("message", identity, len(output))
        output.append(message_item(place, answer.text, answer.logprobs, "completed"))
    for call in answer.tool_calls:
        output.append(call_item(item_id("call", identity, len(output)), call, "completed"))
    if output and is_cut(answer.finished):
        output[-1]["status"] = "incomplete"
    finished = answer.finished
    if finished and (summary := summary_text(finished.reasoning_tokens, finished.reasoning_seconds)):
        output.append(summary_item(item_id("summary", identity, len(output)), summary, "completed"))
    return output


def is_cut(finished: Finished | None) -> bool:
    """Whether an answer is shorter than the model meant it."""
    return finished is None or finished.reason == "length"


def whole_body(response: dict[str, Any], answer: Answer, usage: Usage, identity: str, now: int) -> dict[str, Any]:
    """The response at once."""
    return ended(response, output_of(answer, identity), is_cut(answer.finished), usage, reasoning_tokens([answer]), now)
