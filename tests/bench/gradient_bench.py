"""`make bench-gradient`: time and memory of the gradient, beside a bare forward-and-backward loop of transformers.

Each contestant runs in a process of its own on the same traces, one after the other. Memory is the process's peak
resident memory less what it held before the model was opened (interpreter and libraries).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from adlocal.llamacpp.model import open_vocabulary
from adlocal.traces import EncodedTrace, Trace, TraceEncoder
from adlocal_convert.demo.smollm2 import demo_model
from adlocal_convert.demo.word_problems import word_problems
from adlocal_convert.direction.gradient import Settings, compute_gradient
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.source.export import export_directory
from adlocal_convert.source.quantize import quantize
from support import families

CONTESTANTS = ("bare", "ours", "low-memory")


def main() -> int:
    """Prints a row a contestant; with --contestant runs one and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model(), metavar="PROXY.gguf")
    parser.add_argument("-n", type=int, default=16, help="traces")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contestant", choices=CONTESTANTS)
    parser.add_argument("--random", type=int, metavar="WIDTH", help="a random llama of this width, 24 layers, in Q4_1")
    args = parser.parse_args()
    if args.random:
        with tempfile.TemporaryDirectory() as name:
            args.model = random_model(Path(name), args.random)
            return compare(args)
    if args.contestant:
        print(json.dumps(run(args)))
        return 0
    return compare(args)


def compare(args: argparse.Namespace) -> int:
    """Runs and prints them all."""
    found = {name: [measured(args, name) for _ in range(args.rounds)] for name in CONTESTANTS}
    bare = median([row["seconds"] for row in found["bare"]])
    print(f"{args.model.name}: {found['ours'][0]['weights'] / 1e6:.1f} M weights, {args.n} traces")
    for name, rows in found.items():
        seconds, peak = (median([row[key] for row in rows]) for key in ("seconds", "bytes"))
        per_weight = peak / found["ours"][0]["weights"]
        print(
            f"{name:12} {seconds:7.1f} s  {seconds / bare:5.2f} of bare  {peak / 1e6:7.0f} MB  "
            f"{per_weight:5.2f} bytes a weight"
        )
    return 0


def random_model(directory: Path, width: int) -> Path:
    """SmolLM2's vocabulary and any width: for memory and time, weights need not be trained."""
    model = families.family_model(
        "llama",
        vocab_size=49152,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=24,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    export_directory(families.save(model, directory / "model"), demo_model(), directory / "random.gguf")
    quantize(directory / "random.gguf", directory / f"random-{width}.gguf", "Q4_1", 2)
    return directory / f"random-{width}.gguf"


def measured(args: argparse.Namespace, name: str) -> dict[str, float]:
    """One contestant in a process of its own."""
    command = [sys.executable, __file__, "--contestant", name, "--model", str(args.model)]
    command += ["-n", str(args.n), "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the passes, without loading; bytes at the peak, loading included."""
    torch.set_num_threads(args.threads)
    traces = encoded(args.model, args.n)
    before = peak_bytes()
    passes, n_weights = CONTESTANT[args.contestant](args, traces)
    started = time.perf_counter()
    passes()
    return {"seconds": time.perf_counter() - started, "bytes": peak_bytes() - before, "weights": n_weights}


def encoded(model: Path, n: int) -> list[EncodedTrace]:
    """The demo's traces."""
    encoder = TraceEncoder(open_vocabulary(model))
    return [encoder.encode(Trace("", prompt=p["prompt"], completion=p["completion"])) for p in word_problems(n)]


Passes = tuple[Callable[[], object], int]


def bare(args: argparse.Namespace, traces: list[EncodedTrace]) -> Passes:
    """What anyone would write: transformers' model, a trace at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model.parent, gguf_file=args.model.name, dtype=torch.float32
    ).eval()

    def passes() -> None:
        for trace in traces:
            ids, at = torch.tensor(trace.tokens), torch.tensor(trace.targets).nonzero()[:, 0]
            logits = model(input_ids=ids[None], use_cache=False).logits[0, at - 1]
            (torch.nn.functional.cross_entropy(logits, ids[at]) / len(traces)).backward()

    return passes, sum(p.numel() for p in model.parameters())


def ours(args: argparse.Namespace, traces: list[EncodedTrace], settings: Settings | None = None) -> Passes:
    """`compute_gradient` over every tensor, file and all."""
    proxy = Proxy(args.model, n_threads=args.threads)
    names = [t.name for t in proxy.tensors]

    def passes() -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "gradient.safetensors"
            compute_gradient(proxy, traces, names, path, settings or Settings(), lambda n, loss: None)

    return passes, sum(t.n_weights for t in proxy.tensors)


CONTESTANT: dict[str, Callable[..., Passes]] = {
    "bare": bare,
    "ours": ours,
    "low-memory": lambda args, traces: ours(args, traces, Settings.low_memory()),
}


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def median(values: list[float]) -> float:
    """Of an odd number."""
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    sys.exit(main())
