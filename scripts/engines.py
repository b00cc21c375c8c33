"""Installs the engines that tests/plugin runs, into build/engines: prebuilt ones, and a llama-server that it builds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import llama_server
from llama_server import ENGINES

XLLAMACPP, NODE_LLAMA_CPP = "xllamacpp==2026.10.11549", "node-llama-cpp@3.22.1"


def main() -> int:
    """Installs what is missing; says what cannot be had, whose tests are skipped then."""
    if not (ENGINES / "python" / "xllamacpp").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(ENGINES / "python")]
        install(XLLAMACPP, [*pip, XLLAMACPP], ENGINES)
    npm, node = shutil.which("npm"), ENGINES / "node"
    if npm is None:
        print(f"{NODE_LLAMA_CPP}: needs npm; its tests will be skipped", file=sys.stderr)
    elif not (node / "node_modules" / "node-llama-cpp").exists():
        node.mkdir(parents=True, exist_ok=True)
        (node / "package.json").write_text('{"type": "module", "private": true}\n')
        options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error"]
        install(NODE_LLAMA_CPP, [npm, "install", *options, NODE_LLAMA_CPP], node)
    try:
        llama_server.build()
    except (subprocess.SubprocessError, OSError) as error:
        print(f"llama-server: cannot be built ({error}); its tests will be skipped", file=sys.stderr)
    return 0


def install(name: str, command: Sequence[str], directory: Path) -> None:
    """Runs an installer; a registry that is out of reach is no failure of the tests."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command, cwd=directory, check=True, timeout=900, stdout=subprocess.DEVNULL)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{name}: cannot be installed ({error}); its tests will be skipped", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
