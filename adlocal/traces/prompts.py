"""Prompts to generate from, and the answers that tell whether a completion is right.

{"prompt": str}    {"prompt": [message, ...]}    {"question": str}    each with "answer" and "id", if there are any
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..errors import InputError
from .encoder import TraceEncoder
from .records import read_json_lines
from .trace import Message, Trace

# A sign counts where it touches the number and no term stands before it: 10-5 ends in 5, and "x = -5" in -5.
_NUMBER = re.compile(
    r"((?<![\w.)\]%])[-−])?(?:\$([-−])?)?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        where: file and line, for messages.
        prompt: a user's message, or a conversation.
        answer: text whose final number is the right answer, None if the line has none.
        id: the line's "id", for answers that are given apart.
    """

    where: str
    prompt: str | tuple[Message, ...]
    answer: str | None = None
    id: str | None = None


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Reads a prompt file: JSON lines with "prompt", or "question" as in GSM8K.

    Raises:
        InputError: the file is missing or empty, or a line is no prompt; the message gives its number.
    """
    prompts = [_prompt(row.fields, row.where) for row in read_json_lines(path)]
    if not prompts:
        raise InputError(f'{path}: no prompts; give lines like {{"prompt": "..."}}')
    return prompts


def join_answers(prompts: list[Prompt], path: str | os.PathLike[str]) -> list[Prompt]:
    """The prompts with the answers of a file: matched by "id" if its lines have one, else line by line.

    Raises:
        InputError: a line has no answer, or prompts and answers do not match.
    """
    rows = read_json_lines(path)
    answers = [_answer(row.fields, row.where) for row in rows]
    for (where, _), answer in zip(rows, answers, strict=True):
        if answer is None:
            raise InputError(f'{where}: no text "answer"; give lines like {{"answer": "18"}}')
    if rows and all("id" in row for _, row in rows):
        by_id = {str(row["id"]): answer for (_, row), answer in zip(rows, answers, strict=True)}
        for prompt in prompts:
            if prompt.id not in by_id:
                raise InputError(f"{prompt.where}: id {prompt.id} has no answer in {path}; give each prompt's id there")
        answers = [by_id[str(prompt.id)] for prompt in prompts]
    if len(answers) != len(prompts):
        raise InputError(f"{path}: {len(answers)} answers for {len(prompts)} prompts; give one a prompt, or ids")
    return [dataclasses.replace(p, answer=answer) for p, answer in zip(prompts, answers, strict=True)]


def encode_prompt(encoder: TraceEncoder, prompt: Prompt) -> list[int]:
    """Token ids up to where the model begins to write.

    Raises:
        TraceError: the chat template refuses the messages.
    """
    given = prompt.prompt
    if isinstance(given, str):
        trace = Trace(prompt.where, prompt=given, completion=".")
    else:
        trace = Trace(prompt.where, messages=(*given, {"role": "assistant", "content": "."}), n_given=len(given))
    encoded = encoder.encode(trace)
    return encoded.tokens[: encoded.targets.index(True)]


def final_answer(text: str) -> Decimal | None:
    """The last number in a text, after its last "####" if it has one; None if there is no number.

    Thousands' commas, currency signs, percent signs and a sentence's period are no part of it.
    """
    numbers = _NUMBER.findall(text.rpartition("####")[2])
    if not numbers:
        return None
    sign, sign_after_currency, digits = numbers[-1]
    return (-1 if sign or sign_after_currency else 1) * Decimal(digits.replace(",", ""))


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    given = row.get("prompt", row.get("question"))
    found: str | tuple[Message, ...] | None = None
    if isinstance(given, str) and given.strip():
        found = given
    elif isinstance(given, list) and given and all(map(_is_message, given)):
        found = tuple(given)
    if found is None:
        raise InputError(f'{where}: has {sorted(row)}, expected text or messages as "prompt", or text as "question"')
    return Prompt(where, found, _answer(row, where), str(row["id"]) if "id" in row else None)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and bool(message.get("content"))


def _answer(row: dict[str, Any], where: str) -> str | None:
    given = row.get("answer")
    if given is None:
        return None
    if not isinstance(given, (str, int, float)) or final_answer(str(given)) is None:
        raise InputError(f"{where}: the answer {str(given)[:40]!r} holds no number; give one, as in GSM8K")
    return str(given)
