"""What the watch writes to its log: everything that its state follows from, and no text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .observation import Observation, Outcome
from .sketch import Sketch, sketch

_COOL = 0.3


@dataclass(frozen=True)
class Admitted:
    """An observation without its text, and where it left its subjects.

    Attributes:
        positions: on the ramp, of the subjects that are raised.
    """

    time: float
    key: str
    owner: str
    user: str | None
    reasoning: bool
    cool: bool
    prompt_tokens: int
    evaluation: bool
    sketch: Sketch
    positions: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, observation: Observation) -> Admitted:
        """Of an observation that nobody has judged yet. Its text ends here."""
        return cls(
            time=observation.time,
            key=observation.key,
            owner=observation.owner,
            user=observation.user,
            reasoning=observation.reasoning,
            cool=observation.temperature is not None and observation.temperature <= _COOL,
            prompt_tokens=observation.prompt_tokens,
            evaluation=observation.declared == "evaluation",
            sketch=sketch(observation.prompt),
        )


@dataclass(frozen=True)
class Reset:
    """An operator's word: forget this subject."""

    time: float
    subject: str


Record = Admitted | Outcome | Reset
_KINDS: dict[str, type[Any]] = {"admitted": Admitted, "finished": Outcome, "reset": Reset}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def encode(node: str, record: Record) -> bytes:
    """A line of JSON, and after it the sketch if there is one.

    Args:
        node: that writes it, which knows it already when it comes back.
        record: any.
    """
    fields = {name: value for name, value in vars(record).items() if name != "sketch"}
    line = json.dumps({"node": node, "record": _NAMES[type(record)], **fields}, separators=(",", ":"))
    return line.encode() + b"\n" + (record.sketch.to_bytes() if isinstance(record, Admitted) else b"")


def decode(data: bytes) -> tuple[str, Record] | None:
    """The inverse of `encode`; None for what this version does not know."""
    line, _, rest = data.partition(b"\n")
    try:
        fields = json.loads(line)
        node, kind = str(fields.pop("node")), _KINDS[fields.pop("record")]
        if kind is Admitted:
            fields["sketch"] = Sketch.from_bytes(rest)
        record: Record = kind(**fields)
    except (ValueError, KeyError, TypeError):
        return None
    return node, record
