"""`python -m examples.lab quick`: does protection work, and what does it cost? Everything is kept in ./lab-results."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from adlocal.commands.arguments import count
from adlocal.errors import AdlocalError
from adlocal.files import written_whole

from .report import document as report
from .run import collected, plan
from .stages import execute, ordered

_PLANS = {
    "quick": plan.quick,
    "full": plan.full,
    "students": plan.students,
    "confirm": plan.confirm,
    "consistent": plan.consistent,
    "hypotheses": plan.hypotheses,
}
_EPILOG = """examples:
  python -m examples.lab quick            one seed, the method among its controls
  python -m examples.lab full --jobs 8    three seeds, more directions and proxies, and the attackers
  python -m examples.lab students         lower costs, whole traces, and other students, some of them less able
  python -m examples.lab confirm          what acts for 2 points or less on these, on eight seeds
  python -m examples.lab consistent       whole traces that agree on the answer, on eight seeds
  python -m examples.lab report full      the report again, from the results stored

A run that is stopped goes on where it was. All share what they have in common."""


def main() -> int:
    args = _parser().parse_args()
    try:
        if args.command == "report":
            return _report(args.plan, args.out)
        return _run(args.command, args.out, args.jobs)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the stages that are left", file=sys.stderr)
        return 130
    except (AdlocalError, OSError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


def _run(name: str, out: Path, jobs: int) -> int:
    entries = _PLANS[name]()
    stages = ordered(stage for entry in entries for stage in entry.stages)
    root = out / "stages"
    n_left = sum(not stage.is_done(root) for stage in stages)
    print(f"{name}: {len(stages)} stages, {n_left} to do, {jobs} at a time", file=sys.stderr)
    execute(stages, root, jobs)
    target = _results(name, out)
    rows = [{"scale": name, **row} for row in collected.results(entries, root)]
    with written_whole(target) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _report(name, out)


def _report(name: str, out: Path) -> int:
    target = out / name
    report.write(_results(name, out), target)
    print((target / "report.md").read_text())
    print(f"wrote {target / 'report.md'} and its pictures", file=sys.stderr)
    return 0


def _results(name: str, out: Path) -> Path:
    return out / f"{name}.jsonl"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.lab",
        description="Train tiny teachers and students, protect the teachers, and see what students learn.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=[*_PLANS, "report"])
    parser.add_argument("plan", nargs="?", choices=_PLANS, default="quick", help="for report")
    parser.add_argument(
        "--out", type=Path, default=Path("lab-results"), help="where everything is kept (default: lab-results)"
    )
    parser.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="processes of one thread each")
    return parser


if __name__ == "__main__":
    sys.exit(main())
