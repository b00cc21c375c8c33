"""The answers that tell whether a completion is right: its final number against the number of a reference."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ..errors import InputError
from .prompts import Prompt
from .records import read_records

# A sign counts where it touches the number and no term stands before it: 10-5 ends in 5, and "x = -5" in -5.
_NUMBER = re.compile(
    r"((?<![\w.)\]%])[-−])?(?:\$([-−])?)?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def final_answer(text: str) -> Decimal | None:
    """The last number in a text, after its last "####" if it has one; None if there is no number.

    Thousands' commas, currency signs, percent signs and a sentence's period are no part of it.
    """
    numbers = _NUMBER.findall(text.rpartition("####")[2])
    if not numbers:
        return None
    sign, sign_after_currency, digits = numbers[-1]
    return (-1 if sign or sign_after_currency else 1) * Decimal(digits.replace(",", ""))


def check_answers(prompts: Sequence[Prompt]) -> None:
    """Refuses prompts whose own "answer" holds no number.

    Raises:
        InputError: naming the first.
    """
    for prompt in prompts:
        _answer(prompt.record.fields, prompt.where)


def join_answers(prompts: Sequence[Prompt], source: str | os.PathLike[str]) -> list[Prompt]:
    """The prompts with the answers of a file: matched by "id" if its records have one, else in order.

    Raises:
        InputError: a record has no answer, or prompts and answers do not match.
    """
    records = read_records(source)
    answers = [_answer(record.fields, record.where) for record in records]
    for record, answer in zip(records, answers, strict=True):
        if answer is None:
            raise InputError(f'{record.where}: no text "answer"; give lines like {{"answer": "18"}}')
    if records and all("id" in record.fields for record in records):
        by_id = {str(record.fields["id"]): answer for record, answer in zip(records, answers, strict=True)}
        for prompt in prompts:
            if prompt.id not in by_id:
                raise InputError(
                    f"{prompt.where}: id {prompt.id} has no answer in {source}; give each prompt's id there"
                )
        answers = [by_id[str(prompt.id)] for prompt in prompts]
    if len(answers) != len(prompts):
        raise InputError(f"{source}: {len(answers)} answers for {len(prompts)} prompts; give one a prompt, or ids")
    return [dataclasses.replace(p, answer=answer) for p, answer in zip(prompts, answers, strict=True)]


def _answer(fields: dict[str, Any], where: str) -> str | None:
    given = fields.get("answer")
    if given is None:
        return None
    if not isinstance(given, (str, int, float)) or final_answer(str(given)) is None:
        raise InputError(f"{where}: the answer {str(given)[:40]!r} holds no number; give one, as in GSM8K")
    return str(given)
