"""`make soak`: llama-server under `adlocal run`, with half an hour of mixed load: answers, hang-ups and garbage.

It says what the anonymous memory of the server was, minute by minute, and fails where it grew after the first third,
where a slot is stuck at the end, where the server says something else than at the start, or where a row was not
counted.
The model is tiny: what may leak is the bookkeeping, not the weights.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

from adlocal.plugin import control_directory
from adlocal_convert.convert import convert
from adlocal_convert.demo.word_problems import word_problems
from adlocal_convert.options import Options
from llama_server import server
from support import tiny
from support.barrage import Barrage
from support.json_lines import write_lines
from support.llama_server import Server

N_SLOTS = 4
PROMPT = [tiny.BOS, *b"tick tock tick tock tick tock"]
#: By how much memory may be larger at the end than after the first third.
GROWTH = 1.05


def main() -> int:
    """Returns 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, metavar="N")
    parser.add_argument(
        "--rate", type=float, default=10.0, metavar="N", help="requests a second of each of the clients"
    )
    args = parser.parse_args()
    if not server().exists():
        print("soak: no llama-server here; run `make test-server` first", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        teacher, bundle = tiny_parts(Path(name))
        directory = control_directory(Path(name) / "control")
        asked = ["-m", teacher, "--cache-ram", 16, "--slots"]
        with Server(asked, bundle, ["--control", directory], n_parallel=N_SLOTS, log=Path(name) / "log") as running:
            return soak(
                running, [Barrage(running, directory, seed) for seed in range(N_SLOTS)], args.minutes, args.rate
            )


def tiny_parts(directory: Path) -> tuple[Path, Path]:
    """A tiny teacher and its bundle."""
    teacher = tiny.write_gguf(tiny.tiny_model(), directory / "teacher.gguf", tiny.CHAT_TEMPLATE)
    traces = write_lines(directory / "traces.jsonl", *word_problems(8))
    options = Options(str(teacher), {"traces": traces}, directory / "bundle", carriers=1.0, n_threads=1)
    convert(options, lambda line: None)
    return teacher, directory / "bundle"


def soak(running: Server, clients: list[Barrage], minutes: float, rate: float) -> int:
    """Sends requests for so long; prints, and returns the exit status."""
    expected, until = running.complete(PROMPT, 16), time.monotonic() + 60 * minutes
    threads = [threading.Thread(target=ask, args=(client, until, rate), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    seen = watch(running, clients, until)
    for thread in threads:
        thread.join(120)
    outcomes = sum((client.outcomes for client in clients), clients[0].outcomes.__class__())
    counters = clients[0].counters()
    print(f"requests: {dict(outcomes)}; rows {counters.n_rows:,}, with a choice {counters.n_choices:,}")
    third = seen[len(seen) // 3 :]
    failures = [
        said
        for fails, said in (
            (running.process.poll() is not None, "the server has ended"),
            (any(thread.is_alive() for thread in threads), "a client still waits"),
            (max(third) > GROWTH * third[0], f"memory grew from {third[0]:.1f} to {max(third):.1f} MB"),
            (any(slot["is_processing"] for slot in running.get("/slots")), "a slot is stuck"),
            (running.complete(PROMPT, 16) != expected, "the server says something else than at the start"),
            (counters.n_choices != counters.n_evaluated, "a row with a choice was not evaluated"),
            (sum(client.n_tokens for client in clients) > counters.n_rows, "a token came from no row"),
        )
        if fails
    ]
    print("\n".join(failures) or "all of it holds")
    return 1 if failures else 0


def ask(client: Barrage, until: float, rate: float) -> None:
    """Requests at random times until then."""
    while time.monotonic() < until:
        client.one()
        time.sleep(client.pause(rate))


def watch(running: Server, clients: list[Barrage], until: float) -> list[float]:
    """Anonymous memory in MB, a figure every ten seconds; a line is printed every minute."""
    seen = []
    while time.monotonic() < until and running.process.poll() is None:
        seen.append(anonymous(running.process.pid))
        if len(seen) % 6 == 1:
            asked = sum(sum(client.outcomes.values()) for client in clients)
            print(f"{len(seen) // 6:4} min  {seen[-1]:8.1f} MB  {asked:8,} requests", flush=True)
        time.sleep(10)
    return seen


def anonymous(pid: int) -> float:
    """MB of a process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    sys.exit(main())
