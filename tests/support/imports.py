"""What modules import of their own package, read from the sources: in functions and under TYPE_CHECKING, too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Module -> source. A package is its `__init__`.
Sources = Mapping[str, str]
#: Layers from the top, each of one or several rooms: modules or folders beside each other. "" is the package itself.
Layers = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Import:
    """One module's use of another."""

    importer: str
    imported: str

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}"


def sources(directory: Path, name: str) -> dict[str, str]:
    """The modules of the package `name`, which lies in `directory`."""
    found = {}
    for path in sorted(directory.rglob("*.py")):
        parts = [name, *path.relative_to(directory).with_suffix("").parts]
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[module] = path.read_text(encoding="utf-8")
    packages = {parent for module in found for parent in _parents(module) if parent.startswith(name)}
    return {**dict.fromkeys(packages - found.keys(), ""), **found}


def imports(modules: Sources, package: str) -> list[Import]:
    """Every import of one of `modules` by another, however deep it stands."""
    folders = {parent for module in modules for parent in _parents(module)} | {package}
    return sorted(
        {
            Import(importer, imported)
            for importer, source in modules.items()
            for imported in _imported(ast.parse(source), importer, importer in folders, modules)
            if imported != importer
        },
        key=str,
    )


def names_imported(tree: ast.AST, importer: str, is_package: bool) -> Iterator[tuple[str, list[str]]]:
    """(module, names that are taken from it) of each import, relative ones resolved."""
    parts = importer.split(".") + ([""] if is_package else [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level] if node.level else []
            yield ".".join([*above, *([node.module] if node.module else [])]), [alias.name for alias in node.names]


def _imported(tree: ast.AST, importer: str, is_package: bool, modules: Sources) -> Iterator[str]:
    for module, names in names_imported(tree, importer, is_package):
        inside = [f"{module}.{name}" for name in names if f"{module}.{name}" in modules]
        yield from inside
        if module in modules and len(inside) < max(1, len(names)):
            yield module


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def room(module: str, package: str) -> str:
    """The folder or module of `package` that a module stands in; "" for the package itself."""
    return module.removeprefix(package).removeprefix(".").partition(".")[0]


def misplaced(modules: Sources, package: str, layers: Layers) -> list[str]:
    """What runs upward, or between rooms of one layer, and the rooms that have no layer."""
    rank = {name: i for i, layer in enumerate(layers) for name in layer}
    wrong = [f"{module} is in no layer" for module in modules if room(module, package) not in rank]
    for each in imports(modules, package):
        ours, theirs = room(each.importer, package), room(each.imported, package)
        if ours == theirs or not {ours, theirs} <= rank.keys() or rank[ours] < rank[theirs]:
            continue
        wrong.append(f"{each}, {'of another room of its layer' if rank[ours] == rank[theirs] else 'a layer above'}")
    return wrong


def circle(modules: Sources, package: str) -> list[str]:
    """Modules of which each imports the next and the last the first; empty if there is no such circle."""
    arrows: dict[str, list[str]] = {module: [] for module in modules}
    for each in imports(modules, package):
        arrows[each.importer].append(each.imported)
    done: set[str] = set()
    for start in arrows:
        if found := _walk(start, arrows, [], done):
            return found
    return []


def _walk(module: str, arrows: Mapping[str, Sequence[str]], way: list[str], done: set[str]) -> list[str]:
    if module in way:
        return way[way.index(module) :]
    if module in done:
        return []
    for following in arrows[module]:
        if found := _walk(following, arrows, [*way, module], done):
            return found
    done.add(module)
    return []


def imported_on_load(node: ast.AST) -> set[str]:
    """Top-level packages that are imported when a module is loaded: outside of its functions."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return set()
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").partition(".")[0]} if node.level == 0 else set()
    return set().union(*map(imported_on_load, ast.iter_child_nodes(node)))
