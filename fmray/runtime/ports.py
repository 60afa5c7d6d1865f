"""Is this address free? Asked before a model is loaded, answered in one line."""

from __future__ import annotations

import errno
import os
import socket

from fmray.errors import ResourceError


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host:port`, to listen on or to close again; raises ResourceError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ResourceError(f"host {host!r} cannot be listened on: {error.strerror}") from None
    bound.setsockopt(
        socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
    )  # connections in TIME_WAIT do not hold the port
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        in_use = error.errno == errno.EADDRINUSE
        reason = (
            "is in use; choose another with port="
            if in_use
            else f"cannot be had: {os.strerror(error.errno or 0)}"
        )
        raise ResourceError(f"port {port} on {host} {reason}") from None
    return bound


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with bind(host, 0) as socket_:
        return int(socket_.getsockname()[1])
