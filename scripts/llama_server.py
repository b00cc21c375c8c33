"""Builds a llama-server of the very llama.cpp that llama-cpp-python carries, in build/engines.

llama-cpp-python comes as source with the whole of llama.cpp in it, its server and that server's own tests too. Nobody
needs this to use adlocal: the tests do, which want a llama-server that anybody might have.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

import setup

ENGINES = Path(__file__).resolve().parents[1] / "build" / "engines"
PACKAGE = "llama-cpp-python"
DOWNLOAD_SECONDS, BUILD_SECONDS = 300, 1500
PROGRAMS = ("llama-server", "llama-completion")
#: Only what they are made of: no page to serve, no TLS, none of the other programs.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",  # a library that is preloaded stands before a shared libllama alone
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def source() -> Path:
    """Where llama.cpp's source lies, or would."""
    return ENGINES / f"llama_cpp_python-{version(PACKAGE)}" / "vendor" / "llama.cpp"


def server() -> Path:
    """The program, where llama.cpp's own tests look for it."""
    return program("llama-server")


def program(name: str) -> Path:
    """One of `PROGRAMS`."""
    return source() / "build" / "bin" / name


def build() -> None:
    """Builds what is missing.

    Raises:
        subprocess.SubprocessError: the package index cannot be reached, or the compiler failed.
        OSError: the archive cannot be written or unpacked.
    """
    if all(program(name).exists() for name in PROGRAMS):
        return
    started = time.monotonic()
    if not (source() / "CMakeLists.txt").exists():
        unpack(fetch())
    print(f"llama-server of {PACKAGE} {version(PACKAGE)}: compiling, about 6 minutes on 2 cores ...", flush=True)
    environment = {**os.environ, **setup.build_flags()}
    cmake, folder = setup.PYTHON.parent / "cmake", source() / "build"
    settings = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    for command in (
        [cmake, "-S", source(), "-B", folder, *settings],
        [cmake, "--build", folder, "--target", *PROGRAMS, "--parallel", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(
            list(map(str, command)),
            env=environment,
            timeout=BUILD_SECONDS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            print("\n".join(done.stdout.splitlines()[-30:]), file=sys.stderr)
            done.check_returncode()
    print(f"llama-server: ready after {time.monotonic() - started:.0f} s", flush=True)


def fetch() -> Path:
    """Downloads the source archive as pip does, from wherever pip is configured to; pip checks its hash.

    Not in an isolated build environment: to read the archive's name, pip would first install, or compile, its tools.
    """
    folder = ENGINES / "download"
    folder.mkdir(parents=True, exist_ok=True)
    what = f"{PACKAGE}=={version(PACKAGE)}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--no-binary", PACKAGE, "--dest", str(folder), what]
    subprocess.run(command, check=True, timeout=DOWNLOAD_SECONDS)
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def unpack(archive: Path) -> None:
    """Unpacks an archive into ENGINES, whole or not at all."""
    folder = ENGINES / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    shutil.rmtree(ENGINES / top.name, ignore_errors=True)
    top.rename(ENGINES / top.name)
    folder.rmdir()
    archive.unlink()
