"""Inner packets: their length, addresses, and the fields that selectors look at (RFC 4301 §4.4.1.1)."""

from __future__ import annotations

from dataclasses import dataclass

from oepy.errors import ParseError
from oepy.model import TrafficSelector

_EXTENSION_HEADERS = frozenset((0, 43, 60))
_FRAGMENT = 44
MAX_EXTENSION_HEADERS = 8
_WITH_PORTS = frozenset((6, 17, 33, 132, 136))
_ICMP = frozenset((1, 58))
OPAQUE = -1  # ports that cannot be seen: only a selector for any port matches them

Bytes = bytes | bytearray | memoryview


def inner_length(packet: Bytes, next_header: int, available: int) -> int:
    """The packet's own length, which TFC padding may follow (RFC 4303 §2.7), of `available` bytes. `next_header`
    as in the ESP trailer: 4 for IPv4, 41 for IPv6. Raises ParseError where packet and header do not fit."""
    if next_header == 4:
        if available >= 20 and packet[0] >> 4 == 4 and packet[0] & 15 >= 5:
            length = packet[2] << 8 | packet[3]
            if (packet[0] & 15) * 4 <= length <= available:
                return length
    elif next_header == 41:
        if available >= 40 and packet[0] >> 4 == 6:
            length = 40 + (packet[4] << 8 | packet[5])
            if length <= available:
                return length
    else:
        raise ParseError(f"next header {next_header} is no IP packet")
    raise ParseError("inner packet is cut off, or not of the family that its next header names")


def addresses(packet: Bytes) -> tuple[bytes, bytes]:
    """Packed source and destination of a packet that has its whole header."""
    if packet[0] >> 4 == 4:
        return bytes(packet[12:16]), bytes(packet[16:20])
    return bytes(packet[8:24]), bytes(packet[24:40])


def dscp(packet: Bytes) -> int:
    """In the upper six bits of eight (RFC 2474), of a packet that has its whole header."""
    traffic_class = packet[1] if packet[0] >> 4 == 4 else (packet[0] & 15) << 4 | packet[1] >> 4
    return traffic_class & 0xFC


def protocol_and_ports(packet: Bytes) -> tuple[int, int, int]:
    """Protocol, source and destination port. ICMP's type and code stand in both ports, type in the upper
    byte; OPAQUE where they cannot be seen (a later fragment, a cut-off header); 0 for other protocols."""
    if packet[0] >> 4 == 4:
        protocol, offset = packet[9], (packet[0] & 15) * 4
        if (packet[6] << 8 | packet[7]) & 0x1FFF:
            return protocol, OPAQUE, OPAQUE
    else:
        protocol, offset = packet[6], 40
        for _ in range(MAX_EXTENSION_HEADERS):
            if len(packet) < offset + 8:
                break
            if protocol in _EXTENSION_HEADERS:
                protocol, offset = packet[offset], offset + 8 + packet[offset + 1] * 8
            elif protocol == _FRAGMENT:
                if (packet[offset + 2] << 8 | packet[offset + 3]) & 0xFFF8:
                    return packet[offset], OPAQUE, OPAQUE
                protocol, offset = packet[offset], offset + 8
            else:
                break
    if protocol in _WITH_PORTS:
        if len(packet) < offset + 4:
            return protocol, OPAQUE, OPAQUE
        return (
            protocol,
            packet[offset] << 8 | packet[offset + 1],
            packet[offset + 2] << 8 | packet[offset + 3],
        )
    if protocol in _ICMP:
        if len(packet) < offset + 2:
            return protocol, OPAQUE, OPAQUE
        both = packet[offset] << 8 | packet[offset + 1]
        return protocol, both, both
    return protocol, 0, 0


@dataclass(frozen=True, slots=True)
class _Side:
    """A traffic selector as bytes: packed addresses of one family compare like the numbers they are."""

    start: bytes
    end: bytes
    protocol: int
    start_port: int
    end_port: int

    def has_address(self, address: bytes) -> bool:
        return len(address) == len(self.start) and self.start <= address <= self.end

    def has_port(self, protocol: int, port: int) -> bool:
        if self.protocol not in (0, protocol):
            return False
        return (self.start_port, self.end_port) == (0, 65535) or self.start_port <= port <= self.end_port


def _side(selector: TrafficSelector) -> _Side:
    return _Side(
        selector.start.packed,
        selector.end.packed,
        selector.protocol,
        selector.start_port,
        selector.end_port,
    )


class Selectors:
    """What one SA pair may carry, in either direction."""

    __slots__ = ("_local", "_remote", "addresses_only", "direct", "inward")

    def __init__(self, local: tuple[TrafficSelector, ...], remote: tuple[TrafficSelector, ...]) -> None:
        self._local = tuple(_side(selector) for selector in local)
        self._remote = tuple(_side(selector) for selector in remote)
        self.addresses_only = all(
            side.protocol == 0 and (side.start_port, side.end_port) == (0, 65535)
            for side in (*self._local, *self._remote)
        )

        # The opportunistic case, one host to one host: both addresses at once, as they stand in the packet
        self.direct = self.inward = b""
        if self.addresses_only and len(local) == len(remote) == 1:
            (here,), (there,) = self._local, self._remote
            if here.start == here.end and there.start == there.end:
                self.direct, self.inward = here.start + there.start, there.start + here.start

    def allow_outward(self, packet: Bytes) -> bool:
        """From a local to a remote selector."""
        if self.direct:
            return both_addresses(packet) == self.direct
        source, destination = addresses(packet)
        if self.addresses_only:
            return _any_has(self._local, source) and _any_has(self._remote, destination)
        protocol, source_port, destination_port = protocol_and_ports(packet)
        return any(
            side.has_address(source) and side.has_port(protocol, source_port) for side in self._local
        ) and any(
            side.has_address(destination) and side.has_port(protocol, destination_port)
            for side in self._remote
        )

    def allow_inward(self, packet: Bytes) -> bool:
        """From a remote to a local selector (RFC 4301 §5.2 step 4)."""
        if self.inward:
            return both_addresses(packet) == self.inward
        source, destination = addresses(packet)
        if self.addresses_only:
            return _any_has(self._remote, source) and _any_has(self._local, destination)
        protocol, source_port, destination_port = protocol_and_ports(packet)
        return any(
            side.has_address(source) and side.has_port(protocol, source_port) for side in self._remote
        ) and any(
            side.has_address(destination) and side.has_port(protocol, destination_port)
            for side in self._local
        )


def both_addresses(packet: Bytes) -> Bytes:
    """Source and destination as they stand in a packet that has its whole header."""
    return packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]


def _any_has(sides: tuple[_Side, ...], address: bytes) -> bool:
    return any(side.has_address(address) for side in sides)
