"""What a reader of a report has to know about data that was read: nothing that a record says is dropped in silence."""

from __future__ import annotations

from collections.abc import Sequence

from .encoder import TraceEncoder
from .messages import Message
from .prompts import Prompt
from .trace import Trace, TraceFile

Item = Trace | Prompt


def remarks(read: TraceFile | Sequence[Prompt], encoder: TraceEncoder) -> list[str]:
    """Remarks on traces or prompts and the chat template that renders them, a phrase each; those that say nothing are
    left out."""
    items: Sequence[Item] = read.traces if isinstance(read, TraceFile) else read
    traces = [item for item in items if isinstance(item, Trace)]
    counts = {
        "with reasoning": sum(trace.has_reasoning for trace in traces),
        "with turns that are context only, by their weight": sum(bool(trace.unlearned) for trace in traces),
        "with tools that the chat template has no place for": sum(_loses_tools(item, encoder) for item in items),
        "with calls of tools that the chat template has no place for": sum(_loses_calls(i, encoder) for i in items),
    }
    unknown = dict.fromkeys(key for item in items for key in item.unused)
    named = ", ".join(f'"{key}"' for key in unknown)
    return [
        *(f"{n} {what}" for what, n in counts.items() if n),
        *([f"keys that adlocal does not know: {named}"] if unknown else []),
    ]


def _loses_tools(item: Item, encoder: TraceEncoder) -> bool:
    template = None if encoder.is_raw(item.messages) else encoder.template
    return bool(item.tools) and not (template and template.knows_tools)


def _loses_calls(item: Item, encoder: TraceEncoder) -> bool:
    messages: Sequence[Message] = item.messages or ()
    calls = any(message.get("tool_calls") for message in messages)
    return calls and not (encoder.template and encoder.template.knows_tool_calls)
