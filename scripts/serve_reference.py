"""Writes docs/serve-settings.md and docs/serve-fields.md from what the gateway itself checks with."""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from adlocal.serve.config import Config, Engine, Limits, Listen, Tags
from adlocal.serve.policy import Rule, Strict
from adlocal.serve.protocols import as_markdown

_MADE = "Made by `scripts/serve_reference.py`."
DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLES: tuple[tuple[str, type[Strict], str], ...] = (
    ("Top of the file", Config, ""),
    ("[listen]", Listen, ""),
    ("[engine]", Engine, ""),
    ("[limits]", Limits, ""),
    ("[reasoning_tags]", Tags, "Where the model's template does not tell; both are needed."),
    (
        "Rules",
        Rule,
        "In `[policy.default]`, `[policy.tiers.NAME]`, `[policy.owners.NAME]` and `[policy.keys.ID]`, and in\n"
        "`kinds.chat`, `kinds.completion`, `kinds.tools` and `kinds.reasoning` of each. Of two rules that say\n"
        "something, the more special one holds: default, tier, owner, key; in each, the rule and then its kinds.",
    ),
)
_TABLES_THEMSELVES = (Strict, dict)


def main() -> int:
    """Writes both."""
    for name, text in {"serve-settings.md": settings(), "serve-fields.md": fields()}.items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


def settings() -> str:
    """The page of settings."""
    lines = [
        "# Settings of `adlocal serve`",
        "",
        "Made by `scripts/serve_reference.py`. An unknown setting is an error.",
    ]
    for title, model, note in TABLES:
        lines += ["", f"## {title}", "", *([note, ""] if note else []), "| setting | kind | default | meaning |"]
        lines += ["|---|---|---|---|", *_rows(model)]
    lines += ["", "`[watch]` is described in [serve.md](serve.md#the-extraction-watch)."]
    return "\n".join(lines) + "\n"


def fields() -> str:
    """The page of request fields."""
    return (
        f"# Request fields\n\n{_MADE} What becomes of every field that llama-server, OpenAI's or Anthropic's\n"
        "clients may send. Nothing is handed on to the engine that is not obeyed or allowed by policy.\n\n"
        + as_markdown()
    )


def _rows(model: type[Strict]) -> list[str]:
    meanings = _meanings(model)
    found = []
    for name, field in model.model_fields.items():
        if name == "watch" or _is_table(field.annotation):
            continue
        default = "" if field.is_required() or field.default is None else f"`{_told(field.get_default())}`"
        found.append(f"| `{name}` | {_kind(field.annotation)} | {default} | {meanings.get(name, '')} |")
    return found


def _meanings(model: type[Strict]) -> dict[str, str]:
    """Of its attributes, from its docstring. One line may tell of several."""
    _, _, attributes = (inspect.getdoc(model) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in attributes.splitlines():
        if match := re.match(r" {4}(\w[\w, ]*): (.*)", line):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _is_table(annotation: Any) -> bool:
    if get_origin(annotation) in (types.UnionType, dict) or annotation in (Any,):
        return any(_is_table(each) for each in get_args(annotation)) and annotation is not Any
    return inspect.isclass(annotation) and issubclass(annotation, _TABLES_THEMSELVES)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f'`"{each}"`' for each in get_args(annotation))
    kinds = [_kind(each) for each in get_args(annotation) if each is not type(None)]
    if get_origin(annotation) is tuple:
        return "list of texts"
    if kinds and get_origin(annotation) is not None:
        return " or ".join(dict.fromkeys(each for each in kinds if each))
    names = {int: "number", float: "number", str: "text", bool: "`true` or `false`", Path: "path"}
    return names.get(annotation, "")


def _told(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
