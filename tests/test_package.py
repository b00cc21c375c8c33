"""The package as its users import it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import adlocal
from adlocal import errors

PACKAGE = Path(adlocal.__file__).parent

EXCEPTIONS = sorted(
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == errors.__name__
)


def test_all_is_complete_and_sorted() -> None:
    """As httpx tests it: every public name that is no module, in one order."""
    names = {name for name in dir(adlocal) if not name.startswith("_") and not is_module(getattr(adlocal, name))}
    assert names - {"annotations"} | {"__version__"} == set(adlocal.__all__)
    assert adlocal.__all__ == sorted(adlocal.__all__)


def is_module(value: object) -> bool:
    return isinstance(value, type(sys))


def test_every_exception_is_public_and_of_one_family() -> None:
    assert set(EXCEPTIONS) <= set(adlocal.__all__)
    for name in EXCEPTIONS:
        assert issubclass(getattr(adlocal, name), adlocal.AdlocalError)


def test_the_tree_of_exceptions_is_drawn_as_it_is() -> None:
    """A line of the drawing for every exception, indented by its depth, its base above it."""
    drawn: list[tuple[int, str]] = []
    for line in str(errors.__doc__).splitlines():
        found = next((name for name in EXCEPTIONS if name in line.split()), None)
        if found:
            drawn.append((line.index(found) // 4, found))
    assert sorted(name for _, name in drawn) == EXCEPTIONS
    above: dict[int, str] = {}
    for depth, name in drawn:
        base = getattr(errors, name).__base__
        assert base is (getattr(errors, above[depth - 1]) if depth else Exception)
        above[depth] = name


@pytest.mark.parametrize("name", [name for name in adlocal.__all__ if name != "__version__"])
def test_every_public_name_has_a_docstring(name: str) -> None:
    text = vars(getattr(adlocal, name)).get("__doc__") or ""
    assert text.strip()
    assert not text.startswith(f"{name}(")  # what a dataclass writes of itself


def test_the_runtime_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
