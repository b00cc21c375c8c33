"""Programs in which no library can be preloaded: they are refused before they start."""

from __future__ import annotations

import stat
import struct
from pathlib import Path

from ..errors import InputError

_MACHINES = {62: "x86-64"}  # those that the plugin is compiled for
_INTERPRETER = 3  # PT_INTERP: the program is loaded by ld.so, which preloads


def check_program(path: Path) -> None:
    """Refuses a binary that the dynamic linker would start without our library. Scripts are their interpreter's.

    Raises:
        InputError: it is linked statically, of another machine or another C library, or runs with another's rights.
    """
    if path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID):
        raise InputError(f"{path}: runs with its owner's rights (setuid), and nothing can be preloaded into it")
    with path.open("rb") as file:
        header = file.read(64)
        if header[:4] != b"\x7fELF":
            return
        (machine,) = struct.unpack_from("<H", header, 18)
        if header[4] != 2 or machine not in _MACHINES:
            raise InputError(f"{path}: made for another machine than {', '.join(_MACHINES.values())}")
        (offset,), (size, count) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
        file.seek(offset)
        table = file.read(size * count)
        segments = [struct.unpack_from("<IIQQQQ", table, i * size) for i in range(count)]
        at = next(((start, length) for kind, _, start, _, _, length in segments if kind == _INTERPRETER), None)
        if at is None:
            raise InputError(
                f"{path}: linked statically, so nothing can be preloaded into it; use a build of shared libraries"
            )
        file.seek(at[0])
        linker = file.read(at[1]).rstrip(b"\0").decode(errors="replace")
    if "musl" in linker:
        raise InputError(f"{path}: made for musl ({linker}), and the plugin for glibc; use a build for glibc")
