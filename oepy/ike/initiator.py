"""The initiator's IKE_SA_INIT and IKE_AUTH, in the order in which they happen (RFC 7296 §1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.errors import ParseError
from oepy.ike import aggregation, transport
from oepy.ike.algorithms import accepted, esp_suite, has_additional, ike_suite, to_proposals, without_groups
from oepy.ike.authentication import AuthMethod, matches, null_auth, psk_auth, verify_auth
from oepy.ike.child import ChildSa, install, read_selectors, spi_of, within
from oepy.ike.events import FailureKind, NeedSignature, NeedSpi
from oepy.ike.flow import ChildRefused, HandshakeFailed, OwnSteps, Send, Steps
from oepy.ike.handshake import (
    GROUP_NAMES,
    NONCE_SIZE,
    Handshake,
    common_notifies,
    derive,
    establish,
    read_common_notifies,
)
from oepy.ike.header import NO_SPI, Exchange, PayloadType
from oepy.ike.intermediate import exchange_keys
from oepy.ike.key_exchange import generate
from oepy.ike.message import Message
from oepy.ike.notify import NotifyType, notify_name
from oepy.ike.payload_sa import PROTOCOL_ESP, PROTOCOL_IKE, SaPayload, TransformType, build_sa
from oepy.ike.payload_ts import build_ts
from oepy.ike.payloads import (
    AuthData,
    Identification,
    KeyShareData,
    Notify,
    Payload,
    build_auth,
    build_id,
    build_ke,
    notify,
)
from oepy.ike.rules import first_error
from oepy.ike.states import Happening
from oepy.model import Authenticated, Endpoint, PeerIdentity

if TYPE_CHECKING:
    from oepy.ike.algorithms import Offer
    from oepy.ike.session import Session
    from oepy.ike.settings import Initiate

MAX_INIT_ROUNDS = 5
MAX_COOKIE = 64
COOKIE_PATIENCE = 0.2
"""Seconds before a COOKIE is obeyed. The answer to either request would look the same, and AUTH covers the one
that the peer answered: so where the demand is a forgery, the true answer has to come first."""


def initiate(session: Session, request: Initiate) -> OwnSteps:
    handshake = Handshake()
    session.handshake = handshake
    session.move(Happening.START)
    answer = yield from _init_rounds(session, request, handshake)
    _init_answered(session, handshake, answer)
    yield from exchange_keys(session, handshake)
    yield from _auth(session, request, handshake)


def _init_rounds(session: Session, request: Initiate, handshake: Handshake) -> Steps[Message]:
    """IKE_SA_INIT, again with a cookie or in another group as the peer asks (RFC 7296 §2.6)."""
    context = session.context
    offers = request.ike_offers or session.settings.ike_offers
    handshake.nonce_i = context.random(NONCE_SIZE)
    group = GROUP_NAMES[offers[0][TransformType.KE][0].id]
    handshake.offers, handshake.share = offers, generate(group, context.random)
    sa = build_sa(SaPayload(to_proposals(offers, PROTOCOL_IKE, b"")))
    cookie: list[Payload] = []
    while True:
        share = handshake.share
        payloads = [
            *cookie,
            (PayloadType.SA, sa),
            (PayloadType.KE, build_ke(_group_id(offers, share.group), share.public)),
            (PayloadType.NONCE, handshake.nonce_i),
            *common_notifies(session, NO_SPI),
        ]
        if any(map(has_additional, offers)):
            payloads.append(notify(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED))
        handshake.rounds += 1
        message: Message = yield Send(Exchange.IKE_SA_INIT, payloads)
        error = first_error(message.chain)
        if error is None:
            return message
        session.move(Happening.INIT_AGAIN)
        if error.type == NotifyType.COOKIE:
            cookie = [notify(NotifyType.COOKIE, error.data)]
        else:
            handshake.share = generate(_wanted_group(handshake, error), context.random)


def weigh_init_answer(session: Session, message: Message) -> bool:
    """Whether this answer to IKE_SA_INIT carries the exchange on. Anybody on the path may have written it
    (RFC 7296 §2.21.1), so what cannot be right is no answer, a refusal is kept for the case that nothing
    better comes, and an answer to an earlier round still counts. Raises ParseError for a malformed one."""
    handshake, outstanding = session.handshake, session.window.outstanding
    assert handshake is not None
    assert handshake.share is not None
    assert outstanding is not None
    handshake.sent[handshake.share.group] = (outstanding.datagrams[0], handshake.share)
    error = first_error(message.chain)
    if error is None:
        return _good_answer(handshake, message)
    again = handshake.rounds < MAX_INIT_ROUNDS
    if again and error.type == NotifyType.COOKIE and 0 < len(error.data) <= MAX_COOKIE:
        handshake.deferred = message
        outstanding.next_at = min(outstanding.next_at, session.context.now + COOKIE_PATIENCE)
        return False
    if again and error.type == NotifyType.INVALID_KE_PAYLOAD and _wanted_group(handshake, error):
        return True
    session.context.counters["init_refusals"] += 1
    if handshake.refusal is None:
        name = notify_name(error.type)
        handshake.refusal = (f"the peer answers IKE_SA_INIT with {name}", name)
        outstanding.give_up_at = min(
            outstanding.give_up_at, session.context.now + session.settings.refusal_patience
        )
    return False


def _wanted_group(handshake: Handshake, error: Notify) -> str:
    """The group of an INVALID_KE_PAYLOAD: one that we offered and did not try yet, else nothing."""
    wanted = int.from_bytes(error.data, "big") if len(error.data) == 2 else 0
    offered = any(t.id == wanted for offer in handshake.offers for t in offer[TransformType.KE])
    name = GROUP_NAMES.get(wanted, "") if offered else ""
    return "" if name in handshake.sent else name


def _good_answer(handshake: Handshake, answer: Message) -> bool:
    chosen = accepted(handshake.offers, answer.must(PayloadType.SA, SaPayload).proposals, PROTOCOL_IKE)
    ke = answer.must(PayloadType.KE, KeyShareData)
    sent = handshake.sent.get(GROUP_NAMES.get(ke.group, ""))
    if chosen is None or sent is None or ike_suite(chosen).group != sent[1].group:
        raise ParseError("IKE_SA_INIT: the peer chose what was not proposed")
    if ike_suite(chosen).additional and answer.notify(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED) is None:
        raise ParseError("IKE_SA_INIT: additional key exchanges without IKE_INTERMEDIATE")
    if answer.header.spi_r == NO_SPI:
        raise ParseError("IKE_SA_INIT: the peer chose SPI 0")
    answer.must(PayloadType.NONCE, bytes)
    handshake.message_i = sent[0]
    handshake.agreed = ike_suite(chosen), sent[1].shared_secret(ke.data)
    return True


def _group_id(offers: tuple[Offer, ...], name: str) -> int:
    return next(t.id for offer in offers for t in offer[TransformType.KE] if GROUP_NAMES[t.id] == name)


def _init_answered(session: Session, handshake: Handshake, answer: Message) -> None:
    assert handshake.agreed is not None
    suite, shared = handshake.agreed
    handshake.agreed = handshake.share = None
    handshake.sent = {}
    session.spi_peer = answer.header.spi_r
    handshake.nonce_r = answer.must(PayloadType.NONCE, bytes)
    handshake.message_r = answer.raw
    read_common_notifies(session, handshake, answer, session.spi_peer)
    derive(session, handshake, suite, shared)
    session.move(Happening.INIT_ANSWERED)
    session.window.next_own = 1
    settings = session.settings
    if session.encap and session.remote.port == settings.ike_port:
        session.local = Endpoint(session.local.address, settings.nat_t_port)
        session.remote = Endpoint(session.remote.address, settings.nat_t_port)


def own_identity(session: Session, configured: PeerIdentity | None, own_auth: str) -> PeerIdentity:
    if own_auth == "null":
        return PeerIdentity.null()
    return configured or session.settings.identity or PeerIdentity.address(session.local.address)


def own_proof(session: Session, handshake: Handshake, request: Initiate, id_body: bytes) -> Steps[AuthData]:
    octets = handshake.octets_of(session, initiator=True, id_body=id_body)
    assert session.suite is not None
    if request.own_auth == "psk":
        if request.psk is None:
            raise HandshakeFailed(FailureKind.REFUSED, "own_auth is psk, and there is no secret")
        session.own_proof = True
        return AuthData(AuthMethod.PSK, psk_auth(session.suite.prf, request.psk, octets))
    if request.own_auth == "null":
        assert handshake.sk_pi is not None
        return AuthData(AuthMethod.NULL, null_auth(session.suite.prf, handshake.sk_pi, octets))
    signature = yield NeedSignature(session.number, 0, octets, handshake.peer_hashes)
    if signature is None:
        raise HandshakeFailed(FailureKind.REFUSED, "this host has no key that the peer could verify")
    session.own_proof = True
    return AuthData(*signature)


def _auth(session: Session, request: Initiate, handshake: Handshake) -> OwnSteps:
    context = session.context
    spi_in = yield NeedSpi(session.number, 0)
    if not isinstance(spi_in, int):
        raise HandshakeFailed(FailureKind.REFUSED, "the datapath has no SPI to give")
    offers = tuple(without_groups(offer) for offer in request.esp_offers or session.settings.esp_offers)
    id_body = build_id(own_identity(session, request.identity, request.own_auth))
    auth = yield from own_proof(session, handshake, request, id_body)
    payloads: list[Payload] = [(PayloadType.IDI, id_body)]
    if request.initial_contact and request.own_auth != "null" and not _known(session):
        payloads.append(notify(NotifyType.INITIAL_CONTACT))
    if request.expected_identity is not None:
        payloads.append((PayloadType.IDR, build_id(request.expected_identity)))
    payloads += [
        (PayloadType.AUTH, build_auth(auth)),
        (PayloadType.SA, build_sa(SaPayload(to_proposals(offers, PROTOCOL_ESP, spi_in.to_bytes(4, "big"))))),
        (PayloadType.TSI, build_ts(request.local_ts)),
        (PayloadType.TSR, build_ts(request.remote_ts)),
    ]
    payloads += transport.payloads(request.mode)
    aggregates = session.settings.aggregation and request.mode == transport.TUNNEL
    if aggregates:
        payloads += aggregation.payloads()
    answer = yield Send(Exchange.IKE_AUTH, payloads)
    error = first_error(answer.chain)
    if answer.get(PayloadType.AUTH, AuthData) is None:
        name = notify_name(error.type if error else 0)
        raise HandshakeFailed(
            FailureKind.REJECTED, f"the peer answers IKE_AUTH with {name}", error.type if error else 0
        )
    _verify_peer(session, request, handshake, answer)
    nonces = (handshake.nonce_i, handshake.nonce_r)
    session.connection = request.connection
    try:
        child = _agreed_child(request, offers, spi_in, answer)
        child.aggregation = aggregation.agreed_on(answer, asked=aggregates)
    except ChildRefused as refused:
        # An IKE SA without a child is of no use to us: the peer hears of its end
        kind = FailureKind.REJECTED if error is not None else FailureKind.PROTOCOL
        context.counters["children_refused"] += 1
        _say_goodbye(session)
        raise HandshakeFailed(kind, refused.text, error.type if error else refused.notify) from None
    establish(session)
    install(session, child, b"", nonces)
    from oepy.ike.duplicates import after_establishment

    after_establishment(session)


def _known(session: Session) -> bool:
    """Whether another established session with the peer exists, which INITIAL_CONTACT would tear down."""
    return bool(session.context.by_remote.get(session.remote.address))


def _say_goodbye(session: Session) -> None:
    from oepy.ike.informational import send_last_delete

    send_last_delete(session)


def _verify_peer(session: Session, request: Initiate, handshake: Handshake, answer: Message) -> None:
    """Raises HandshakeFailed(PROOF_FAILED) unless the responder is whom we meant."""
    idr = answer.must(PayloadType.IDR, Identification)
    auth = answer.must(PayloadType.AUTH, AuthData)
    octets = handshake.octets_of(session, initiator=False, id_body=idr.body)
    session.identity = idr.identity
    assert session.suite is not None
    proven: Authenticated | None = None
    if auth.method == AuthMethod.PSK:
        if request.psk is not None and matches(psk_auth(session.suite.prf, request.psk, octets), auth.data):
            proven = Authenticated.PSK
    elif auth.method == AuthMethod.NULL:
        assert handshake.sk_pr is not None
        right = matches(null_auth(session.suite.prf, handshake.sk_pr, octets), auth.data)
        if request.accept_null and right:
            proven = Authenticated.NULL
    else:
        session.key = verify_auth(
            request.remote_keys,
            auth.method,
            auth.data,
            octets,
            allow_sha1=session.settings.allow_sha1,
        )
        if session.key is not None:
            proven = Authenticated(request.authenticated_by)
    if proven is None:
        raise _unproven(f"its proof (AUTH method {auth.method}) is not by an expected key")
    if idr.identity is None:
        raise _unproven("its identity is of an unknown type")
    if request.expected_identity is not None and idr.identity != request.expected_identity:
        raise _unproven(f"it is {idr.identity}, not {request.expected_identity}")
    session.authenticated = proven


def _unproven(text: str) -> HandshakeFailed:
    return HandshakeFailed(
        FailureKind.PROOF_FAILED,
        f"the peer could not prove who it is: {text}",
        0,
        NotifyType.AUTHENTICATION_FAILED,
    )


def _agreed_child(request: Initiate, offers: tuple[Offer, ...], spi_in: int, answer: Message) -> ChildSa:
    error = first_error(answer.chain)
    sa = answer.get(PayloadType.SA, SaPayload)
    if sa is None:
        name = notify_name(error.type) if error else "nothing"
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, f"the peer answers the child SA with {name}")
    chosen = accepted(offers, sa.proposals, PROTOCOL_ESP)
    if chosen is None:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "the peer chose an ESP suite that was not proposed")
    tsi, tsr = read_selectors(answer)
    if not within(tsi, request.local_ts) or not within(tsr, request.remote_ts):
        raise ChildRefused(NotifyType.TS_UNACCEPTABLE, "the peer widened the traffic selectors")
    child = ChildSa(spi_in, spi_of(chosen), esp_suite(chosen), local_ts=tsi, remote_ts=tsr, initiator=True)
    child.mode = transport.agreed_on(answer, request.mode, required=request.transport_required)
    child.offers, child.connection, child.label = request.esp_offers, request.connection, request.label
    return child
