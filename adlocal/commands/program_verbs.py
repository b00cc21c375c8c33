"""The verbs for programs that nobody changed, and their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .arguments import add_control, add_preloaded, count, seconds
from .server_arguments import ENGINES, add_server
from .verb import add_verb


def add_run(verbs: Any) -> None:
    """`adlocal run`."""
    description = "Start a llama.cpp program that nobody changed, under protection (Linux)"
    example = "adlocal run --bundle bundle/ -- llama-server -m teacher.gguf --parallel 4"
    parser = add_verb(verbs, "run", description, example)
    add_preloaded(parser)
    parser.add_argument(
        "--libllama", type=Path, metavar="FILE", help="the program's llama.cpp, where it needs a plugin of its own"
    )
    parser.add_argument("program", nargs="+", metavar="PROGRAM", help="and its arguments, after --")


def add_engine(verbs: Any) -> None:
    """`adlocal engine`."""
    description = "Serve a teacher under protection, with llama-server's HTTP API and flags"
    example = "adlocal engine -m teacher.gguf --bundle bundle/ --parallel 4 --port 8080"
    parser = add_verb(verbs, "engine", description, example)
    add_preloaded(parser)
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="xllamacpp (Linux; adlocal[engine]), or where it cannot be protected llama-cpp-python's own server, which "
        "answers one request at a time",
    )
    add_server(parser)
    parser.set_defaults(libllama=None)  # it brings its own


def add_plugin(verbs: Any) -> None:
    """`adlocal plugin`."""
    parser = add_verb(
        verbs,
        "plugin",
        "Compile the library of adlocal run for another llama.cpp (seconds; needs a C++ compiler)",
        "adlocal plugin build --include llama.cpp/include --libllama llama.cpp/build/bin/libllama.so",
    )
    parser.add_argument("action", choices=["build"])
    parser.add_argument("--include", type=Path, required=True, metavar="DIR", help="where its llama.h is")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--libllama", type=Path, metavar="FILE", help="the library, which is asked for its version")
    which.add_argument("--llama-version", metavar="VERSION", help="what its llama_version() returns")


def add_status(verbs: Any) -> None:
    """`adlocal status`."""
    description = "Show what the programs under adlocal run are doing"
    parser = add_verb(verbs, "status", description, "adlocal status --watch")
    add_control(parser)
    parser.add_argument("pid", nargs="*", type=count, metavar="PID", help="only these; all by default")
    parser.add_argument(
        "-w",
        "--watch",
        type=seconds,
        nargs="?",
        const=1.0,
        metavar="SECONDS",
        help="again and again, every second by default",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array, or one a line with --watch")
