"""What lives only during IKE_SA_INIT and IKE_AUTH, and the parts that both roles share."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from oepy.ike import certificates
from oepy.ike.algorithms import GROUPS
from oepy.ike.authentication import OUR_HASHES, signed_octets
from oepy.ike.crypto import IkeKeyMaterial, derive_ike_keys, skeyseed_initial
from oepy.ike.events import IkeEstablished
from oepy.ike.header import NO_SPI
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import Payload, notify
from oepy.ike.states import Happening
from oepy.model import Endpoint, Secret

if TYPE_CHECKING:
    from oepy.ike.algorithms import IkeSuite, Offer
    from oepy.ike.key_exchange import Share
    from oepy.ike.message import Message
    from oepy.ike.session import Session

NONCE_SIZE = 32
MAX_PEER_HASHES = 32
GROUP_NAMES = {transform.id: name for name, transform in GROUPS.items()}


class Handshake:
    """Dropped as soon as the peer is authenticated."""

    __slots__ = (
        "additional",
        "agreed",
        "certificates_asked",
        "deferred",
        "int_auth",
        "message_i",
        "message_r",
        "nonce_i",
        "nonce_r",
        "offers",
        "peer_childless",
        "peer_hashes",
        "peer_nat_t",
        "peer_ppk",
        "pending",
        "refusal",
        "rounds",
        "sent",
        "share",
        "sk_pi",
        "sk_pr",
    )

    def __init__(self) -> None:
        self.message_i = b""
        self.message_r = b""
        self.nonce_i = b""
        self.nonce_r = b""
        self.peer_hashes: frozenset[int] = frozenset()
        self.peer_ppk = False
        self.peer_nat_t = False
        self.peer_childless = False
        self.certificates_asked: frozenset[int] = frozenset()  # encodings, by the peer
        self.sk_pi: Secret | None = None
        self.sk_pr: Secret | None = None
        self.additional: list[str] = []  # key exchanges that IKE_AUTH waits for, in order (RFC 9370)
        self.int_auth: tuple[bytes, bytes] = (
            b"",
            b"",
        )  # IntAuth of initiator and responder (RFC 9242 §3.3.2)
        self.pending = b""  # the responder's: a secret to mix in as soon as the answer is sent
        # the initiator's, until IKE_SA_INIT is answered:
        self.offers: tuple[Offer, ...] = ()
        self.rounds = 0
        self.share: Share | None = None
        self.sent: dict[str, tuple[bytes, Share]] = {}  # by group: the last request with it
        self.agreed: tuple[IkeSuite, bytes] | None = None  # and the shared secret
        self.deferred: Message | None = None  # a COOKIE, not yet obeyed
        self.refusal: tuple[str, str] | None = None  # text and notify; by whom, nobody knows

    def octets_of(self, session: Session, *, initiator: bool, id_body: bytes) -> bytes:
        """What the AUTH of the initiator or the responder covers."""
        assert session.suite is not None
        assert self.sk_pi is not None
        assert self.sk_pr is not None
        if initiator:
            octets = signed_octets(self.message_i, self.nonce_r, session.suite.prf, self.sk_pi, id_body)
        else:
            octets = signed_octets(self.message_r, self.nonce_i, session.suite.prf, self.sk_pr, id_body)
        if self.int_auth[0]:
            message_id = 1 + len(session.suite.additional)
            octets += b"".join(self.int_auth) + message_id.to_bytes(4, "big")
        return octets


def nat_hash(spi_i: bytes, spi_r: bytes, endpoint: Endpoint) -> bytes:
    """RFC 7296 §2.23: SHA-1, which is a fingerprint here and no protection."""
    data = spi_i + spi_r + endpoint.address.packed + endpoint.port.to_bytes(2, "big")
    return hashlib.sha1(data, usedforsecurity=False).digest()


def nat_detection(
    session: Session, spi_r: bytes, ends: tuple[Endpoint, Endpoint] | None = None
) -> list[Payload]:
    """`ends`: ours and the peer's, where they are not those of the session."""
    local, remote = ends or (session.local, session.remote)
    source = nat_hash(session.spi_i, spi_r, local)
    if session.settings.force_encap:
        # a source that cannot be: the peer then sees a NAT, and both encapsulate ESP in UDP
        source = bytes(byte ^ 0xFF for byte in source)
    return [
        notify(NotifyType.NAT_DETECTION_SOURCE_IP, source),
        notify(NotifyType.NAT_DETECTION_DESTINATION_IP, nat_hash(session.spi_i, spi_r, remote)),
    ]


def nats_found(session: Session, message: Message, spi_r: bytes) -> tuple[bool, bool] | None:
    """Whether there is a NAT before the peer, and one before us; None where the peer says nothing of it."""
    sources = [n.data for n in message.notifies() if n.type == NotifyType.NAT_DETECTION_SOURCE_IP]
    ours = message.notify(NotifyType.NAT_DETECTION_DESTINATION_IP)
    if not sources or ours is None:
        return None
    return (
        nat_hash(session.spi_i, spi_r, session.remote) not in sources,
        nat_hash(session.spi_i, spi_r, session.local) != ours.data,
    )


_HASHES_ANNOUNCED = b"".join(number.to_bytes(2, "big") for number in OUR_HASHES)


def common_notifies(session: Session, spi_r: bytes) -> list[Payload]:
    """NAT detection, hash algorithms and fragmentation, which both IKE_SA_INIT messages carry."""
    fragments = session.settings.fragmentation != "no"
    return [
        *nat_detection(session, spi_r),
        notify(NotifyType.SIGNATURE_HASH_ALGORITHMS, _HASHES_ANNOUNCED),
        *([notify(NotifyType.FRAGMENTATION_SUPPORTED)] if fragments else []),
    ]


def read_common_notifies(session: Session, handshake: Handshake, message: Message, spi_r: bytes) -> None:
    nats = nats_found(session, message, spi_r)
    handshake.peer_nat_t = nats is not None
    if nats is not None:
        session.nat_remote, session.nat_local = nats
        session.encap = session.nat_local or session.nat_remote or session.settings.force_encap
    hashes = message.notify(NotifyType.SIGNATURE_HASH_ALGORITHMS)
    if hashes is not None:
        data = hashes.data[: 2 * MAX_PEER_HASHES]
        handshake.peer_hashes = frozenset(
            int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data) - 1, 2)
        )
    handshake.certificates_asked = certificates.asked_for(message)
    handshake.peer_ppk = message.notify(NotifyType.USE_PPK) is not None
    handshake.peer_childless = message.notify(NotifyType.CHILDLESS_IKEV2_SUPPORTED) is not None
    session.peer_fragments = message.notify(NotifyType.FRAGMENTATION_SUPPORTED) is not None


def derive(session: Session, handshake: Handshake, suite: IkeSuite, shared: bytes) -> None:
    handshake.additional = list(suite.additional)
    skeyseed = skeyseed_initial(suite, shared, handshake.nonce_i, handshake.nonce_r)
    use_keys(session, handshake, suite, skeyseed)


def use_keys(session: Session, handshake: Handshake, suite: IkeSuite, skeyseed: bytes) -> None:
    keys: IkeKeyMaterial = derive_ike_keys(
        suite, skeyseed, (handshake.nonce_i, handshake.nonce_r), session.spi_i, session.spi_r
    )
    session.set_keys(suite, keys, final=not handshake.additional)
    handshake.sk_pi, handshake.sk_pr = keys.pi, keys.pr


def establish(session: Session) -> None:
    """The peer is proven: drop what only the handshake needed and tell the daemon."""
    context = session.context
    session.move(Happening.PROVEN)
    session.handshake = None
    if session.half_open_key is not None:
        context.drop_half_open(session.half_open_key)
        session.half_open_key = None
    session.origin = (session.initiator, session.spi_i + session.spi_r)
    session.established_at = context.now
    session.childless_since = context.now
    lifetimes = session.settings.lifetimes
    session.rekey_at = context.now + context.jitter(lifetimes.ike_rekey, lifetimes.jitter)
    if lifetimes.ike_reauth and session.initiator:
        session.reauth_at = context.now + context.jitter(lifetimes.ike_reauth, lifetimes.jitter)
    if session.nat_local:
        session.keepalive_at = context.now + session.settings.keepalive_interval
    context.established(session)
    context.counters["established"] += 1
    assert session.identity is not None
    assert session.authenticated is not None
    context.emit(
        IkeEstablished(
            session.number,
            session.initiator,
            session.identity,
            session.authenticated,
            session.key,
            session.local,
            session.remote,
            str(session.suite),
            session.label,
        )
    )


__all__ = ["GROUP_NAMES", "NONCE_SIZE", "NO_SPI", "Handshake", "common_notifies", "derive", "establish"]
