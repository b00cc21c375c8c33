"""What may be given as PROXY, and how each becomes one GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from adlocal.errors import InputError

from . import hub
from .export import export_directory
from .splits import merge_parts, part_names, stem


def resolve(spec: str, teacher: Path | None, staging: Path, say: Callable[[str], None]) -> Path:
    """The proxy as one GGUF file: a local file as it lies there, anything else written into `staging`.

    Args:
        spec: a GGUF file, whole or any part of a split one; a directory with config.json and safetensors; or a hub id,
            `owner/name`, `owner/name:file.gguf`, `owner/name:Q8_0`. A local path wins over a hub id.
        teacher: its GGUF, needed for a directory or repository of safetensors, which takes the tokenizer from it.
        staging: an existing directory for files that have to be written.
        say: told what is done.

    Raises:
        InputError: there is no such thing, it is gated or cannot be mapped, several files fit, or the tokens are not
            the teacher's.
        ConversionError: the download or the writing failed. Nothing half-written is left in `staging`.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _export(path, path.resolve().name, _required(teacher, spec), staging, say)
    if path.exists():
        return _file(path, staging, say)
    parsed = None if spec.endswith(".gguf") and ":" not in spec else hub.parse(spec)
    if parsed is None:
        raise InputError(
            f"{spec}: no such file or directory, and no hub id; give a GGUF, a directory with config.json and "
            "safetensors, owner/name, owner/name:Q8_0 or owner/name:file.gguf"
        )
    return _from_hub(*parsed, teacher, staging, say)


def _from_hub(
    repository: str, choice: str | None, teacher: Path | None, staging: Path, say: Callable[[str], None]
) -> Path:
    found = hub.Repository(repository)
    if choice is None and found.has_safetensors:
        given = _required(teacher, repository)
        return _export(found.snapshot(), repository.rpartition("/")[2], given, staging, say)
    names = found.choose(choice)
    say(f"{repository}: {names[0]}" + (f" and {len(names) - 1} more parts" if len(names) > 1 else ""))
    return _file(found.fetch(names), staging, say)


def _required(teacher: Path | None, spec: str) -> Path:
    if teacher is None:
        raise InputError(f"{spec}: safetensors take the tokenizer from the teacher; give --teacher TEACHER.gguf")
    return teacher


def _file(path: Path, staging: Path, say: Callable[[str], None]) -> Path:
    parts = part_names(path.name)
    if not parts:
        return path
    target = staging / f"{stem(path.name)}.gguf"
    say(f"merging {len(parts)} parts of {stem(path.name)}")
    with _bar("merging") as progress:
        merge_parts(path, target, progress)
    return target


def _export(directory: Path, name: str, teacher: Path, staging: Path, say: Callable[[str], None]) -> Path:
    target = staging / f"{name}.gguf"
    say(f"writing {name} as a GGUF with the tokenizer of {teacher.name}")
    with _bar("writing") as progress:
        export_directory(directory, teacher, target, progress)
    return target


@contextmanager
def _bar(description: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc=description, unit="B", unit_scale=True, delay=1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
