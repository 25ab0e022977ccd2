"""The UDP sockets of IKE and of UDP-encapsulated ESP (RFC 7296 §2.23, RFC 3948).

Ports 500 and 4500, IPv4 and IPv6 apart. Every packet sent carries MARK_OWN, so the trap lets it pass, and the
source address that the caller names (a host with several addresses must answer from the one it was asked at).
"""

from __future__ import annotations

import enum
import errno
import functools
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from oepy.errors import OepyError
from oepy.model import IKE_PORT, MARK_OWN, NAT_T_PORT, Endpoint, IpAddress

NON_ESP_MARKER = bytes(4)  # RFC 3948 §2.2
KEEPALIVE = b"\xff"  # RFC 3948 §2.3
MAX_DATAGRAM = 65_535
RECEIVE_BUFFER = 8 << 20
SEND_BUFFER = 4 << 20

# From linux/in.h, linux/in6.h and asm-generic/socket.h; the socket module lacks some of them
_SO_MARK = 36
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32
_IP_PKTINFO = 8
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_PMTUDISC_DONT = 0
_IPV6_RECVPKTINFO, _IPV6_PKTINFO = 49, 50
_PKTINFO4 = struct.Struct("=i4s4s")  # interface, source to use, destination seen
_PKTINFO6 = struct.Struct("=16sI")
ANCILLARY_SPACE = socket.CMSG_SPACE(_PKTINFO6.size)

Ancillary = list[tuple[int, int, bytes]]

# What the network may answer to a send: the datagram is lost, as it might be anywhere else on its way.
_LOST = frozenset(
    (
        errno.EAGAIN,
        errno.ENOBUFS,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ECONNREFUSED,
        errno.EPERM,
        errno.EADDRNOTAVAIL,
        errno.EMSGSIZE,
        errno.EINVAL,
        errno.EACCES,
    )
)


class Kind(enum.Enum):
    """What a datagram on port 4500 is, RFC 3948 §2."""

    IKE = "ike"
    ESP = "esp"
    KEEPALIVE = "keepalive"


def classify(data: bytes | bytearray | memoryview) -> Kind:
    """Of a datagram on port 4500. Too short for either is ESP, whose parser refuses it."""
    if data[:4] == NON_ESP_MARKER:
        return Kind.IKE
    return Kind.KEEPALIVE if data[:] == KEEPALIVE else Kind.ESP


@dataclass(frozen=True, slots=True)
class Datagram:
    """Received bytes; `local` is where they were sent to."""

    data: bytes
    local: Endpoint
    remote: Endpoint


def source_ancillary(source: IpAddress) -> Ancillary:
    """For sendmsg: the source address to use, on the device that routing chooses."""
    if source.version == 4:
        return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, source.packed, bytes(4)))]
    return [(socket.IPPROTO_IPV6, _IPV6_PKTINFO, _PKTINFO6.pack(source.packed, 0))]


def received_at(ancillary: Iterable[tuple[int, int, bytes]]) -> IpAddress | None:
    """From recvmsg: the address that the datagram was sent to."""
    for level, kind, value in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO) and len(value) >= _PKTINFO4.size:
            return IPv4Address(_PKTINFO4.unpack_from(value)[2])
        if (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO) and len(value) >= _PKTINFO6.size:
            return IPv6Address(_PKTINFO6.unpack_from(value)[0])
    return None


@functools.lru_cache(maxsize=4096)
def _endpoint(text: str, port: int) -> Endpoint:
    """As the socket module names it. A peer's is the same object each time, in all that keeps it."""
    address = IPv6Address(text.partition("%")[0]) if ":" in text else IPv4Address(text)
    return Endpoint(address, port)


class UdpSocket:
    """One bound socket of one family. Never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.version = 4 if sock.family == socket.AF_INET else 6
        self.port: int = sock.getsockname()[1]

    def fileno(self) -> int:
        return self.socket.fileno()

    def receive(self) -> Datagram | None:
        """The next datagram, None for none now."""
        try:
            data, ancillary, _, address = self.socket.recvmsg(MAX_DATAGRAM, ANCILLARY_SPACE)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _LOST:  # an ICMP error to something sent earlier
                return None
            raise
        local = received_at(ancillary)
        if local is None:  # cannot happen: asked for in open_socket
            return None
        return Datagram(data, Endpoint(local, self.port), _endpoint(address[0], address[1]))

    def send(self, data: bytes, source: IpAddress, remote: Endpoint) -> bool:
        """Whether the kernel took it. False where it is lost on the way out (no route, no buffer)."""
        try:
            self.socket.sendmsg([data], source_ancillary(source), 0, (str(remote.address), remote.port))
        except OSError as error:
            if error.errno in _LOST:
                return False
            raise
        return True

    def close(self) -> None:
        self.socket.close()


def _configure(sock: socket.socket, version: int) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, MARK_OWN)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
    # No DF on the outside: where the path is narrower than our tunnel's MTU assumes, fragments arrive
    # where a dropped packet would be a black hole.
    if version == 4:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DONT)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DONT)


def open_socket(version: int, port: int, address: IpAddress | None = None) -> UdpSocket:
    """Bound to `address` or to all. Raises OepyError with the mend, where the port is taken for instance."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        _configure(sock, version)
        sock.bind((str(address) if address else "", port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise OepyError(
                f"UDP port {port} is taken", "stop the other IKE daemon (`ss -ulpn` names it)"
            ) from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise OepyError(
                f"not permitted to open UDP port {port}", "run as root (CAP_NET_ADMIN)"
            ) from error
        raise OepyError(f"UDP port {port}, IPv{version}: {error.strerror}") from error
    return UdpSocket(sock)


class IkeSockets:
    """The daemon's sockets: `ike` on 500, `nat_t` on 4500. Where a datapath process reads `nat_t`, the daemon
    only sends on them."""

    def __init__(self, ike: Sequence[UdpSocket], nat_t: Sequence[UdpSocket]) -> None:
        self.ike = tuple(ike)
        self.nat_t = tuple(nat_t)
        self._by_local = {(sock.version, sock.port): sock for sock in (*self.ike, *self.nat_t)}
        self._marked = {sock.port for sock in self.nat_t}

    def send(self, data: bytes, local: Endpoint, remote: Endpoint) -> bool:
        """An IKE message from `local`, whose port says from which socket; with the marker on the NAT-T port.
        False where there is no such socket or the kernel did not take it: IKE will send it again."""
        sock = self._by_local.get((local.address.version, local.port))
        if sock is None or local.address.version != remote.address.version:
            return False
        marker = NON_ESP_MARKER if sock.port in self._marked else b""
        return sock.send(marker + data, local.address, remote)

    def keepalive(self, local: Endpoint, remote: Endpoint) -> bool:
        """Keep a NAT's mapping open, RFC 3948 §4."""
        sock = self._by_local.get((local.address.version, local.port))
        return sock is not None and sock.send(KEEPALIVE, local.address, remote)

    def receive(self, sock: UdpSocket) -> Datagram | None:
        """The next IKE message of one of our sockets, without its marker; None for none now. For a NAT-T
        socket only where no datapath process reads it: ESP and keepalives are skipped."""
        while (datagram := sock.receive()) is not None:
            if sock.port not in self._marked:
                return datagram
            if classify(datagram.data) is Kind.IKE:
                return Datagram(datagram.data[len(NON_ESP_MARKER) :], datagram.local, datagram.remote)
        return None

    def close(self) -> None:
        for sock in (*self.ike, *self.nat_t):
            sock.close()


def _ipv6_is_there() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def open_ike_sockets(
    *, ike_port: int = IKE_PORT, nat_t_port: int = NAT_T_PORT, versions: Iterable[int] | None = None
) -> IkeSockets:
    """Open all of them on all addresses. `versions`: 4 and 6 where the host has IPv6. Raises OepyError."""
    wanted = tuple(versions) if versions is not None else (4, 6) if _ipv6_is_there() else (4,)
    opened: list[UdpSocket] = []
    try:
        for port in (ike_port, nat_t_port):
            for version in wanted:
                opened.append(open_socket(version, port))
    except OepyError:
        for sock in opened:
            sock.close()
        raise
    return IkeSockets(opened[: len(wanted)], opened[len(wanted) :])
