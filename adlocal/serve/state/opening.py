"""Which store an operator means."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import InputError
from .protocol import Store
from .sqlite import SqliteStore

_SCHEMES = ("redis://", "rediss://", "unix://")


def default_directory() -> Path:
    """Where state is kept: adlocal in XDG_STATE_HOME, or in ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "adlocal"


def is_redis(state: str | Path | None) -> bool:
    """Whether it is the address of a Redis server."""
    return isinstance(state, str) and state.startswith(_SCHEMES)


async def open_store(state: str | Path | None) -> Store:
    """Opens a store, which is made if there is none.

    Args:
        state: a directory; "redis://...", "rediss://..." (TLS) or "unix://..." (its socket); None for the default
            directory. A directory is made with mode 0700.

    Raises:
        InputError: it is no such place, of another adlocal's schema, or Redis's client is not installed.
        AdlocalError: it cannot be reached.
    """
    if isinstance(state, str) and is_redis(state):
        try:
            from .redis import RedisStore
        except ImportError:
            raise InputError("state in Redis needs its client; pip install 'adlocal[redis]'") from None
        return await RedisStore.open(state)
    if "://" in str(state or ""):
        scheme = str(state).partition("://")[0]
        raise InputError(f"state {scheme}://...: give a directory, or an address that begins {', '.join(_SCHEMES)}")
    return await SqliteStore.open(Path(state) if state else default_directory())
