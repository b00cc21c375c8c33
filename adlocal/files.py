"""Files that a command leaves for people: refused before the work, written beside their place, moved there whole."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import AdlocalError, InputError


def check_target(option: str, path: Path, suffix: str) -> None:
    """Tries whether `path` can be written, so that minutes of work don't end in an error.

    Raises:
        InputError: naming the option, if the name does not end in `suffix` (a trace file given by mistake would be
            replaced), or its directory is missing or cannot be written to.
    """
    if path.suffix.lower() != suffix:
        raise InputError(f"{option} {path}: give a file name that ends in {suffix}")
    if path.is_dir():
        raise InputError(f"{option} {path}: a directory lies there; give another name")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no directory {path.parent}; make it, or give another place")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(
            f"{option} {path}: cannot write to {path.parent} ({error.strerror}); give another place"
        ) from None


def write_failure(error: OSError) -> str:
    """Why a file could not be written: numpy's short writes carry no reason, and come from a full disk."""
    return error.strerror or f"{error}; is the disk full?"


@contextmanager
def written_whole(path: Path, failure: type[AdlocalError] = AdlocalError) -> Iterator[Path]:
    """The name of a file beside `path` to write to; it takes the place of `path` at the end, or is removed.

    Raises:
        failure: it cannot be written, because the disk is full, say.
    """
    try:
        with replaced(path) as partial:
            yield partial
    except OSError as error:
        raise failure(f"cannot write {path}: {write_failure(error)}; give another place") from None


@contextmanager
def replaced(path: Path, *, private: bool = False) -> Iterator[Path]:
    """As `written_whole`, with its OSError as it is. A `private` file can be read by its owner alone."""
    partial = path.with_name(f".adlocal-{os.getpid()}.partial")
    try:
        if private:
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_directory() -> Path:
    """Where what took time to compute is kept: ADLOCAL_CACHE, or adlocal in the user's cache directory."""
    if own := os.environ.get("ADLOCAL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adlocal"
