"""GGUF files read by gguf-py, and keys carried from one into another byte for byte through its writer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

from adlocal.errors import ModelError


def open_reader(path: Path) -> Any:
    """gguf-py's view of a file.

    Raises:
        ModelError: it is no GGUF that can be read.
    """
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # gguf-py raises whatever its parser trips over
        raise ModelError(f"{path}: not a readable GGUF file ({error}); download or convert it again") from None


class AsStored(bytes):
    """Type and value of a key as a file's bytes hold them."""

    def __new__(cls, field: Any) -> AsStored:
        return super().__new__(cls, b"".join(part.tobytes() for part in field.parts[2:]))

    @classmethod
    def array(cls, item_type: gguf.GGUFValueType, items: Sequence[bytes], order: str = "<") -> AsStored:
        """An array of items as they are stored; of STRING, they are the text alone. `order` is struct's."""
        if item_type == gguf.GGUFValueType.STRING:
            items = [struct.pack(f"{order}Q", len(item)) + item for item in items]
        head = struct.pack(f"{order}IIQ", gguf.GGUFValueType.ARRAY, item_type, len(items))
        return super().__new__(cls, head + b"".join(items))


class Writer(gguf.GGUFWriter):
    """Also takes keys as they are stored; some of them gguf-py could not write: empty arrays, strings not in UTF-8."""

    def add_stored(self, name: str, value: AsStored) -> None:
        self.add_key_value(name, value, gguf.GGUFValueType(struct.unpack_from("<I", value)[0]))

    def add_metadata(self, key: str, value: Any, gguf_type: gguf.GGUFValueType) -> None:
        """A scalar of type `gguf_type`, or a list of such."""
        if not isinstance(value, list):
            self.add_key_value(key, value, gguf_type)
        elif value:
            self.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=gguf_type)
        else:  # gguf-py refuses to write an array without elements, which GGUF has
            order = "<" if self.endianess == gguf.GGUFEndian.LITTLE else ">"
            self.add_key_value(key, AsStored.array(gguf_type, [], order), gguf.GGUFValueType.ARRAY)

    def _pack_val(self, val: Any, *args: Any, **kwargs: Any) -> Any:
        return val if isinstance(val, AsStored) else super()._pack_val(val, *args, **kwargs)


def array_items(field: Any) -> list[bytes]:
    """Items of an array as they are stored; of STRING, the text alone."""
    return [field.parts[i].tobytes() for i in field.data]
