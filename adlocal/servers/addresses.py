"""Where a server is to listen."""

from __future__ import annotations

import errno
import ipaddress
import socket

from ..errors import InputError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Args:
        host: a name or an address.
        port: 0 for a free one.

    Raises:
        InputError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "give another one, or 0 for a free one"
            raise InputError(f"--port {port}: another program listens at {host}:{port}; {remedy}") from None
        raise InputError(f"--host {host}: nothing can listen at {host}:{port} here ({error.strerror})") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
