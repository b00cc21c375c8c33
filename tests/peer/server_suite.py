"""`make server-suite`: llama.cpp's own tests of llama-server, run plainly, at strength 0 and at the default strength.

What passes plainly must pass under protection. The tests come from llama-cpp-python's source archive, beside the
server that `make test-server` builds; a copy of them lies in build/, with the lines masked that `peer.masks` lists.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from adlocal.bundle import ADAPTER_NAME, PLUS_NAME
from llama_server import ENGINES, server, source
from peer import stand_ins
from peer.masks import MASKED, REFUSED, SKIPPED
from support.paths import ROOT

SUITE = ENGINES / "server-suite"
TESTS = SUITE / "tools" / "server" / "tests"
PACKAGES = ENGINES / "server-suite-python"
REPORT = ROOT / "docs" / "evidence" / "llama_server_tests.md"
RUN_SECONDS = 2400
#: Heading of a column -> options of `adlocal run`, None without it.
RUNS: dict[str, list[str] | None] = {"plain": None, "strength 0": ["--strength", "0"], "default strength": []}
Outcomes = dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--select", default="", help="pytest's -k: run only some, and write no report")
    parser.add_argument("--only", choices=RUNS, action="append", help="only some of the runs, and write no report")
    args = parser.parse_args()
    if not server().exists():
        print("server-suite: no llama-server here; run `make test-server` first", file=sys.stderr)
        return 2
    prepare()
    results = {name: run(name, options, args.select) for name, options in RUNS.items() if name in (args.only or RUNS)}
    lost = {name: broken(results.get("plain", {}), found) for name, found in results.items() if name != "plain"}
    for name, found in results.items():
        print(f"{name}: {dict(Counter(found.values()))}; passed plainly and not here: {lost.get(name) or 'none'}")
    if not args.select and not args.only:
        REPORT.write_text(report(results), encoding="utf-8")
    unrefused = [name for run in lost for name in passing_though_refused(results[run])]
    if unrefused:
        print(f"passing, though protection refuses what they ask for: {unrefused}")
    return 1 if any(lost.values()) or unrefused else 0


def broken(plain: Outcomes, found: Outcomes) -> list[str]:
    """Tests that pass plainly and not here, and not because protection refuses what they ask for."""
    lost = [name for name, outcome in plain.items() if outcome == "passed" and found.get(name) != "passed"]
    return [name for name in lost if reason_of(name, REFUSED) is None]


def passing_though_refused(found: Outcomes) -> list[str]:
    """Tests that pass and should not: protection was off, or refuses less than it says."""
    return [name for name, outcome in found.items() if outcome == "passed" and reason_of(name, REFUSED)]


def reason_of(name: str, reasons: Mapping[str, str]) -> str | None:
    """The reason of the pattern that a test's name matches."""
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, name)), None)


# Preparation


def prepare() -> None:
    """Copies the tests with their masks, and makes the models, where that was not done."""
    shutil.rmtree(SUITE / "tools", ignore_errors=True)
    shutil.copytree(source() / "tools" / "server" / "tests", TESTS, ignore=shutil.ignore_patterns("tmp"))
    (TESTS / "tmp").mkdir()
    if not (SUITE / "models").exists():
        (SUITE / "models").symlink_to(source() / "models")
    used: set[tuple[str, str]] = set()
    for file in sorted((TESTS / "unit").glob("*.py")):
        file.write_text(masked(file.name, file.read_text(encoding="utf-8"), used), encoding="utf-8")
    if useless := MASKED.keys() - used:
        raise SystemExit(f"server-suite: no line is masked by {useless}; mend tests/peer/masks.py")
    made = SUITE / "made"
    if not (made / "adapter").exists():  # the last of them
        shutil.rmtree(made, ignore_errors=True)
        stand_ins.write(made, source() / "models" / "ggml-vocab-llama-spm.gguf")
    (TESTS / "tmp" / "stories15M-q4_0.gguf").symlink_to(made / "bundle" / PLUS_NAME)
    (TESTS / "tmp" / "moe_shakespeare15M.gguf").symlink_to(made / "adapter" / ADAPTER_NAME)
    if not PACKAGES.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(PACKAGES), "openai", "requests"]
        subprocess.run([*pip, "filelock"], check=True, timeout=600)
    (PACKAGES / "wget.py").write_text("# llama.cpp's tests import it, and nothing is downloaded here.\n")


def masked(file: str, text: str, used: set[tuple[str, str]]) -> str:
    """A test file's text in which the lines that the list names are `pass`. Notes the masks that were used."""
    lines, function = text.split("\n"), ""
    for i, line in enumerate(lines):
        if found := re.match(r"def (\w+)", line):
            function = found[1]
        for name, pattern in MASKED:
            if re.fullmatch(name, f"{file}::{function}") and re.fullmatch(pattern, line.strip()):
                lines[i] = line[: len(line) - len(line.lstrip())] + "pass"
                used.add((name, pattern))
    return "\n".join(lines)


# Runs


def run(name: str, options: Sequence[str] | None, select: str) -> Outcomes:
    """The outcome of each test by its name: passed, failed or skipped."""
    results = SUITE / f"{name.replace(' ', '-')}.xml"
    results.unlink(missing_ok=True)
    bundle = SUITE / "made" / "bundle"
    own = [] if options is None else [sys.executable, "-m", "adlocal", "run", "--bundle", str(bundle), *options, "--"]
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "peer.overrides",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "-q",
        "--tb=short",
    ]
    command = [*own, *pytest, "-m", "not slow", "-k", select, f"--junitxml={results}", "-o", "junit_logging=no", "unit"]
    started = time.monotonic()
    with (SUITE / f"{results.stem}.log").open("wb") as log:
        subprocess.run(command, cwd=TESTS, env=environment(), timeout=RUN_SECONDS, stdout=log, stderr=subprocess.STDOUT)
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return outcomes(results)


def environment() -> dict[str, str]:
    """The variables of a run: pytest starts each server, which has them from it, protection included."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_ARG_", "PYTEST_"))}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "scripts"), str(PACKAGES)]),
        "LLAMA_SERVER_BIN_PATH": str(server()),
        "LLAMA_CACHE": str(SUITE / "made" / "hub"),
        "LLAMA_ARG_THREADS": "1",  # two workers start servers
        "OMP_NUM_THREADS": "1",
    }


def outcomes(results: Path) -> Outcomes:
    """What a JUnit file tells of each test."""
    found = {}
    for case in ElementTree.parse(results).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('unit.')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        found[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return found


# Report


def report(results: dict[str, Outcomes]) -> str:
    """The page in docs/evidence."""
    plain = results["plain"]
    files = sorted({name.partition("::")[0] for name in plain})
    lines = [
        "# llama.cpp's own tests of llama-server",
        "",
        "`make server-suite` writes this page. It runs the tests that llama.cpp carries for its server, against the",
        "llama-server of llama-cpp-python's own llama.cpp, plainly and under `adlocal run`. A small random model with",
        "Llama 2's vocabulary stands in for the ones that the tests download.",
        "",
        "| file | tests | " + " | ".join(f"pass, {name}" for name in RUNS) + " | skipped |",
        "|---|---|" + "---|" * (len(RUNS) + 1),
    ]
    for file in [*files, "all"]:
        names = [name for name in plain if file in ("all", name.partition("::")[0])]
        passed = [sum(results[run].get(name) == "passed" for name in names) for run in RUNS]
        skipped = sum(plain[name] == "skipped" for name in names)
        lines.append(f"| {file} | {len(names)} | " + " | ".join(map(str, passed)) + f" | {skipped} |")
    for run_name in list(RUNS)[1:]:
        lost = broken(plain, results[run_name])
        lines += ["", f"Passing plainly and not at {run_name}, beside what is refused: {', '.join(lost) or 'none'}."]
    failing = [name for name, outcome in plain.items() if outcome == "failed"]
    lines += ["", f"Failing plainly: {', '.join(failing) or 'none'}.", "", "## Refused", ""]
    lines += ["What these ask for is refused under protection:", ""]
    lines += [f"- `{pattern}`: {reason}" for pattern, reason in REFUSED.items()]
    lines += ["", "## Skipped", ""]
    lines += [f"- `{pattern}`: {reason}" for pattern, reason in SKIPPED.items()]
    lines += ["", "Tests that llama.cpp marks slow, or skips itself, are left out too.", "", "## Masked", ""]
    lines += [f"- `{name}`, `{pattern}`: {reason}" for (name, pattern), reason in MASKED.items()]
    lines += ["", "## What passes", ""]
    for file in files:
        passing = Counter(
            name.partition("::")[2].partition("[")[0]
            for name in plain
            if name.partition("::")[0] == file and all(found.get(name) == "passed" for found in results.values())
        )
        if passing:
            each = (f"{name} ({n})" if n > 1 else name for name, n in passing.items())
            lines.append(f"- {file}: {', '.join(each)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
