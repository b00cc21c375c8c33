"""`make gateway-suite`: llama.cpp's own tests of llama-server, those of what the gateway offers, through the gateway.

What passes against the llama-server alone passes through `adlocal serve`, or is in `peer.gateway_differences` with
its reason. The tests, models and masks are those of `make server-suite`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_server import server
from peer.gateway_differences import DIFFERENCES, MASKED
from peer.server_suite import SUITE, TESTS, Outcomes, environment, outcomes, prepare, reason_of
from peer.stand_ins import N_CTX
from support.paths import ROOT

REPORT = ROOT / "docs" / "evidence" / "gateway_tests.md"
FILES = (
    *("test_basic", "test_chat_completion", "test_completion", "test_compat_anthropic", "test_compat_oai_responses"),
    *("test_security", "test_template", "test_tokenize", "test_tool_call"),
)
RUN_SECONDS = 1800


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--select", default="", help="pytest's -k: run only some, and write no report")
    args = parser.parse_args()
    if not server().exists():
        print("gateway-suite: no llama-server here; run `make test-server` first", file=sys.stderr)
        return 2
    prepare()
    mask()
    alone = run("alone", [], {}, args.select)
    with tempfile.TemporaryDirectory() as temporary:
        through = run("gateway", ["-p", "peer.gateway_overrides"], gateway_variables(Path(temporary)), args.select)
    lost = lost_tests(alone, through)
    unexplained = [name for name in lost if reason_of(name, DIFFERENCES) is None]
    explained = {pattern for pattern in DIFFERENCES if any(reason_of(name, {pattern: ""}) is not None for name in lost)}
    print(f"alone {dict(Counter(alone.values()))}, through the gateway {dict(Counter(through.values()))}")
    print(f"passed alone and not through the gateway, without a reason: {unexplained or 'none'}")
    if not args.select:
        print(f"reasons of nothing: {[*(DIFFERENCES.keys() - explained)] or 'none'}")
        REPORT.write_text(report(alone, through, lost), encoding="utf-8")
    return 1 if unexplained else 0


def mask() -> None:
    """Masks the lines that ask for what the gateway tells nobody."""
    for name in FILES:
        path = TESTS / "unit" / f"{name}.py"
        text = path.read_text(encoding="utf-8")
        for pattern in MASKED:
            text = re.sub(rf"^(\s*){pattern}$", r"\1pass", text, flags=re.M)
        path.write_text(text, encoding="utf-8")


def gateway_variables(temporary: Path) -> dict[str, str]:
    """What makes the tests start the gateway: `gateway_shim` in llama-server's place, and a key that exists."""
    shim = SUITE / "gateway-server"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m peer.gateway_shim "$@"\n')
    shim.chmod(0o755)
    command = [sys.executable, "-m", "adlocal", "keys", "add", "--owner", "suite", "--operator", "--json"]
    done = subprocess.run(
        [*command, "--state", str(temporary / "keys")], capture_output=True, text=True, timeout=60, check=True
    )
    return {
        "LLAMA_SERVER_BIN_PATH": str(shim),
        "GATEWAY_SUITE_ENGINE": str(server()),
        "GATEWAY_SUITE_MADE": str(SUITE / "made"),
        "GATEWAY_SUITE_N_CTX": str(N_CTX),
        "GATEWAY_SUITE_STATE": str(temporary / "keys"),
        "GATEWAY_SUITE_TEMPORARY": str(temporary),
        "GATEWAY_SUITE_KEY": json.loads(done.stdout)["key"],
        "TMPDIR": str(temporary),  # short, for the engine's socket
    }


def run(name: str, options: Sequence[str], variables: Mapping[str, str], select: str) -> Outcomes:
    """The outcome of each test by its name: passed, failed or skipped."""
    results = SUITE / f"gateway-suite-{name}.xml"
    results.unlink(missing_ok=True)
    files = [f"unit/{each}.py" for each in FILES]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "peer.overrides", *options, "-q", "--tb=short"]
    command = [*pytest, "-m", "not slow", "-k", select, f"--junitxml={results}", "-o", "junit_logging=no", *files]
    started = time.monotonic()
    with (SUITE / f"{results.stem}.log").open("wb") as log:
        subprocess.run(
            command,
            cwd=TESTS,
            env={**environment(), **variables},
            timeout=RUN_SECONDS,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return outcomes(results)


def lost_tests(alone: Outcomes, through: Outcomes) -> list[str]:
    """Those that pass alone, and not through the gateway."""
    return [name for name, outcome in alone.items() if outcome == "passed" and through.get(name) != "passed"]


def report(alone: Outcomes, through: Outcomes, lost: Sequence[str]) -> str:
    """The page in docs/evidence."""
    passed = sum(outcome == "passed" for outcome in alone.values())
    unexplained = [name for name in lost if reason_of(name, DIFFERENCES) is None]
    lines = [
        "# llama.cpp's own tests of llama-server, through the gateway",
        "",
        f"Of {passed} tests that pass against llama-server alone, {passed - len(lost)} pass through `adlocal serve`; "
        f"{len(lost) - len(unexplained)} do not for the reasons below, and {len(unexplained) or 'none'} without one.",
        "",
        f"`make gateway-suite` wrote this page on {datetime.date.today()}. It runs the tests that llama.cpp carries",
        "for its server, of what the gateway offers too, against the llama-server of llama-cpp-python's own llama.cpp,",
        "and through the gateway with this llama-server as its engine, at the default strength. Policy allows all that",
        "it may. Models and other masks are those of [llama_server_tests.md](llama_server_tests.md); paths of routes",
        "that llama-server has under two names begin with /v1 here.",
        "",
        "It does not show that answers are good, that reasoning is hidden (no model here reasons), or anything of",
        "routes that the gateway does not have: the files of embeddings, slots, the router and others are left out.",
        "",
        "| file | tests | pass alone | pass through the gateway | explained |",
        "|---|---|---|---|---|",
    ]
    for file in [*FILES, "all"]:
        names = [name for name in alone if file in ("all", name.partition("::")[0])]
        n_alone, n_through = (sum(found.get(name) == "passed" for name in names) for found in (alone, through))
        n_lost = sum(name in lost and reason_of(name, DIFFERENCES) is not None for name in names)
        lines.append(f"| {file} | {len(names)} | {n_alone} | {n_through} | {n_lost} |")
    lines += ["", "## Differences", ""]
    for pattern, reason in DIFFERENCES.items():
        n = sum(reason_of(name, {pattern: reason}) is not None for name in lost)
        if n:
            lines.append(f"- `{pattern}` ({n}): {reason}")
    lines += ["", "Masked, so that the rest of a test counts:", ""]
    lines += [f"- `{pattern}`: {reason}" for pattern, reason in MASKED.items()]
    if unexplained:
        lines += ["", "Without a reason: " + ", ".join(f"`{name}`" for name in unexplained) + "."]
    gained = [name for name, outcome in through.items() if outcome == "passed" and alone.get(name) == "failed"]
    lines += ["", f"Passing through the gateway and failing alone: {', '.join(gained) or 'none'}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
