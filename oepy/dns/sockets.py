"""The sockets by which this room asks."""

from __future__ import annotations

import errno
import socket

from oepy.model import IpAddress


def open_socket(address: IpAddress, kind: socket.SocketKind, mark: int) -> socket.socket:
    """Of the address's family, not blocking, with this SO_MARK (0 for none). Raises OSError."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    channel = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if mark:
        try:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        except PermissionError:
            pass  # commands of ordinary users ask unmarked: only the daemon's own trap needs the mark
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                channel.close()
                raise
    return channel
