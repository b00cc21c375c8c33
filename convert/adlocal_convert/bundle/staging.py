"""Bundles are made beside their place and moved there when they are whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adlocal.bundle import NAMES
from adlocal.bundle.calibration import CALIBRATION_NAME


@contextmanager
def staging_directory(out: Path) -> Iterator[Path]:
    """A private directory beside `out`, on the same file system, removed whatever happens."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, out: Path, kind: str) -> None:
    """Moves both files into place. Should the second move fail, the ids differ and the runtime refuses the bundle.

    What another format or an older calibration left is removed first: it belongs to the bundle that is replaced.
    """
    out.mkdir(mode=0o700, exist_ok=True)
    stale = [name for other, names in NAMES.items() if other != kind for name in names] + [CALIBRATION_NAME]
    for name in stale:
        (out / name).unlink(missing_ok=True)
    for name in NAMES[kind]:
        os.replace(staging / name, out / name)
