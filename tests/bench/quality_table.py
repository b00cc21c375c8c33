"""`make qualities`: what each quality and format of a bundle is and costs, on SmolLM2-135M-Instruct.

The first conversion of each selection computes the gradient, the others take the saved one, as they would for a user;
the gradient's time is given apart. Peak memory is the process's, everything included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adlocal.bundle import NAMES
from adlocal.bundle.choices import QUALITIES
from adlocal_convert.demo.smollm2 import demo_model
from adlocal_convert.demo.word_problems import word_problems
from support.json_lines import write_lines


def main() -> int:
    """Prints a row a bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model(), metavar="PROXY.gguf")
    parser.add_argument("--traces", type=Path, metavar="FILE.jsonl", help="default: the demo's problems")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        traces = args.traces or write_traces(directory / "traces.jsonl")
        print("format   quality    median  p10     slope  MB of both files  of the base  seconds  peak MB")
        for kind in NAMES:
            for quality in QUALITIES:
                print(row(args.model, traces, directory, kind, quality), flush=True)
    return 0


def row(model: Path, traces: Path, directory: Path, kind: str, quality: str) -> str:
    """Converts in a process of its own."""
    command = [sys.executable, "-m", "adlocal", "convert", str(model), "--traces", str(traces), "--json"]
    command += ["--out", str(directory / f"{kind}-{quality}"), "--format", kind, "--quality", quality]
    environment = {**os.environ, "ADLOCAL_CACHE": str(directory / "cache")}
    report = directory / "report.txt"
    started = time.perf_counter()
    with open(report, "w+") as file, open(directory / "bundle.json", "w+") as printed:
        child = subprocess.Popen(command, stdout=printed, stderr=file, env=environment)
        _, status, usage = os.wait4(child.pid, 0)  # tells this child's peak alone
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds, peak = time.perf_counter() - started, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    if child.returncode:
        return f"{kind:8} {quality:9}  refused: {report.read_text().splitlines()[-1]}"
    bundle = json.loads((directory / "bundle.json").read_text())
    sizes = list(bundle["bytes"].values())
    return (
        f"{kind:8} {quality:9}  {bundle['fidelity_median']:.4f}  {bundle['fidelity_p10']:.4f}  "
        f"{bundle['fidelity_slope']:.3f}  {sum(sizes) / 1e6:16.1f}  {sum(sizes) / bundle['base_bytes']:11.3f}  "
        f"{seconds:7.0f}  {peak:7.0f}"
    )


def write_traces(path: Path) -> Path:
    """48 worked problems."""
    return write_lines(path, *word_problems(48))


if __name__ == "__main__":
    sys.exit(main())
