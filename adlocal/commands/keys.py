"""`adlocal keys`: makes, lists and revokes keys of the gateway."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ..errors import InputError
from ..serve.keys import Keys, open_keys
from ..serve.state import Charge, KeyRecord, Store, default_directory, is_redis, open_store

_TITLES = ("id", "owner", "tier", "created", "expires", "is", "tokens used", "of", "note")


def run(args: argparse.Namespace) -> None:
    """Does what the action says."""
    asyncio.run({"add": _add, "list": _list, "revoke": _revoke}[args.action](args))


async def _add(args: argparse.Namespace) -> None:
    async with _opened(args) as (_, keys):
        key, record = await keys.add(
            args.owner,
            tier=args.tier,
            expires=None if args.expires is None else expiry(args.expires, time.time()),
            operator=args.operator,
            trusted=args.trusted,
            budget_tokens=args.budget,
            declared="evaluation" if args.evaluation else None,
            note=args.note,
        )
    if args.json:
        print(json.dumps({"key": key, **asdict(record)}))
        return
    print(key)
    print(f"key {record.id} of {record.owner}; its text is shown this once", file=sys.stderr)


async def _list(args: argparse.Namespace) -> None:
    async with _opened(args) as (store, keys):
        records = await keys.records()
        levels = await store.levels([Charge(f"key:{each.id}", "budget_tokens", 0, 0) for each in records])
    used = [level.taken for level in levels]
    if args.json:
        print(json.dumps([asdict(each) | {"used_tokens": n} for each, n in zip(records, used, strict=True)]))
    else:
        print(describe(records, used, time.time()))


async def _revoke(args: argparse.Namespace) -> None:
    async with _opened(args) as (_, keys):
        missing = set(args.id) - {record.id for record in await keys.records()}
        if missing:
            raise InputError(
                f"key {min(missing)}: there is none of this id, and none was revoked; see adlocal keys list"
            )
        for id in args.id:
            await keys.revoke(id)


@asynccontextmanager
async def _opened(args: argparse.Namespace) -> AsyncIterator[tuple[Store, Keys]]:
    if is_redis(args.state) and args.pepper is None:
        raise InputError("--state in Redis: give --pepper FILE, the same file on every node")
    store = await open_store(args.state)
    try:
        directory = Path(args.state) if args.state else default_directory()
        yield store, await open_keys(store, args.pepper or directory / "pepper")
    finally:
        await store.close()


def expiry(text: str, now: float) -> int:
    """Seconds since 1970 of "30d", "12h", or a date as ISO 8601 writes it, in UTC where it does not say.

    Raises:
        InputError: it is none of them.
    """
    try:
        if span := re.fullmatch(r"(\d+)([dh])", text):
            after = timedelta(days=int(span[1])) if span[2] == "d" else timedelta(hours=int(span[1]))
            return int((datetime.fromtimestamp(now, UTC) + after).timestamp())
        date = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise InputError(f"--expires {text}: give 30d, 12h, or a date such as 2027-01-31") from None
    return int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())


def describe(records: list[KeyRecord], used: list[int], now: float) -> str:
    """A table with a line for each key."""
    if not records:
        return "there are no keys; make one with adlocal keys add --owner NAME"
    lines = [_TITLES, *(_line(*each, now) for each in zip(records, used, strict=True))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _line(record: KeyRecord, used: int, now: float) -> tuple[str, ...]:
    return (
        record.id,
        record.owner,
        record.tier,
        _date(record.created),
        _date(record.expires),
        ", ".join(_marks(record, now)) or "-",
        f"{used:,}",
        "-" if record.budget_tokens is None else f"{record.budget_tokens:,}",
        record.note,
    )


def _marks(record: KeyRecord, now: float) -> list[str]:
    marks = {
        "revoked": record.revoked is not None,
        "expired": record.expires is not None and record.expires <= now,
        "operator": record.operator,
        "trusted": record.trusted,
        record.declared or "": record.declared is not None,
    }
    return [mark for mark, is_so in marks.items() if is_so]


def _date(seconds: int | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
