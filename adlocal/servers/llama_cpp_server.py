"""llama-cpp-python's own HTTP server with `AntidistillationLlama` for its model: where no library can be preloaded.

It answers one request at a time: the others wait.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any

from ..errors import AdlocalError, InputError
from ..llama import AntidistillationLlama
from ..plugin import Protection
from .addresses import listen

#: Arguments of `llama_cpp.Llama`, by the path of the attribute that xllamacpp has for it.
_ARGUMENTS = {
    "n_ctx": "n_ctx",
    "cpuparams.n_threads": "n_threads",
    "cpuparams_batch.n_threads": "n_threads_batch",
    "n_gpu_layers": "n_gpu_layers",
    "n_batch": "n_batch",
    "n_ubatch": "n_ubatch",
}
_SINGLE = ("hostnames", "api_keys", "model_alias")
#: The attributes that there is something for.
KNOWN = frozenset({*_ARGUMENTS, *_SINGLE, "model.path", "port"})


def serve(protection: Protection, values: Mapping[str, Any]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        protection: but for `observe` and `allow_models`, which the drop-in has not.
        values: of attributes in `KNOWN`.

    Raises:
        InputError: a value cannot be used.
        AdlocalError: a package that the server needs is not installed.
    """
    for name in _SINGLE:
        if len(values.get(name, ())) > 1:
            raise InputError(f"{','.join(values[name])}: llama-cpp-python's server takes one; leave out the others")
    uvicorn = _uvicorn()
    (host,) = values.get("hostnames", ["127.0.0.1"])
    with closing(listen(host, values.get("port", 8080))) as listening, suppress(KeyboardInterrupt):
        server = uvicorn.Server(uvicorn.Config(_app(protection, values), log_level="warning"))
        print("adlocal engine: llama-cpp-python's server answers one request at a time", file=sys.stderr)
        print(f"adlocal engine: listening on {_url(listening)}", flush=True)
        server.run(sockets=[listening])


def _uvicorn() -> Any:
    try:
        import llama_cpp.server.app  # noqa: F401 # what it needs is looked for before anything is loaded
        import uvicorn
    except ModuleNotFoundError as error:
        raise AdlocalError(
            f"llama-cpp-python's server needs {error.name}, which is not installed; run: "
            "pip install 'llama-cpp-python[server]'"
        ) from None
    return uvicorn


def _app(protection: Protection, values: Mapping[str, Any]) -> Any:
    from llama_cpp.server.app import create_app
    from llama_cpp.server.model import LlamaProxy
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    os.environ.pop("CONFIG_FILE", None)  # it would be read in the place of what is given
    LlamaProxy.load_llama_from_model_settings = staticmethod(lambda _: _model(protection, values))  # type: ignore[assignment]
    (key,) = values.get("api_keys", [None])
    (alias,) = values.get("model_alias", [None])
    return create_app(
        # Requests wait for each other; by default a new one would end the one that runs.
        server_settings=ServerSettings(api_key=key, interrupt_requests=False, root_path="", disable_ping_events=False),
        model_settings=[ModelSettings.model_construct(model=values["model.path"], model_alias=alias)],
    )


def _model(protection: Protection, values: Mapping[str, Any]) -> AntidistillationLlama:
    how = {_ARGUMENTS[path]: value for path, value in values.items() if path in _ARGUMENTS}
    if how.get("n_gpu_layers", 0) < 0:
        how["n_gpu_layers"] = -1  # all: it has no other word for as many as fit
    return AntidistillationLlama(
        values["model.path"],
        bundle=protection.bundle,
        strength=protection.settings.strength,
        guard=protection.settings.guard,
        epsilon=protection.epsilon,
        proxy_n_threads=protection.proxy_n_threads,
        proxy_n_gpu_layers=protection.proxy_n_gpu_layers,
        **{"n_ctx": 0, "verbose": False, **how},
    )


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
