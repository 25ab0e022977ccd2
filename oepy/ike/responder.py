"""The responder's IKE_SA_INIT and IKE_AUTH (RFC 7296 §1.2). No session exists before the cookie
is checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike import (
    aggregation,
    auth_lifetime,
    certificates,
    configuration,
    mobike,
    ppk,
    rules,
    transport,
)
from oepy.ike.algorithms import choose, ike_suite, without_additional, without_groups
from oepy.ike.authentication import AuthMethod, matches, null_auth, psk_auth, verify_auth
from oepy.ike.child import ChildSa, install, note_tfc
from oepy.ike.events import (
    FailureKind,
    Known,
    NeedPeerKey,
    NeedPsk,
    NeedSignature,
    Refused,
)
from oepy.ike.flow import ChildRefused, HandshakeFailed, PeerSteps, Questions
from oepy.ike.handshake import (
    GROUP_NAMES,
    NONCE_SIZE,
    Handshake,
    common_notifies,
    derive,
    establish,
    read_common_notifies,
)
from oepy.ike.header import FLAG_RESPONSE, VERSION_2, Exchange, Header, PayloadType
from oepy.ike.key_exchange import generate
from oepy.ike.message import Message, build_plain
from oepy.ike.narrowing import ask_narrowing, child_payloads, make_child
from oepy.ike.notify import NotifyType
from oepy.ike.payload_sa import SaPayload, TransformType, build_sa
from oepy.ike.payloads import (
    AuthData,
    Identification,
    KeyShareData,
    Payload,
    build_auth,
    build_id,
    build_ke,
    notify,
)
from oepy.ike.session import Session
from oepy.ike.states import Happening
from oepy.ike.window import digest
from oepy.model import Authenticated, Endpoint, IpAddress, PeerIdentity, PublicKey, Secret

if TYPE_CHECKING:
    from oepy.ike.context import Context


def receive_init(context: Context, message: Message, local: Endpoint, remote: Endpoint) -> None:
    """An IKE_SA_INIT request that belongs to no session. Raises ParseError for a malformed one."""
    rules.check(Exchange.IKE_SA_INIT, False, message.chain)
    header = message.header
    if header.spi_i in context.by_spi:
        context.counters["reflected"] += 1  # our own request, thrown back: nobody else would draw this SPI
        return
    nonce = message.must(PayloadType.NONCE, bytes)
    if not _admitted(context, message, nonce, local, remote):
        return
    ke = message.must(PayloadType.KE, KeyShareData)
    proposals = message.must(PayloadType.SA, SaPayload).proposals
    settings = context.settings_for(local, remote)
    offers = settings.ike_offers
    if message.notify(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED) is None:
        offers = without_additional(offers)
    chosen = choose(offers, proposals, prefer_group=ke.group)
    if chosen is None:
        context.counters["no_proposal_chosen"] += 1
        _refuse(context, header, local, remote, [notify(NotifyType.NO_PROPOSAL_CHOSEN)])
        return
    wanted = chosen.transforms[TransformType.KE].id
    if wanted != ke.group:
        context.counters["invalid_ke"] += 1
        _refuse(
            context, header, local, remote, [notify(NotifyType.INVALID_KE_PAYLOAD, wanted.to_bytes(2, "big"))]
        )
        return
    share = generate(GROUP_NAMES[wanted], context.random)
    shared = share.shared_secret(ke.data)  # before there is a session: an invalid point costs nothing more
    session = Session(context, context.new_number(), local, remote, initiator=False, settings=settings)
    session.spi_peer = header.spi_i
    session.half_open_key = (remote, header.spi_i)
    context.add_half_open(session, session.half_open_key)
    session.move(Happening.INIT_RECEIVED)
    handshake = session.handshake = Handshake()
    handshake.message_i = message.raw
    handshake.nonce_i, handshake.nonce_r = nonce, context.random(NONCE_SIZE)
    read_common_notifies(session, handshake, message, bytes(8))
    answer: list[Payload] = [
        (PayloadType.SA, build_sa(SaPayload((chosen.proposal(b""),)))),
        (PayloadType.KE, build_ke(ke.group, share.public)),
        (PayloadType.NONCE, handshake.nonce_r),
        *common_notifies(session, session.spi_own),
        *certificates.requests(settings.certificates),
    ]
    suite = ike_suite(chosen)
    answer += ppk.announcement(handshake.peer_ppk and settings.ppk != "never")
    handshake.peer_ppk = handshake.peer_ppk and settings.ppk != "never"
    if settings.childless != "never":
        answer.append(notify(NotifyType.CHILDLESS_IKEV2_SUPPORTED))
    if suite.additional:
        answer.append(notify(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED))
    datagrams = session.build(Exchange.IKE_SA_INIT, 0, answer, response=True)
    handshake.message_r = datagrams[0]
    derive(session, handshake, suite, shared)
    session.window.respond(digest(message.raw), datagrams)
    session.send(datagrams)
    session.reschedule()


def _admitted(context: Context, message: Message, nonce: bytes, local: Endpoint, remote: Endpoint) -> bool:
    """Cookies and limits (RFC 7296 §2.6): all of it without state."""
    from oepy.ike.context import prefix_of

    settings, header = context.settings, message.header
    near = context.half_open_of[prefix_of(remote.address)]
    many = len(context.half_open) >= settings.cookie_threshold
    if many or near >= settings.max_half_open_per_prefix // 4:
        cookie = message.notify(NotifyType.COOKIE)
        if cookie is None or not context.cookies.check(cookie.data, nonce, remote, header.spi_i, context.now):
            context.counters["cookies_sent"] += 1
            fresh = context.cookies.make(nonce, remote, header.spi_i, context.now)
            _refuse(context, header, local, remote, [notify(NotifyType.COOKIE, fresh)])
            return False
    crowded = near >= settings.max_half_open_per_prefix
    if (
        crowded
        or len(context.half_open) >= settings.max_half_open
        or len(context.by_spi) >= settings.max_sessions
    ):
        context.counters["half_open_refused"] += 1
        return False
    return True


def _refuse(
    context: Context, header: Header, local: Endpoint, remote: Endpoint, payloads: list[Payload]
) -> None:
    answer = Header(header.spi_i, bytes(8), 0, VERSION_2, Exchange.IKE_SA_INIT, FLAG_RESPONSE, 0)
    context.send(local, remote, build_plain(answer, payloads))


# ---- IKE_AUTH ------------------------------------------------------------------------------------------


def serve_auth(session: Session, message: Message) -> PeerSteps:
    session.move(Happening.AUTH_RECEIVED)
    handshake = session.handshake
    assert handshake is not None
    idi = message.must(PayloadType.IDI, Identification)
    if idi.identity is None:
        raise _refused("the peer's identity is of an unknown type")
    session.identity = idi.identity
    asked = message.get(PayloadType.IDR, Identification)
    wanted = asked.identity if asked else None
    auth, ppk_answer = yield from ppk.serve(session, handshake, message, idi.identity)
    psk = yield from _verify_peer(session, handshake, auth, idi, wanted, certificates.sent(message))
    bad_status = yield from certificates.check_status(session, message)
    if bad_status:
        raise _unproven(bad_status)
    refused: ChildRefused | None = None
    child: tuple[ChildSa, list[Payload]] | None = None
    childless = session.settings.childless != "never" and PayloadType.SA not in message.chain.counts
    leased: tuple[IpAddress, ...] = ()
    lease_answer: list[Payload] = []
    try:
        lease_answer, leased = yield from configuration.serve(session, message)
        if not childless:
            child = yield from _child(session, message, leased)
    except ChildRefused as refusal:
        refused = refusal
    payloads = yield from _own_identity_and_proof(session, handshake, message, psk, wanted)
    payloads += [*ppk_answer, *lease_answer, *mobike.accept(session, message)]
    payloads += auth_lifetime.announce(session)
    nonces = (handshake.nonce_i, handshake.nonce_r)
    establish(session)
    if message.notify(NotifyType.INITIAL_CONTACT) is not None:
        from oepy.ike.duplicates import initial_contact

        initial_contact(session)
    if child is not None:
        payloads += child[1]
        if child[0].aggregation is not None:
            payloads += aggregation.payloads()
        install(session, child[0], b"", nonces)
        from oepy.ike.duplicates import after_establishment

        after_establishment(session)
    elif refused is not None:
        session.context.counters["children_refused"] += 1
        session.last_error = refused.text
        payloads.append(notify(refused.notify, refused.data))
    return payloads


def _refused(text: str) -> HandshakeFailed:
    return HandshakeFailed(
        FailureKind.REFUSED, text, NotifyType.AUTHENTICATION_FAILED, NotifyType.AUTHENTICATION_FAILED
    )


def _unproven(text: str) -> HandshakeFailed:
    return HandshakeFailed(
        FailureKind.PROOF_FAILED, text, NotifyType.AUTHENTICATION_FAILED, NotifyType.AUTHENTICATION_FAILED
    )


def _verify_peer(
    session: Session,
    handshake: Handshake,
    auth: AuthData,
    idi: Identification,
    wanted: PeerIdentity | None,
    sent: tuple[bytes, ...],
) -> Questions[Secret | None]:
    """The secret, where it was a PSK. Raises HandshakeFailed unless the initiator proves its identity."""
    octets = handshake.octets_of(session, initiator=True, id_body=idi.body)
    assert session.suite is not None
    assert idi.identity is not None
    if auth.method == AuthMethod.NULL:
        assert handshake.sk_pi is not None
        if not session.settings.allow_null_initiator:
            raise _refused("peers without authentication are not accepted here")
        if not matches(null_auth(session.suite.prf, handshake.sk_pi, octets), auth.data):
            raise _unproven("AUTH NULL with a wrong value")
        # RFC 7619 §2.2: whatever name a NULL peer claims, it is nobody
        session.identity = PeerIdentity.null()
        session.authenticated = Authenticated.NULL
        return None
    if auth.method == AuthMethod.PSK:
        known = yield NeedPsk(session.number, 0, idi.identity, wanted, session.remote, session.local)
        secret = known.psk if isinstance(known, Known) else known
        if not isinstance(secret, Secret):
            raise _refused(f"no secret is shared with {idi.identity}")
        if not matches(psk_auth(session.suite.prf, secret, octets), auth.data):
            raise _unproven(f"{idi.identity} has another secret")
        session.authenticated = Authenticated.PSK
        _go_on_with(session, known)
        return secret
    known = yield NeedPeerKey(session.number, 0, idi.identity, session.remote, session.local, wanted, sent)
    if isinstance(known, Refused):
        raise _refused(known.reason)
    keys = known.keys if isinstance(known, Known) else known
    candidates = [key for key in keys or () if isinstance(key, PublicKey)]
    if not candidates:
        raise _refused(f"no usable key is known of {idi.identity}")
    session.key = verify_auth(
        candidates, auth.method, auth.data, octets, allow_sha1=session.settings.allow_sha1
    )
    if session.key is None:
        raise _unproven(f"the proof of {idi.identity} is not by a key that it publishes")
    session.authenticated = known.authenticated if isinstance(known, Known) else Authenticated.DNS
    session.certified = isinstance(known, Known) and known.certified
    _go_on_with(session, known)
    return None


def _go_on_with(session: Session, known: object) -> None:
    if isinstance(known, Known) and known.settings is not None:
        session.settings = known.settings


def _own_identity_and_proof(
    session: Session, handshake: Handshake, message: Message, psk: Secret | None, wanted: PeerIdentity | None
) -> Questions[list[Payload]]:
    """IDr, our certificates, AUTH."""
    own_auth = "psk" if psk is not None else session.settings.own_auth
    identity = session.settings.identity or PeerIdentity.address(session.local.address)
    if own_auth == "psk" and wanted is not None:
        identity = wanted  # the daemon knew a secret for this very pair of identities
    if session.authenticated is Authenticated.NULL and not handshake.peer_hashes:
        # Anonymous itself, and it announces no hash (RFC 7427 §4): no signature of ours proves anything to it
        own_auth = "null"
    if own_auth == "null":
        identity = PeerIdentity.null()
    id_body = build_id(identity)
    proof = yield from _own_proof(session, handshake, own_auth, psk, id_body)
    payloads: list[Payload] = [(PayloadType.IDR, id_body)]
    if proof.method not in (AuthMethod.PSK, AuthMethod.NULL):
        unproven = session.authenticated is Authenticated.NULL
        asked = certificates.asked_for(message)
        payloads += certificates.own(session.settings.certificates, asked, unproven=unproven)
    return [*payloads, (PayloadType.AUTH, build_auth(proof))]


def _own_proof(
    session: Session, handshake: Handshake, own_auth: str, psk: Secret | None, id_body: bytes
) -> Questions[AuthData]:
    octets = handshake.octets_of(session, initiator=False, id_body=id_body)
    assert session.suite is not None
    if psk is not None:
        session.own_proof = True
        return AuthData(AuthMethod.PSK, psk_auth(session.suite.prf, psk, octets))
    if own_auth == "null":
        assert handshake.sk_pr is not None
        return AuthData(AuthMethod.NULL, null_auth(session.suite.prf, handshake.sk_pr, octets))
    signature = yield NeedSignature(session.number, 0, octets, handshake.peer_hashes)
    if signature is None:
        raise _refused("this host has no key that the peer could verify")
    session.own_proof = True
    return AuthData(*signature)


def _child(
    session: Session, message: Message, leased: tuple[IpAddress, ...]
) -> Questions[tuple[ChildSa, list[Payload]]]:
    sa = message.get(PayloadType.SA, SaPayload)
    if sa is None:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "IKE_AUTH without a child SA")
    if session.settings.childless == "force":
        raise ChildRefused(NotifyType.NO_ADDITIONAL_SAS, "its IKE SA is to begin without a child (RFC 6023)")
    narrowed = yield from ask_narrowing(session, message, None, leased)
    offers = tuple(without_groups(o) for o in narrowed.offers or session.settings.esp_offers)
    chosen = choose(offers, sa.proposals)
    if chosen is None:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "no suite in common")
    child = yield from make_child(session, narrowed, chosen)
    note_tfc(child, message)
    if session.settings.aggregation and child.mode == transport.TUNNEL:
        child.aggregation = aggregation.asked_for(message)
    return child, child_payloads(child, chosen)
