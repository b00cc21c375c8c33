"""Records: dataclasses that are stored as typed metadata keys of a GGUF file, a field a key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import field
from typing import Any

from .gguf import GGUFHeader

# GGUF value types of keys, by gguf's names; lists are arrays of them.
U32, U64, I32, F64, BOOL, STRING = "UINT32", "UINT64", "INT32", "FLOAT64", "BOOL", "STRING"


class KeyProblem(Exception):
    """A key is missing, or of another type. The message names file and key; the remedy is the caller's to add."""


def key(name: str, gguf_type: str) -> Any:
    """A field that is stored under a metadata key."""
    return field(metadata={"key": name, "type": gguf_type})


def stored_fields(record: Any) -> Iterator[tuple[str, str, str]]:
    """(name, key, GGUF type) of each field that is stored; a list's type is that of its items."""
    for f in dataclasses.fields(record):
        if "key" in f.metadata:
            yield f.name, f.metadata["key"], f.metadata["type"]


class GGUFRecord:
    """What records have in common."""

    @classmethod
    def stored_in(cls, header: GGUFHeader) -> dict[str, Any]:
        """The value of every stored field, by its name.

        Raises:
            KeyProblem: a key is missing, or of another type than the field's.
        """
        lists = {f.name for f in dataclasses.fields(cls) if str(f.type).startswith("list")}  # type: ignore[arg-type]
        return {
            name: value_of(header, key, f"ARRAY of {gguf_type}" if name in lists else gguf_type)
            for name, key, gguf_type in stored_fields(cls)
        }

    def keys(self) -> Iterator[tuple[str, Any, str]]:
        """(key, value, GGUF type) of every stored field, as `write_metadata` takes them."""
        for name, key, gguf_type in stored_fields(self):
            yield key, getattr(self, name), gguf_type

    def as_dict(self) -> dict[str, Any]:
        """The value of every stored field, by its name."""
        return {name: getattr(self, name) for name, _, _ in stored_fields(self)}


def value_of(header: GGUFHeader, key: str, gguf_type: str) -> Any:
    """The value of a key that has to be there, and of that type.

    Raises:
        KeyProblem: it is not.
    """
    found = header.type_of(key)
    if found is None:
        raise KeyProblem(f"{header.path}: key {key} is missing")
    if found != gguf_type:
        raise KeyProblem(f"{header.path}: key {key} is of GGUF type {found}, expected {gguf_type}")
    return header.get(key)
