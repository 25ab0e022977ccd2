"""The initiator's IKE_AUTH (RFC 7296 §1.2, 2.15–2.16)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from oepy.ike import (
    aggregation,
    auth_lifetime,
    certificates,
    configuration,
    mobike,
    ppk,
    reauthentication,
    transport,
)
from oepy.ike.algorithms import accepted, esp_suite, to_proposals, without_groups
from oepy.ike.authentication import AuthMethod, matches, null_auth, psk_auth, verify_auth
from oepy.ike.child import ChildSa, install, note_tfc, read_selectors, spi_of, within
from oepy.ike.child_request import create_child
from oepy.ike.events import FailureKind, Known, NeedPeerKey, NeedSignature, NeedSpi, Refused
from oepy.ike.flow import ChildRefused, HandshakeFailed, OwnSteps, Send, Steps
from oepy.ike.handshake import establish
from oepy.ike.header import Exchange, PayloadType
from oepy.ike.notify import NotifyType, notify_name
from oepy.ike.payload_sa import SaPayload, build_sa
from oepy.ike.payload_ts import build_ts
from oepy.ike.payloads import AuthData, Identification, Payload, build_auth, build_id, notify
from oepy.ike.rules import first_error
from oepy.ike.settings import ChildRequest
from oepy.model import Authenticated, PeerIdentity, PublicKey, TrafficSelector

if TYPE_CHECKING:
    from oepy.ike.algorithms import Offer
    from oepy.ike.handshake import Handshake
    from oepy.ike.message import Message
    from oepy.ike.session import Session
    from oepy.ike.settings import Initiate, Ppk
    from oepy.model import IpAddress


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


def authenticate(session: Session, request: Initiate, handshake: Handshake) -> OwnSteps:
    """IKE_AUTH, with the first child unless the request is childless."""
    request = replace(request, own_auth=certificates.own_auth(request.own_auth, handshake.certificates_asked))
    childless = request.childless == "force" or (request.childless == "prefer" and handshake.peer_childless)
    if childless and not handshake.peer_childless:
        text = "the peer does not begin an IKE SA without a child (RFC 6023)"
        raise HandshakeFailed(FailureKind.REJECTED, text)
    secret = ppk.check_announced(handshake, request.ppk)
    spi_in = 0
    if not childless:
        spi_in = yield NeedSpi(session.number, 0)
        if not isinstance(spi_in, int):
            raise HandshakeFailed(FailureKind.REFUSED, "the datapath has no SPI to give")
    offers = tuple(without_groups(offer) for offer in request.esp_offers or session.settings.esp_offers)
    keys = ppk.Keys.of(session, handshake)
    payloads = yield from _identity_and_proof(session, request, handshake, secret)
    payloads += [*configuration.request_payloads(request), *mobike.offer(session)]
    if not childless:
        payloads += _child_payloads(session, request, offers, spi_in)
    answer = yield Send(Exchange.IKE_AUTH, payloads)
    error = first_error(answer.chain)
    if answer.get(PayloadType.AUTH, AuthData) is None:
        kind = error.type if error else 0
        text = f"the peer answers IKE_AUTH with {notify_name(kind)}"
        raise HandshakeFailed(FailureKind.REJECTED, text, kind)
    if secret is not None:
        ppk.confirm(session, handshake, secret, keys, answer)
    yield from _verify_peer(session, request, handshake, answer)
    mobike.agree(session, answer)
    session.connection = request.connection
    _establish_with_child(session, request, handshake, answer, offers, spi_in, childless=childless)
    auth_lifetime.heed(session, answer)


def _identity_and_proof(
    session: Session, request: Initiate, handshake: Handshake, secret: Ppk | None
) -> Steps[list[Payload]]:
    """IDi, what goes with it, and AUTH. From here on the keys are those with the PPK, where there is one."""
    id_body = build_id(own_identity(session, request.identity, request.own_auth))
    payloads: list[Payload] = [(PayloadType.IDI, id_body)]
    if request.own_auth == "pubkey":
        payloads += certificates.own(session.settings.certificates, handshake.certificates_asked)
    payloads += certificates.requests(session.settings.certificates)
    if secret is not None:
        without = None
        if not secret.required:
            without = yield from own_proof(session, handshake, request, id_body)
        payloads += ppk.identity_payloads(secret, without)
        ppk.mixed(session, ppk.Keys.of(session, handshake), secret.secret).use(session, handshake)
    auth = yield from own_proof(session, handshake, request, id_body)
    if request.initial_contact and request.own_auth != "null" and not _known(session):
        payloads.append(notify(NotifyType.INITIAL_CONTACT))
    if request.expected_identity is not None:
        payloads.append((PayloadType.IDR, build_id(request.expected_identity)))
    return [*payloads, (PayloadType.AUTH, build_auth(auth))]


def _aggregates(session: Session, request: Initiate) -> bool:
    return session.settings.aggregation and request.mode == transport.TUNNEL


def _child_payloads(
    session: Session, request: Initiate, offers: tuple[Offer, ...], spi_in: int
) -> list[Payload]:
    return [
        (PayloadType.SA, build_sa(SaPayload(to_proposals(offers, spi_in.to_bytes(4, "big"))))),
        (PayloadType.TSI, build_ts(configuration.proposed_selectors(request))),
        (PayloadType.TSR, build_ts(request.remote_ts)),
        *transport.payloads(request.mode),
        *(aggregation.payloads() if _aggregates(session, request) else ()),
    ]


def _establish_with_child(
    session: Session,
    request: Initiate,
    handshake: Handshake,
    answer: Message,
    offers: tuple[Offer, ...],
    spi_in: int,
    *,
    childless: bool,
) -> None:
    child: ChildSa | None = None
    error = first_error(answer.chain)
    try:
        addresses = configuration.read_reply(session, request, answer)
        if not childless:
            child = _agreed_child(session, request, offers, spi_in, answer)
            if not request.local_ts:
                child.local_ts = configuration.within_addresses(child.local_ts, addresses)
            note_tfc(child, answer)
            child.aggregation = aggregation.agreed_on(answer, asked=_aggregates(session, request))
    except ChildRefused as refused:
        # An IKE SA without its child is of no use to us: the peer hears of its end
        kind = FailureKind.REJECTED if error is not None else FailureKind.PROTOCOL
        session.context.counters["children_refused"] += 1
        _say_goodbye(session)
        raise HandshakeFailed(kind, refused.text, error.type if error else refused.notify) from None
    establish(session)
    if child is not None:
        install(session, child, b"", (handshake.nonce_i, handshake.nonce_r))
        from oepy.ike.duplicates import after_establishment

        after_establishment(session)
    carried_over = reauthentication.after_establishment(session)
    if childless and request.remote_ts and not carried_over:
        wanted = _child_request(request, addresses)
        session.start("create-child", lambda it: create_child(it, wanted))


def _child_request(request: Initiate, addresses: tuple[IpAddress, ...]) -> ChildRequest:
    return ChildRequest(
        request.local_ts or tuple(TrafficSelector.of(address) for address in addresses),
        request.remote_ts,
        request.esp_offers,
        request.mode,
        transport_required=request.transport_required,
        connection=request.connection,
        label=request.label,
        lifetimes=request.lifetimes,
    )


def _known(session: Session) -> bool:
    """Whether another established session with the peer exists, which INITIAL_CONTACT would tear down."""
    return bool(session.context.by_remote.get(session.remote.address))


def _say_goodbye(session: Session) -> None:
    from oepy.ike.informational import send_last_delete

    send_last_delete(session)


def _verify_peer(session: Session, request: Initiate, handshake: Handshake, answer: Message) -> Steps[None]:
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
        keys, by = request.remote_keys, Authenticated(request.authenticated_by)
        if request.by_certificate:
            keys, by = yield from _certified_keys(session, idr, answer)
        session.key = verify_auth(
            *(keys, auth.method, auth.data, octets), allow_sha1=session.settings.allow_sha1
        )
        proven = None if session.key is None else by
    if proven is None:
        raise _unproven(f"its proof (AUTH method {auth.method}) is not by an expected key")
    if idr.identity is None:
        raise _unproven("its identity is of an unknown type")
    if request.expected_identity is not None and not idr.identity.same_as(request.expected_identity):
        raise _unproven(f"it is {idr.identity}, not {request.expected_identity}")
    session.authenticated = proven
    refusal = yield from certificates.check_status(session, answer)
    if refusal:
        raise _unproven(refusal)


def _certified_keys(
    session: Session, idr: Identification, answer: Message
) -> Steps[tuple[tuple[PublicKey, ...], Authenticated]]:
    """Those that the certificates in the answer give to this identity."""
    if idr.identity is None:
        raise _unproven("its identity is of an unknown type")
    known = yield NeedPeerKey(
        *(session.number, 0, idr.identity, session.remote, session.local),
        certificates=certificates.sent(answer),
        initiator=True,
    )
    if isinstance(known, Refused):
        raise _unproven(known.reason)
    if not isinstance(known, Known) or not known.keys:
        raise _unproven(f"no usable key is known of {idr.identity}")
    session.certified = known.certified
    return known.keys, known.authenticated


def _unproven(text: str) -> HandshakeFailed:
    return HandshakeFailed(
        FailureKind.PROOF_FAILED,
        f"the peer could not prove who it is: {text}",
        0,
        NotifyType.AUTHENTICATION_FAILED,
    )


def _agreed_child(
    session: Session, request: Initiate, offers: tuple[Offer, ...], spi_in: int, answer: Message
) -> ChildSa:
    error = first_error(answer.chain)
    sa = answer.get(PayloadType.SA, SaPayload)
    if sa is None:
        name = notify_name(error.type) if error else "nothing"
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, f"the peer answers the child SA with {name}")
    chosen = accepted(offers, sa.proposals)
    if chosen is None:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "the peer chose a suite that was not proposed")
    mode = transport.agreed_on(answer, request.mode, required=request.transport_required)
    tsi, tsr = read_selectors(answer)
    if mode == transport.TRANSPORT:
        tsi, tsr = transport.as_seen(session, tsi, tsr)
    if not within(tsi, configuration.proposed_selectors(request)) or not within(tsr, request.remote_ts):
        raise ChildRefused(NotifyType.TS_UNACCEPTABLE, "the peer widened the traffic selectors")
    child = ChildSa(
        spi_in, spi_of(session, chosen), esp_suite(chosen), local_ts=tsi, remote_ts=tsr, initiator=True
    )
    child.mode = mode
    child.offers, child.connection, child.label = request.esp_offers, request.connection, request.label
    child.lifetimes = request.lifetimes
    return child
