"""This host's own addresses: which are ours, and from which one a peer is reached."""

from __future__ import annotations

import contextlib
import socket
from ipaddress import IPv6Address, ip_address

from oepy.model import MARK_OWN, IpAddress

_SO_MARK = 36


def own_addresses() -> frozenset[IpAddress]:
    """Every unicast address of this network namespace but loopback and link-local."""
    from pyroute2 import IPRoute

    found = set()
    with IPRoute() as ipr:
        for message in ipr.get_addr():
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            if text is None:
                continue
            address = ip_address(text)
            if not address.is_loopback and not address.is_link_local:
                found.add(address)
    return frozenset(found)


def source_towards(destination: IpAddress) -> IpAddress | None:
    """The source address that the kernel's routes give for the daemon's own packets, None without a route."""
    family = socket.AF_INET6 if isinstance(destination, IPv6Address) else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(PermissionError):
            probe.setsockopt(socket.SOL_SOCKET, _SO_MARK, MARK_OWN)
        try:
            probe.connect((str(destination), 9))  # sends nothing: a UDP connect only asks the routes
        except OSError:
            return None
        return ip_address(probe.getsockname()[0])
