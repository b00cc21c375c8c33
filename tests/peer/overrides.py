"""A pytest plugin for llama.cpp's own tests: no downloads, free ports, and the skips of `peer.masks`."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from typing import Any

import pytest

from .masks import SKIPPED


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The models lie in the cache already; `load_all` would ask the hub for them. Each worker has a port."""
    import utils  # type: ignore[import-not-found]  # of llama.cpp's tests

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    port, made = free_port(), utils.ServerProcess.__init__

    def init(self: Any) -> None:
        made(self)
        self.server_port = port

    utils.ServerProcess.__init__ = init
    for name in ("bert_bge_small", "bert_bge_small_with_fa"):
        setattr(utils.ServerPreset, name, staticmethod(pooled(getattr(utils.ServerPreset, name))))
    for item in items:
        name = item.nodeid.removeprefix("unit/").replace(".py::", "::")
        for pattern, reason in SKIPPED.items():
            if re.fullmatch(pattern, name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pooled(preset: Callable[[], Any]) -> Callable[[], Any]:
    """A preset of an embedding model: the stand-in does not say itself how it pools."""

    def made() -> Any:
        server = preset()
        server.pooling = "mean"
        return server

    return made


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
