"""The flow of a queued packet, read from its first bytes (RFC 791, RFC 8200)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from oepy.errors import ParseError
from oepy.model import Direction, Flow
from oepy.wire import Reader

_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION_OPTIONS = 0, 43, 44, 60
_EXTENSION_HEADERS = frozenset((_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION_OPTIONS))
MAX_EXTENSION_HEADERS = 8
# TCP, UDP, DCCP, SCTP and UDP-Lite begin with source and destination port
_WITH_PORTS = frozenset((6, 17, 33, 132, 136))


def parse_flow(data: bytes, direction: Direction) -> Flow:
    """`data` begins with the IP header and may be cut off behind it: ports that are not there are 0.
    Raises ParseError where there is no whole IP header."""
    if not data:
        raise ParseError("empty packet")
    if data[0] >> 4 == 4:
        return _parse4(Reader(data, what="IPv4 packet"), direction)
    if data[0] >> 4 == 6:
        return _parse6(Reader(data, what="IPv6 packet"), direction)
    raise ParseError(f"IP version {data[0] >> 4}")


def _parse4(reader: Reader, direction: Direction) -> Flow:
    words = reader.pull_u8() & 15
    reader.pull_bytes(5)
    later_fragment = reader.pull_u16() & 0x1FFF != 0
    reader.pull_u8()
    protocol = reader.pull_u8()
    reader.pull_u16()
    source, destination = IPv4Address(reader.pull_bytes(4)), IPv4Address(reader.pull_bytes(4))
    if words < 5:
        raise ParseError(f"IPv4 header of {words} words")
    reader.pull_bytes(min(reader.remaining, words * 4 - 20))
    ports = (0, 0) if later_fragment else _ports(reader, protocol)
    return Flow(source, destination, protocol, *ports, direction)


def _parse6(reader: Reader, direction: Direction) -> Flow:
    reader.pull_bytes(6)
    protocol = reader.pull_u8()
    reader.pull_u8()
    source, destination = IPv6Address(reader.pull_bytes(16)), IPv6Address(reader.pull_bytes(16))
    later_fragment = False
    for _ in range(MAX_EXTENSION_HEADERS):
        if protocol not in _EXTENSION_HEADERS or reader.remaining < 8:
            break
        following = reader.pull_u8()
        length = reader.pull_u8()
        if protocol == _FRAGMENT:
            later_fragment = later_fragment or reader.pull_u16() & 0xFFF8 != 0
            reader.pull_u32()
        else:
            reader.pull_bytes(min(reader.remaining, 6 + length * 8))
        protocol = following
    ports = (0, 0) if later_fragment else _ports(reader, protocol)
    return Flow(source, destination, protocol, *ports, direction)


def _ports(reader: Reader, protocol: int) -> tuple[int, int]:
    if protocol not in _WITH_PORTS or reader.remaining < 4:
        return 0, 0
    return reader.pull_u16(), reader.pull_u16()
