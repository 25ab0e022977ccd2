"""Configuration payloads (RFC 7296 §3.15; RFC 8598 for INTERNAL_DNS_DOMAIN)."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from oepy.errors import ParseError
from oepy.model import IpAddress, IpNetwork
from oepy.wire import Reader, Writer

MAX_ATTRIBUTES = 64
MAX_DOMAIN = 253


class CfgType(enum.IntEnum):
    REQUEST = 1
    REPLY = 2
    SET = 3
    ACK = 4


class Attribute(enum.IntEnum):
    INTERNAL_IP4_ADDRESS = 1
    INTERNAL_IP4_NETMASK = 2
    INTERNAL_IP4_DNS = 3
    INTERNAL_IP6_ADDRESS = 8
    INTERNAL_IP6_DNS = 10
    INTERNAL_IP4_SUBNET = 13
    INTERNAL_IP6_SUBNET = 15
    INTERNAL_DNS_DOMAIN = 25


@dataclass(frozen=True, slots=True)
class Configuration:
    """`asked`: the attributes that were sent without a value, which in a request means: any."""

    kind: int
    addresses: tuple[IpAddress, ...] = ()
    dns: tuple[IpAddress, ...] = ()
    subnets: tuple[IpNetwork, ...] = ()
    domains: tuple[str, ...] = ()
    asked: frozenset[int] = frozenset()


_DOMAIN = re.compile(rb"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def parse_cp(reader: Reader) -> Configuration:
    """Attributes that nobody here knows are left out (§3.15). Raises ParseError for a known one of a wrong form."""
    kind = reader.pull_u8()
    reader.pull_bytes(3)
    addresses: list[IpAddress] = []
    dns: list[IpAddress] = []
    subnets: list[IpNetwork] = []
    domains: list[str] = []
    asked: set[int] = set()
    number = 0
    while reader.remaining:
        number += 1
        if number > MAX_ATTRIBUTES:
            raise ParseError(f"configuration: more than {MAX_ATTRIBUTES} attributes")
        what = reader.pull_u16() & 0x7FFF
        value = reader.pull_bytes(reader.pull_u16())
        if not value:
            asked.add(what)
        elif what == Attribute.INTERNAL_IP4_ADDRESS:
            addresses.append(IPv4Address(_sized(value, 4)))
        elif what == Attribute.INTERNAL_IP6_ADDRESS:
            addresses.append(IPv6Address(_sized(value, 17)[:16]))
        elif what == Attribute.INTERNAL_IP4_DNS:
            dns.append(IPv4Address(_sized(value, 4)))
        elif what == Attribute.INTERNAL_IP6_DNS:
            dns.append(IPv6Address(_sized(value, 16)))
        elif what == Attribute.INTERNAL_IP4_SUBNET:
            subnets.append(_subnet4(_sized(value, 8)))
        elif what == Attribute.INTERNAL_IP6_SUBNET:
            subnets.append(_subnet6(_sized(value, 17)))
        elif what == Attribute.INTERNAL_DNS_DOMAIN:
            if len(value) > MAX_DOMAIN or not _DOMAIN.fullmatch(value):
                raise ParseError("configuration: a domain that is none")
            domains.append(value.decode("ascii").rstrip(".").lower())
    return Configuration(kind, tuple(addresses), tuple(dns), tuple(subnets), tuple(domains), frozenset(asked))


def _sized(value: bytes, size: int) -> bytes:
    if len(value) != size:
        raise ParseError(f"configuration: an attribute of {len(value)} bytes instead of {size}")
    return value


def _subnet4(value: bytes) -> IPv4Network:
    mask = int.from_bytes(value[4:], "big")
    length = mask.bit_count()
    if mask != (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF:
        raise ParseError("configuration: a netmask with holes")
    return IPv4Network((value[:4], length), strict=False)


def _subnet6(value: bytes) -> IPv6Network:
    if value[16] > 128:
        raise ParseError(f"configuration: a prefix of {value[16]} bits")
    return IPv6Network((value[:16], value[16]), strict=False)


def build_cp(configuration: Configuration) -> bytes:
    writer = Writer()
    writer.push_u8(configuration.kind)
    writer.push_bytes(bytes(3))
    for what, value in _attributes(configuration):
        writer.push_u16(what)
        writer.push_u16(len(value))
        writer.push_bytes(value)
    return writer.finish()


def _attributes(configuration: Configuration) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    for address in configuration.addresses:
        if address.version == 4:
            found.append((Attribute.INTERNAL_IP4_ADDRESS, address.packed))
        else:
            found.append((Attribute.INTERNAL_IP6_ADDRESS, address.packed + b"\x80"))
    for server in configuration.dns:
        kind = Attribute.INTERNAL_IP4_DNS if server.version == 4 else Attribute.INTERNAL_IP6_DNS
        found.append((kind, server.packed))
    for subnet in configuration.subnets:
        start = subnet.network_address.packed
        if isinstance(subnet, IPv4Network):
            found.append((Attribute.INTERNAL_IP4_SUBNET, start + subnet.netmask.packed))
        else:
            found.append((Attribute.INTERNAL_IP6_SUBNET, start + bytes((subnet.prefixlen,))))
    found += [(Attribute.INTERNAL_DNS_DOMAIN, name.encode("ascii")) for name in configuration.domains]
    return found + [(what, b"") for what in sorted(configuration.asked)]
