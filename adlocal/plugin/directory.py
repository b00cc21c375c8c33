"""Where control files lie, and which of them are of programs that live."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import InputError
from .control import Control


def control_directory(directory: Path | None = None) -> Path:
    """Makes sure that a directory is there in which control files can be trusted; the user's own by default.

    Raises:
        InputError: it cannot be made, or others may write to it.
    """
    directory = directory or _own_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise InputError(
            f"{directory}: no control files can be kept there ({error.strerror}); give --control DIR"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(f"{directory}: others may write there, so no control files are kept in it; give --control DIR")
    return directory.resolve()


def _own_directory() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "adlocal" if runtime else Path(tempfile.gettempdir()) / f"adlocal-{os.getuid()}"


def controls(directory: Path) -> list[Control]:
    """Those of the programs that live, the oldest first. What dead ones left is removed."""
    found = []
    for path in directory.glob("*.control"):
        with suppress(InputError, FileNotFoundError):  # it ended meanwhile, or is of another version
            if _is_alive(path):
                found.append(Control.open(path))
    return sorted(found, key=lambda control: (control.started, control.pid))


def _is_alive(path: Path) -> bool:
    """Whether the program that made the file still holds its lock; else the file is removed."""
    import fcntl  # Windows has none, nor anything that would call this

    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        path.unlink(missing_ok=True)
        return False
