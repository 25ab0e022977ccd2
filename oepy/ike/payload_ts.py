"""Traffic Selector payloads (RFC 7296 §3.13)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from oepy.errors import ParseError
from oepy.model import IpAddress, TrafficSelector
from oepy.wire import Reader, Writer

MAX_SELECTORS = 64

_TS_IPV4 = 7
_TS_IPV6 = 8
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
        kind, protocol = reader.pull_u8(), reader.pull_u8()
        body = reader.pull_reader(reader.pull_u16() - 4, "traffic selector")
        if kind not in _TYPES:
            continue
        size, family = _TYPES[kind]
        start_port, end_port = body.pull_u16(), body.pull_u16()
        start: IpAddress = family(body.pull_bytes(size))
        end: IpAddress = family(body.pull_bytes(size))
        body.expect_end()
        if int(start) > int(end):
            raise ParseError("traffic selector: an address range runs backwards")
        if start_port > end_port:
            continue
        selectors.append(TrafficSelector(start, end, protocol, start_port, end_port))
    reader.expect_end()
    return tuple(selectors)


def build_ts(selectors: tuple[TrafficSelector, ...]) -> bytes:
    writer = Writer()
    writer.push_u8(len(selectors))
    writer.push_bytes(bytes(3))
    for selector in selectors:
        kind = _TS_IPV4 if selector.start.version == 4 else _TS_IPV6
        writer.push_u8(kind)
        writer.push_u8(selector.protocol)
        writer.push_u16(8 + 2 * _TYPES[kind][0])
        writer.push_u16(selector.start_port)
        writer.push_u16(selector.end_port)
        writer.push_bytes(selector.start.packed)
        writer.push_bytes(selector.end.packed)
    return writer.finish()
