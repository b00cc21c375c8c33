"""Imports run one way: the order of the rooms, in the runtime, the converter and the laboratory."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adlocal
from support.imports import (
    Layers,
    Sources,
    circle,
    imported_on_load,
    imports,
    misplaced,
    names_imported,
    sources,
)
from support.paths import ROOT

#: Packages from the top; a layer may import the layers under it.
LAYERS: dict[str, Layers] = {
    "adlocal": (
        ("__main__",),
        ("cli",),
        ("commands",),
        ("serve",),
        ("servers",),
        ("calibrate", "plugin", ""),  # the package itself: its public names
        ("llama", "score"),
        ("dose", "traces"),
        ("engine",),
        ("settings", "pair"),
        ("bundle", "plotting"),
        ("adjust", "llamacpp", "files", "statistics"),
        ("errors",),
    ),
    "adlocal_convert": (
        ("convert",),
        ("bundle",),
        ("direction", "source"),
        ("model",),
        ("gguf_copy", "options", "demo"),
        ("",),
    ),
    "examples.lab": (
        ("__main__", "real"),
        ("run",),
        ("traces", "report"),
        ("models",),
        ("task", "stages"),
        ("",),
    ),
}
DIRECTORIES = {
    "adlocal": ROOT / "adlocal",
    "adlocal_convert": ROOT / "convert" / "adlocal_convert",
    "examples.lab": ROOT / "examples" / "lab",
}
OFFLINE = {"adlocal_convert", "torch", "transformers", "gguf", "accelerate", "datasets", "pandas", "pyarrow"}
#: What each may not know of, in functions neither.
UNKNOWN = {"adlocal": {"examples", "support"}, "adlocal_convert": {"examples", "support"}, "examples.lab": {"support"}}


@pytest.fixture(params=LAYERS, scope="module")
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def modules_of(package: str) -> dict[str, str]:
    return sources(DIRECTORIES[package], package)


def test_imports_run_down_the_layers(package: str) -> None:
    wrong = misplaced(modules_of(package), package, LAYERS[package])
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    found = circle(modules_of(package), package)
    assert not found, " imports ".join([*found, found[0]])


def test_nothing_is_imported_from_outside_that_lies_above(package: str) -> None:
    for module, source in modules_of(package).items():
        found = {name.partition(".")[0] for name, _ in names_imported(ast.parse(source), module, False)}
        assert not found & UNKNOWN[package], module


def test_the_reader_sees_the_imports_that_there_are() -> None:
    """Of each kind one that stands in the sources."""
    found = {str(each) for each in imports(modules_of("adlocal"), "adlocal")}
    assert "adlocal.cli imports adlocal.commands.parser" in found  # from .commands.parser
    assert "adlocal.commands.parser imports adlocal" in found  # in a function
    assert "adlocal.calibrate.plot imports adlocal.plotting" in found  # a module from a package
    assert "adlocal.commands.inspect imports adlocal.bundle" in found  # names of a package
    assert "adlocal imports adlocal.errors" in found  # by the package itself


# The checks themselves, on a made-up package: top -> {left, right} -> low.

ORDER: Layers = (("top",), ("left", "right"), ("low",), ("",))
SOUND = {
    "made": "",
    "made.top": "from .left import a\nfrom . import low\n",
    "made.left": "",
    "made.left.one": "from .two import a\nfrom ..low import b\n",
    "made.left.two": "import made.low\n",
    "made.right": "",
    "made.low": "",
}


def changed(**added: str) -> Sources:
    lines = {f"made.{name.replace('__', '.')}": text for name, text in added.items()}
    return {name: text + lines.get(name, "") for name, text in {**dict.fromkeys(lines, ""), **SOUND}.items()}


def test_a_sound_package_passes() -> None:
    assert misplaced(SOUND, "made", ORDER) == []
    assert circle(SOUND, "made") == []


@pytest.mark.parametrize(
    "line",
    [
        "from .top import a\n",
        "import made.top\n",
        "from made.top import a\n",
        "from . import top\n",
        "def f():\n    from .top import a\n",
        "class A:\n    def f(self):\n        import made.top as t\n",
        "if TYPE_CHECKING:\n    from .top import a\n",
        "try:\n    from .top import a\nexcept ImportError:\n    pass\n",
    ],
)
def test_an_import_of_a_layer_above_is_told(line: str) -> None:
    assert misplaced(changed(low=line), "made", ORDER) == ["made.low imports made.top, a layer above"]


def test_an_import_of_another_room_of_the_layer_is_told() -> None:
    expected = ["made.left.two imports made.right, of another room of its layer"]
    assert misplaced(changed(left__two="def f():\n    from ..right import c\n"), "made", ORDER) == expected


def test_a_room_without_a_layer_is_told() -> None:
    assert misplaced(changed(attic__box=""), "made", ORDER) == ["made.attic.box is in no layer"]


@pytest.mark.parametrize("line", ["from .one import a\n", "def f():\n    from made.left import one\n"])
def test_a_circle_is_told(line: str) -> None:
    assert sorted(circle(changed(left__two=line), "made")) == ["made.left.one", "made.left.two"]


def test_a_circle_through_a_package_is_told() -> None:
    modules = changed(left="from .two import a\n", left__two="from . import b\n")
    assert sorted(circle(modules, "made")) == ["made.left", "made.left.two"]


# Between the packages.


@pytest.mark.parametrize("path", sorted(DIRECTORIES["adlocal"].rglob("*.py")), ids=lambda path: path.name)
def test_the_runtime_never_imports_the_converter(path: Path) -> None:
    """Not while a module loads; a function may."""
    assert not imported_on_load(ast.parse(path.read_text(encoding="utf-8"))) & OFFLINE


def test_the_check_of_imports_sees_them() -> None:
    code = "if x:\n    import torch.nn\nfrom adlocal_convert import a\nfrom .b import c\ndef f():\n    import gguf\n"
    assert imported_on_load(ast.parse(code)) == {"torch", "adlocal_convert"}


def test_importing_every_module_of_the_runtime_loads_nothing_of_the_converter() -> None:
    names = [name for name in modules_of("adlocal") if not name.endswith("__main__")]
    code = f"import sys, {', '.join(names)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "adlocal" in loaded
    assert not OFFLINE & set(loaded)


def private(tree: ast.AST) -> Iterator[str]:
    """Modules of adlocal whose names begin with an underscore, where a file outside of it imports them."""
    for module, names in names_imported(tree, "outside", False):
        paths = [module.split("."), *([*module.split("."), name] for name in names)]
        for parts in paths:
            if parts[0] == "adlocal" and any(part.startswith("_") and not part.startswith("__") for part in parts):
                yield ".".join(parts)


@pytest.mark.parametrize("folder", ["convert", "examples", "scripts", "tests"])
def test_no_private_module_of_the_runtime_is_used_outside(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        found = list(private(ast.parse(path.read_text(encoding="utf-8"))))
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from adlocal._gguf import a", ["adlocal._gguf", "adlocal._gguf.a"]),
        ("from adlocal import _gguf", ["adlocal._gguf"]),
        ("import adlocal.llamacpp._gguf", ["adlocal.llamacpp._gguf"]),
        ("def f():\n    from adlocal import _gguf", ["adlocal._gguf"]),
        ("from adlocal import __version__", []),
        ("from other import _gguf", []),
    ],
)
def test_a_private_module_is_seen(line: str, found: list[str]) -> None:
    assert list(private(ast.parse(line))) == found


def test_the_runtime_lies_where_it_is_read() -> None:
    assert Path(adlocal.__file__).parent.samefile(DIRECTORIES["adlocal"])
