"""How the engine is started: its command, its variables, and its end with the gateway's."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from ..settings import Settings
from .config import XLLAMACPP, Config

#: Variables that would give others a say in the engine.
_OTHERS = ("LLAMA_ARG_", "LLAMA_SERVER_", "LLAMA_API_KEY", "ADLOCAL_")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def command(config: Config, floor: Settings, directory: Path, keys: Path) -> list[str]:
    """The words that start it. What the gateway relies on comes last, so that no flag of the operator's undoes it.

    Args:
        config: model, bundle and engine are used.
        floor: the least that it protects with.
        directory: of its socket and its control file.
        keys: the file of the key that it asks for.
    """
    engine, adlocal = config.engine, [sys.executable, "-m", "adlocal"]
    protection = ["--bundle", str(config.bundle), "--control", str(directory)]
    protection += ["--strength", repr(floor.strength), "--guard", repr(floor.guard)]
    own = ["-m", str(config.model), "--host", str(directory / "engine.sock"), "--api-key-file", str(keys)]
    # Nothing of one key may come back to another, and an answer begins where its prompt ends.
    own += ["-np", str(engine.parallel), "-cram", "0", "--no-slots", "--no-prefill-assistant"]
    chosen = [*_chosen(config), *engine.flags]
    if engine.program == XLLAMACPP:
        return [*adlocal, "engine", *chosen, *protection, *own]
    own += ["--no-ui", "--offline", "--no-context-shift"]
    return [*adlocal, "run", *protection, "--", engine.program, *chosen, *own]


def _chosen(config: Config) -> list[str]:
    engine = config.engine
    size = engine.ctx_size and engine.ctx_size * engine.parallel
    words = {"-c": size, "-t": engine.threads, "-ngl": engine.gpu_layers, "--pooling": engine.pooling}
    found = [word for flag, value in words.items() if value is not None for word in (flag, str(value))]
    return [*found, *(["--embeddings"] if engine.pooling else [])]


def environment() -> dict[str, str]:
    """Ours without what would give others a say."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OTHERS)}


def end_with_parent() -> None:
    """Has the kernel end this process when the gateway is killed; called in the child before it becomes the engine."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
