"""`make gateway-load`: what the gateway costs beside the engine alone, and what half an hour of ill use does to it.

Throughput is a ratio: the same requests go to the gateway and to `adlocal engine` with the same flags, in turns, at 1,
4 and 8 at once. The gateway's processor time is read from the kernel, over the parts that it has passed on. The model
is tiny, so that parts come as fast as they ever will; `--real` takes SmolLM2, where the model is what costs.

`--soak MINUTES` sends answers, hang-ups, garbage, readers that stall and bodies that dribble, and prints the anonymous
memory of gateway and engine. It fails where a slot is stuck, a request is lost, a row was not evaluated, or memory grew
after the first third.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx2

from adlocal_convert.convert import convert
from adlocal_convert.demo.smollm2 import demo_model
from adlocal_convert.demo.word_problems import word_problems
from adlocal_convert.options import Options
from bench.soak import anonymous
from support import tiny
from support.engines import serving
from support.gateway import Gateway, gateway
from support.json_lines import write_lines

N_SLOTS = 8
TOKENS = 200
#: MB by which the gateway may grow after the first third.
GROWTH = 4.0
_STALL_SECONDS = 3.0


def main() -> int:
    """Returns 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M instead of a tiny model")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="instead of throughput")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as exits:
        directory = Path(name)
        teacher, bundle = real_parts(directory) if args.real else tiny_parts(directory)
        flags = ["-np", N_SLOTS, "-c", 256]
        config = f"[limits]\nstall_seconds = {_STALL_SECONDS}\nbody_seconds = 2.0\n"
        seconds = 7200.0
        gate = exits.enter_context(gateway(teacher, bundle, directory, *flags, config=config, seconds=seconds))
        if args.soak is not None:
            return soak(gate, args.soak)
        engine = exits.enter_context(alone(teacher, bundle, directory))
        return throughput(gate, engine, args.rounds)


def tiny_parts(directory: Path) -> tuple[Path, Path]:
    """A tiny teacher whose tokens are text, and its bundle."""
    teacher = tiny.write_readable(directory / "teacher.gguf", max_position_embeddings=1024)
    traces = write_lines(directory / "traces.jsonl", *word_problems(8))
    convert(
        Options(str(teacher), {"traces": traces}, directory / "bundle", carriers=1.0, n_threads=1), lambda line: None
    )
    return teacher, directory / "bundle"


def real_parts(directory: Path) -> tuple[Path, Path]:
    """SmolLM2 and a bundle of it."""
    traces = write_lines(directory / "traces.jsonl", *word_problems(32))
    convert(Options(str(demo_model()), {"traces": traces}, directory / "bundle"), print)
    return Path(demo_model()), directory / "bundle"


@contextmanager
def alone(teacher: Path, bundle: Path, directory: Path) -> Iterator[str]:
    """The address of an engine without a gateway."""
    command = [sys.executable, "-m", "adlocal", "engine", "-m", teacher, "--bundle", bundle, "--port", 0, "-t", 1]
    command += ["-np", N_SLOTS, "-c", 256 * N_SLOTS, "-cram", 0]
    with serving(command, directory / "engine.log", seconds=7200.0) as server:
        yield server.address


def throughput(gate: Gateway, engine: str, rounds: int) -> int:
    """Prints a line for each number of requests at once."""
    print(
        "at once  engine parts/s  gateway parts/s  ratio: median [least, most] of rounds    gateway µs/part", flush=True
    )
    for n in (1, 4, 8):
        ratios, speeds, per_part = [], {"engine": [0.0], "gateway": [0.0]}, []
        for i in range(rounds + 1):  # the first warms up
            for name, url in (("engine", engine), ("gateway", gate.url))[:: 1 if i % 2 else -1]:
                before, began = processor_seconds(gate), time.monotonic()
                n_parts = answers(url, n, seed=i)
                speeds[name].append(n_parts / (time.monotonic() - began))
                if name == "gateway" and i:
                    per_part.append(1e6 * (processor_seconds(gate) - before) / n_parts)
            if i:
                ratios.append(speeds["gateway"][-1] / speeds["engine"][-1])
        engines, own = (statistics.median(speeds[name][2:]) for name in ("engine", "gateway"))
        spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        print(f"{n:7}  {engines:14.1f}  {own:15.1f}  {spread:39}  {statistics.median(per_part):15.0f}", flush=True)
    request, part = costs(gate, rounds)
    print(f"a request costs the gateway {request:.1f} ms of processor time, and each part of its answer {part:.0f} µs")
    return 0


def answers(url: str, n: int, seed: int, n_tokens: int = 0) -> int:
    """Asks for n streams at once, and counts the parts that have text."""

    def one(i: int) -> int:
        body = chat(f"{i} and {seed}", n_tokens or TOKENS, seed)
        with httpx2.Client(base_url=url, timeout=300, trust_env=False) as client:
            answered = client.post("/v1/chat/completions", json=body)
        text = answered.raise_for_status().text
        return sum(line.startswith("data: {") and '"content":"' in line for line in text.splitlines())

    with ThreadPoolExecutor(n) as pool:
        return sum(pool.map(one, range(n)))


def chat(text: str, n: int, seed: int) -> dict[str, object]:
    """A chat that is streamed, greedily."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": n, "stream": True, "seed": seed, "temperature": 0}


def processor_seconds(gate: Gateway) -> float:
    """Of all threads of the gateway's own process so far, as the kernel's scheduler counts them."""
    tasks = Path(f"/proc/{gate.server.process.pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def costs(gate: Gateway, rounds: int) -> tuple[float, float]:
    """Processor time of a request, ms, and of one more part of its answer, µs: from short answers and long ones."""
    found = []
    for _ in range(rounds):
        spent = {}
        for n_tokens in (8, TOKENS):
            before = processor_seconds(gate)
            spent[n_tokens] = (answers(gate.url, N_SLOTS, 0, n_tokens), processor_seconds(gate) - before)
        (few, short), (many, long) = spent.values()
        part = (long - short) / (many - few)
        found.append(((short - few * part) / N_SLOTS, part))
    request, part = (statistics.median(each) for each in zip(*found, strict=True))
    return 1e3 * request, 1e6 * part


def soak(gate: Gateway, minutes: float) -> int:
    """Sends requests of all kinds for so long; prints, and returns the exit status."""
    outcomes: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    expected = answer(gate)
    threads = [threading.Thread(target=misuse, args=(gate, seed, until, outcomes), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    seen = watch(gate, outcomes, until)
    for thread in threads:
        thread.join(120)
    gate.wait_until(lambda: not processing(gate), 60)
    third = seen[len(seen) // 3]
    grown = [last - before for before, last in zip(third, seen[-1], strict=True)]
    counters = gate.control().counters()
    answered = Counter(str(record["status"]) for record in gate.records())
    print(f"requests {dict(outcomes)}; answered {dict(answered)}; rows {counters.n_rows:,}")
    print(f"growth after the first third: gateway {grown[0]:+.1f} MB, engine {grown[1]:+.1f} MB")
    failures = [
        said
        for fails, said in (
            (gate.server.process.poll() is not None, "the gateway has ended"),
            (any(thread.is_alive() for thread in threads), "a client still waits"),
            (grown[0] > GROWTH, "the gateway's memory grew"),
            (counters.n_choices != counters.n_evaluated, "a row with a choice was not evaluated"),
            (counters.n_closed > 0, "a row was closed"),
            (answered["200"] < outcomes["whole"], "a request was lost"),
            (bool(outcomes["5xx"]), "the gateway failed"),
            (answer(gate) != expected, "it says something else than at the start"),
        )
        if fails
    ]
    print("\n".join(failures) or "all of it holds")
    return 1 if failures else 0


def answer(gate: Gateway) -> str:
    """To a fixed request."""
    found = gate.chat("tick tock", 16, temperature=0)
    text: str = found.json()["choices"][0]["message"]["content"]
    return text


def processing(gate: Gateway) -> bool:
    """Whether it thinks that it works on something."""
    lines = gate.get("/metrics").text.splitlines()
    return any(float(line.split()[1]) for line in lines if line.startswith("llamacpp:requests_"))


def watch(gate: Gateway, outcomes: Counter[str], until: float) -> list[list[float]]:
    """Anonymous memory of gateway and engine every ten seconds, MB; a line every minute."""
    seen = []
    while time.monotonic() < until:
        seen.append([anonymous(gate.server.process.pid), anonymous(gate.control().pid)])
        if len(seen) % 6 == 1:
            own, engine = seen[-1]
            asked = sum(outcomes.values())
            print(
                f"{len(seen) // 6:4} min  gateway {own:7.1f} MB  engine {engine:7.1f} MB  {asked:8,} requests",
                flush=True,
            )
        time.sleep(10)
    return seen


def misuse(gate: Gateway, seed: int, until: float, outcomes: Counter[str]) -> None:
    """Requests of all kinds, one after the other."""
    rng = random.Random(seed)
    kinds: Sequence[tuple[str, float, Callable[[Gateway, random.Random], str]]] = (
        ("whole", 0.70, whole),
        ("hang-up", 0.15, hang_up),
        ("garbage", 0.09, garbage),
        ("stalled", 0.03, stalled),
        ("dribble", 0.03, dribble),
    )
    while time.monotonic() < until:
        _, _, kind = rng.choices(kinds, [weight for _, weight, _ in kinds])[0]
        outcomes[kind(gate, rng)] += 1
        time.sleep(rng.expovariate(10))


def whole(gate: Gateway, rng: random.Random) -> str:
    """An answer, read to its end."""
    body = {**chat("x" * rng.randrange(60), rng.randrange(1, 100), rng.randrange(99)), "stream": rng.random() < 0.5}
    path = rng.choice(["/v1/chat/completions", "/v1/messages"])
    found = gate.post(path, {**body, "model": "m"})
    return "whole" if found.status_code == 200 else status(found.status_code)


def status(code: int) -> str:
    return "5xx" if code >= 500 else str(code)


def hang_up(gate: Gateway, rng: random.Random) -> str:
    """The beginning of an answer."""
    with connected(gate) as connection:
        connection.sendall(raw(chat("x", 150, 0)))
        connection.settimeout(rng.random() * 0.3)
        with suppress(TimeoutError):
            connection.recv(100)
    return "hung up"


def garbage(gate: Gateway, rng: random.Random) -> str:
    """Bytes that are no request, or no JSON."""
    with connected(gate) as connection:
        data = rng.randbytes(rng.randrange(1, 400))
        connection.sendall(data if rng.random() < 0.5 else head(len(data)) + data)
        connection.settimeout(2)
        try:
            return "garbage" if not connection.recv(100).startswith(b"HTTP/1.1 5") else "5xx"
        except (TimeoutError, OSError):
            return "garbage"


def stalled(gate: Gateway, rng: random.Random) -> str:
    """A reader that reads nothing of many answers."""
    with connected(gate) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(raw({**chat("x", 150, 0), "n": 8}))
        time.sleep(rng.random() * 2 * _STALL_SECONDS)
    return "stalled"


def dribble(gate: Gateway, rng: random.Random) -> str:
    """A body that comes byte by byte, and not in time."""
    with connected(gate) as connection:
        connection.sendall(head(1000))
        with suppress(OSError):
            for _ in range(rng.randrange(10, 30)):
                connection.sendall(b" ")
                time.sleep(0.1)
    return "dribbled"


@contextmanager
def connected(gate: Gateway) -> Iterator[socket.socket]:
    """A connection of its own."""
    host, port = gate.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        yield connection


def raw(body: dict[str, object]) -> bytes:
    """A request as it goes over the line."""
    data = json.dumps(body).encode()
    return head(len(data)) + data


def head(length: int) -> bytes:
    """Of a chat request."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )


if __name__ == "__main__":
    sys.exit(main())
