"""Traffic selectors of IKE (ranges) as selectors of the kernel (prefixes and masks)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, summarize_address_range
from itertools import product

from oepy.errors import OepyError
from oepy.model import IpNetwork, TrafficSelector
from oepy.xfrm.values import ANY_PORT, Port, Selector

MAX_SELECTORS = 256  # of one SA: each is up to three policies
_ALL_PORTS = (0, 65535)
_ICMP = (1, 58)  # RFC 7296 §3.13.1: the port is type and code
_FULL = 0xFFFF


def selectors(
    source_ts: Sequence[TrafficSelector], destination_ts: Sequence[TrafficSelector]
) -> tuple[Selector, ...]:
    """Every combination that a packet can have. Raises OepyError where the kernel cannot express one, where
    there is none, or where there are more than MAX_SELECTORS."""
    found: dict[Selector, None] = {}
    for source, destination in product(source_ts, destination_ts):
        for selector in _combined(source, destination):
            found[selector] = None
            if len(found) > MAX_SELECTORS:
                raise OepyError(
                    f"traffic selectors become more than {MAX_SELECTORS} policies",
                    "use whole prefixes, and fewer port ranges",
                )
    if not found:
        raise OepyError("no packet can have both of these traffic selectors", "check families and protocols")
    return tuple(found)


def reverse(selector: Selector) -> Selector:
    """Of the packets that come back. ICMP's type and code stay where they are."""
    if selector.wild:
        return selector
    if selector.protocol in _ICMP:
        ports = selector.source_port, selector.destination_port
    else:
        ports = selector.destination_port, selector.source_port
    return Selector(selector.destination, selector.source, selector.protocol, *ports, selector.interface)


def _combined(source: TrafficSelector, destination: TrafficSelector) -> Iterator[Selector]:
    if source.start.version != destination.start.version:
        return
    if source.protocol and destination.protocol and source.protocol != destination.protocol:
        return
    protocol = source.protocol or destination.protocol
    if protocol in _ICMP:
        ports = [_type_and_code(source, destination)]
    else:
        ports = [
            (one, other)
            for one in _port_masks(source.start_port, source.end_port)
            for other in _port_masks(destination.start_port, destination.end_port)
        ]
    for one, other in product(_prefixes(source), _prefixes(destination)):
        for source_port, destination_port in ports:
            yield Selector(one, other, protocol, source_port, destination_port)


def _prefixes(selector: TrafficSelector) -> Iterable[IpNetwork]:
    """Mostly it is one address or one prefix, which is found much faster than by the library's way."""
    first, width = int(selector.start), selector.start.max_prefixlen
    bits = (first ^ int(selector.end)).bit_length()
    mask = (1 << bits) - 1
    if not first & mask and int(selector.end) & mask == mask:
        kind = IPv4Network if width == 32 else IPv6Network
        return (kind((first, width - bits)),)
    return summarize_address_range(selector.start, selector.end)


def _port_masks(first: int, last: int) -> list[Port]:
    """The fewest (value, mask) that cover exactly `first` to `last`. Raises OepyError for OPAQUE, where the
    first is above the last: whatever the kernel matched then, it would be more or less than was agreed."""
    if (first, last) == _ALL_PORTS:
        return [ANY_PORT]
    if first > last:
        raise OepyError("a traffic selector with OPAQUE ports", "agree on all ports, or on some")
    masks: list[Port] = []
    while first <= last:
        size = first & -first if first else 1 << 16
        while first + size - 1 > last:
            size >>= 1
        masks.append((first, _FULL & ~(size - 1)))
        first += size
    return masks


def _type_and_code(source: TrafficSelector, destination: TrafficSelector) -> tuple[Port, Port]:
    """The kernel takes ICMP's type for the source port and its code for the destination port."""
    ranges = {(ts.start_port, ts.end_port) for ts in (source, destination)} - {_ALL_PORTS}
    if not ranges:
        return ANY_PORT, ANY_PORT
    first, last = ranges.pop()
    if ranges or first >> 8 != last >> 8 or (first != last and (first & 0xFF, last & 0xFF) != (0, 0xFF)):
        raise OepyError("the kernel takes one ICMP type, or one type with one code", "agree on all of ICMP")
    code = (first & 0xFF, _FULL) if first == last else ANY_PORT
    return (first >> 8, _FULL), code
