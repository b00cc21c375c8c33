"""Stages: what is computed once and kept. A run that is stopped goes on with the stages that are not there yet.

A stage is a frozen dataclass. Its fields are its settings; those that are stages are what it needs. Its results are the
files of a directory that is named by a hash of all settings, its own and those of what it needs, and appears whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Enters every hash: raise it when a stage comes to compute something else from the same settings.
_VERSION = 2


@dataclass(frozen=True)
class Stage:
    """Base of all stages."""

    def run(self, root: Path, out: Path) -> None:
        """Writes the results into the empty directory `out`; what is needed lies in `root`."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """About how long it takes on one core, to show the time that is left."""
        return 10.0

    @property
    def needs(self) -> list[Stage]:
        """The stages among its fields."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
        return [v for v in flat if isinstance(v, Stage)]

    @property
    def key(self) -> str:
        """A name that follows from all settings."""
        digest = hashlib.sha256(f"{_VERSION} {self!r}".encode()).hexdigest()[:16]
        return f"{type(self).__name__.lower()}-{digest}"

    def path(self, root: Path) -> Path:
        """Where the results lie."""
        return root / self.key

    def is_done(self, root: Path) -> bool:
        return self.path(root).is_dir()

    def read(self, root: Path, name: str) -> Any:
        """A JSON result."""
        return json.loads((self.path(root) / name).read_text())


def execute(stages: Iterable[Stage], root: Path, jobs: int) -> None:
    """Runs the stages, and all that they need, in `jobs` processes of one thread each.

    Raises:
        Exception: what a stage raised. Stages that were done remain done.
    """
    waiting = [stage for stage in ordered(stages) if not stage.is_done(root)]
    root.mkdir(parents=True, exist_ok=True)
    for stray in root.glob(".*.partial"):  # of a run that was killed
        shutil.rmtree(stray)
    total = sum(stage.seconds for stage in waiting)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
    context = multiprocessing.get_context("spawn")
    with (
        environment("TQDM_DISABLE", "1"),  # tqdm looks when it is imported: our bar stays, the workers have none
        tqdm(total=total, desc="laboratory", bar_format=bar_format) as bar,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_worker) as pool,
    ):
        try:
            for stage in _finished(waiting, root, pool, jobs):
                bar.update(stage.seconds)
                bar.set_postfix_str(stage.key)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def ordered(stages: Iterable[Stage]) -> list[Stage]:
    """Each stage once, after all that it needs."""
    found: dict[Stage, None] = {}

    def visit(stage: Stage) -> None:
        if stage not in found:
            for need in stage.needs:
                visit(need)
            found[stage] = None

    for stage in stages:
        visit(stage)
    return list(found)


def _finished(waiting: Sequence[Stage], root: Path, pool: ProcessPoolExecutor, jobs: int) -> Iterator[Stage]:
    """Yields stages as they end. Only as many are handed out as there are processes, earliest first."""
    left, running = list(waiting), dict[Future[None], Stage]()
    undone = set(waiting)
    while left or running:
        for stage in [s for s in left if not any(need in undone for need in s.needs)][: jobs - len(running)]:
            left.remove(stage)
            running[pool.submit(run, stage, root)] = stage
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            stage = running.pop(future)
            future.result()
            undone.discard(stage)
            yield stage


def run(stage: Stage, root: Path) -> None:
    """Runs one stage whose needs are met; its directory appears when it is whole."""
    partial = root / f".{stage.key}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    started = time.perf_counter()
    try:
        stage.run(root, partial)
        (partial / "stage.json").write_text(
            json.dumps({"stage": repr(stage), "seconds": time.perf_counter() - started})
        )
        os.replace(partial, stage.path(root))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable of the environment, for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _prepare_worker() -> None:
    """One thread a process; bars are the parent's; no worker outlives a parent that is killed."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
