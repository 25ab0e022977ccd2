"""Which flow serves which request of the peer: (exchange, state) → flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike.child_exchange import serve_create_child
from oepy.ike.followup import serve_followup
from oepy.ike.header import Exchange, PayloadType
from oepy.ike.ike_rekey import resolve_candidate
from oepy.ike.informational import serve_informational
from oepy.ike.intermediate import serve_intermediate
from oepy.ike.responder import serve_auth
from oepy.ike.states import State

if TYPE_CHECKING:
    from oepy.ike.message import Message
    from oepy.ike.session import Session

_LATE = (State.ESTABLISHED, State.REPLACED, State.DELETING)
SERVED_IN: dict[int, tuple[State, ...]] = {
    Exchange.IKE_AUTH: (State.HALF_OPEN,),
    Exchange.IKE_INTERMEDIATE: (State.HALF_OPEN,),
    Exchange.CREATE_CHILD_SA: _LATE,
    Exchange.IKE_FOLLOWUP_KE: _LATE,
    # while our IKE_AUTH is under way the peer may already be established and speak: it is not yet proven, so
    # it waits for its retransmission. A responder that gave up on AUTH tells so by INFORMATIONAL (§2.21.2).
    Exchange.INFORMATIONAL: _LATE,
}


def awaits_key_exchange(session: Session) -> bool:
    """Whether a peer that begins has agreed on further key exchanges before IKE_AUTH."""
    handshake = session.handshake
    return session.state is State.HALF_OPEN and handshake is not None and bool(handshake.additional)


def serve_request(session: Session, message: Message, first_datagram: bytes) -> None:
    """An authenticated request with the right message ID."""
    exchange = message.header.exchange
    waits = awaits_key_exchange(session)
    if (exchange == Exchange.IKE_AUTH and waits) or (exchange == Exchange.IKE_INTERMEDIATE and not waits):
        session.context.counters["request_out_of_place"] += 1
        return
    if session.state not in SERVED_IN.get(exchange, ()):
        session.context.counters["request_out_of_place"] += 1
        return
    deletes = message.chain.counts.get(PayloadType.DELETE)
    if session.candidate_for is not None and not deletes:
        resolve_candidate(session.candidate_for)  # the peer already lives in this one
    if exchange == Exchange.IKE_AUTH:
        session.serve(serve_auth(session, message), message, "auth", first_datagram)
    elif exchange == Exchange.IKE_INTERMEDIATE:
        session.serve(serve_intermediate(session, message), message, "intermediate", first_datagram)
    elif exchange == Exchange.IKE_FOLLOWUP_KE:
        session.serve(serve_followup(session, message), message, "followup", first_datagram)
    elif exchange == Exchange.CREATE_CHILD_SA:
        session.serve(serve_create_child(session, message), message, "create-child", first_datagram)
    else:
        session.serve(serve_informational(session, message), message, "informational", first_datagram)
