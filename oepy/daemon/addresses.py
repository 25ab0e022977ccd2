"""This host's own addresses: which are ours, and from which one a peer is reached."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

from oepy.model import MARK_OWN, IpAddress

_SO_MARK = 36
_RTM_NEWADDR, _RTM_GETADDR, _NLMSG_DONE = 20, 22, 3
_RTM_NEWROUTE, _RTM_GETROUTE, _RTA_DST = 24, 26, 1
_RTM_TYPE_OFFSET, _RTN_LOCAL = 7, 2
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFADDRMSG_SIZE = 8
_HEADER = struct.Struct("=IHHII")
_PLACEHOLDERS = frozenset({IPv4Address("192.0.0.8")})  # RFC 7600 §4.8: on the tunnel device, and no host's
_DUMP_BUFFER = 1 << 16
_DUMP_SECONDS = 2.0


def own_addresses() -> frozenset[IpAddress]:
    """Every unicast address of this network namespace but loopback, link-local and the tunnel device's.

    One rtnetlink dump, some 50 µs: pyroute2's own call cannot be made inside of a running event loop.
    """
    found: set[IpAddress] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_DUMP_SECONDS)
        request = struct.pack("=IHHII", 24, _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + bytes(8)
        netlink.send(request)
        done = False
        while not done:
            data = netlink.recv(_DUMP_BUFFER)
            while len(data) >= _HEADER.size:
                length, kind = _HEADER.unpack_from(data)[:2]
                done = done or kind == _NLMSG_DONE or length < _HEADER.size
                if done:
                    break
                if kind == _RTM_NEWADDR:
                    found.update(_addresses_in(data[_HEADER.size : length]))
                data = data[(length + 3) & ~3 :]
    return frozenset(found)


def is_own(address: IpAddress) -> bool:
    """Whether the kernel would deliver packets to this address here. One question about one route, some
    20 µs however many addresses the host has."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    packed = address.packed
    route = struct.pack("=BBBBBBBBI", family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    attribute = struct.pack("=HH", 4 + len(packed), _RTA_DST) + packed
    length = _HEADER.size + len(route) + len(attribute)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_DUMP_SECONDS)
        netlink.send(_HEADER.pack(length, _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + route + attribute)
        answer = netlink.recv(_DUMP_BUFFER)
    if len(answer) < _HEADER.size + len(route) or _HEADER.unpack_from(answer)[1] != _RTM_NEWROUTE:
        return False  # no route at all: an error message
    return answer[_HEADER.size + _RTM_TYPE_OFFSET] == _RTN_LOCAL


def _addresses_in(message: bytes) -> Iterator[IpAddress]:
    """The address of one RTM_NEWADDR: IFA_LOCAL where it is there (point-to-point links), else IFA_ADDRESS."""
    attributes: dict[int, bytes] = {}
    rest = message[_IFADDRMSG_SIZE:]
    while len(rest) >= 4:
        length, kind = struct.unpack_from("=HH", rest)
        if length < 4:
            break
        attributes[kind] = rest[4:length]
        rest = rest[(length + 3) & ~3 :]
    packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
    if packed is None or len(packed) not in (4, 16):
        return
    address = ip_address(packed)
    if not (address.is_loopback or address.is_link_local or address in _PLACEHOLDERS):
        yield address


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
