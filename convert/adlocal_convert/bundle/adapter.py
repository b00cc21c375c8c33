"""The direction as a LoRA adapter: a GGUF file that llama.cpp attaches to the proxy at +ε and at −ε.

llama.cpp multiplies an adapter by alpha / rank where alpha is not 0. Here it is 0, so that the scale is ε itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from adlocal.errors import ConversionError

from ..direction.lowrank import LowRank
from ..gguf_copy import Writer
from ..model.architectures import TABLE
from ..model.weights import Array


def write_adapter(
    path: Path, architecture: str, pairs: Sequence[LowRank], metadata: Iterable[tuple[str, Any, str]], *, tied: bool
) -> None:
    """Writes the adapter, readable by its owner alone.

    Args:
        path: the file.
        architecture: `general.architecture` of the base.
        pairs: a product for each tensor that is to be moved.
        metadata: (key, value, GGUF type), as `Bundle.metadata` gives them.
        tied: whether the base's token table is its output head too. An adapter cannot move such a table: llama.cpp
            stores a table's factors the other way round than a head's, and ends the process when it multiplies them.

    Raises:
        ConversionError: a product is malformed, or it is of a tied table.
    """
    for pair in pairs:
        pair.check()
    if tied and any(pair.name == TABLE for pair in pairs):
        raise ConversionError(
            f"tensor {TABLE} is the output head too, which no adapter can move; leave it out, or write halves"
        )
    writer = Writer(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for key, value, gguf_type in metadata:
        writer.add_metadata(key, value, gguf.GGUFValueType[gguf_type])
    for name, values in _tensors(pairs):
        writer.add_tensor(name, values)
    path.touch(mode=0o600)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def adapter_sha256(pairs: Sequence[LowRank]) -> str:
    """Hash of the bytes of all tensors that `write_adapter` writes, in file order."""
    digest = hashlib.sha256()
    for _, values in _tensors(pairs):
        digest.update(values.data)
    return digest.hexdigest()


def _tensors(pairs: Sequence[LowRank]) -> Iterator[tuple[str, Array]]:
    """(name, values) of each tensor. llama.cpp looks tokens up in a table's lora_a, so that one has a row a token."""
    for pair in pairs:
        a, b = (pair.b, pair.a.T) if pair.name == TABLE else (pair.a, pair.b)
        for suffix, values in (("lora_a", a), ("lora_b", b)):
            yield f"{pair.name}.{suffix}", np.ascontiguousarray(values, dtype=np.float32)
