"""What of adlocal and of llama-cpp-python is installed. Importing this loads neither library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import NativeError

REMEDY = "install adlocal again (`pip install .` compiles it; `make setup` in a checkout)"
#: As pyproject.toml asks for it.
LLAMA_CPP_PYTHON = "llama-cpp-python>=0.3.36,<0.3.37"


def find(file_name: str) -> Path:
    """A native library lies beside the package's modules; in an editable installation, beside where they would be.

    Raises:
        NativeError: it was not built.
    """
    for directory in sys.modules["adlocal"].__path__:
        if (path := Path(directory) / file_name).exists():
            return path
    raise NativeError(f"the native library {file_name} is not there; {REMEDY}")


@contextmanager
def llama_cpp_python(user: str, failure: type[Exception]) -> Iterator[None]:
    """Where modules are imported that run llama.cpp in this process.

    Args:
        user: who needs them, as the message names it.

    Raises:
        failure: llama-cpp-python is not installed; the message tells what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "llama_cpp":
            raise
        raise failure(
            f"{user} needs llama-cpp-python, which is not installed; run: pip install '{LLAMA_CPP_PYTHON}'"
        ) from None
