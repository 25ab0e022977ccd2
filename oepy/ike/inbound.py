"""What a session does with a datagram that carries its SPI: window, integrity, fragments, then the flows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.errors import ParseError
from oepy.ike import intermediate, rules
from oepy.ike.dispatch import awaits_key_exchange, serve_request
from oepy.ike.events import FailureKind, PeerMoved
from oepy.ike.header import MAX_MESSAGE, Exchange, Header, PayloadType
from oepy.ike.informational import goodbye
from oepy.ike.initiator import weigh_init_answer
from oepy.ike.message import Fragment, Message, Reassembly, open_sealed, parse_inner
from oepy.ike.notify import NotifyType, ProtocolError
from oepy.ike.payloads import Chain, notify
from oepy.ike.states import State
from oepy.ike.window import digest
from oepy.model import Authenticated, Endpoint

if TYPE_CHECKING:
    from oepy.ike.session import Session

_NEVER = float("inf")
MAX_UNPROVEN_MESSAGE = 16_384  # bytes that fragments of an unproven peer may take up


def receive(session: Session, outer: Message, local: Endpoint, remote: Endpoint) -> None:
    """A datagram with our SPI. Raises ParseError for what does not verify: the endpoint counts it.
    `outer` is what can be read without a key."""
    header, chain, data = outer.header, outer.chain, outer.raw
    if header.exchange == Exchange.IKE_SA_INIT:
        _receive_init(session, header, chain, data)
        return
    if session.unprotect is None or chain.encrypted is None:
        raise ParseError("a message in the clear after IKE_SA_INIT")
    if header.is_response:
        outstanding = session.window.outstanding
        if outstanding is None or outstanding.message_id != header.message_id:
            session.context.counters["out_of_window"] += 1
            return
        if outstanding.exchange != header.exchange:
            raise ParseError("a response of another exchange than asked")
    elif not _expects(session, header, data, local, remote):
        return
    opened = open_sealed(data, chain.encrypted, session.unprotect)
    if not header.is_response:
        session.arrived = (local, remote)
    _heard(session, local, remote)
    whole = _reassemble(session, header, chain, opened)
    if whole is None:
        return
    first, plain = whole
    if header.is_response:
        _response(session, header, first, plain, data)
    else:
        _request(session, header, first, plain, data)


def _expects(session: Session, header: Header, data: bytes, local: Endpoint, remote: Endpoint) -> bool:
    """Whether a request has the one message ID that is due. A repeated one is answered from the cache."""
    counters = session.context.counters
    if header.message_id == session.window.next_peer:
        if session.serving is not None:
            counters["retransmits_absorbed"] += 1
            return False
        return True
    again = session.window.cached(header.message_id, data)
    if again is not None:
        counters["responses_repeated"] += 1
        session.send(again, remote, local)
    else:
        counters["out_of_window"] += 1
    return False


def _heard(session: Session, local: Endpoint, remote: Endpoint) -> None:
    """An authenticated message arrived: the peer lives, and is where it sends from (RFC 7296 §2.23).

    To another address it is followed only when it has proved a key. A source is easily forged: the answer to
    IKE_SA_INIT has shown that the peer receives at its address, and that is all that a NULL peer has. Else it
    could come to speak for anybody's address, and have the traffic of that sent to itself.
    """
    session.heard_at = session.context.now
    if (remote == session.remote and local == session.local) or session.mobike is not None:
        return  # RFC 4555 §3.8: with MOBIKE nothing moves but by UPDATE_SA_ADDRESSES
    proven = session.established_at != _NEVER and session.authenticated is not Authenticated.NULL
    if remote.address != session.remote.address and not proven:
        session.context.counters["moves_refused"] += 1
        return
    if session.state in (State.HALF_OPEN, State.AUTHENTICATING) or session.nat_remote:
        if session.established_at != _NEVER:
            if remote.address != session.remote.address:
                session.context.moved(session, remote.address)
            session.context.emit(PeerMoved(session.number, local, remote, session.encap))
        session.local, session.remote = local, remote


def _reassemble(
    session: Session, header: Header, chain: Chain, opened: bytes | Fragment
) -> tuple[int, bytes] | None:
    assert chain.encrypted is not None
    if isinstance(opened, bytes):
        return chain.encrypted.first_inner, opened
    if session.reassembly is None or session.reassembly.message_id != header.message_id:
        limit = MAX_MESSAGE if session.authenticated is not None else MAX_UNPROVEN_MESSAGE
        session.reassembly = Reassembly(header.message_id, limit)
    whole = session.reassembly.add(opened)
    if whole is not None:
        session.reassembly = None
    return whole


def _response(session: Session, header: Header, first: int, plain: bytes, data: bytes) -> None:
    flow = session.own
    session.window.answered()
    try:
        message = parse_inner(header, first, plain, data)
        rules.check(header.exchange, True, message.chain)
        if header.exchange == Exchange.IKE_INTERMEDIATE:
            intermediate.note(session, header, first, plain)
    except ParseError as error:
        session.fail(FailureKind.PROTOCOL, str(error), "INVALID_SYNTAX")
        return
    if flow is not None:
        session.drive(flow, message)
    elif header.exchange == Exchange.IKE_AUTH:
        _late_answer(session, message)
    session.reschedule()


def _late_answer(session: Session, message: Message) -> None:
    session.context.counters["late_auth"] += 1
    if message.chain.counts.get(PayloadType.AUTH):
        session.start("goodbye", goodbye)
    else:
        session.end()


def _request(session: Session, header: Header, first: int, plain: bytes, data: bytes) -> None:
    flow_digest = digest(data)
    try:
        message = parse_inner(header, first, plain, data)
        rules.check(header.exchange, False, message.chain)
    except ParseError as error:
        kind = error.notify if isinstance(error, ProtocolError) else NotifyType.INVALID_SYNTAX
        detail = error.data if isinstance(error, ProtocolError) else b""
        datagrams = session.build(header.exchange, header.message_id, [notify(kind, detail)], response=True)
        session.window.respond(flow_digest, datagrams)
        session.send(datagrams)
        session.context.counters["bad_requests"] += 1
        if kind is NotifyType.INVALID_SYNTAX:  # RFC 7296 §2.21.2–3: fatal
            session.fail(FailureKind.PROTOCOL, str(error), "INVALID_SYNTAX")
        return
    if header.exchange == Exchange.IKE_INTERMEDIATE and awaits_key_exchange(session):
        intermediate.note(session, header, first, plain)
    serve_request(session, message, flow_digest)
    session.reschedule()


def _receive_init(session: Session, header: Header, chain: Chain, data: bytes) -> None:
    if not header.is_response:
        if (
            session.handshake is not None
            and session.window.cached(0, data) is not None
            and session.state is State.HALF_OPEN
        ):
            session.context.counters["responses_repeated"] += 1
            session.send(session.window.cached(0, data) or [])
        return
    outstanding = session.window.outstanding
    if session.state is not State.INIT_SENT or outstanding is None or header.message_id != 0:
        session.context.counters["out_of_window"] += 1
        return
    rules.check(Exchange.IKE_SA_INIT, True, chain)
    message = Message(header, chain, data)
    if weigh_init_answer(session, message):
        carry_init_on(session, message)
    else:
        session.reschedule()


def carry_init_on(session: Session, message: Message) -> None:
    flow = session.own
    assert flow is not None
    assert session.handshake is not None
    session.handshake.deferred = None
    session.window.outstanding = None  # the next request, IKE_SA_INIT again or IKE_AUTH, sets its own ID
    session.drive(flow, message)
    session.reschedule()
