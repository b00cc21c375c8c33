"""A pytest plugin for llama.cpp's own tests: their key is one of the gateway's, and their paths begin with /v1."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keys are made by `adlocal keys`, never chosen. Of llama-server's routes with two names, the gateway has one."""
    import utils  # type: ignore[import-not-found]  # of llama.cpp's tests

    made = utils.ServerProcess.make_url

    def make_url(self: Any, path: str, host: str | None = None) -> str:
        url: str = made(self, re.sub(r"^/(chat/completions|completions|embeddings|models)\b", r"/v1/\1", path), host)
        return url

    utils.ServerProcess.make_url = make_url
    key = os.environ.get("GATEWAY_SUITE_KEY")
    for module in {item.module for item in items}:
        if key and hasattr(module, "TEST_API_KEY"):
            module.TEST_API_KEY = key
