"""Stages that add numbers and say when they ran. `main`, run apart with ROOT LOG JOBS, executes a chain of them.

A module of its own, which imports no torch: worker processes import it anew.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from examples.lab.stages import Stage, execute


@dataclass(frozen=True)
class Sum(Stage):
    """The sum of its terms and of the stages it needs.

    Attributes:
        name: what it calls itself in the log, a file beside the results.
        log: that file.
        gate: a file that it waits for in the middle of its work; none by default.
    """

    name: str
    log: str
    terms: tuple[int, ...] = ()
    parts: tuple[Sum, ...] = ()
    first: Sum | None = None
    gate: str = ""
    fails: bool = False

    def run(self, root: Path, out: Path) -> None:
        assert not list(out.iterdir())
        needed = [*self.parts, *([self.first] if self.first else [])]
        total = sum(self.terms) + sum(stage.read(root, "sum.json") for stage in needed)
        (out / "half.txt").write_text("half of it")
        say(self.log, f"begun {self.name}")
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.01)
        if self.fails:
            raise ValueError(f"{self.name} cannot be had")
        (out / "sum.json").write_text(json.dumps(total))
        say(self.log, f"ended {self.name}")


def say(log: str, words: str) -> None:
    """One line, whole, whoever else writes at the same time."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{words}\n".encode())
    os.close(handle)


def said(log: Path) -> list[str]:
    """All lines."""
    return log.read_text().splitlines() if log.exists() else []


def chain(log: Path) -> Sum:
    """Three in a row; the second waits at its gate."""
    a = Sum("a", str(log), terms=(1,))
    b = Sum("b", str(log), terms=(10,), first=a, gate=f"{log}.gate")
    return Sum("c", str(log), terms=(100,), first=b)


def light_worker() -> None:
    """In place of the laboratory's own preparation, which takes seconds to import torch."""
    os.environ["TQDM_DISABLE"] = "1"


def main() -> None:
    """Executes the chain."""
    root, log, jobs = sys.argv[1:]
    execute([chain(Path(log))], Path(root), int(jobs))
