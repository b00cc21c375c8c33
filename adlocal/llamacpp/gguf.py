"""Header of a GGUF file, read and written in Python: who starts another program has no llama.cpp loaded to ask.

Numbers keep their type and precision here; `llama_model_meta_val_str` would print floats with six decimals.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .gguf_reader import ARRAY, MAGIC, SCALARS, STRING, TYPES, VERSION, Malformed, Reader, TensorInfo, within

__all__ = ["GGUFHeader", "TensorInfo", "write_metadata"]

_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32


class GGUFHeader:
    """Metadata keys and tensor table of one GGUF file. The tensors' data is not read.

    Args:
        tokenizer: keep the values of the tokenizer's keys, whose arrays are as long as the vocabulary.

    Raises:
        ModelError: the file is missing, is no GGUF, or ends before its last tensor does.
    """

    def __init__(self, path: str | os.PathLike[str], *, tokenizer: bool = False) -> None:
        self.path = Path(path)
        self._tokenizer = tokenizer
        if not self.path.is_file():
            raise ModelError(f"{self.path}: no such file; give the path of a GGUF file")
        try:
            with self.path.open("rb") as file:
                self._read(Reader(file.fileno()))
        except OSError as error:
            raise ModelError(f"{self.path}: {error.strerror}; give a GGUF file that can be read") from None
        except Malformed as error:
            raise ModelError(f"{self.path}: not a readable GGUF file ({error}); download or convert it again") from None
        size = self.path.stat().st_size
        end = max((t.offset + t.n_bytes for t in self.tensors), default=0)
        if size < end:
            raise ModelError(f"{self.path}: truncated at {size:,} bytes of {end:,}; download or convert it again")

    def _read(self, reader: Reader) -> None:
        n_tensors, n_keys = reader.start()
        self._types: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        with within("failed to read key-value pairs"):
            for _ in range(n_keys):
                key = reader.string()
                if key in self._types:
                    raise Malformed(f"duplicate key {key}")
                self._types[key], value = reader.value(skip=key.startswith("tokenizer.") and not self._tokenizer)
                if value is not None:
                    self._values[key] = value
        with within("failed to read tensor info"):
            self.tensors = reader.tensors(n_tensors, self._alignment())

    def _alignment(self) -> int:
        found = self._values.get(_ALIGNMENT_KEY, _ALIGNMENT)
        if self._types.get(_ALIGNMENT_KEY, "UINT32") != "UINT32" or found == 0 or found & (found - 1):
            raise Malformed(f"alignment {found} is not a power of 2")
        return int(found)

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained for; 0 if the file does not say."""
        return int(self.get(f"{self.get('general.architecture')}.context_length", 0))

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a metadata key as a Python scalar, string or list. The tokenizer's are left out unless asked for."""
        return self._values.get(key, default)

    def type_of(self, key: str) -> str | None:
        """GGUF type of a key's value by gguf's name, "FLOAT64" or "ARRAY of STRING"; None if there is no such key."""
        return self._types.get(key)


def write_metadata(path: str | os.PathLike[str], values: Iterable[tuple[str, Any, str]]) -> None:
    """Writes a GGUF file that holds keys and no tensors.

    Args:
        path: overwritten if it exists.
        values: (key, value, GGUF type by gguf's name) of each key; a list is stored as an array of that type.

    Raises:
        OSError: the file could not be written.
    """
    keys = [_string(key) + _stored(value, TYPES.index(gguf_type)) for key, value, gguf_type in values]
    content = MAGIC + struct.pack("<IQQ", VERSION, 0, len(keys)) + b"".join(keys)
    try:
        Path(path).write_bytes(content + bytes(-len(content) % _ALIGNMENT))
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None


def _stored(value: Any, gguf_type: int) -> bytes:
    """A value behind its type."""
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, gguf_type, len(value)) + b"".join(_item(each, gguf_type) for each in value)
    return struct.pack("<I", gguf_type) + _item(value, gguf_type)


def _item(value: Any, gguf_type: int) -> bytes:
    return _string(value) if gguf_type == STRING else struct.pack(f"<{SCALARS[gguf_type]}", value)


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content
