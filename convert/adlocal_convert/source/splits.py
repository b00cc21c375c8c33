"""GGUF files that llama-gguf-split has cut into parts, `NAME-00001-of-0000N.gguf`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf

from adlocal.errors import ConversionError, ModelError
from adlocal.files import written_whole

from ..gguf_copy import AsStored, Writer, open_reader

_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_names(name: str) -> list[str]:
    """Names of all parts of the file that `name` is a part of, in order; empty if it is no part."""
    match = _PART.fullmatch(name)
    if match is None:
        return []
    return [f"{match['stem']}-{i:05}-of-{match['count']}.gguf" for i in range(1, int(match["count"]) + 1)]


def stem(name: str) -> str:
    """The name without the numbers of a part and without .gguf."""
    match = _PART.fullmatch(name)
    return match["stem"] if match else name.removesuffix(".gguf")


def merge_parts(part: Path, target: Path, progress: Callable[[int, int], object] = lambda done, total: None) -> None:
    """Writes all parts as one GGUF, keys and tensors as they are stored. Nothing is left at `target` if it fails.

    Args:
        part: any of them; the others lie beside it.
        target: the GGUF to write.
        progress: told the bytes of tensors written, and how many there will be.

    Raises:
        ModelError: a part is missing, cannot be read, or they do not hold as many tensors as they should.
        ConversionError: the file cannot be written.
    """
    paths = [part.with_name(name) for name in part_names(part.name)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ModelError(f"{part}: its part {missing[0]} is missing; download all {len(paths)} into one directory")
    readers = [open_reader(path) for path in paths]
    found, expected = sum(len(reader.tensors) for reader in readers), _tensor_count(readers[0])
    if found != expected:
        raise ModelError(f"{part}: the parts hold {found} tensors, expected {expected}; download them again")
    with written_whole(target, ConversionError) as partial:
        _write(partial, readers, progress)


def _tensor_count(reader: Any) -> int | None:
    field = reader.get_field(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
    return int(field.contents()) if field else None


def _write(path: Path, readers: Sequence[Any], progress: Callable[[int, int], object]) -> None:
    first = readers[0]
    writer = Writer(path, first.get_field("general.architecture").contents())
    try:
        writer.data_alignment = first.alignment
        for field in first.fields.values():
            if field.name != "general.architecture" and not field.name.startswith(("GGUF.", "split.")):
                writer.add_stored(field.name, AsStored(field))
        tensors = [tensor for reader in readers for tensor in reader.tensors]
        for t in tensors:
            writer.add_tensor_info(t.name, t.data.shape, t.data.dtype, t.data.nbytes, raw_dtype=t.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(tensor.data.nbytes for tensor in tensors)
        for tensor in tensors:
            writer.write_tensor_data(tensor.data)
            done += tensor.data.nbytes
            progress(done, total)
    finally:
        writer.close()
