"""What time does to a session: retransmission and silence, liveness, rekeys, expiry, the end of one without
children."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike.child_request import rekey_child
from oepy.ike.deadlines import half_open_until, ike_expiry
from oepy.ike.events import Datagram, DownReason, FailureKind
from oepy.ike.header import Exchange
from oepy.ike.ike_rekey import rekey_ike
from oepy.ike.informational import delete_child, delete_ike, liveness
from oepy.ike.mobike import another_path
from oepy.ike.reauthentication import reauthenticate
from oepy.ike.states import LIVE, State

if TYPE_CHECKING:
    from oepy.ike.session import Session


def handle_timer(session: Session) -> None:
    now, settings = session.context.now, session.settings
    outstanding = session.window.outstanding
    if outstanding is not None and outstanding.due(now):
        if outstanding.exhausted(now):
            _silent(session)
            return
        if session.handshake is not None and session.handshake.deferred is not None:
            from oepy.ike.inbound import carry_init_on

            carry_init_on(session, session.handshake.deferred)
            return
        outstanding.sent_again(now)
        session.context.counters["retransmits"] += 1
        session.send(outstanding.datagrams)
    for flow in (session.own, session.serving):
        if flow is not None and flow.token and now >= flow.asked_at + settings.question_timeout:
            session.context.counters["questions_unanswered"] += 1
            session.context.questions.pop(flow.token, None)
            session.resume(flow, None)
            if session.state is State.CLOSED:
                return
    half_open = session.state in (State.HALF_OPEN, State.AUTHENTICATING)
    if half_open and now >= half_open_until(session):
        session.context.counters["half_open_expired"] += 1
        if session.state is State.HALF_OPEN:
            session.end()
        else:
            session.fail(FailureKind.REFUSED, "the exchange took too long", "")
        return
    if session.state in LIVE:
        session.next_queued()  # what waited for a rekey of the peer's that it has not completed
        live_timers(session)
    session.reschedule()


def _silent(session: Session) -> None:
    session.context.counters["silent"] += 1
    if session.state is State.ESTABLISHED and another_path(session):
        session.reschedule()
    elif session.state in LIVE:
        session.last_error = "the peer is silent"
        session.end(DownReason.LIVENESS)
    elif session.state is State.DELETING:
        session.end(session.leaving)  # the peer has forgotten it, and no longer answers
    else:
        assert session.window.outstanding is not None
        refusal = session.handshake.refusal if session.handshake else None
        if session.state is State.INIT_SENT and refusal is not None:
            session.fail(FailureKind.REJECTED, *refusal)
            return
        name = Exchange(session.window.outstanding.exchange).name
        session.give_up(FailureKind.SILENT, f"no answer to {name}")


def live_timers(session: Session) -> None:
    now, settings = session.context.now, session.settings
    if session.state is State.REPLACED and now >= session.childless_since + settings.replaced_lifetime:
        session.end(DownReason.REKEYED)  # the peer forgot to delete it
        return
    if session.state is State.ESTABLISHED:
        if now >= ike_expiry(session):
            session.last_error = "the IKE SA was not renewed in time"
            terminate(session, DownReason.EXPIRED)
            return
        if now >= session.childless_since + settings.childless_lifetime:
            session.childless_since = float("inf")
            terminate(session, DownReason.LOCAL)
            return
        if now >= session.keepalive_at:  # RFC 3948 §4: we are behind a NAT that must not forget us
            session.keepalive_at = now + settings.keepalive_interval
            session.context.datagrams.append(Datagram(session.local, session.remote, b"\xff", keepalive=True))
        for child in list(session.children.values()):
            if now >= child.expires_at:
                child.expires_at = float("inf")
                start_delete_child(session, child.spi_in, DownReason.EXPIRED)
            elif now >= child.rekey_at:
                child.rekey_at = float("inf")
                start_rekey_child(session, child.spi_in)
        if now >= session.reauth_at:
            session.reauth_at = now + settings.lifetimes.rekey_retry  # where it comes to nothing
            reauthenticate(session)
        if now >= session.rekey_at:
            session.rekey_at = float("inf")
            start_rekey_ike(session)
    idle = settings.liveness_interval and now >= session.heard_at + settings.liveness_interval
    if idle and session.window.outstanding is None and session.own is None:
        session.start("liveness", liveness)


def start_rekey_child(session: Session, spi_in: int) -> None:
    session.start(f"rekey {spi_in:08x}", lambda it: rekey_child(it, spi_in))


def start_delete_child(session: Session, spi_in: int, reason: DownReason) -> None:
    session.start(f"delete {spi_in:08x}", lambda it: delete_child(it, spi_in, reason))


def start_rekey_ike(session: Session) -> None:
    if session.state is State.ESTABLISHED and not session.busy_with("rekey-ike"):
        session.start("rekey-ike", rekey_ike)


def start_liveness(session: Session) -> None:
    if not session.busy_with("liveness"):
        session.start("liveness", liveness)


def terminate(session: Session, reason: DownReason) -> None:
    """Delete the IKE SA; what was queued is dropped, what is under way comes to its end first."""
    if session.state in (State.ESTABLISHED, State.REPLACED):
        session.queue = None
        session.start("delete-ike", lambda it: delete_ike(it, reason))
    elif session.state is State.AUTH_SENT:
        session.give_up(FailureKind.LOCAL, "ended by command")
    elif session.state is not State.DELETING:
        session.end(reason)
