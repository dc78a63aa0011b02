"""A listening socket, or a clear reason why there is none."""

from __future__ import annotations

import errno
import socket

from ..errors import FolderError

LOOPBACK = "127.0.0.1"


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that who connects early waits. Port 0 finds a free one. Raises FolderError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server_socket = socket.socket(family, socket.SOCK_STREAM)
    server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server_socket.bind((host, port))
        server_socket.listen(256)
    except (OSError, OverflowError) as error:
        server_socket.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            what, where, fix = f"port {port} is in use", "--port", "Choose another, or --port 0 for any free one."
        elif isinstance(error, socket.gaierror) or (isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL):
            what, where, fix = f"this machine has no address {host}", "--host", "Give one of its own, or 127.0.0.1."
        else:
            what, where = f"port {port} cannot be used ({error})", "--port"
            fix = "Choose another, or --port 0 for any free one."
        raise FolderError(what, where=where, fix=fix) from None
    return server_socket


def url_of(host: str, port: int) -> str:
    """The address as clients write it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")
