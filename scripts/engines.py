"""Installs the prebuilt engines that tests/plugin/test_engines.py runs, into build/engines."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ENGINES = Path(__file__).resolve().parents[1] / "build" / "engines"
XLLAMACPP, NODE_LLAMA_CPP = "xllamacpp==2026.10.11549", "node-llama-cpp@3.22.1"


def main() -> int:
    """Installs what is missing; says what cannot be had."""
    python, node = ENGINES / "python", ENGINES / "node"
    if not (python / "xllamacpp").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(python), XLLAMACPP]
        subprocess.run(pip, check=True, timeout=600)
    if (node / "node_modules" / "node-llama-cpp").exists():
        return 0
    npm = shutil.which("npm")
    if npm is None:
        print("engines: no npm here; tests of node-llama-cpp will be skipped", file=sys.stderr)
        return 0
    node.mkdir(parents=True, exist_ok=True)
    (node / "package.json").write_text('{"type": "module", "private": true}\n')
    subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", NODE_LLAMA_CPP],
        cwd=node,
        check=True,
        timeout=900,
        stdout=subprocess.DEVNULL,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
