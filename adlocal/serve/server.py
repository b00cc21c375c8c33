"""The process of `adlocal serve`: a socket, signals, and the gateway between them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from ..errors import InputError
from ..servers.addresses import listen
from .app import make_app
from .config import Config
from .gateway import Gateway
from .patience import Patient

LOG = logging.getLogger(__name__)
_KEEP_ALIVE_SECONDS = 30
#: Requests that run get so long to end once the gateway is told to.
_GRACE_SECONDS = 30


def serve(config: Config, read_again: Callable[[], Config]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        config: checked.
        read_again: the configuration as its file now is, for SIGHUP.

    Raises:
        InputError: the configuration cannot be used.
        AdlocalError: the engine, or the state, cannot be had.
    """
    check(config)
    with contextlib.closing(listen(config.listen.host, config.listen.port)) as listening:
        _set_patience(listening, config.limits.stall_seconds)
        asyncio.run(_serve(config, read_again, listening))


def check(config: Config) -> None:
    """Refuses addresses and certificates that make no sense.

    Raises:
        InputError: they do not.
    """
    where = config.listen
    if (where.tls_cert is None) != (where.tls_key is None):
        raise InputError("tls_cert and tls_key belong together; give both, or none")
    for name in ("tls_cert", "tls_key"):
        path: Path | None = getattr(where, name)
        if path is not None and not path.is_file():
            raise InputError(f"{name} = {path}: no such file")


async def _serve(config: Config, read_again: Callable[[], Config], listening: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # there is nothing to read again yet
    async with Gateway(config) as gateway:
        server = _Server(
            uvicorn.Config(
                make_app(gateway),
                http=Patient,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                ssl_certfile=config.listen.tls_cert,
                ssl_keyfile=config.listen.tls_key,
            )
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, _reload, gateway, read_again)
        print(f"adlocal serve: listening on {_url(config, listening)}", flush=True)
        await server.serve(sockets=[listening])


def _set_patience(listening: socket.socket, seconds: float) -> None:
    """Has the kernel end connections whose client takes in nothing: what is left to send would keep them for ever."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2000 * seconds))


class _Server(uvicorn.Server):
    """One that leaves signals to us: it would raise them once more when it has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _reload(gateway: Gateway, read_again: Callable[[], Config]) -> None:
    try:
        gateway.reload(read_again())
    except InputError as error:
        LOG.error("configuration kept as it was", extra={"error": str(error)})
        print(f"adlocal serve: the configuration stays as it was: {error}", file=sys.stderr, flush=True)
    else:
        LOG.info("configuration reloaded")


def _url(config: Config, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    scheme = "https" if config.listen.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
