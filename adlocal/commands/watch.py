"""`adlocal watch`: whom the extraction watch suspects, from what the gateways recorded."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import check_target
from ..serve.state import default_directory, is_redis
from ..serve.watch import (
    Row,
    Watch,
    WatchSettings,
    fit,
    open_log,
    read_baseline,
    read_observations,
    samples,
    write_baseline,
)
from ..serve.watch.baseline import as_toml
from ..serve.watch.calibration import recorded
from ..serve.watch.logs import FILE, Log

_CLEAR = "\033[H\033[J"
_TITLES = ("subject", "owner", "requests", "tokens", "score", "level", "signals")
_LEFT = (0, 1, 6)


def run(args: argparse.Namespace) -> None:
    """Prints the table, calibrates, or resets."""
    actions: dict[str | None, Callable[[argparse.Namespace], Coroutine[Any, Any, None]]]
    actions = {None: _show, "calibrate": _calibrate, "reset": _reset}
    with suppress(KeyboardInterrupt):
        asyncio.run(actions[args.action](args))


async def _show(args: argparse.Namespace) -> None:
    settings = WatchSettings()
    if args.baseline:
        settings = replace(settings, baseline=read_baseline(args.baseline))
    watch = Watch(settings, _log(args.state))
    try:
        while True:
            await watch.read()
            rows = watch.table(time.time())
            if args.watch and not args.json and sys.stdout.isatty():
                print(_CLEAR, end="")
            print(json.dumps([asdict(row) for row in rows]) if args.json else describe(rows), flush=True)
            if not args.watch:
                return
            await asyncio.sleep(args.watch)
    finally:
        await watch.close()


async def _calibrate(args: argparse.Namespace) -> None:
    if args.out:
        check_target("--out", args.out, ".toml")
    settings = WatchSettings()
    if args.observations:
        records = read_observations(args.observations)
    else:
        log = _log(args.state)
        try:
            records = list(recorded(await log.read("")))
        finally:
            await log.close()
    baseline = fit(samples(records, settings))
    if not any(baseline.values()):
        raise InputError(
            f"{len(records)} records are too few to calibrate on; let the gateway serve for a day, or give --from"
        )
    if args.out:
        write_baseline(args.out, baseline)
    else:
        print(as_toml(baseline), end="")


async def _reset(args: argparse.Namespace) -> None:
    watch = Watch(log=_log(args.state))
    try:
        await watch.read()
        if args.subject not in {row.subject for row in watch.table(time.time())}:
            raise InputError(f"{args.subject}: the watch has not seen it in the last day; see adlocal watch")
        await watch.reset(args.subject, time.time())
        await watch.write()
    finally:
        await watch.close()


def _log(state: str | None) -> Log:
    """The log of gateways that run or ran; none is made.

    Raises:
        InputError: there is none.
    """
    place = state or str(default_directory())
    if not is_redis(place) and not (Path(place) / FILE).is_file():
        raise InputError(f"{place}: no watch has kept its state there; give the --state of adlocal serve")
    return open_log(place, WatchSettings().capacity.records)


def describe(rows: list[Row]) -> str:
    """A table, the most suspicious first."""
    if not rows:
        return "nobody has asked anything in the last day"
    lines = [_TITLES, *map(_line, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(_placed(line, widths)).rstrip() for line in lines)


def _line(row: Row) -> tuple[str, ...]:
    owner = f"{row.parties} clients" if row.parties else row.owner
    level = "declared" if row.evaluation else f"{row.position:.2f}"
    signals = ", ".join(row.signals) or "-"
    tokens = f"{row.tokens:,}" if not row.parties else "-"
    return (row.subject, owner or "-", f"{row.requests:,}", tokens, f"{row.score:.2f}", level, signals)


def _placed(line: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        cell.ljust(width) if i in _LEFT else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
