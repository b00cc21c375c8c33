"""The plugin for another llama.cpp than the one that adlocal was installed beside: compiled once, and kept."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from ..errors import InputError, NativeError
from ..files import cache_directory
from ..llamacpp.installed import find

FILE_NAME = "libadlocal-plugin.so"
#: What the plugin that came with adlocal knows (native/src/llama_table.cpp).
ALIKE = ("0.5.0-dev", "0.6.0-dev")

_ASK_VERSION = """
import ctypes, sys
version = ctypes.CDLL(sys.argv[1]).llama_version
version.restype = ctypes.c_char_p
print(version().decode())
"""
#: As native/CMakeLists.txt has them.
_FLAGS = (
    *("-std=c++17", "-shared", "-fPIC", "-pthread", "-O2", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wno-deprecated-declarations"),
    *("-DADLOCAL_STATIC", "-DADLOCAL_BUILD"),
)


def version_of(libllama: Path) -> str:
    """What its `llama_version` returns, asked in a process of its own.

    Raises:
        InputError: it cannot be loaded, or is no llama.cpp of 0.5.0 or later.
    """
    asked = [sys.executable, "-c", _ASK_VERSION, str(libllama)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        why = done.stderr.strip().rpartition("\n")[2]
        raise InputError(f"{libllama}: not a library of llama.cpp that tells its version ({why})")
    return done.stdout.strip()


def kept(version: str) -> Path:
    """Where the plugin for a version lies once it is built, from the sources that there are now.

    Raises:
        NativeError: adlocal was installed without them.
    """
    source = find("native")
    digest = hashlib.sha256()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    name = re.sub(r"[^\w.-]", "_", version)
    return cache_directory() / "plugin" / f"{name}-{digest.hexdigest()[:16]}" / FILE_NAME


def build(include: Path, version: str) -> Path:
    """Compiles the plugin with another llama.h.

    Args:
        include: the directory of llama.h; those of ggml beside it, or in ggml/include of the same source tree.
        version: what the `llama_version` of that llama.cpp returns.

    Returns:
        the library, which `adlocal run --libllama` finds.

    Raises:
        InputError: there is no llama.h, or it declares functions that adlocal does not know.
        NativeError: it cannot be compiled; nothing is kept.
    """
    source = find("native")
    _check_functions(include, source)
    target = kept(version)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = subprocess.run(_command(source, include, version, unfinished), capture_output=True, text=True)
        if done.returncode != 0:
            error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-500:])
            raise NativeError(f"the plugin cannot be compiled with {include / 'llama.h'}: {error}")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _command(source: Path, include: Path, version: str, target: Path) -> list[str]:
    of_others = {"system_macos.cpp"}  # adlocal run is for Linux
    files = [path for path in source.glob("*/*.cpp") if path.name not in of_others]
    defined = [f'-DADL_VERSION="{metadata.version("adlocal")}"', f'-DADL_LLAMA_VERSION="{version}"']
    included = [f"-I{path}" for path in (source / "include", include, *_ggml(include))]
    linked = [f"-Wl,--version-script={source / 'adlocal-plugin.map'}", "-ldl"]
    return [*_compiler(), *_FLAGS, *defined, *included, *map(str, sorted(files)), "-o", str(target), *linked]


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise NativeError(f"{command[0]}: no such compiler; install one (g++ or clang++), or name yours in CXX")
    return command


def _ggml(include: Path) -> list[Path]:
    beside = include.parent / "ggml" / "include"
    return [beside] if beside.is_dir() else []


def _check_functions(include: Path, source: Path) -> None:
    """A function that nobody has thought about could let the teacher's own logits out."""
    header = include / "llama.h"
    if not header.is_file():
        raise InputError(f"{header}: no such file; give the directory of llama.h in --include")
    unknown = declared(header.read_text()) - known(source)
    if unknown:
        raise InputError(
            f"{header} declares functions that this adlocal does not know ({', '.join(sorted(unknown)[:5])}), so it "
            "cannot promise protection there; use a later adlocal"
        )


def declared(header: str) -> set[str]:
    """The functions that a llama.h declares."""
    without_comments = re.sub(r"//.*", "", header)
    return set(re.findall(r"LLAMA_API\s[^;{]*?\b(llama_\w+)\s*\(", without_comments))


def known(source: Path) -> set[str]:
    """The functions whose fate the plugin's source tells."""
    return set(re.findall(r"X\((llama_\w+)", (source / "plugin" / "fates.hpp").read_text()))
