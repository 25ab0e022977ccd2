"""What the IKE room tells the daemon, and what it asks. All frozen; times are the caller's monotonic seconds.

Events come before the datagrams of the same call: install first, then send, and no packet of the peer finds
a tunnel that is not there yet.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from oepy.ike.algorithms import Offer
from oepy.ike.settings import IkeSettings, Lifetimes
from oepy.model import (
    Authenticated,
    Endpoint,
    IpAddress,
    IpNetwork,
    PeerIdentity,
    PublicKey,
    SaPair,
    Secret,
    TrafficSelector,
)


@dataclass(frozen=True, slots=True)
class Datagram:
    """Bytes to send from `local` to `remote`; on port 4500 the transport prepends the non-ESP marker
    (RFC 7296 §2.23), unless `keepalive`."""

    local: Endpoint
    remote: Endpoint
    data: bytes
    keepalive: bool = False


@dataclass(frozen=True, slots=True)
class IkeEvent:
    session: int


# ---- questions: answer(token, value, now) ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question(IkeEvent):
    token: int


@dataclass(frozen=True, slots=True)
class NeedPeerKey(Question):
    """Which keys does this identity have? Asked as responder, and as initiator where `Initiate.by_certificate`.
    Answer: a sequence of PublicKey, all of them are tried; None or an empty one refuses the peer
    (AUTHENTICATION_FAILED), and so does Refused, with its reason. Or Known. Nothing is proven yet."""

    identity: PeerIdentity
    remote: Endpoint
    local: Endpoint | None = None
    own_identity: PeerIdentity | None = None  # the IDr that the peer asks for
    certificates: tuple[bytes, ...] = ()  # X.509 that it sent, its own first; whatever bytes they are
    initiator: bool = False  # whether we began


@dataclass(frozen=True, slots=True)
class NeedStatus(Question):
    """Is the certificate that proved this peer (`Known.certified`) still good? It has shown that the key
    is its own, so that fetching for it is worth while. Answer: True, or Refused with the reason."""

    identity: PeerIdentity
    remote: Endpoint
    responses: tuple[bytes, ...] = ()  # OCSP responses that it sent (RFC 4806)


@dataclass(frozen=True, slots=True)
class NeedPsk(Question):
    """Responder: the secret shared with this identity. Answer: Secret, Known, or None."""

    identity: PeerIdentity
    own_identity: PeerIdentity | None  # the IDr that the peer asks for
    remote: Endpoint
    local: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """An answer to NeedPeerKey (`keys`) or NeedPsk (`psk`) that says more: how the keys were learnt, and with which
    settings to go on, now that the peer's name is known (identity, own_auth, offers for children, lifetimes …).
    `certified`: from certificates, about which NeedStatus asks when the key is proven."""

    keys: tuple[PublicKey, ...] = ()
    psk: Secret | None = None
    authenticated: Authenticated = Authenticated.DNS
    settings: IkeSettings | None = None
    certified: bool = False


@dataclass(frozen=True, slots=True)
class NeedPpk(Question):
    """Responder: the PPK (RFC 8784) of this name, which a peer that is not yet proven says it shares with us.
    Answer: Secret, or None."""

    name: bytes
    identity: PeerIdentity
    remote: Endpoint


@dataclass(frozen=True, slots=True)
class NeedLease(Question):
    """Responder: addresses for a proven client that asks for them (RFC 7296 §2.19), before NeedNarrowing, which
    names them in `leased`. Answer: Lease, or None (INTERNAL_ADDRESS_FAILURE). The lease is the session's: it ends
    with SessionFailed or SessionDown."""

    identity: PeerIdentity
    authenticated: Authenticated
    remote: Endpoint
    local: Endpoint
    families: tuple[int, ...]  # 4, 6
    wanted: tuple[IpAddress, ...]  # which it would like, as it had them before


@dataclass(frozen=True, slots=True)
class Lease:
    addresses: tuple[IpAddress, ...]
    dns: tuple[IpAddress, ...] = ()
    subnets: tuple[IpNetwork, ...] = ()
    domains: tuple[str, ...] = ()  # for which those servers are asked (RFC 8598)


@dataclass(frozen=True, slots=True)
class NeedSignature(Question):
    """Answer: `authentication.sign_auth(private_key, data, peer_hashes)`; None where there is no key or
    sign_auth raises KeyFormatError."""

    data: bytes
    peer_hashes: frozenset[int]


@dataclass(frozen=True, slots=True)
class NeedSpi(Question):
    """Answer: an inbound ESP SPI (256..2^32-1) that nothing else of ours has; None: the child fails."""


@dataclass(frozen=True, slots=True)
class NeedNarrowing(Question):
    """Responder: may this peer have a child SA with these selectors? Asked before every child of the peer's,
    rekeys included (`rekey_of`: our inbound SPI of the child that is replaced). Answer: Narrowed or Refused.
    """

    identity: PeerIdentity
    authenticated: Authenticated
    key: PublicKey | None  # the one that proved it
    remote: Endpoint
    local: Endpoint
    local_ts: tuple[TrafficSelector, ...]  # as the peer proposes them for our side
    remote_ts: tuple[TrafficSelector, ...]
    rekey_of: int | None
    leased: tuple[IpAddress, ...] = ()  # addresses that the peer just got: its side of the child
    mode: str = "tunnel"  # transport: with the addresses that packets have here (RFC 7296 §2.23.1)


@dataclass(frozen=True, slots=True)
class Narrowed:
    """Selectors must be within the proposed ones. `offers` None: the settings'. `mode` "transport" counts only
    where the peer asked for it; "tunnel" refuses it (and, through a NAT, is asked about once more, with the
    selectors as proposed). `label` goes into ChildUp, `settings` replace the session's: its lifetimes and so on
    from now on. A rekey keeps offers, connection and label of the child that it replaces."""

    local_ts: tuple[TrafficSelector, ...]
    remote_ts: tuple[TrafficSelector, ...]
    offers: tuple[Offer, ...] | None = None
    connection: str = ""
    authenticated: Authenticated | None = None  # how certain the peer is, where it is less than its proof
    mode: str = "tunnel"
    label: str = ""
    settings: IkeSettings | None = None
    lifetimes: Lifetimes | None = None  # of the child; None: the settings'


@dataclass(frozen=True, slots=True)
class Refused:
    """`peer` True refuses the peer as such (AUTHENTICATION_FAILED), else this child (TS_UNACCEPTABLE)."""

    reason: str
    peer: bool = False


# ---- news ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IkeEstablished(IkeEvent):
    """The peer has proven who it is. Comes before the ChildUp of the same exchange."""

    initiator: bool
    identity: PeerIdentity
    authenticated: Authenticated
    key: PublicKey | None
    local: Endpoint
    remote: Endpoint
    suite: str
    label: str


@dataclass(frozen=True, slots=True)
class AddressesAssigned(IkeEvent):
    """The peer gave us addresses; before the ChildUp of the same exchange. All of it is only the peer's word."""

    addresses: tuple[IpAddress, ...]
    dns: tuple[IpAddress, ...]
    subnets: tuple[IpNetwork, ...]
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReauthenticationBegun(IkeEvent):
    """A session of ours that is to take the place of an established one, `replaces`."""

    replaces: int


@dataclass(frozen=True, slots=True)
class PeerMoved(IkeEvent):
    """An authenticated message came from another address or port (a NAT between us changed its mind,
    RFC 7296 §2.23), or one of us has moved by MOBIKE: ESP should follow, in UDP where `encap` says so."""

    local: Endpoint
    remote: Endpoint
    encap: bool


@dataclass(frozen=True, slots=True)
class PathLost(IkeEvent):
    """The peer does not answer at `remote`, or is no longer there, and we may try another of its addresses
    (`SessionInfo.peer_addresses`): by `IkeEndpoint.move`. Nothing is lost if nobody does."""

    remote: Endpoint


@dataclass(frozen=True, slots=True)
class IkeRekeyed(IkeEvent):
    """The IKE SA has new keys and SPIs; session number and children stay."""

    suite: str


@dataclass(frozen=True, slots=True)
class ChildUp(IkeEvent):
    """Install the pair. `outbound` False: only receive on it for now (`Datapath.install(outbound=False)`),
    ChildUsable follows as soon as the peer has shown that it has it."""

    pair: SaPair
    initiator: bool
    replaces: int | None
    outbound: bool
    label: str


@dataclass(frozen=True, slots=True)
class ChildUsable(IkeEvent):
    spi_in: int


class DownReason(enum.Enum):
    PEER_DELETE = "peer-delete"
    REKEYED = "rekeyed"
    LOCAL = "local"
    LIVENESS = "liveness"
    IKE_DOWN = "ike-down"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"  # a duplicate tunnel to the same peer goes, or a restarted peer begins anew


@dataclass(frozen=True, slots=True)
class ChildDown(IkeEvent):
    """Remove the pair. `remaining`: our inbound SPI of another live child with the same selectors to the
    same peer, which traffic has to use now; None where there is none."""

    spi_in: int
    spi_out: int
    reason: DownReason
    remaining: int | None


class FailureKind(enum.Enum):
    SILENT = "silent"  # no (usable) answer at all
    REJECTED = "rejected"  # the peer said no
    PROOF_FAILED = "proof-failed"  # the peer answered and could not prove the expected key
    PROTOCOL = "protocol"  # the peer, authenticated or not, does not speak IKEv2 as it should
    REFUSED = "refused"  # we said no to the peer
    LOCAL = "local"  # ended by command
    SUPERSEDED = "superseded"  # another session with the same peer does the job: nothing is lost


@dataclass(frozen=True, slots=True)
class ChildFailed(IkeEvent):
    """A child of `IkeEndpoint.create_child` comes to nothing; the session stays. `notify` is the peer's word:
    after TEMPORARY_FAILURE try again in a while. Where the session ends first, its SessionDown stands for all
    children that were asked for."""

    kind: FailureKind  # REJECTED by the peer, LOCAL: not even asked for
    notify: str
    text: str
    connection: str
    label: str


@dataclass(frozen=True, slots=True)
class SessionFailed(IkeEvent):
    """A session that never came to a child SA ends. As a responder one hears of it from IKE_AUTH on only."""

    kind: FailureKind
    initiator: bool
    notify: str
    text: str
    remote: Endpoint
    identity: PeerIdentity | None
    label: str


@dataclass(frozen=True, slots=True)
class SessionDown(IkeEvent):
    """An established session has ended; a ChildDown for each of its children came before."""

    reason: DownReason
    remote: Endpoint
    label: str


@dataclass(frozen=True, slots=True)
class IkeKeys(IkeEvent):
    """Only with settings.key_log: what an IKEv2 decryption table needs."""

    spi_i: bytes
    spi_r: bytes
    encryption: str
    integrity: str
    sk_ei: Secret
    sk_er: Secret
    sk_ai: Secret
    sk_ar: Secret


__all__ = [
    "AddressesAssigned",
    "ChildDown",
    "ChildFailed",
    "ChildUp",
    "ChildUsable",
    "Datagram",
    "DownReason",
    "FailureKind",
    "IkeEstablished",
    "IkeEvent",
    "IkeKeys",
    "IkeRekeyed",
    "Known",
    "Lease",
    "Narrowed",
    "NeedLease",
    "NeedNarrowing",
    "NeedPeerKey",
    "NeedPpk",
    "NeedPsk",
    "NeedSignature",
    "NeedSpi",
    "NeedStatus",
    "PathLost",
    "PeerMoved",
    "Question",
    "ReauthenticationBegun",
    "Refused",
    "SessionDown",
    "SessionFailed",
]
