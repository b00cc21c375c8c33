"""`make soak`: llama-server under `adlocal run`, with half an hour of mixed load: answers, hang-ups and garbage.

A plain server beside it is sent the same. The anonymous memory of both is printed, minute by minute. It fails where the
protected one's grew by more than the plain one's after the first third, where a slot is stuck at the end, where the
server says something else than at the start, or where a row was not counted. The model is tiny: what may leak is the
bookkeeping, not the weights.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from adlocal.plugin import control_directory
from adlocal_convert.convert import convert
from adlocal_convert.demo.word_problems import word_problems
from adlocal_convert.options import Options
from llama_server import server
from support import tiny
from support.barrage import Barrage, control_of
from support.json_lines import write_lines
from support.llama_server import Server

N_SLOTS = 4
PROMPT = [tiny.BOS, *b"tick tock tick tock tick tock"]
#: MB by which the protected server may grow beyond the plain one, after the first third.
GROWTH = 1.0


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
        asked = ["-m", teacher, "--cache-ram", 1, "--slots"]
        with (
            Server(asked, None, n_parallel=N_SLOTS, log=Path(name) / "plain.log") as plain,
            Server(asked, bundle, ["--control", directory], n_parallel=N_SLOTS, log=Path(name) / "log") as running,
        ):
            return soak(plain, running, directory, args.minutes, args.rate)


def tiny_parts(directory: Path) -> tuple[Path, Path]:
    """A tiny teacher and its bundle."""
    teacher = tiny.write_gguf(tiny.tiny_model(), directory / "teacher.gguf", tiny.CHAT_TEMPLATE)
    traces = write_lines(directory / "traces.jsonl", *word_problems(8))
    options = Options(str(teacher), {"traces": traces}, directory / "bundle", carriers=1.0, n_threads=1)
    convert(options, lambda line: None)
    return teacher, directory / "bundle"


def soak(plain: Server, running: Server, directory: Path, minutes: float, rate: float) -> int:
    """Sends requests for so long; prints, and returns the exit status."""
    expected, until = running.complete(PROMPT, 16), time.monotonic() + 60 * minutes
    clients = [(Barrage(running, seed), Barrage(plain, seed)) for seed in range(N_SLOTS)]
    threads = [threading.Thread(target=ask, args=(pair, until, rate), daemon=True) for pair in clients]
    for thread in threads:
        thread.start()
    grown = watch((plain, running), [own for own, _ in clients], until)
    for thread in threads:
        thread.join(120)
    outcomes = sum((own.outcomes for own, _ in clients), Counter[str]())
    counters = control_of(running, directory).counters()
    print(f"requests: {dict(outcomes)}; rows {counters.n_rows:,}, with a choice {counters.n_choices:,}")
    print(f"growth after the first third: plain {grown[0]:+.1f} MB, protected {grown[1]:+.1f} MB")
    failures = [
        said
        for fails, said in (
            (running.process.poll() is not None, "the server has ended"),
            (any(thread.is_alive() for thread in threads), "a client still waits"),
            (grown[1] > max(grown[0], 0) + GROWTH, "memory grew"),
            (any(slot["is_processing"] for slot in running.ask("/slots")), "a slot is stuck"),
            (running.complete(PROMPT, 16) != expected, "the server says something else than at the start"),
            (counters.n_rows != counters.n_evaluated, "a row was not evaluated, and this teacher is sure of nothing"),
            (sum(own.n_tokens for own, _ in clients) > counters.n_rows, "a token came from no row"),
        )
        if fails
    ]
    print("\n".join(failures) or "all of it holds")
    return 1 if failures else 0


def ask(clients: tuple[Barrage, Barrage], until: float, rate: float) -> None:
    """The same requests to both at random times until then."""
    while time.monotonic() < until:
        for client in clients:
            client.one()
        time.sleep(clients[0].pause(rate))


def watch(servers: Sequence[Server], clients: list[Barrage], until: float) -> list[float]:
    """How much anonymous memory grew after the first third, in MB. A line is printed every minute."""
    seen: list[list[float]] = []
    while time.monotonic() < until and all(server.process.poll() is None for server in servers):
        seen.append([anonymous(server.process.pid) for server in servers])
        if len(seen) % 6 == 1:
            asked = sum(sum(client.outcomes.values()) for client in clients)
            plain, protected = seen[-1]
            print(
                f"{len(seen) // 6:4} min  plain {plain:7.1f} MB  protected {protected:7.1f} MB  {asked:8,} requests",
                flush=True,
            )
        time.sleep(10)
    return [last - before for before, last in zip(seen[len(seen) // 3], seen[-1], strict=True)]


def anonymous(pid: int) -> float:
    """MB of a process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    sys.exit(main())
