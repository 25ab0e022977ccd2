"""Reverse names, and which of the listed zones holds a name."""

from __future__ import annotations

import re

import dns.name

from oepy.dns.message import NameKey, name_key
from oepy.model import IpAddress

_CLASSLESS = re.compile(rb"(\d{1,3})([/-])(\d{1,3})")
_IN_ADDR = dns.name.from_text("in-addr.arpa.")


def reverse_name(address: IpAddress) -> dns.name.Name:
    """`10.2.0.192.in-addr.arpa.`, or the nibbles under ip6.arpa."""
    if address.version == 4:
        labels = [b"%d" % byte for byte in reversed(address.packed)]
        return dns.name.Name((*labels, b"in-addr", b"arpa", b""))
    nibbles = address.packed.hex().encode("ascii")[::-1]
    return dns.name.Name((*(nibbles[at : at + 1] for at in range(32)), b"ip6", b"arpa", b""))


class ZoneMap:
    """Which of the listed zones holds a name: the deepest one."""

    def __init__(self, zones: list[dns.name.Name]) -> None:
        self.zones = tuple(zones)
        self._known = {name_key(zone): zone for zone in zones}
        self._above = {key[depth:] for key in self._known for depth in range(1, len(key))}
        # (parent, first, last) of each RFC 2317 zone, by its parent
        self._classless: dict[NameKey, list[tuple[int, int, dns.name.Name]]] = {}
        for zone in zones:
            span = classless_span(zone)
            if span is not None:
                self._classless.setdefault(name_key(zone.parent()), []).append((*span, zone))

    def find(self, name: dns.name.Name) -> dns.name.Name | None:
        key = name_key(name)
        for depth in range(len(key)):
            zone = self._known.get(key[depth:])
            if zone is not None:
                return zone
        return None

    def is_above_zone(self, name: dns.name.Name) -> bool:
        """Whether a listed zone lies below the name, so that names below it may fall into several zones."""
        return name_key(name) in self._above

    def parent_of(self, zone: dns.name.Name) -> dns.name.Name | None:
        return self.find(zone.parent()) if zone != dns.name.root else None

    def classless(self, name: dns.name.Name) -> dns.name.Name | None:
        """The owner below an RFC 2317 zone for a plain IPv4 reverse name, if one is listed."""
        if not self._classless or not name.labels[0].isdigit():
            return None
        number = int(name.labels[0])
        for first, last, zone in self._classless.get(name_key(name)[1:], ()):
            if first <= number <= last:
                return dns.name.Name((name.labels[0], *zone.labels))
        return None


def classless_span(zone: dns.name.Name) -> tuple[int, int] | None:
    """First and last number that an RFC 2317 zone holds: `64/26`, `64-26` or `64-127`; None for others."""
    match = _CLASSLESS.fullmatch(zone.labels[0])
    if match is None or len(zone.labels) != 7 or not zone.is_subdomain(_IN_ADDR):
        return None
    first, second = int(match[1]), int(match[3])
    if second > first and first + second <= 510 and second <= 255 and (match[2] == b"-" or second > 32):
        size = second - first + 1
        if size & (size - 1) == 0 and first % size == 0:
            return first, second
    if 24 < second <= 32 and first <= 255:
        size = 1 << (32 - second)
        return (first, first + size - 1) if first % size == 0 else None
    return None
