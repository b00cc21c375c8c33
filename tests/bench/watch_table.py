"""`make watch-table`: what the extraction watch raises of honest traffic and of harvests, in one table.

Calibrates on one half of the texts, with its own seeds, and measures on the other; see docs/evidence/watch.md.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adlocal.serve.watch import Watch, WatchSettings, fit, samples
from adlocal.serve.watch.records import Admitted, Record
from bench.watch_traffic import (
    STYLES,
    Asked,
    Texts,
    class_room,
    declared,
    harvest,
    people,
    program,
    read_texts,
)

SHARES = (0.05, 0.2, 0.5, 1.0)
#: Programs of which nothing is a harvest, to see what the filler alone does.
NONE = 0.0
#: Requests of a harvest by one key, and by 50.
N_SINGLE, N_SPREAD = 400, 3000


@dataclass
class Seen:
    """What became of some traffic.

    Attributes:
        keys, raised: keys, and those of which a request was ever raised.
        requests, requests_raised: the honest ones where a harvest is mixed, all of them else.
        harvested, harvested_raised: of a harvest's own requests.
        first: of each harvest, its requests up to the first that was raised; None for never.
    """

    keys: set[str] = field(default_factory=set)
    raised: set[str] = field(default_factory=set)
    requests: int = 0
    requests_raised: int = 0
    harvested: int = 0
    harvested_raised: int = 0
    first: int | None = None


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    place = os.environ.get("ADLOCAL_WATCH_DATA", "build/watch-data")
    parser.add_argument("data", type=Path, nargs="?", default=Path(place), help="directory of the two wheels")
    parser.add_argument(
        "--problems", type=Path, default=os.environ.get("ADLOCAL_TEST_TRACES"), help="GSM8K, JSON lines"
    )
    parser.add_argument("--campaigns", type=int, default=20, metavar="N", help="of one key; a quarter of it spread")
    parser.add_argument("--dev", action="store_true", help="measure on the half that is calibrated on, for development")
    args = parser.parse_args()
    if args.problems is None:
        parser.error("give --problems FILE.jsonl, or set ADLOCAL_TEST_TRACES")
    calibration, test = read_texts(_wheel(args.data, "inspect_evals"), _wheel(args.data, "chatterbot"), args.problems)
    began = time.monotonic()
    settings = calibrated(calibration)
    seed, texts = (500, calibration) if args.dev else (1000, test)
    print_honest(settings, texts, seed)
    print_single(settings, texts, seed, args.campaigns)
    print_spread(settings, texts, seed, max(1, args.campaigns // 4))
    print(f"\n{time.monotonic() - began:.0f} s")
    return 0


def calibrated(texts: Texts) -> WatchSettings:
    """The watch of an operator whose benign traffic is 150 people's chat and 50 people of one app, a day of each."""
    rng = np.random.default_rng(1)
    asked = [*people(rng, "chat", texts, 150), *people(rng, "app", texts, 50, app=True)]
    records: list[Record] = []
    for each in in_order(asked):
        records += [Admitted.of(each.observation), each.outcome]
    records.sort(key=lambda record: record.time)
    return WatchSettings(baseline=fit(samples(records, WatchSettings())))


def in_order(many: Iterable[list[Asked]]) -> list[Asked]:
    """All requests, by time."""
    return sorted((each for asked in many for each in asked), key=lambda each: each.observation.time)


Found = tuple[Seen, Seen]


def watched(settings: WatchSettings, many: Sequence[Sequence[Asked]]) -> list[Found]:
    """What a watch does to the honest keys, and to the harvesters'; of each traffic, on all cores."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_seen, [settings] * len(many), many))


def _seen(settings: WatchSettings, asked: Sequence[Asked]) -> Found:
    return asyncio.run(_watched(settings, asked))


async def _watched(settings: WatchSettings, asked: Sequence[Asked]) -> tuple[Seen, Seen]:
    watch, honest, theirs = Watch(settings), Seen(), Seen()
    harvesters = {each.observation.key for each in asked if each.harvest}
    ends = sorted((each.outcome for each in asked), key=lambda outcome: outcome.time)
    n_ended = 0
    for each in asked:
        while n_ended < len(ends) and ends[n_ended].time <= each.observation.time:
            await watch.finished(ends[n_ended])
            n_ended += 1
        level = await watch.admit(each.observation)
        seen, up = theirs if each.observation.key in harvesters else honest, level.position > 0
        seen.keys.add(each.observation.key)
        if up:
            seen.raised.add(each.observation.key)
        if each.harvest:
            seen.harvested, seen.harvested_raised = seen.harvested + 1, seen.harvested_raised + up
        seen.requests, seen.requests_raised = seen.requests + 1, seen.requests_raised + up
        if up and seen.first is None:
            seen.first = seen.requests
    return honest, theirs


def print_honest(settings: WatchSettings, texts: Texts, seed: int) -> None:
    """False positives: keys of which any request was raised."""
    rng = np.random.default_rng(seed)
    chat, app = list(people(rng, "chat", texts, 200)), list(people(rng, "app", texts, 100, app=True))
    classes = [in_order(class_room(rng, "student", texts, 30)) for _ in range(5)]
    loop = "Answer this problem. Reason step by step, and end with the number alone.\n\n{}"
    loops = [program(rng, "loop", _drawn(rng, texts.problems, 250), loop, True, 400.0) for _ in range(10)]
    jobs = [program(rng, "job", _drawn(rng, texts.chat, 250), texts.batch, False, 40.0) for _ in range(10)]
    traffics = {
        "chat, a day": [in_order(chat)],
        "one app's users, a day": [in_order(app)],
        "both at once": [in_order([*chat, *app])],
        "a class with the app": classes,
        "batch job, no reasoning": jobs,
        "evaluation, declared": [declared(each) for each in loops],
        "evaluation, undeclared": loops,
    }
    print(f"{'Honest traffic':24}  {'keys':>4}  {'raised':>6}  {'share [95%]':22}  {'requests':>8}  of them raised")
    for name, many in traffics.items():
        print(_honest_line(name, *(honest for honest, _ in watched(settings, many))), flush=True)


def print_single(settings: WatchSettings, texts: Texts, seed: int, n: int) -> None:
    """Harvests by one key, one request each 15 seconds."""
    print(_title(f"One key, {N_SINGLE} requests"))
    cells = [("template", "chat", NONE), ("template", "app", NONE)]
    cells += [(style, "chat", share) for style in STYLES for share in SHARES]
    cells += [("template", "app", share) for share in SHARES]
    for style, filler, share in cells:
        rng = np.random.default_rng([seed, 1])
        many = [harvest(rng, ["h"], texts, style, share, N_SINGLE, 15, filler) for _ in range(n)]
        print(_harvest_line(style, filler, share, watched(settings, many)), flush=True)
    rng = np.random.default_rng([seed, 2])
    slow = [harvest(rng, ["h"], texts, "template", 1.0, N_SINGLE, 180) for _ in range(n)]
    print(_harvest_line("template, one in 3 min", "-", 1.0, watched(settings, slow)), flush=True)


def print_spread(settings: WatchSettings, texts: Texts, seed: int, n: int) -> None:
    """Harvests by 50 keys, 60 requests each in four hours, while 20 people chat and 30 use the app."""
    print(_title(f"50 keys, {N_SPREAD:,} requests") + "  honest keys raised")
    keys = [f"h{i}" for i in range(50)]
    for style in STYLES:
        for share in SHARES:
            many = []
            for i in range(n):
                rng = np.random.default_rng([seed, 3, i])
                others = [*people(rng, "chat", texts, 20), *people(rng, "app", texts, 30, app=True)]
                many.append(in_order([*others, harvest(rng, keys, texts, style, share, N_SPREAD, 5)]))
            found = watched(settings, many)
            raised, n_honest = sum(len(each.raised) for each, _ in found), sum(len(each.keys) for each, _ in found)
            print(f"{_harvest_line(style, 'chat', share, found)}  {raised:6} of {n_honest}", flush=True)


def _drawn(rng: np.random.Generator, many: Sequence[str], n: int) -> list[str]:
    return [many[i] for i in rng.permutation(len(many))[:n]]


def _title(what: str) -> str:
    shown = f"{'mixed into':10}  {'share':>5}  {'detected [95%]':22}  {'requests until: median':>22}  {'90%':>5}"
    return f"\n{what:24}  {shown}  harvested raised"


def wilson(k: int, n: int) -> tuple[float, float]:
    """95% interval of a share k / n."""
    z2 = 1.96**2
    middle, half = (k + z2 / 2) / (n + z2), 1.96 * math.sqrt(k * (n - k) / n + z2 / 4) / (n + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(k: int, n: int) -> str:
    low, high = wilson(k, n)
    return f"{k / n:6.1%} [{low:.1%}, {high:.1%}]"


def _honest_line(name: str, *many: Seen) -> str:
    keys, raised = sum(len(each.keys) for each in many), sum(len(each.raised) for each in many)
    requests, up = sum(each.requests for each in many), sum(each.requests_raised for each in many)
    return f"{name:24}  {keys:4}  {raised:6}  {_share(raised, keys):22}  {requests:8}  {up / requests:14.1%}"


def _harvest_line(style: str, filler: str, share: float, many: Sequence[Found]) -> str:
    """A row; where nothing is a harvest, of the program that only fills."""
    seen = [theirs if share else honest for honest, theirs in many]
    detected = sorted(each.first for each in seen if each.first is not None)
    firsts = [*detected, *[math.inf] * (len(seen) - len(detected))]
    median, most = firsts[(len(firsts) - 1) // 2], firsts[math.ceil(0.9 * len(firsts)) - 1]
    harvested, up = sum(each.harvested for each in seen), sum(each.harvested_raised for each in seen)
    until = "  ".join(f"{'never' if math.isinf(each) else each:>{width}}" for each, width in ((median, 22), (most, 5)))
    share_raised = f"{up / harvested:16.1%}" if harvested else f"{'-':>16}"
    name = style if share else "nothing"
    return f"{name:24}  {filler:10}  {share:5.0%}  {_share(len(detected), len(seen)):22}  {until}  {share_raised}"


def _wheel(directory: Path, name: str) -> Path:
    found = sorted(directory.glob(f"{name}*.whl"))
    if not found:
        raise SystemExit(
            f"{directory}: no {name} wheel; "
            f"pip download --no-deps -d {directory} inspect-evals==0.28.0 chatterbot-corpus==1.3.3"
        )
    return found[-1]


if __name__ == "__main__":
    raise SystemExit(main())
