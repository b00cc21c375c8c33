"""`make test-native-cross`: compiles the native library and the plugin for systems that are not at hand.

It says that they compile and link, not that they run. The compiler is the one of the Python package ziglang, which
carries the headers of the other systems.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE, OUT = ROOT / "native", ROOT / "build" / "cross"
ZIGLANG = "ziglang==0.17.1"

FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations", "-Wno-unknown-pragmas"),
    *("-DADLOCAL_BUILD", '-DADL_VERSION="0"', '-DADL_LLAMA_VERSION="0.5.0-dev"'),
]
#: Of the plugin, by system; the rest of its files is of both.
OF_MACOS = {"system_macos.cpp"}
OF_LINUX = {"coverage.cpp", "symbols.cpp", "system_linux.cpp"}


def main() -> int:
    """Returns the exit status."""
    compiler = zig()
    core, plugin = sorted((NATIVE / "src").glob("*.cpp")), sorted((NATIVE / "plugin").glob("*.cpp"))
    on_macos = [path for path in plugin if path.name not in OF_LINUX]
    on_linux = [path for path in plugin if path.name not in OF_MACOS]
    for target, extension, guards, options in (
        ("aarch64-macos", "dylib", on_macos, ["-undefined", "dynamic_lookup"]),
        ("aarch64-linux-gnu.2.34", "so", on_linux, []),
        ("x86_64-windows-gnu", "dll", [], []),
    ):
        print(f"{target} ...", flush=True)
        objects = compiled(compiler, target, [*core, *guards])
        of_core = [made for made in objects if made.stem in {path.stem for path in core}]
        link(compiler, target, of_core, OUT / target / f"libadlocal.{extension}", [])
        if guards:
            link(compiler, target, objects, OUT / target / f"libadlocal-plugin.{extension}", options)
    check_interposed(OUT / "aarch64-macos" / "libadlocal-plugin.dylib")
    return 0


def zig() -> list[str]:
    """The C++ compiler, installed beside the other builds."""
    home = ROOT / "build" / "zig"
    if not (home / "ziglang").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(home), ZIGLANG]
        subprocess.run(pip, check=True, timeout=900)
    return [str(home / "ziglang" / "zig"), "c++"]


def compiled(compiler: list[str], target: str, files: Sequence[Path]) -> list[Path]:
    """Compiles files, two at a time."""
    directory = OUT / target
    directory.mkdir(parents=True, exist_ok=True)
    included = [f"-I{NATIVE / 'include'}", f"-I{Path(sysconfig.get_path('platlib')) / 'include'}"]

    def one(path: Path) -> Path:
        made = directory / f"{path.stem}.o"
        run([*compiler, "-target", target, *FLAGS, *included, "-c", str(path), "-o", str(made)])
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, files))


def link(compiler: list[str], target: str, objects: Sequence[Path], out: Path, options: list[str]) -> None:
    """Makes a shared library."""
    run([*compiler, "-target", target, "-shared", *map(str, objects), "-o", str(out), *options])


def run(command: list[str]) -> None:
    """Runs the compiler; what it says is shown."""
    subprocess.run(command, check=True, timeout=600)


def check_interposed(path: Path) -> None:
    """The table that dyld reads has to be there, and to name what the program would call."""
    content = path.read_bytes()
    for needed in (b"__interpose", b"_llama_init_from_model", b"_llama_get_logits_ith", b"_dlsym"):
        if needed not in content:
            raise SystemExit(f"{path}: has no {needed.decode()}")


if __name__ == "__main__":
    sys.exit(main())
