"""Bundles that are spoiled in one place, and what is said of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from adlocal import Bundle, BundleError
from adlocal.bundle import MINUS_NAME, PLUS_NAME
from adlocal.llamacpp import native
from adlocal.llamacpp.gguf import TensorInfo

HALVES = [PLUS_NAME, MINUS_NAME]

Copy = Callable[[str], Path]


def rewrite(half: Path, key: str, value: Any) -> None:
    """Changes a number in a GGUF's metadata in place."""
    field = gguf.GGUFReader(half, "r+").get_field(key)
    assert field is not None
    field.parts[field.data[0]][0] = value


def drop(half: Path, key: str) -> None:
    """Renames a key, so that nobody finds it; its length stays."""
    content, old = half.read_bytes(), stored(key)
    assert content.count(old) == 1
    half.write_bytes(content.replace(old, old[:-1] + b"?"))


def stored(key: str) -> bytes:
    """A key as GGUF stores it, behind its length: some keys begin with others."""
    return len(key).to_bytes(8, "little") + key.encode()


def flip(half: Path, tensor: TensorInfo) -> None:
    """Flips one bit in the middle of a tensor."""
    content = bytearray(half.read_bytes())
    content[tensor.offset + tensor.n_bytes // 2] ^= 1
    half.write_bytes(content)


def problem(directory: Path, read: Callable[[Path], object] = Bundle.open) -> str:
    """The message of the error that reading a bundle raises: one line that names the path."""
    with pytest.raises(BundleError) as error:
        read(directory)
    message = str(error.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def read_natively(directory: Path) -> native.BundleStruct:
    """A bundle as the native core reads it."""
    lib, out = native.library(), native.sized(native.BundleStruct)
    table = native.llama_table(lib)
    native.check(lib.adl_bundle_read(ctypes.byref(table), os.fsencode(directory), ctypes.byref(out)))
    return out
