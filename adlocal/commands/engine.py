"""`adlocal engine`: an HTTP server under protection, for people who have none."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import AdlocalError, InputError
from ..llamacpp.gguf import GGUFHeader
from ..plugin import Protection, check_program, environment, proxies_bytes
from ..servers import xllamacpp_server
from ..servers.addresses import listen
from .run import protection_of
from .server_arguments import DRAFT, LLAMA_CPP_PYTHON, given

#: Variables by which others would have a say: llama-server's arguments, and what its router tells its children.
_OTHERS = ("LLAMA_ARG_", "LLAMA_SERVER_")


def run(args: argparse.Namespace) -> None:
    """Serves until a signal ends it."""
    values = given(args)
    GGUFHeader(values["model.path"])
    protection = protection_of(args, values["model.path"])
    if args.engine == LLAMA_CPP_PYTHON:
        _serve_llama_cpp_python(args, protection, values)
    else:
        _become_xllamacpp(_with_draft(protection, values), values)


def _serve_llama_cpp_python(args: argparse.Namespace, protection: Protection, values: Mapping[str, Any]) -> None:
    from ..servers import llama_cpp_server  # which loads llama-cpp-python

    unknown = [args.flags[path] for path in values if path not in llama_cpp_server.KNOWN]
    of_the_plugin = {"--observe": args.observe, "--allow-model": args.allow_model, "--control": args.control}
    unknown += [flag for flag, value in of_the_plugin.items() if value]
    if unknown:
        raise InputError(f"{', '.join(unknown)}: not with --engine {LLAMA_CPP_PYTHON}; leave it out")
    llama_cpp_server.serve(protection, values)


def _with_draft(protection: Protection, values: Mapping[str, Any]) -> Protection:
    """The protection that leaves the draft model alone: nothing of it is shown that the teacher has not verified."""
    if DRAFT not in values:
        return protection
    draft = Path(values[DRAFT])
    if draft.samefile(values["model.path"]):
        raise InputError(
            f"--model-draft {draft}: it is the teacher itself, whose text is protected; give a smaller model"
        )
    return replace(protection, allow_models=[*protection.allow_models, draft])


def _become_xllamacpp(protection: Protection, values: Mapping[str, Any]) -> None:
    check_program(Path(sys.executable))
    variables = {n: value for n, value in environment(protection, os.environ).items() if not n.startswith(_OTHERS)}
    if importlib.util.find_spec("xllamacpp") is None:
        raise AdlocalError("xllamacpp, whose server this is, is not installed; run: pip install 'adlocal[engine]'")
    for host in values.get("hostnames", ["127.0.0.1"]):
        if not host.endswith(".sock"):  # before the weights are read, which can take a while
            listen(host, values.get("port", 8080)).close()
    defaults = {"n_parallel": -1, "fit_params_target": proxies_bytes(protection)}  # -1: as many as llama-server's own
    told = json.dumps({**defaults, **values})
    sys.stdout.flush()
    argv = [sys.executable, xllamacpp_server.__file__]
    os.execve(sys.executable, argv, {**variables, xllamacpp_server.VARIABLE: told})
