"""Traffic Selector payloads (RFC 7296 §3.13)."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from oepy.errors import ParseError
from oepy.model import IpAddress, TrafficSelector
from oepy.wire import Reader

MAX_SELECTORS = 64

_TS_IPV4 = 7
_TS_IPV6 = 8
_GENERIC = struct.Struct("!BBH")
_PORTS = struct.Struct("!HH")
_SELECTOR = struct.Struct("!BBHHH")  # both
_TYPES: dict[int, tuple[int, type[IPv4Address] | type[IPv6Address]]] = {
    _TS_IPV4: (4, IPv4Address),
    _TS_IPV6: (16, IPv6Address),
}


def parse_ts(reader: Reader) -> tuple[TrafficSelector, ...]:
    """Selectors of types that nobody here knows are left out (RFC 7296 §2.9 lets us narrow them away), and
    so is OPAQUE (ports 65535..0), which no selector of ours can express."""
    count = reader.pull_u8()
    reader.pull_bytes(3)
    if not 0 < count <= MAX_SELECTORS:
        raise ParseError(f"traffic selectors: {count} of them")
    selectors = []
    for _ in range(count):
        kind, protocol, length = reader.pull(_GENERIC)
        if kind not in _TYPES:
            reader.pull_bytes(length - _GENERIC.size)
            continue
        size, family = _TYPES[kind]
        if length != _SELECTOR.size + 2 * size:
            raise ParseError(f"traffic selector: {length} bytes of type {kind}")
        start_port, end_port = reader.pull(_PORTS)
        first, last = reader.pull_bytes(size), reader.pull_bytes(size)
        start: IpAddress = family(first)
        end: IpAddress = start if first == last else family(last)
        if first > last:
            raise ParseError("traffic selector: an address range runs backwards")
        if start_port > end_port:
            continue
        selectors.append(TrafficSelector(start, end, protocol, start_port, end_port))
    reader.expect_end()
    return tuple(selectors)


def build_ts(selectors: tuple[TrafficSelector, ...]) -> bytes:
    parts = [bytes((len(selectors), 0, 0, 0))]
    for selector in selectors:
        kind = _TS_IPV4 if selector.start.version == 4 else _TS_IPV6
        length = _SELECTOR.size + 2 * _TYPES[kind][0]
        parts += (
            _SELECTOR.pack(kind, selector.protocol, length, selector.start_port, selector.end_port),
            selector.start.packed,
            selector.end.packed,
        )
    return b"".join(parts)
