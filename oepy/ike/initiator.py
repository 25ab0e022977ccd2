"""The initiator's IKE_SA_INIT, and what follows it (RFC 7296 §1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.errors import ParseError
from oepy.ike import ppk
from oepy.ike.algorithms import accepted, has_additional, ike_suite, to_proposals
from oepy.ike.flow import OwnSteps, Send, Steps
from oepy.ike.handshake import (
    GROUP_NAMES,
    NONCE_SIZE,
    Handshake,
    common_notifies,
    derive,
    read_common_notifies,
)
from oepy.ike.header import NO_SPI, Exchange, PayloadType
from oepy.ike.initiator_auth import authenticate
from oepy.ike.intermediate import exchange_keys
from oepy.ike.key_exchange import generate
from oepy.ike.message import Message
from oepy.ike.notify import NotifyType, notify_name
from oepy.ike.payload_sa import SaPayload, TransformType, build_sa
from oepy.ike.payloads import (
    KeyShareData,
    Notify,
    Payload,
    build_ke,
    notify,
)
from oepy.ike.rules import first_error
from oepy.ike.states import Happening
from oepy.model import Endpoint

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
    yield from authenticate(session, request, handshake)


def _init_rounds(session: Session, request: Initiate, handshake: Handshake) -> Steps[Message]:
    """IKE_SA_INIT, again with a cookie or in another group as the peer asks (RFC 7296 §2.6)."""
    context = session.context
    offers = request.ike_offers or session.settings.ike_offers
    handshake.nonce_i = context.random(NONCE_SIZE)
    group = GROUP_NAMES[offers[0][TransformType.KE][0].id]
    handshake.offers, handshake.share = offers, generate(group, context.random)
    sa = build_sa(SaPayload(to_proposals(offers, b"")))
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
        payloads += ppk.announcement(request.ppk is not None)
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
    chosen = accepted(handshake.offers, answer.must(PayloadType.SA, SaPayload).proposals)
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
    floats = session.encap or (settings.mobike and handshake.peer_nat_t)  # RFC 4555 §3.3
    if floats and session.remote.port == settings.ike_port:
        session.local = Endpoint(session.local.address, settings.nat_t_port)
        session.remote = Endpoint(session.remote.address, settings.nat_t_port)
