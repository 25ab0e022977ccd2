"""What the kernel's SAD and SPD hold, as frozen values (linux/xfrm.h). No bytes, no sockets.

SPIs, ports, reqids, marks and if_ids are integers; times are whole seconds; limits are 0 for none.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from oepy.model import IpAddress, IpNetwork, Mark, Secret

ESP = 50
AH = 51
PROTOCOLS = {"esp": ESP, "ah": AH}
ANY_ADDRESS = IPv4Address(0)
ANY_ADDRESS_6 = IPv6Address(0)
ANY_NETWORK = IPv4Network("0.0.0.0/0")
ANY_NETWORK_6 = IPv6Network("::/0")


class Mode(enum.IntEnum):
    """We install the first two; the others may be met in what other programs have installed."""

    TRANSPORT = 0
    TUNNEL = 1
    ROUTE_OPTIMIZATION = 2
    IN_TRIGGER = 3
    BEET = 4
    IPTFS = 5


class PolicyDirection(enum.IntEnum):
    IN = 0
    OUT = 1
    FORWARD = 2


class PolicyAction(enum.IntEnum):
    ALLOW = 0
    BLOCK = 1


class SaFlag(enum.IntFlag):
    """`flags` of xfrm_usersa_info."""

    NONE = 0
    NO_ECN = 1
    DECAP_DSCP = 2
    NO_PMTU_DISCOVERY = 4
    WILDRECV = 8
    ICMP = 16
    AF_UNSPEC = 32  # an SA without a selector of its own carries both families
    ALIGN4 = 64
    ESN = 128


class PolicyFlag(enum.IntFlag):
    NONE = 0
    LOCAL_OK = 1
    ICMP = 2  # covers ICMP errors about the selector's packets, too


# (value, mask) of a port; (0, 0) is any. Of ICMP the source holds the type and the destination the code.
Port = tuple[int, int]
ANY_PORT: Port = (0, 0)


@dataclass(frozen=True, slots=True)
class Selector:
    """Which packets: of the inner header. `protocol` 0 is any; `interface` an ifindex, 0 for any.

    `wild` means a selector without a family, which is every packet of the SA's own family, or with
    SaFlag.AF_UNSPEC of both; source and destination count for nothing then.
    """

    source: IpNetwork
    destination: IpNetwork
    protocol: int = 0
    source_port: Port = ANY_PORT
    destination_port: Port = ANY_PORT
    interface: int = 0
    wild: bool = False

    @property
    def version(self) -> int:
        return self.destination.version


EVERYTHING = Selector(ANY_NETWORK, ANY_NETWORK, wild=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """Soft limits make the kernel send an EXPIRE, hard ones remove the entry as well. Seconds count from
    the installation."""

    soft_bytes: int = 0
    hard_bytes: int = 0
    soft_packets: int = 0
    hard_packets: int = 0
    soft_seconds: int = 0
    hard_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """`added` and `used` (the first use) in seconds since the epoch, 0 for never."""

    bytes: int = 0
    packets: int = 0
    added: int = 0
    used: int = 0


@dataclass(frozen=True, slots=True)
class Algorithm:
    """By the kernel's name. `icv_bits` of an AEAD or a truncated HMAC, 0 of a cipher. An AEAD's key ends in
    its salt."""

    name: str
    key: Secret
    icv_bits: int = 0


@dataclass(frozen=True, slots=True)
class Encapsulation:
    """The ports as they are in the SA's own packets; `kind` is UDP_ENCAP_ESPINUDP (RFC 3948)."""

    source_port: int
    destination_port: int
    kind: int = 2


@dataclass(frozen=True, slots=True)
class Replay:
    """XFRMA_REPLAY_ESN_VAL: `window` in packets; the sequence numbers in 64 bits. `bitmap` is as in memory:
    whole 32-bit words of host order."""

    window: int
    sequence_in: int = 0
    sequence_out: int = 0
    bitmap: bytes = b""


@dataclass(frozen=True, slots=True)
class SaId:
    """How the kernel finds one SA. `mark` and `if_id` are compared as well where the SA has them."""

    destination: IpAddress
    spi: int
    protocol: int = ESP
    mark: Mark | None = None
    source: IpAddress | None = None


@dataclass(frozen=True, slots=True)
class Sa:
    """One SA of one direction. Its addresses are the outer ones in tunnel mode."""

    source: IpAddress
    destination: IpAddress
    spi: int
    protocol: int = ESP
    mode: Mode = Mode.TUNNEL
    reqid: int = 0
    selector: Selector = EVERYTHING
    limits: Limits = Limits()
    encryption: Algorithm | None = None
    integrity: Algorithm | None = None
    aead: Algorithm | None = None
    encapsulation: Encapsulation | None = None
    replay: Replay | None = None
    replay_window: int = 0  # of an SA without `replay`: up to 32
    flags: SaFlag = SaFlag.NONE
    mark: Mark | None = None
    set_mark: Mark | None = None  # given to the packets that this SA has made
    if_id: int = 0
    extra_flags: int = 0
    tfc_padding: int = 0
    care_of: IpAddress | None = None
    # What the kernel counts
    usage: Usage = Usage()
    out_of_window: int = 0  # packets too old for the window
    replayed: int = 0
    integrity_failed: int = 0
    last_used: int = 0
    sequence: int = 0  # of an ACQUIRE

    @property
    def id(self) -> SaId:
        return SaId(self.destination, self.spi, self.protocol, self.mark)


@dataclass(frozen=True, slots=True)
class Template:
    """What a policy demands. `spi` 0 is any SA of the reqid. Transport mode takes the packet's addresses
    where these are unspecified."""

    source: IpAddress
    destination: IpAddress
    protocol: int = ESP
    mode: Mode = Mode.TUNNEL
    reqid: int = 0
    spi: int = 0
    optional: bool = False


@dataclass(frozen=True, slots=True)
class PolicyId:
    """How the kernel finds one policy: by its selector, mark and if_id, or by `index` alone."""

    direction: PolicyDirection
    selector: Selector
    mark: Mark | None = None
    if_id: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """A lower `priority` comes first. Without templates ALLOW lets pass in the clear."""

    direction: PolicyDirection
    selector: Selector
    templates: tuple[Template, ...] = ()
    action: PolicyAction = PolicyAction.ALLOW
    priority: int = 0
    limits: Limits = Limits()
    flags: PolicyFlag = PolicyFlag.NONE
    mark: Mark | None = None
    if_id: int = 0
    sub: bool = False
    index: int = 0
    usage: Usage = Usage()

    @property
    def id(self) -> PolicyId:
        return PolicyId(self.direction, self.selector, self.mark, self.if_id)


# ---- events and answers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Acquire:
    """The kernel has a packet for `policy` and no SA. Do not trust the selector's ports."""

    source: IpAddress
    destination: IpAddress
    protocol: int
    selector: Selector
    policy: Policy
    sequence: int  # name it in the SA that is installed for this


@dataclass(frozen=True, slots=True)
class Expire:
    sa: Sa
    hard: bool


@dataclass(frozen=True, slots=True)
class PolicyExpire:
    policy: Policy
    hard: bool


@dataclass(frozen=True, slots=True)
class SaDeleted:
    """`replay`: what it had sent and received at its end, where the kernel tells it (as news of groups do)."""

    id: SaId
    replay: Replay | None = None


@dataclass(frozen=True, slots=True)
class PolicyDeleted:
    id: PolicyId


@dataclass(frozen=True, slots=True)
class Mapping:
    """Authentic packets of this inbound SA come from other ports or another address: a NAT has a new mapping."""

    id: SaId
    reqid: int
    old_source: IpAddress
    new_source: IpAddress
    old_port: int
    new_port: int


@dataclass(frozen=True, slots=True)
class Move:
    """One template of a policy, and the SAs under it, from old to new outer addresses."""

    old_source: IpAddress
    old_destination: IpAddress
    new_source: IpAddress
    new_destination: IpAddress
    protocol: int = ESP
    mode: Mode = Mode.TUNNEL
    reqid: int = 0


@dataclass(frozen=True, slots=True)
class Migrate:
    policy: PolicyId
    moves: tuple[Move, ...]
    encapsulation: Encapsulation | None = None


@dataclass(frozen=True, slots=True)
class SadInfo:
    """How many SAs there are, in a table of how many buckets."""

    count: int
    buckets: int = 0
    most_buckets: int = 0


@dataclass(frozen=True, slots=True)
class SpdInfo:
    """Policies of each direction; of the sockets' own ones as well."""

    inbound: int
    outbound: int
    forward: int
    socket_inbound: int = 0
    socket_outbound: int = 0
    socket_forward: int = 0


Answer = (
    Sa
    | Policy
    | Acquire
    | Expire
    | PolicyExpire
    | SaDeleted
    | PolicyDeleted
    | Mapping
    | Migrate
    | SadInfo
    | SpdInfo
)
