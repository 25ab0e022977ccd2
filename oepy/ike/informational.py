"""INFORMATIONAL: Delete in pairs, and the empty message that asks whether the peer lives (RFC 7296 §1.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike import auth_lifetime, mobike
from oepy.ike.events import ChildUsable, DownReason
from oepy.ike.flow import OwnSteps, PeerSteps, Send
from oepy.ike.header import Exchange, PayloadType
from oepy.ike.notify import NotifyType
from oepy.ike.payload_sa import PROTOCOL_AH, PROTOCOL_ESP, PROTOCOL_IKE
from oepy.ike.payloads import Delete, Payload, build_delete
from oepy.ike.states import Happening, State

if TYPE_CHECKING:
    from oepy.ike.child import ChildSa
    from oepy.ike.message import Message
    from oepy.ike.session import Session


MAX_EARLY_DELETES = 8


def creates_child(session: Session) -> bool:
    """Whether an exchange of ours is under way, at whose end there is a child that the peer has already."""
    return session.own is not None and session.own.what.startswith(("rekey ", "create-child", "carry-over"))


def serve_informational(session: Session, message: Message) -> PeerSteps:
    yield from ()  # a generator like the others, which asks nothing
    answer: list[Payload] = []
    for item in message.chain.parsed.get(PayloadType.DELETE, ()):
        assert isinstance(item, Delete)
        if item.protocol == PROTOCOL_IKE:
            _peer_ends(session)
            return []
        if item.protocol in (PROTOCOL_ESP, PROTOCOL_AH) and (ours := _peer_deletes(session, item)):
            answer.append((PayloadType.DELETE, build_delete(Delete(item.protocol, tuple(ours)))))
    if message.notify(NotifyType.AUTHENTICATION_FAILED) is not None:
        session.last_error = "the peer says AUTHENTICATION_FAILED"
        session.context.counters["peer_rejects_our_proof"] += 1
        _peer_ends(session)
        return []
    auth_lifetime.heed(session, message)
    return answer + mobike.serve(session, message)


def _peer_ends(session: Session) -> None:
    """The whole IKE SA goes, its children with it; the empty answer is still sent."""
    from oepy.ike.ike_rekey import resolve_candidate

    resolve_candidate(session)
    reason = DownReason.REKEYED if session.moved_to is not None else DownReason.PEER_DELETE
    for spi_in in list(session.children):
        session.child_down(spi_in, reason)
    session.end_after_answer(reason)


def _peer_deletes(session: Session, delete: Delete) -> list[bytes]:
    """The peer's inbound SPIs are our outbound ones; ours of the same pairs go back (RFC 7296 §1.4.1)."""
    ours: list[bytes] = []
    gone = {int.from_bytes(spi, "big") for spi in delete.spis}
    if creates_child(session):
        unknown = gone - {child.spi_out for child in session.children.values()}
        session.early_deletes = tuple(unknown)[:MAX_EARLY_DELETES]
    of_protocol = [child for child in session.children.values() if child.protocol == delete.protocol]
    for child in [child for child in of_protocol if child.spi_out in gone]:
        if not child.deleting:  # both sides delete at once: the answer then names nothing
            ours.append(child.spi_in.to_bytes(4, "big"))
        if child.replaced:
            make_usable(session, child)
        session.child_down(child.spi_in, DownReason.REKEYED if child.replaced else DownReason.PEER_DELETE)
    return ours


def make_usable(session: Session, old: ChildSa) -> None:
    """The peer lets the old SA go: it has the new one, so we may send on it (RFC 7296 §2.8)."""
    for child in session.children.values():
        if not child.usable and child.same_selectors(old):
            child.usable = True
            session.context.emit(ChildUsable(session.number, child.spi_in))


def send_last_delete(session: Session) -> None:
    """Tell the peer that the IKE SA ends, once, and wait for nothing."""
    window = session.window
    message_id = window.next_own + (1 if window.outstanding is not None else 0)
    payloads: list[Payload] = [(PayloadType.DELETE, build_delete(Delete(PROTOCOL_IKE)))]
    session.send(session.build(Exchange.INFORMATIONAL, message_id, payloads, response=False))


def delete_ike(session: Session, reason: DownReason) -> OwnSteps:
    session.move(Happening.DELETE_SENT)
    session.leaving = reason
    for spi_in in list(session.children):
        session.child_down(spi_in, reason)
    yield Send(Exchange.INFORMATIONAL, [(PayloadType.DELETE, build_delete(Delete(PROTOCOL_IKE)))])
    session.end(reason)


def goodbye(session: Session) -> OwnSteps:
    """To a peer that answered IKE_AUTH when we had given up already."""
    yield Send(Exchange.INFORMATIONAL, [(PayloadType.DELETE, build_delete(Delete(PROTOCOL_IKE)))])
    session.end()


def delete_child(session: Session, spi_in: int, reason: DownReason) -> OwnSteps:
    child = session.children.get(spi_in)
    if child is None or child.deleting or session.state is not State.ESTABLISHED:
        return
    child.deleting = True
    spis = (spi_in.to_bytes(4, "big"),)
    yield Send(Exchange.INFORMATIONAL, [(PayloadType.DELETE, build_delete(Delete(child.protocol, spis)))])
    if child.replaced:  # by the peer's rekey, whose end would have told us that it can be used
        make_usable(session, child)
    session.child_down(spi_in, reason)


def liveness(session: Session) -> OwnSteps:
    session.context.counters["liveness_checks"] += 1
    answer: Message = yield Send(Exchange.INFORMATIONAL, mobike.probe(session))
    mobike.after_probe(session, answer)
