"""Connections as frozen values, with the names and meanings of swanctl.conf. Times in seconds."""

from __future__ import annotations

import enum
import fnmatch
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from oepy import dn
from oepy.model import (
    NO_MARKS,
    NOT_COPIED,
    Copied,
    IdType,
    IpAddress,
    IpNetwork,
    Marks,
    PeerIdentity,
    PublicKey,
    Secret,
    TrafficSelector,
)

if TYPE_CHECKING:
    from oepy.x509.certificates import Certificate

ANY = "%any"


class Action(enum.Enum):
    """What becomes of a child that is not up."""

    NONE = "none"
    TRAP = "trap"
    START = "start"


@dataclass(frozen=True, slots=True)
class IdPattern:
    """An identity as configured: one, or with `*` at its beginning or end, or %any. `text` is lower case, but for
    distinguished names, in which a value may be `*`."""

    text: str

    @property
    def rank(self) -> int:
        """The lower, the more exact: 0 is one identity, the last is %any."""
        if self.text == ANY:
            return 1000
        if self.is_dn:
            return 50 * dn.wildcards(dn.parse(self.text))
        return 0 if "*" not in self.text else 999 - min(len(self.text), 900)

    @property
    def is_dn(self) -> bool:
        return "=" in self.text

    def matches(self, identity: PeerIdentity | None) -> bool:
        if self.text == ANY:
            return True
        if identity is None or identity.type is IdType.NULL:
            return False
        if self.is_dn:
            return identity.type is IdType.DER_ASN1_DN and dn.matches(dn.parse(self.text), identity.data)
        if self.rank == 0:
            return identity.same_as(_identity(self.text))
        named = identity.type in (IdType.FQDN, IdType.RFC822_ADDR)
        return named and fnmatch.fnmatchcase(str(identity).lower(), self.text)

    def exact(self) -> PeerIdentity | None:
        """The identity itself, None where there are many."""
        return None if self.rank else _identity(self.text)


@functools.lru_cache(maxsize=20_000)
def _identity(text: str) -> PeerIdentity:
    """Of the configuration; each handshake asks for some."""
    return PeerIdentity.parse(text)


@dataclass(frozen=True, slots=True)
class Place:
    """One entry of local_addrs or remote_addrs: a network (of one address, or of many), %any, or a name."""

    network: IpNetwork | None = None
    name: str = ""

    @property
    def rank(self) -> int:
        """The lower, the more exact."""
        if self.network is None:
            return 1 if self.name else 200
        return self.network.max_prefixlen - self.network.prefixlen

    @property
    def address(self) -> IpAddress | None:
        """The one address that it is, if it is one."""
        single = self.network is not None and self.network.prefixlen == self.network.max_prefixlen
        return self.network.network_address if self.network is not None and single else None

    @classmethod
    def of(cls, text: str) -> Place:
        """Raises ValueError."""
        if text == ANY:
            return cls()
        try:
            return cls(ip_network(text))
        except ValueError:
            words = text.rstrip(".").lower().split(".")
            good = all(word and len(word) <= 63 and word.replace("-", "").isalnum() for word in words)
            if not good or len(text) > 253 or words[-1].isdigit() or "/" in text:
                raise
            return cls(name=text.rstrip(".").lower())

    def __str__(self) -> str:
        return self.name or (ANY if self.network is None else str(self.address or self.network))


@dataclass(frozen=True, slots=True)
class Selector:
    """A traffic selector as configured. `network` None is `dynamic`: the outer address of that side."""

    network: IpNetwork | None
    protocol: int = 0
    port: int = 0

    def at(self, outer: IpAddress | None) -> TrafficSelector | None:
        """With `dynamic` filled in; None where that is not known yet."""
        network = self.network if self.network is not None else outer
        return None if network is None else _selector(network, self.protocol, self.port or None)

    def __str__(self) -> str:
        text = "dynamic" if self.network is None else str(self.network)
        return f"{text}[{self.protocol}/{self.port or 'any'}]" if self.protocol or self.port else text


@functools.lru_cache(maxsize=4096)
def _selector(network: IpNetwork | IpAddress, protocol: int, port: int | None) -> TrafficSelector:
    return TrafficSelector.of(network, protocol, port)


@dataclass(frozen=True, slots=True)
class LocalAuth:
    """How we prove ourselves: psk, pubkey or x509 (`key` "": the host key), or null. `certs` are files, our own
    certificate first; their content is `ConnectionSet.certificates`."""

    auth: str
    id: PeerIdentity | None = None  # None: our address, or (x509) the certificate's subject
    key: str = ""  # file of a private key
    certs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoteAuth:
    auth: str
    id: IdPattern
    pubkeys: tuple[PublicKey, ...] = ()
    cacerts: tuple[str, ...] = ()  # files, for x509
    certs: tuple[str, ...] = ()  # files; if there are any, the peer's certificate is one of them
    revocation: str = "relaxed"  # strict | ifuri | relaxed


@dataclass(frozen=True, slots=True)
class Life:
    """Of one child's SAs; 0 is never."""

    rekey_time: float = 3600.0
    life_time: float = 3960.0
    rand_time: float = 360.0
    rekey_bytes: int = 0
    life_bytes: int = 0
    rekey_packets: int = 0
    life_packets: int = 0


@dataclass(frozen=True, slots=True)
class Child:
    name: str
    local_ts: tuple[Selector, ...] = (Selector(None),)
    remote_ts: tuple[Selector, ...] = (Selector(None),)
    esp_proposals: tuple[str, ...] = ()
    ah_proposals: tuple[str, ...] = ()  # instead of ESP, or after what is proposed of it
    mode: str = "tunnel"
    trap: bool = False  # of start_action, which may be both
    start: bool = False
    close_action: Action = Action.NONE
    dpd_action: Action = Action.NONE
    life: Life = Life()
    inactivity: float = 0.0
    # Of XFRM interfaces of the administrator's, whose routes decide what goes there; 0 is none
    if_id_in: int = 0
    if_id_out: int = 0
    tfc_padding: int = 0  # least bytes of a packet inside; 0 is none
    marks: Marks = NO_MARKS
    copied: Copied = NOT_COPIED
    priority: int = 0  # as of SaPair
    updown: tuple[str, ...] = ()

    @property
    def by_interface(self) -> bool:
        return bool(self.if_id_in or self.if_id_out)


Order = tuple[int, str, int]
"""Where something stands in the configuration: the number of the pattern that found its file, the file, and its
number there. It is the same whatever comes before or behind it, and it is not what somebody wants."""


@dataclass(frozen=True, slots=True)
class Connection:
    """`keyingtries` 0 is for ever."""

    name: str
    local: LocalAuth
    remote: RemoteAuth
    children: tuple[Child, ...]
    local_addrs: tuple[Place, ...] = (Place(),)
    remote_addrs: tuple[Place, ...] = (Place(),)
    proposals: tuple[str, ...] = ()
    rekey_time: float = 4 * 3600.0
    over_time: float = 1440.0
    rand_time: float = 1440.0
    unique: str = "no"
    encap: bool = False
    dpd_delay: float = 30.0
    keyingtries: int = 0
    send_cert: str = "ifasked"  # always | ifasked | never; of `ConnectionSet.vouching` as in ike.Certificates
    send_certreq: bool = True
    reauth_time: float = 0.0  # of IKE SAs that we begin; others are told to (RFC 4478); 0 is never
    mobike: bool = True
    fragmentation: str = "yes"  # of IKE messages (RFC 7383): yes | accept | no
    childless: str = "allow"
    ppk_id: str = ""
    ppk_required: bool = False
    vips: tuple[IpAddress, ...] = ()
    """Addresses that we ask the peer for, one of a family; 0.0.0.0 and :: leave it the choice."""
    pools: tuple[str, ...] = ()  # out of which the peer gets addresses, in this order
    order: Order = field(default=(0, "", 0), compare=False)

    def __hash__(self) -> int:
        """Names are unique in a configuration, and a hash of all there is would cost each lookup 10 µs."""
        return hash(self.name)

    def child(self, name: str) -> Child | None:
        return next((child for child in self.children if child.name == name), None)

    def label(self, child: Child) -> str:
        return f"{self.name}/{child.name}"

    @property
    def initiates(self) -> bool:
        """Whether there is somebody to begin with."""
        return any(place.name or place.address is not None for place in self.remote_addrs)


@dataclass(frozen=True, slots=True)
class SharedSecret:
    """`ids` as configured; none of them: for every pair."""

    ids: tuple[IdPattern, ...]
    secret: Secret
    order: Order = field(default=(0, "", 0), compare=False)


@dataclass(frozen=True, slots=True)
class NamedPpk:
    """A post-quantum preshared key (RFC 8784) and the names by which peers may ask for it."""

    names: tuple[str, ...]
    secret: Secret


@dataclass(frozen=True, slots=True)
class AddressPool:
    """Addresses for clients, and what they are told with them (RFC 7296 §3.15, RFC 8598)."""

    name: str
    addrs: str  # as leases.parse_range reads it
    dns: tuple[IpAddress, ...] = ()
    subnets: tuple[IpNetwork, ...] = ()
    domains: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Authority:
    """Who knows whether certificates of a CA are revoked, beside whom they name themselves. `cacert` is a file."""

    cacert: str
    crl_uris: tuple[str, ...] = ()
    ocsp_uris: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConnectionSet:
    connections: tuple[Connection, ...] = ()
    secrets: tuple[SharedSecret, ...] = ()
    authorities: tuple[Authority, ...] = ()
    certificates: Mapping[str, tuple[Certificate, ...]] = field(default_factory=dict)
    """By file. They are no part of the connections: a renewed one is a change of content, and ends nothing."""
    pools: tuple[AddressPool, ...] = ()
    ppks: tuple[NamedPpk, ...] = ()
    vouching: Connection | None = None
    """Of opportunistic encryption, as if it were a connection without children: the certificates that we show peers
    who ask, and the CAs that vouch for peers without a key in the DNS. It is in no list of connections."""

    @property
    def certified(self) -> tuple[Connection, ...]:
        """All that may show or take certificates."""
        return self.connections if self.vouching is None else (*self.connections, self.vouching)

    def certificates_of(self, files: Iterable[str]) -> tuple[Certificate, ...]:
        return tuple(one for file in files for one in self.certificates[file])

    def ppk(self, name: str) -> Secret | None:
        return next((ppk.secret for ppk in self.ppks if name in ppk.names), None)

    def labels(self) -> Iterator[str]:
        for connection in self.connections:
            for child in connection.children:
                yield connection.label(child)


def identity_of(address: IpAddress | str) -> PeerIdentity:
    return PeerIdentity.address(ip_address(str(address)))


EMPTY = ConnectionSet()
