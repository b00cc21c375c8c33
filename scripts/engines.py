"""Installs the engines that tests/plugin runs, into build/engines: prebuilt ones, and a llama-server that it builds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import llama_server
from llama_server import ENGINES

#: Python packages by folder, the one first that tells whether they are there.
PYTHON = {
    "python": ("xllamacpp==2026.10.11549",),
    "llm": ("llm==0.36",),
    "server": (
        "uvicorn==0.54.0",
        "fastapi==0.163.2",
        "pydantic-settings==2.16.3",
        "sse-starlette==3.7.0",
        "starlette-context>=0.3.6,<0.4",
        "PyYAML",
    ),
}
#: npm's packages by folder. The older node-llama-cpp holds a llama.cpp that the plugin does not know.
NODE = {
    "node": ("node-llama-cpp@3.22.1",),
    "node-3.21.1": ("node-llama-cpp@3.21.1", "@node-llama-cpp/linux-x64@3.21.1", "--omit=optional"),
}


def main() -> int:
    """Installs what is missing; says what cannot be had, whose tests are skipped then."""
    for folder, packages in PYTHON.items():
        if not (ENGINES / folder / packages[0].partition("==")[0]).exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(ENGINES / folder)]
            install(packages[0], [*pip, *packages], ENGINES)
    npm = shutil.which("npm")
    for folder, packages in NODE.items():
        if npm is None:
            print(f"{packages[0]}: needs npm; its tests will be skipped", file=sys.stderr)
        elif not (ENGINES / folder / "node_modules" / "node-llama-cpp").exists():
            (ENGINES / folder).mkdir(parents=True, exist_ok=True)
            (ENGINES / folder / "package.json").write_text('{"type": "module", "private": true}\n')
            options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error"]
            install(packages[0], [npm, "install", *options, *packages], ENGINES / folder)
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
