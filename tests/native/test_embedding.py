"""The native core as a C program has it: found by CMake, or as a subdirectory; and what a wheel of it holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import llama_cpp
import pytest

from adlocal import AntidistillationLlama
from adlocal.llamacpp import native
from support import tiny
from support.paths import ROOT

NATIVE = ROOT / "native"
CMAKE = Path(sys.executable).parent / "cmake"
LLAMA = Path(llama_cpp.__file__).parent.parent  # llama-cpp-python installs llama.cpp's headers and libraries here too
PROMPT = "3 + 4 ="
N = 12

FIND_PACKAGE = """
cmake_minimum_required(VERSION 3.21)
project(host C)
find_package(llama REQUIRED)
find_package(adlocal 0.1 REQUIRED)
add_executable(host simple.c)
target_link_libraries(host adlocal::adlocal llama)
"""

ADD_SUBDIRECTORY = f"""
cmake_minimum_required(VERSION 3.21)
project(host C CXX)
find_package(llama REQUIRED)
add_subdirectory({NATIVE.as_posix()} adlocal)
add_executable(host simple.c)
target_link_libraries(host adlocal::adlocal llama)
"""

Host = Callable[..., "subprocess.CompletedProcess[str]"]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", errors="replace")


def built(*command: object) -> None:
    result = run(*command)
    assert result.returncode == 0, result.stdout + result.stderr


def build(source: Path, binary: Path, *options: str, prefix: object = "") -> None:
    """Configures and builds; `prefix` is searched besides the llama.cpp that llama-cpp-python installed."""
    built(CMAKE, "-S", source, "-B", binary, f"-DCMAKE_PREFIX_PATH={LLAMA};{prefix}", *options)
    built(CMAKE, "--build", binary, "--parallel", os.cpu_count() or 1)


def host_of(folder: Path, lists: str, *options: str, prefix: object = "") -> Host:
    """Builds a project of native/examples/simple.c and returns a function that runs it."""
    folder.mkdir()
    shutil.copy(NATIVE / "examples" / "simple.c", folder)
    (folder / "CMakeLists.txt").write_text(lists)
    build(folder, folder / "build", *options, prefix=prefix)
    return lambda *arguments: run(folder / "build" / "host", *arguments)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `cmake --install` put adlocal."""
    folder = tmp_path_factory.mktemp("native")
    build(NATIVE, folder / "build")
    built(CMAKE, "--install", folder / "build", "--prefix", folder / "prefix")
    return folder / "prefix"


@pytest.fixture(scope="module")
def host(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """native/examples/simple.c against the installed adlocal, both shared."""
    return host_of(tmp_path_factory.mktemp("find") / "host", FIND_PACKAGE, prefix=installed)


def greedy(teacher: Path, bundle: Path, strength: float) -> tuple[str, float]:
    """What simple.c should print, and the dose, by the Python runtime."""
    with closing(
        AntidistillationLlama(str(teacher), bundle=bundle, strength=strength, n_ctx=64, n_threads=1, verbose=False)
    ) as llm:
        tokens = []
        stream = llm.generate(llm.tokenize(PROMPT.encode(), special=True), temp=0.0)
        for _ in range(N):
            token = next(stream)
            if token == tiny.EOS:
                break
            tokens.append(token)
        return llm.detokenize(tokens).decode("utf-8", errors="replace"), llm.last_dose.total or 0.0


def check_text(host: Host, teacher: Path, bundle: Path) -> None:
    result = host("-m", teacher, "-b", bundle, "-n", N, "-s", 5, "-t", 1, PROMPT)
    text, dose = greedy(teacher, bundle, 5.0)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == text.rstrip("\n")
    assert f"dose {dose:+.3f} over" in result.stderr


def test_simple_c_with_find_package_writes_what_python_writes(
    host: Host, tiny_llama: Path, tiny_bundle: Path, adapter_bundle: Path
) -> None:
    """Through the sampler there and the pair here, so to the token and to the printed digit of the dose."""
    for bundle in (tiny_bundle, adapter_bundle):
        check_text(host, tiny_llama, bundle)


def test_simple_c_with_add_subdirectory_and_a_static_core(tiny_llama: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    host = host_of(tmp_path / "host", ADD_SUBDIRECTORY, "-DBUILD_SHARED_LIBS=OFF")
    assert not list((tmp_path / "host").rglob("libadlocal.so"))
    check_text(host, tiny_llama, tiny_bundle)


def test_simple_c_refuses_in_words(
    host: Host, tiny_llama: Path, tiny_bundle: Path, copy_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """With an exit status, and without a word of text."""
    swapped = copy_bundle("swapped")
    (swapped / "proxy-plus.gguf").rename(swapped / "x")
    (swapped / "proxy-minus.gguf").rename(swapped / "proxy-plus.gguf")
    (swapped / "x").rename(swapped / "proxy-minus.gguf")
    other = tiny.write_gguf(tiny.tiny_model(), tmp_path / "other.gguf", pieces=list(reversed(tiny.BYTES)))
    for teacher, bundle, options, status, words in (
        (tiny_llama, tmp_path / "none", (), 2, "is missing or no GGUF file"),
        (tmp_path / "none.gguf", tiny_bundle, (), 2, "cannot load the teacher"),
        (tiny_llama, swapped, (), 2, "the halves are swapped"),
        (other, tiny_bundle, (), 2, "convert a proxy that shares the teacher's tokenizer"),
        (tiny_llama, tiny_bundle, ("-s", "-1"), 1, "strength=-1: give nats from 0"),
        (tiny_llama, tiny_bundle, ("-n", "300"), 2, "exceeds the 256 tokens that the proxy was trained for"),
        (tiny_llama, tiny_bundle, ("-x", "1"), 2, "usage: "),
    ):
        result = host("-m", teacher, "-b", bundle, *options)
        assert (result.returncode, result.stdout) == (status, ""), words
        assert words in result.stderr


def test_native_tests(tmp_path: Path) -> None:
    """The core against a llama.cpp written by hand, as a host that links it statically has it: no libllama is there."""
    build(NATIVE, tmp_path, "-DADLOCAL_BUILD_TESTS=ON")
    result = run(CMAKE.with_name("ctest"), "--test-dir", tmp_path, "--output-on-failure")
    assert result.returncode == 0, result.stdout


def test_a_wheel_holds_the_core_and_no_path_of_this_machine(tmp_path: Path) -> None:
    built(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("adlocal-*-py3-none-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (core,) = [name for name in names if name == f"adlocal/{native.FILE_NAME}"]
        content = archive.read(core)
    assert {"adlocal/py.typed", "adlocal_convert/convert.py", "adlocal_convert/py.typed"} <= set(names)
    assert not [name for name in names if not name.startswith(("adlocal/", "adlocal_convert/", "adlocal-"))]
    for path in (ROOT, LLAMA, Path.home(), tmp_path):
        assert str(path).encode() not in content
