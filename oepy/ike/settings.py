"""What the daemon decides for the IKE room, once. All times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from oepy.ike.algorithms import DEFAULT_ESP, DEFAULT_IKE, Offer, parse_esp_proposal, parse_ike_proposal
from oepy.model import Endpoint, IpAddress, PeerIdentity, PublicKey, Secret, TrafficSelector


@dataclass(frozen=True, slots=True)
class Retransmission:
    """Send again after `first`, then after `factor` times the last pause; `total` after the first sending
    the peer counts as silent."""

    first: float = 0.5
    factor: float = 1.8
    total: float = 9.0


def default_ike_offers() -> tuple[Offer, ...]:
    return tuple(parse_ike_proposal(text) for text in DEFAULT_IKE)


def default_esp_offers() -> tuple[Offer, ...]:
    return tuple(parse_esp_proposal(text) for text in DEFAULT_ESP)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """0 is never. `jitter`: the part of a rekey time by which it is randomly shortened (RFC 7296 §2.8), so that the
    two ends seldom rekey at the same moment."""

    ike_rekey: float = 4 * 3600.0
    ike_grace: float = 600.0  # after ike_rekey; then the IKE SA is ended
    ike_reauth: float = (
        0.0  # a new IKE SA, with new proofs, takes over; as responder we ask for it; 0 = never
    )
    child_rekey: float = 3600.0
    child_hard: float = 3960.0
    child_soft_bytes: int = 0
    child_hard_bytes: int = 0
    child_soft_packets: int = 0
    child_hard_packets: int = 0
    jitter: float = 0.1
    child_jitter: float = 0.0  # of child_rekey; 0: as `jitter`
    rekey_retry: float = 10.0  # after TEMPORARY_FAILURE


@dataclass(frozen=True, slots=True)
class Ppk:
    """A post-quantum preshared key (RFC 8784) and its name; `required`: no tunnel without it."""

    identity: bytes
    secret: Secret
    required: bool = True


@dataclass(frozen=True, slots=True)
class Certificates:
    """X.509, as far as IKE carries it. `chain` and `authorities` are DER and SHA-1 key hashes (RFC 7296 §3.7)."""

    chain: tuple[bytes, ...] = ()  # our own first, then those above it, without the root
    send: str = (
        "ifasked"  # always | unproven: as responder also unasked, to who proves nothing | ifasked | never
    )
    ask: bool = False  # the peer for its own
    authorities: tuple[bytes, ...] = ()  # whose certificates we take
    ask_status: bool = False  # the peer for an OCSP response (RFC 4806)
    responses: tuple[bytes, ...] = ()  # our own, for peers that ask


@dataclass(frozen=True, slots=True)
class IkeSettings:
    """Of the endpoint, or of one connection's sessions (`Initiate.settings`, `IkeEndpoint(settings_for=)`,
    `Narrowed.settings`, `Known.settings`). The limits on half-open and all sessions, the ports and the cookies are
    the endpoint's alone."""

    identity: PeerIdentity | None = None  # None: our address towards the peer
    own_auth: str = "pubkey"  # as responder, to a peer that did not use a PSK: pubkey | null
    certificates: Certificates = Certificates()
    allow_null_initiator: bool = True
    ppk: str = "never"  # as responder: never | accept | require (RFC 8784); NeedPpk asks for it
    childless: str = (
        "never"  # as responder, an IKE SA that begins without a child (RFC 6023): never | accept | force
    )
    allow_sha1: bool = False  # accept method 1 (RSA) over SHA-1
    ike_offers: tuple[Offer, ...] = field(default_factory=default_ike_offers)
    esp_offers: tuple[Offer, ...] = field(default_factory=default_esp_offers)
    lifetimes: Lifetimes = Lifetimes()
    handshake: Retransmission = Retransmission()
    established: Retransmission = Retransmission(0.5, 1.8, 20.0)
    liveness_interval: float = 30.0  # nothing heard for so long: ask; 0 = never by itself
    refusal_patience: float = 2.0  # after a refusal that anybody may have forged: wait for a good answer
    half_open_lifetime: float = 15.0
    question_timeout: float = 30.0  # an unanswered question ends its exchange
    childless_lifetime: float = 15.0  # an established session without a child ends; infinity: it stays
    replaced_lifetime: float = 180.0  # a rekeyed IKE SA awaits its Delete: longer than peers retransmit
    cookie_threshold: int = 64  # half-open sessions from which on cookies are demanded
    max_half_open: int = 4096
    max_half_open_per_prefix: int = 64  # of one IPv4 /24 or IPv6 /56
    max_sessions: int = 100_000
    heeds_initial_contact: bool = True  # of proven peers: older sessions of the same identity end
    force_encap: bool = True
    mobike: bool = False  # RFC 4555, with peers that prove who they are
    additional_addresses: tuple[
        IpAddress, ...
    ] = ()  # of ours, which the peer may use as well (RFC 4555 §3.4)
    aggregation: bool = False  # AGGFRAG payloads (RFC 9347): whether the datapath can
    ike_port: int = 500
    nat_t_port: int = 4500
    keepalive_interval: float = 20.0
    fragment_size: int = 1200  # IKE messages longer than this are fragmented (RFC 7383), where the peer can
    fragmentation: str = "yes"  # accept: ours are not; no: nor is it announced. Fragments are always read
    key_log: bool = False


@dataclass(frozen=True, slots=True)
class Initiate:
    """One negotiation to begin. The peer is accepted by any of `remote_keys`, by `psk`, or, only where
    `accept_null`, without proof; its IDr must be `expected_identity` unless that is None (then the key
    alone decides)."""

    local: Endpoint
    remote: Endpoint
    local_ts: tuple[TrafficSelector, ...]
    remote_ts: tuple[TrafficSelector, ...]
    remote_keys: tuple[PublicKey, ...] = ()
    psk: Secret | None = None
    accept_null: bool = False
    own_auth: str = (
        "pubkey"  # pubkey | null | psk | if-asked: by certificate if the peer asks for one, else null
    )
    identity: PeerIdentity | None = None  # None: the settings', else our address
    expected_identity: PeerIdentity | None = None
    ike_offers: tuple[Offer, ...] | None = None
    esp_offers: tuple[Offer, ...] | None = None
    initial_contact: bool = True
    retransmission: Retransmission | None = None
    authenticated_by: str = "dns"  # how remote_keys were learnt: dns | name | manual
    by_certificate: bool = False  # NeedPeerKey asks for the keys, with the certificates that the peer sends
    connection: str = ""
    label: str = ""
    lifetimes: Lifetimes | None = None  # of the child; None: the settings'
    settings: IkeSettings | None = None  # None: the endpoint's
    want_addresses: tuple[int, ...] = ()
    """Families (4, 6) of which we want an address of the peer's (RFC 7296 §2.19): AddressesAssigned tells them.
    With empty `local_ts` our side of the child is what we get (`dynamic`)."""
    had_addresses: tuple[IpAddress, ...] = ()  # those that we had last time, and would like again
    ppk: Ppk | None = None
    childless: str = "never"
    """Begin without a child (RFC 6023): never | prefer, where the peer can | force. Where there are selectors, the
    child follows in an exchange of its own, with a key exchange of its own; its end is ChildUp or ChildFailed."""
    mode: str = "tunnel"  # of the child: tunnel | transport
    transport_required: bool = False  # where the peer refuses transport mode: fail, instead of tunnel mode


@dataclass(frozen=True, slots=True)
class ChildRequest:
    """A further child SA of an established IKE SA. With groups in the offers it has a key exchange of its own,
    unless the peer wants none. Rekeys ask for the same again."""

    local_ts: tuple[TrafficSelector, ...]
    remote_ts: tuple[TrafficSelector, ...]
    offers: tuple[Offer, ...] | None = None  # None: the session's settings'
    mode: str = "tunnel"  # tunnel | transport
    transport_required: bool = False  # where the peer refuses transport mode: fail, instead of tunnel mode
    connection: str = ""
    label: str = ""
    lifetimes: Lifetimes | None = None  # None: the session's settings'
