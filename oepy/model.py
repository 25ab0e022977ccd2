"""The words that the rooms share: frozen values, no behaviour beyond their own consistency.

Times are seconds as float on the caller's monotonic clock; ports and SPIs are integers in host order.
"""

from __future__ import annotations

import enum
import hmac
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from oepy import dn

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network
AddressRange = tuple[IpAddress, IpAddress]
"""First and last."""

IKE_PORT = 500
NAT_T_PORT = 4500

# Bits of the packet mark (fwmark). Chosen away from the bits that kube-proxy (0xc000), Tailscale (0xff0000)
# and Cilium (0xf00) use. Only these bits are ever set or matched.
MARK_MASK = 0x30000000
MARK_PRIVATE = 0x10000000  # route this packet through the tunnel
MARK_OWN = 0x20000000  # the daemon's own IKE, ESP and DNS traffic: never trapped
MARK_KERNEL = (
    0x30000000  # routed as it would be; the kernel's policies protect it on its way, or it is dropped
)
FOREIGN_BITS = 0xFFFFFFFF ^ MARK_MASK  # everybody else's
MAX_PRIORITY = 10_000  # of a connection's child; a lower one comes first
MAX_USERLAND_MARKS = 32  # each is a device and a routing table
XFRM_IF_ID = 17733  # ties the kernel's SAs and policies to the tunnel's device


def marked_device(device: str, number: int | str) -> str:
    """The name of the userland datapath's device for a mark, beside `device`."""
    return f"{device}.m{number}"


class Secret:
    """Key material: hidden from `repr`, logs and accidental comparison by timing."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytes(value)

    def reveal(self) -> bytes:
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return f"Secret({len(self._value)} bytes)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        raise TypeError("a Secret is not hashable")

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a Secret is not pickled; reveal() it where it must travel")


class PolicyGroup(enum.Enum):
    """FreeS/WAN's policy groups (DESIGN: longest prefix wins, then the stricter group)."""

    CLEAR = "clear"
    CLEAR_OR_PRIVATE = "clear-or-private"
    PRIVATE_OR_CLEAR = "private-or-clear"
    PRIVATE = "private"
    BLOCK = "block"

    @property
    def strictness(self) -> int:
        return _STRICTNESS[self]

    @property
    def fails_closed(self) -> bool:
        return self in (PolicyGroup.PRIVATE, PolicyGroup.BLOCK)


_STRICTNESS = {group: rank for rank, group in enumerate(PolicyGroup)}


class Direction(enum.Enum):
    OUTPUT = "output"
    FORWARD = "forward"


@dataclass(frozen=True, slots=True)
class Flow:
    """The selector of one trapped packet. Ports are 0 where the protocol has none or in a later fragment."""

    source: IpAddress
    destination: IpAddress
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    direction: Direction = Direction.OUTPUT


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An outer address and UDP port."""

    address: IpAddress
    port: int

    def __hash__(self) -> int:
        """The numbers: to hash an address object takes four times as long."""
        return hash((int(self.address), self.port))

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class TrafficSelector:
    """RFC 7296 §3.13.1: one protocol (0 = any), a port range and an address range, all ends included."""

    start: IpAddress
    end: IpAddress
    protocol: int = 0
    start_port: int = 0
    end_port: int = 65535

    def __post_init__(self) -> None:
        if self.start.version != self.end.version or int(self.start) > int(self.end):
            raise ValueError(f"traffic selector {self.start}..{self.end} is no range of one family")
        if not 0 <= self.start_port <= 65535 or not 0 <= self.end_port <= 65535:
            raise ValueError("a port is outside of 0..65535")

    @classmethod
    def of(
        cls, network: IpNetwork | IpAddress, protocol: int = 0, port: int | None = None
    ) -> TrafficSelector:
        if isinstance(network, (IPv4Address, IPv6Address)):
            first = last = network
        else:
            first, last = network[0], network[-1]
        if port is None:
            return cls(first, last, protocol)
        return cls(first, last, protocol, port, port)

    def contains_address(self, address: IpAddress) -> bool:
        return address.version == self.start.version and int(self.start) <= int(address) <= int(self.end)

    def __hash__(self) -> int:
        """The numbers: to hash two address objects takes four times as long."""
        return hash((int(self.start), int(self.end), self.protocol, self.start_port, self.end_port))

    def covers(self, other: TrafficSelector) -> bool:
        """Whether every packet of `other` is one of ours."""
        return (
            self.start.version == other.start.version
            and self.protocol in (0, other.protocol)
            and self.start_port <= other.start_port
            and self.end_port >= other.end_port
            and int(self.start) <= int(other.start)
            and int(self.end) >= int(other.end)
        )

    def intersect(self, other: TrafficSelector) -> TrafficSelector | None:
        """The narrowed selector of RFC 7296 §2.9, or None where nothing is common."""
        if other.covers(self):
            return self
        if self.covers(other):
            return other
        if self.start.version != other.start.version:
            return None
        if self.protocol and other.protocol and self.protocol != other.protocol:
            return None
        start = self.start if int(self.start) >= int(other.start) else other.start
        end = self.end if int(self.end) <= int(other.end) else other.end
        start_port = max(self.start_port, other.start_port)
        end_port = min(self.end_port, other.end_port)
        if int(start) > int(end) or start_port > end_port:
            return None
        return TrafficSelector(start, end, self.protocol or other.protocol, start_port, end_port)

    def __str__(self) -> str:
        if self.start == self.end:
            text = f"{self.start}/{self.start.max_prefixlen}"
        else:
            bits = (int(self.start) ^ int(self.end)).bit_length()
            width = self.start.max_prefixlen
            whole = int(self.start) & ((1 << bits) - 1) == 0 and int(self.end) == int(self.start) | (
                (1 << bits) - 1
            )
            text = f"{self.start}/{width - bits}" if whole else f"{self.start}-{self.end}"
        if self.protocol or (self.start_port, self.end_port) != (0, 65535):
            ports = (
                str(self.start_port)
                if self.start_port == self.end_port
                else f"{self.start_port}-{self.end_port}"
            )
            text += f"[{self.protocol or 'any'}/{'any' if ports == '0-65535' else ports}]"
        return text


class IdType(enum.IntEnum):
    """IKE identification types, RFC 7296 §3.5 and RFC 7619 §2.2."""

    IPV4_ADDR = 1
    FQDN = 2
    RFC822_ADDR = 3
    IPV6_ADDR = 5
    DER_ASN1_DN = 9
    KEY_ID = 11
    NULL = 13


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """An IKE identity as on the wire: `data` is empty for NULL, packed for an address, ASCII for names."""

    type: IdType
    data: bytes = b""

    @classmethod
    def null(cls) -> PeerIdentity:
        return cls(IdType.NULL)

    @classmethod
    def address(cls, address: IpAddress) -> PeerIdentity:
        return cls(IdType.IPV4_ADDR if address.version == 4 else IdType.IPV6_ADDR, address.packed)

    @classmethod
    def parse(cls, text: str) -> PeerIdentity:
        """From configuration text: an address, a distinguished name (`C=CH, CN=gw`), an e-mail, else an FQDN
        (lower-cased, no final dot). Raises ValueError."""
        try:
            return cls.address(ip_address(text))
        except ValueError:
            pass
        if "=" in text:
            return cls(IdType.DER_ASN1_DN, dn.parse(text))
        kind = IdType.RFC822_ADDR if "@" in text else IdType.FQDN
        return cls(kind, text.rstrip(".").lower().encode("ascii"))

    def as_address(self) -> IpAddress | None:
        if self.type is IdType.IPV4_ADDR and len(self.data) == 4:
            return IPv4Address(self.data)
        if self.type is IdType.IPV6_ADDR and len(self.data) == 16:
            return IPv6Address(self.data)
        return None

    def same_as(self, other: PeerIdentity) -> bool:
        """Whether it is the same to people: names in any case, distinguished names by their attributes."""
        if self.type is not other.type:
            return False
        if self.type is IdType.DER_ASN1_DN:
            return dn.same(self.data, other.data)
        if self.type is IdType.FQDN:
            return self.data.lower() == other.data.lower()
        return self.data == other.data

    def __str__(self) -> str:
        address = self.as_address()
        if address is not None:
            return str(address)
        if self.type is IdType.NULL:
            return "%null"
        if self.type in (IdType.FQDN, IdType.RFC822_ADDR):
            text = self.data[:255].decode("ascii", "backslashreplace")
            if text.isprintable():
                return text
            return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
        if self.type is IdType.DER_ASN1_DN:
            return dn.to_text(self.data)
        return f"{self.type.name}:{self.data[:64].hex()}"


class KeyAlgorithm(enum.IntEnum):
    """IPSECKEY algorithm numbers: RFC 4025 §2.4, RFC 8005, RFC 9373."""

    RSA = 2
    ECDSA = 3
    EDDSA = 4


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key in the form that DNS carries (RFC 3110 §2, RFC 6605 §4, RFC 8080 §3)."""

    algorithm: KeyAlgorithm
    data: bytes


class GatewayType(enum.IntEnum):
    """RFC 4025 §2.3."""

    NONE = 0
    IPV4 = 1
    IPV6 = 2
    NAME = 3


@dataclass(frozen=True, slots=True)
class PeerKey:
    """One usable key record of a peer, with its gateway already resolved.

    `gateways` are the addresses to negotiate with, of the destination's own address where the record names
    no gateway; `gateway_text` is the record's gateway field as published (`.` for none).
    """

    key: PublicKey
    gateways: tuple[IpAddress, ...]
    gateway_type: GatewayType
    gateway_text: str
    precedence: int
    record: str  # "IPSECKEY" or "TXT"
    owner: str
    ttl: int


class Security(enum.Enum):
    """RFC 4033 §5."""

    SECURE = "secure"
    INSECURE = "insecure"
    BOGUS = "bogus"
    INDETERMINATE = "indeterminate"


@dataclass(frozen=True, slots=True)
class KeyAnswer:
    """What the DNS says of a peer. One of the five classes below, never None."""

    subject: str  # the address or name asked for
    owner: str  # the DNS name asked
    ttl: int  # seconds for which this answer may be relied on
    reason: str = ""  # why it is not secure; empty where it is
    elapsed: float = 0.0  # seconds that the lookup took
    questions: int = 0  # questions sent to the resolver for it (0: all from cache)
    notes: tuple[str, ...] = ()  # odd records skipped, with the reason
    # Keys at names that lead to this address and that the address's own (reverse) records do not confirm. They
    # may be tried where the alternative is the clear, and decide nothing else (docs/forward-names.md).
    claims: tuple[PeerKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Secure(KeyAnswer):
    keys: tuple[PeerKey, ...] = ()  # in the order in which to try them; never empty


@dataclass(frozen=True, slots=True)
class Insecure(KeyAnswer):
    """Records (perhaps) in a zone that is provably unsigned."""

    keys: tuple[PeerKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Bogus(KeyAnswer):
    """Validation failed, or a secure record that should hold a key is malformed (`reason` names it).
    `stripped`: it is the resolver that leaves DNSSEC records away."""

    stripped: bool = False


@dataclass(frozen=True, slots=True)
class Absent(KeyAnswer):
    """Proven: no key record of ours at this name."""


@dataclass(frozen=True, slots=True)
class Unreachable(KeyAnswer):
    """The resolver was silent, refused, or failed in a way that proves nothing."""


class Authenticated(enum.Enum):
    """How the *peer* proved who it is."""

    DNS = "dns"
    NAME = "name"  # by the key at a name that leads to its address, which the address's records don't confirm
    PSK = "psk"
    X509 = "x509"
    NULL = "null"
    MANUAL = "manual"

    @property
    def proves_address(self) -> bool:
        """Whether it is certain that the traffic of the peer's address is the peer's. What isn't protects against
        those who listen, and never stands in for what is."""
        return self not in (Authenticated.NULL, Authenticated.NAME)


@dataclass(frozen=True, slots=True)
class EspSuite:
    """An ESP or AH transform set, by strongSwan's names.

    `encryption`: aes128gcm16, aes192gcm16, aes256gcm16, chacha20poly1305, aes128, aes192, aes256, null; in the
    kernel's datapath also aes128ctr, aes192ctr, aes256ctr; "" for AH.
    `integrity`: "" for an AEAD, else sha256, sha384 or sha512 (HMAC, truncated by RFC 4868); in the kernel's
    datapath also sha1 (RFC 2404).
    """

    encryption: str
    integrity: str = ""
    esn: bool = True

    def __str__(self) -> str:
        parts = (self.encryption, self.integrity, "esn" if self.esn else "")
        return "-".join(part for part in parts if part)  # AH has no encryption


@dataclass(frozen=True, slots=True)
class SaKeys:
    """Key material of one direction, in the order of RFC 7296 §2.17. `encryption` includes the salt or nonce
    (4 bytes for GCM, ChaCha20-Poly1305 and CTR) at its end; `integrity` is empty for an AEAD."""

    encryption: Secret
    integrity: Secret = field(default_factory=lambda: Secret(b""))


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Limits of one SA; 0 = none. Soft limits ask for a rekey, hard limits end the SA."""

    soft_seconds: float = 0.0
    hard_seconds: float = 0.0
    soft_bytes: int = 0
    hard_bytes: int = 0
    soft_packets: int = 0
    hard_packets: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """Bits of a packet's mark. A packet has it where `mark & mask == value`."""

    value: int
    mask: int = 0xFFFFFFFF

    def matches(self, mark: int) -> bool:
        return mark & self.mask == self.value

    def joined(self, other: Mark | None) -> Mark:
        """Both at once, of marks that have no bit in common."""
        return self if other is None else Mark(self.value | other.value, self.mask | other.mask)

    def overlaps(self, other: Mark) -> bool:
        """Whether a packet can have both."""
        return not (self.value ^ other.value) & self.mask & other.mask

    def __str__(self) -> str:
        return f"{self.value:#x}/{self.mask:#x}"


@dataclass(frozen=True, slots=True)
class Marks:
    """Of a connection's child; none has bits of MARK_MASK, which are oepy's own. Only packets with `outward` leave
    by its tunnel, and only those with `inward` are let out of it; `set_inward` is given to what comes out, and
    `set_outward` to the packets that carry it."""

    inward: Mark | None = None
    outward: Mark | None = None
    set_inward: Mark | None = None
    set_outward: Mark | None = None


NO_MARKS = Marks()


@dataclass(frozen=True, slots=True)
class Copied:
    """What of the inner header a tunnel copies to the outer one, or back. `ecn` None is as the datapath does it."""

    df: bool = False
    ecn: bool | None = None
    dscp_out: bool = False
    dscp_in: bool = False


NOT_COPIED = Copied()


@dataclass(frozen=True, slots=True)
class SaPair:
    """What IKE hands to a datapath: one inbound and one outbound SA with their selectors.

    The initiator/responder question is already settled: keys_in decrypt, keys_out encrypt.
    """

    spi_in: int  # chosen by us; the pair's identity everywhere in this host
    spi_out: int
    local: Endpoint
    remote: Endpoint
    suite: EspSuite
    keys_in: SaKeys
    keys_out: SaKeys
    local_ts: tuple[TrafficSelector, ...]
    remote_ts: tuple[TrafficSelector, ...]
    authenticated: Authenticated
    peer: PeerIdentity
    encap: bool = True
    mode: str = "tunnel"
    natted: bool = (
        False  # transport mode through a NAT: checksums inside are of other addresses (RFC 3948 §3.1.2)
    )
    protocol: str = "esp"
    replay_window: int = 1024
    lifetime: Lifetime = Lifetime()
    connection: str = ""  # name of a configured connection; "" for opportunistic
    aggregation: bool = False  # AGGFRAG payloads (RFC 9347) in both directions
    fragments: bool = True  # with aggregation: whether the peer takes packets in several payloads
    super_packets: bool = False  # with aggregation: whether both sides know oepy's offload blocks
    if_id_in: int = (
        0  # of the administrator's XFRM interface that packets come out of; 0: the datapath's own way
    )
    if_id_out: int = 0  # of the one that they go into
    takes_tfc: bool = True  # the peer: padding for traffic flow confidentiality (RFC 7296 §1.3.1)
    tfc_padding: int = 0  # bytes that inner packets have at least, up to the MTU (RFC 4303 §2.7); tunnel mode
    marks: Marks = NO_MARKS
    copied: Copied = NOT_COPIED
    priority: int = 0  # up to MAX_PRIORITY, before all without one; 0: the narrower selectors come first

    @property
    def standing(self) -> tuple[bool, int]:
        """The lower comes first, before any selectors are compared: connections, and among them by priority."""
        return not self.connection, self.priority or MAX_PRIORITY + 1


@dataclass(frozen=True, slots=True)
class SaCounters:
    spi_in: int
    bytes_in: int = 0
    bytes_out: int = 0
    packets_in: int = 0
    packets_out: int = 0
    replayed: int = 0
    integrity_failures: int = 0
    selector_mismatches: int = 0
    last_in: float = 0.0  # monotonic time of the last good packet in, 0.0 for never
    last_out: float = 0.0


class Verdict(enum.Enum):
    """What the trap does with packets to a destination."""

    CLEAR = "clear"
    PRIVATE = "private"
    BLOCK = "block"
