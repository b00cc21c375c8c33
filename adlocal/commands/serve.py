"""`adlocal serve`: the gateway."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdlocalError, InputError

if TYPE_CHECKING:
    from ..serve.config import Config


def run(args: argparse.Namespace) -> None:
    """Serves until a signal ends it, or tells what would be in force."""
    try:
        from ..serve import config, logs, model, server
    except ModuleNotFoundError as error:
        raise AdlocalError(f"{error.name} is not installed; run: pip install 'adlocal[serve]'") from None

    def read() -> Config:
        found = config.read(args.config) if args.config else config.Config()
        return _overridden(found, args)

    chosen = read()
    config.parts(chosen)
    server.check(chosen)
    if args.check:
        model.read_model(chosen)
        print(_check(chosen, args))
        return
    logs.set_up(chosen.log_format, args.verbose)
    server.serve(chosen, read)


#: The place in the configuration of each argument.
_PLACES: Mapping[str, tuple[str, ...]] = {
    "model": ("model",),
    "bundle": ("bundle",),
    "alias": ("alias",),
    "state": ("state",),
    "host": ("listen", "host"),
    "port": ("listen", "port"),
    "tls_cert": ("listen", "tls_cert"),
    "tls_key": ("listen", "tls_key"),
    "engine": ("engine", "program"),
    "parallel": ("engine", "parallel"),
    "ctx_size": ("engine", "ctx_size"),
    "threads": ("engine", "threads"),
    "gpu_layers": ("engine", "gpu_layers"),
    "flags": ("engine", "flags"),
    "strength": ("policy", "default", "strength"),
    "guard": ("policy", "default", "guard"),
    "log_format": ("log_format",),
}


def _overridden(found: Config, args: argparse.Namespace) -> Config:
    """The configuration with what the command line gives in the place of its own."""
    from ..serve.config import checked

    values = found.model_dump(exclude_unset=True)
    for name, place in _PLACES.items():
        value = getattr(args, name)
        if value is None or value == []:
            continue
        table = values
        for step in place[:-1]:
            table = table.setdefault(step, {})
        table[place[-1]] = tuple(value) if isinstance(value, list) else value
    return checked(values, Path("command line"))


def _check(chosen: Config, args: argparse.Namespace) -> str:
    """What would be in force for a caller and a kind of request."""
    from ..serve.config import default_settings
    from ..serve.policy import KINDS, Caller, decide

    groups: dict[str, Any] = {"tiers": chosen.policy.tiers, "owners": chosen.policy.owners, "keys": chosen.policy.keys}
    for group, name in (("tiers", args.tier), ("owners", args.owner), ("keys", args.key)):
        if name is not None and name not in groups[group]:
            print(f"note: no rule names {group}.{name}; what is more general holds", file=sys.stderr)
    caller = Caller(key=args.key or "", owner=args.owner or "", tier=args.tier or "default")
    kinds = tuple(kind for kind in KINDS if kind in args.kind)
    if not {"chat", "completion"} & set(kinds):
        raise InputError(f"--kind {' '.join(args.kind)}: give chat or completion, and tools or reasoning beside it")
    decision = decide(chosen.policy, caller, kinds, default_settings(chosen))
    found = {name: value for name, value in vars(decision).items() if name not in ("settings", "sources")}
    found = {"strength": decision.settings.strength, "guard": decision.settings.guard, **found}
    if args.json:
        return json.dumps({"in_force": found, "sources": dict(decision.sources)}, indent=2)
    width = max(map(len, found))
    return "\n".join(
        f"{name:{width}}  {_told(value):14}  {decision.sources.get(name, '')}" for name, value in found.items()
    )


def _told(value: Any) -> str:
    if value is None:
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
