"""The verbs of the gateway, and their arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import count
from .verb import add_verb


def add_keys(verbs: Any) -> None:
    """`adlocal keys`."""
    description = "Make, list and revoke the keys of adlocal serve, which may run meanwhile"
    actions = add_verb(verbs, "keys", description, "adlocal keys add --owner alice --expires 30d").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    _add_add(actions)
    for_list = actions.add_parser("list", help="all keys, with the tokens that they have used")
    for_list.add_argument("--json", action="store_true", help="print one JSON array")
    for_revoke = actions.add_parser("revoke", help="for ever; adlocal serve knows within seconds")
    for_revoke.add_argument("id", nargs="+", metavar="ID", help="as adlocal keys list shows it")
    for each in (for_list, for_revoke):
        _add_state(each)


def _add_add(actions: Any) -> None:
    parser: argparse.ArgumentParser = actions.add_parser("add", help="make a key, which is shown this once")
    parser.add_argument("--owner", required=True, metavar="NAME", help="who may have several keys, and limits over all")
    parser.add_argument("--tier", default="default", metavar="TIER", help="a name that the policy gives a meaning")
    parser.add_argument("--expires", metavar="TIME", help="30d, 12h, or a date: 2027-01-31, which begins in UTC")
    parser.add_argument("--budget", type=count, metavar="TOKENS", help="in all, for ever, prompts and answers")
    parser.add_argument("--operator", action="store_true", help="may see the operator's part of the page")
    parser.add_argument("--trusted", action="store_true", help="may name its end users in a header")
    parser.add_argument("--evaluation", action="store_true", help="its traffic is declared as an evaluation loop")
    parser.add_argument("--note", default="", metavar="TEXT", help="for yourself")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_state(parser)


def _add_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="where adlocal serve keeps its state: a directory (default: adlocal in XDG_STATE_HOME or ~/.local/state), "
        "or redis://..., rediss://...",
    )
    parser.add_argument(
        "--pepper",
        type=Path,
        metavar="FILE",
        help="secret that keys are hashed with, the same on every node; needed with Redis, else DIR/pepper",
    )


def add_serve(verbs: Any) -> None:
    """`adlocal serve`."""
    description = "Serve a teacher to many users: keys, policy, limits and a watch before a protected engine"
    parser = add_verb(verbs, "serve", description, "adlocal serve -m teacher.gguf --bundle bundle/ --parallel 4")
    parser.add_argument("-m", "--model", type=Path, metavar="TEACHER.gguf")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="from adlocal convert")
    parser.add_argument("--config", type=Path, metavar="serve.toml", help="everything else; SIGHUP reads it again")
    parser.add_argument("-a", "--alias", metavar="NAME", help="of the model, for clients")
    parser.add_argument("--state", metavar="DIR", help="where keys, limits and the watch are kept, or redis://...")
    _add_network(parser)
    _add_engine(parser)
    parser.add_argument("--strength", type=float, metavar="NATS", help="where no rule says otherwise")
    parser.add_argument("--guard", type=float, metavar="SHARE", help="where no rule says otherwise")
    parser.add_argument("--log-format", choices=["json", "text"], help="of the log, on standard error")
    parser.add_argument("-v", "--verbose", action="store_true", help="the engine's log, too")
    _add_check(parser)


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", metavar="ADDRESS", help="127.0.0.1 by default; others only with keys")
    parser.add_argument("--port", type=int, metavar="N", help="8080 by default, 0 for a free one")
    parser.add_argument("--ssl-cert-file", dest="tls_cert", type=Path, metavar="FILE", help="PEM, for HTTPS")
    parser.add_argument("--ssl-key-file", dest="tls_key", type=Path, metavar="FILE", help="PEM, for HTTPS")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", metavar="PATH", help="a llama-server; xllamacpp's by default")
    parser.add_argument("-np", "--parallel", type=count, metavar="N", help="answers at once, 4 by default")
    parser.add_argument("-c", "--ctx-size", type=count, metavar="N", help="tokens of context of each")
    parser.add_argument("-t", "--threads", type=count, metavar="N")
    parser.add_argument("-ngl", "--gpu-layers", metavar="N|auto|all")
    parser.add_argument(
        "flags", nargs="*", metavar="FLAG", help="others of the engine, after --; see adlocal engine --help"
    )


def _add_check(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("to see what would be in force")
    group.add_argument("--check", action="store_true", help="tell it, and start nothing")
    group.add_argument("--key", metavar="ID", help="for a key, by its id")
    group.add_argument("--owner", metavar="NAME")
    group.add_argument("--tier", metavar="TIER")
    group.add_argument(
        "--kind",
        nargs="+",
        choices=["chat", "completion", "tools", "reasoning"],
        default=["chat"],
        help="of the request",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")
