"""What all client protocols share: reading a body, refusing it in plain words, and gathering an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from ..events import Answer, Delta, Event, Failed, ToolCall, Usage
from .fields import Route, Unknown, check

_HALF_PAIR: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_VALUE_LENGTH_MAX = 60
#: Parts of messages that are no text, by every protocol's names.
_MEDIA: Final = (
    *("image_url", "image", "input_image", "input_audio", "audio_url", "input_video", "video_url", "video"),
    *("file", "input_file", "document", "search_result"),
)


class Body(BaseModel):
    """A request's body, or a part of one. Fields it does not name are dropped: `fields` says which are refused."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


Model = TypeVar("Model", bound=Body)


def bad(param: str | None, message: str) -> Failed:
    """A request that its client has to mend: 400."""
    return Failed(400, "invalid_request_error", f"{param}: {message}" if param else message, param)


def read_json(raw: bytes) -> dict[str, Any]:
    """A body that is a JSON object in UTF-8, of finite numbers and whole characters.

    Raises:
        Failed: 400, it is not.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_number, parse_float=_finite)
        if _HALF_PAIR.search(raw):
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise bad(None, "the body has too many levels") from None
    except UnicodeError:
        raise bad(None, "the body is no UTF-8, or has half of a surrogate pair in it") from None
    except ValueError as error:
        raise bad(None, f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad(None, f"the body is of type {type(body).__name__}: expected a JSON object")
    return body


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:_VALUE_LENGTH_MAX]} is too big a number")
    return number


def validate(model: type[Model], body: Mapping[str, Any]) -> Model:
    """The body as the model has it.

    Raises:
        Failed: 400, which names the field, what it holds, and what was expected.
    """
    try:
        return model.model_validate(dict(body))
    except ValidationError as error:
        raise _in_words(error, body) from None


def read(model: type[Model], body: Mapping[str, Any], route: Route, unknown: Unknown) -> Model:
    """A body of a route, of whose fields none is refused.

    Args:
        unknown: what becomes of fields that nobody knows.

    Raises:
        Failed: 400, with the field that is at fault.
    """
    check(body, route, unknown)
    return validate(model, body)


def _in_words(error: ValidationError, body: Mapping[str, Any]) -> Failed:
    """The error that lies deepest: among the alternatives of a field, that of the one the client meant."""
    found = [(_located(each, body), each) for each in error.errors(include_url=False)]
    (param, value, _), details = max(found, key=lambda one: (one[0][2], one[1]["type"] != "missing"))
    kind = value.get("type") if isinstance(value, Mapping) else value if param.endswith(".type") else None
    if kind in _MEDIA:
        return bad(param.removesuffix(".type"), f"{kind}: this server takes text alone; leave it out")
    if "tag" in details["type"]:
        tag = "role" if "role" in details["ctx"]["discriminator"] else "type"
        given = value.get(tag) if isinstance(value, Mapping) else value
        expected = details["ctx"].get("expected_tags", "a text")
        return bad(f"{param}.{tag}", f"{_brief(given)}: expected {expected}")
    if details["type"] == "missing":
        return bad(param, "this field is required")
    if details["type"].startswith("model_"):
        return bad(param, f"{_brief(value)}: expected an object")
    expected = details["msg"]
    return bad(param, f"{_brief(value)}: {expected[:1].lower()}{expected[1:]}")


def _located(error: ErrorDetails, body: Any) -> tuple[str, Any, int]:
    """A place in the body as clients write it, what is there, and how deep it lies. Names of types are left out."""
    text, value, depth = "", body, 0
    steps = error["loc"]
    for i, step in enumerate(steps):
        missing = error["type"] == "missing" and i == len(steps) - 1
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            text, value, depth = f"{text}[{step}]", value[step], depth + 1
        elif isinstance(value, Mapping) and (step in value or missing):
            text, value, depth = f"{text}.{step}" if text else str(step), value.get(step), depth + 1
    return text, value, depth


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_LENGTH_MAX else f"{text[: _VALUE_LENGTH_MAX - 3]}..."


def one_of(body: Body, *names: str) -> Any:
    """The value of a field that has several names; None where none is given.

    Raises:
        Failed: 400, two names say different things.
    """
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    first, *others = given or [""]
    for other in others:
        if given[other] != given[first]:
            raise bad(other, f"{given[other]} contradicts {first}={given[first]}: give one of them")
    return given.get(first)


def gather(events: Iterable[Event], n_choices: int = 1) -> list[Answer]:
    """The whole answers, by choice."""
    answers = [Answer() for _ in range(n_choices)]
    for event in events:
        add(answers[event.choice], event)
    return answers


def add(answer: Answer, event: Event) -> None:
    """Adds what an event brings."""
    if not isinstance(event, Delta):
        answer.finished = event
        return
    answer.text += event.text
    answer.reasoning += event.reasoning
    answer.logprobs += event.logprobs
    for call in event.tool_calls:
        _add_call(answer.tool_calls, call)


def _add_call(calls: list[ToolCall], part: ToolCall) -> None:
    for i, call in enumerate(calls):
        if call.index == part.index:
            name, arguments = call.name or part.name, call.arguments + part.arguments
            calls[i] = replace(call, id=call.id or part.id, name=name, arguments=arguments)
            return
    calls.append(part)


def openai_usage(usage: Usage, reasoning_tokens: int | None) -> dict[str, Any]:
    """Without cached tokens, which would tell what others asked."""
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if reasoning_tokens is not None:
        body["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return body


def summary_text(tokens: int | None, seconds: float | None) -> str:
    """What the disclosure `summary` tells of hidden reasoning; "" where there was none."""
    if tokens is None:
        return ""
    duration = "" if seconds is None else f" in {seconds:.1f} seconds"
    return f"Reasoned for {tokens} tokens{duration}."


def reasoning_tokens(answers: Iterable[Answer]) -> int | None:
    """Of all answers, under the disclosure `summary`; None under another."""
    told = [each.finished.reasoning_tokens for each in answers if each.finished is not None]
    known = [n for n in told if n is not None]
    return sum(known) if known else None
