"""The converter, which only some verbs need and which may not be installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import AdlocalError


@contextmanager
def converter() -> Iterator[None]:
    """Where the converter is imported.

    Raises:
        AdlocalError: a package that it needs is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise AdlocalError(
            f"the converter needs {error.name}, which is not installed; run: pip install 'adlocal[convert]'"
        ) from None
