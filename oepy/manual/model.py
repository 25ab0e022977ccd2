"""Manual SAs and policies as frozen values, in the terms of setkey(8) and ip-xfrm(8).

SPIs, ports and reqids are integers in host order; 0 is any port, any protocol, no reqid. Secrets hide themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_network

from oepy.model import IpAddress, IpNetwork, Lifetime, Secret

MIN_SPI = 256  # RFC 4303 §2.1: 0 is local, 1 to 255 are reserved
MAX_REQID = 0xFFFF
MIN_PRIORITY, MAX_PRIORITY = 1, 0xFFFF
MAX_SAS = 10_000
MAX_POLICIES = 4096
MAX_TEMPLATES = 6  # as many as the kernel takes
MAX_REPLAY_WINDOW = 4096
WITH_PORTS = frozenset((6, 17, 33, 132, 136))  # TCP, UDP, DCCP, SCTP, UDP-Lite
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "ipv6-icmp": 58, "sctp": 132}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}

NO_KEY = Secret(b"")
NO_LIFETIME = Lifetime()

SaKey = tuple[IpAddress, str, int]  # destination, protocol, SPI: how the kernel finds an SA (RFC 4301 §4.1)


@dataclass(frozen=True, slots=True)
class Encap:
    """ESP in UDP (RFC 3948): the ports as they are in this SA's own packets."""

    source_port: int
    destination_port: int


@dataclass(frozen=True, slots=True)
class ManualSa:
    """One SA of one direction. `encryption` is the name of a cipher or an AEAD, "" for AH; `integrity` is ""
    for an AEAD. `replay_window` 0 is no anti-replay, as RFC 4303 §3.4.3 wants it for manual keys."""

    src: IpAddress
    dst: IpAddress
    protocol: str
    spi: int
    mode: str
    encryption: str = ""
    encryption_key: Secret = NO_KEY
    integrity: str = ""
    integrity_key: Secret = NO_KEY
    reqid: int = 0
    encap: Encap | None = None
    replay_window: int = 0
    esn: bool = False
    lifetime: Lifetime = NO_LIFETIME
    allow_weak: bool = field(default=False, compare=False)  # a word to the reader, no property of the SA

    @property
    def key(self) -> SaKey:
        return (self.dst, self.protocol, self.spi)

    def __str__(self) -> str:
        return f"{self.protocol} SA {self.spi:#x} to {self.dst}"


@dataclass(frozen=True, slots=True)
class Selector:
    """Which packets a policy is for."""

    src: IpNetwork
    dst: IpNetwork
    protocol: int = 0
    sport: int = 0
    dport: int = 0

    @property
    def version(self) -> int:
        return self.dst.version

    def covers(self, other: Selector) -> bool:
        """Whether every packet of `other` is one of ours."""
        return (
            self.version == other.version
            and _within(other.src, self.src)
            and _within(other.dst, self.dst)
            and self.protocol in (0, other.protocol)
            and self.sport in (0, other.sport)
            and self.dport in (0, other.dport)
        )

    def meets(self, other: Selector) -> bool:
        """Whether a packet could be of both."""
        return (
            self.version == other.version
            and (_within(self.src, other.src) or _within(other.src, self.src))
            and (_within(self.dst, other.dst) or _within(other.dst, self.dst))
            and (self.protocol == other.protocol or 0 in (self.protocol, other.protocol))
            and (self.sport == other.sport or 0 in (self.sport, other.sport))
            and (self.dport == other.dport or 0 in (self.dport, other.dport))
        )

    def __str__(self) -> str:
        source, destination = (
            f"{network}[{port}]" if port else str(network)
            for network, port in ((self.src, self.sport), (self.dst, self.dport))
        )
        protocol = PROTOCOL_NAMES.get(self.protocol, str(self.protocol)) + " " if self.protocol else ""
        return f"{protocol}{source} to {destination}"


def _within(inner: IpNetwork, outer: IpNetwork) -> bool:
    width = inner.max_prefixlen - outer.prefixlen
    return inner.prefixlen >= outer.prefixlen and (
        int(inner.network_address) >> width == int(outer.network_address) >> width
    )


@dataclass(frozen=True, slots=True)
class Template:
    """What a policy demands of an SA. `src` and `dst` are its outer endpoints, None (transport mode) for the
    packet's own addresses; `reqid` must be the SA's; `spi` 0 is any. Level `use` takes the SA where there is
    one and lets the packet pass in the clear otherwise."""

    protocol: str
    mode: str
    src: IpAddress | None = None
    dst: IpAddress | None = None
    level: str = "require"
    reqid: int = 0
    spi: int = 0

    def fits(self, sa: ManualSa, selector: Selector) -> bool:
        """Whether this SA can carry packets of the selector for us."""
        if (self.protocol, self.mode, self.reqid) != (sa.protocol, sa.mode, sa.reqid):
            return False
        if self.spi not in (0, sa.spi):
            return False
        if self.src is not None and self.dst is not None:
            return (self.src, self.dst) == (sa.src, sa.dst)
        return (
            sa.dst.version == selector.version
            and _within(ip_network(sa.src), selector.src)
            and _within(ip_network(sa.dst), selector.dst)
        )

    def __str__(self) -> str:
        ends = f"{self.src}-{self.dst}" if self.src is not None else ""
        unique = f":{self.reqid}" if self.reqid else ""
        return f"{self.protocol}/{self.mode}/{ends}/{self.level}{unique}"


@dataclass(frozen=True, slots=True)
class ManualPolicy:
    """`direction`: in, out or fwd; `action`: ipsec, bypass or block. The lowest `priority` comes first."""

    direction: str
    selector: Selector
    action: str
    templates: tuple[Template, ...] = ()
    priority: int = 0

    @property
    def key(self) -> tuple[str, Selector]:
        return (self.direction, self.selector)

    @property
    def required(self) -> bool:
        """Whether a packet in the clear is a breach of it."""
        return self.action == "block" or any(item.level == "require" for item in self.templates)

    def __str__(self) -> str:
        return f"policy {self.direction} {self.selector}"


def default_priority(selector: Selector) -> int:
    """More specific first: longer prefixes, then a protocol, then ports. Between 4,360 and 30,000."""
    scale = 4 if selector.version == 4 else 1  # a host to a host is as specific in IPv4 as in IPv6
    length = (selector.src.prefixlen + selector.dst.prefixlen) * scale
    named = 2 * (selector.protocol != 0) + (selector.sport != 0) + (selector.dport != 0)
    return 30_000 - 100 * length - 10 * named


@dataclass(frozen=True, slots=True)
class ManualSet:
    """Everything keyed by hand on a host, in the order in which it was given."""

    sas: tuple[ManualSa, ...] = ()
    policies: tuple[ManualPolicy, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sas or self.policies)


NOTHING = ManualSet()


class SaIndex:
    """Finds the SAs that a template fits, at a cost that does not grow with their number."""

    def __init__(self, sas: Iterable[ManualSa]) -> None:
        self._by_ends: dict[tuple[object, ...], list[ManualSa]] = {}
        self._by_dst: dict[tuple[object, ...], list[ManualSa]] = {}
        self._by_kind: dict[tuple[object, ...], list[ManualSa]] = {}
        for sa in sas:
            kind = (sa.protocol, sa.mode, sa.reqid)
            self._by_ends.setdefault((*kind, sa.src, sa.dst), []).append(sa)
            self._by_dst.setdefault((*kind, sa.dst), []).append(sa)
            self._by_kind.setdefault(kind, []).append(sa)

    def fitting(self, template: Template, selector: Selector) -> list[ManualSa]:
        """In the order in which they were given."""
        kind = (template.protocol, template.mode, template.reqid)
        if template.src is not None:
            near = self._by_ends.get((*kind, template.src, template.dst), [])
        elif selector.dst.prefixlen == selector.dst.max_prefixlen:
            near = self._by_dst.get((*kind, selector.dst.network_address), [])
        else:
            near = self._by_kind.get(kind, [])
        return [sa for sa in near if template.fits(sa, selector)]
