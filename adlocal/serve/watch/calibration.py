"""Benign traffic for a baseline: what the watch recorded, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from .features import Figures
from .logs import Entries
from .observation import Observation, Outcome, party
from .records import Admitted, Record, decode
from .settings import WatchSettings
from .state import State

#: Samples of a party at most, evenly spaced over its requests, so that the busiest do not decide alone.
PER_PARTY = 32
_NUMBERS = ("time", "prompt_tokens", "temperature", "duration", "completion_tokens", "n_rows", "n_choices", "dose")
_TEXTS = ("key", "owner", "user", "prompt")


def samples(records: Iterable[Record], settings: WatchSettings) -> dict[int, list[Figures]]:
    """Figures of each window, as parties had them at their requests. Declared evaluation loops are left out."""
    state = State(settings)
    of_party: dict[str, list[tuple[Figures, ...]]] = {}
    for record in records:
        state.apply(record)
        if isinstance(record, Admitted) and not record.evaluation:
            name = party(record.key, record.user)
            figures = tuple(state.subjects[name].figures(record.time, window)[0] for window in settings.windows)
            of_party.setdefault(name, []).append(figures)
    thinned = [row for rows in of_party.values() for row in _evenly(rows)]
    return {window: [row[i] for row in thinned] for i, window in enumerate(settings.windows)}


def recorded(entries: Entries) -> Iterator[Record]:
    """The records of a log."""
    for _, data in entries:
        known = decode(data)
        if known is not None:
            yield known[1]


def read_observations(path: Path) -> list[Record]:
    """Records of JSON lines, in the order of time.

    Each line is an object with `time` (seconds), `key` and `prompt`, and may have `owner` (else the key), `user`,
    `reasoning`, `temperature`, `prompt_tokens`, `duration` (seconds), and of the answer `completion_tokens`, `n_rows`,
    `n_choices`, `dose`.

    Raises:
        InputError: a line is no such object; the message tells its number.
    """
    found: list[Record] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give JSON lines of observations") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            found += _records(line, f"{path}, line {number}")
    return sorted(found, key=lambda record: record.time)


def _records(line: str, where: str) -> list[Record]:
    values = _checked(line, where)
    key, owner, user = values["key"], values.get("owner", values["key"]), values.get("user")
    observation = Observation(
        time=values["time"],
        key=key,
        owner=owner,
        user=user,
        reasoning=bool(values.get("reasoning", False)),
        temperature=values.get("temperature"),
        prompt=values["prompt"],
        prompt_tokens=values.get("prompt_tokens", 0),
    )
    admitted = Admitted.of(observation)
    outcome = {name: values[name] for name in ("completion_tokens", "n_rows", "n_choices", "dose") if name in values}
    if not outcome:
        return [admitted]
    return [admitted, Outcome(values["time"] + values.get("duration", 0.0), key, owner, user, **outcome)]


def _checked(line: str, where: str) -> Mapping[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        raise InputError(f"{where}: no JSON; give an object with time, key and prompt") from None
    if not isinstance(values, dict) or not {"time", "key", "prompt"} <= set(values):
        raise InputError(f"{where}: give an object with time, key and prompt")
    values = {name: value for name, value in values.items() if value is not None}
    for names, kind, told in ((_NUMBERS, (int, float), "a number"), (_TEXTS, str, "a text")):
        for name in names:
            if name in values and (not isinstance(values[name], kind) or isinstance(values[name], bool)):
                raise InputError(f"{where}: {name}={values[name]!r}; give {told}")
    return values


def _evenly(rows: list[tuple[Figures, ...]]) -> list[tuple[Figures, ...]]:
    step = max(1.0, len(rows) / PER_PARTY)
    return [rows[int((i + 1) * step) - 1] for i in range(min(len(rows), PER_PARTY))]
