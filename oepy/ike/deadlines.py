"""When a session has to be woken next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike.states import LIVE, State

if TYPE_CHECKING:
    from oepy.ike.session import Session

NEVER = float("inf")


def half_open_until(session: Session) -> float:
    """Each additional key exchange that the peer has carried out prolongs its time once."""
    done = 0
    if session.suite is not None and session.handshake is not None:
        done = len(session.suite.additional) - len(session.handshake.additional)
    return session.created + (1 + done) * session.settings.half_open_lifetime


def ike_expiry(session: Session) -> float:
    """When an IKE SA ends that was neither rekeyed nor reauthenticated in time. Where that is the peer's to do, it
    has been told (RFC 4478 §2)."""
    lifetimes = session.settings.lifetimes
    until = session.established_at + lifetimes.ike_rekey
    if lifetimes.ike_reauth:
        until = min(until, session.created + lifetimes.ike_reauth)  # `created` stays, over all rekeys
    return until + lifetimes.ike_grace


def next_deadline(session: Session) -> float:
    settings = session.settings
    deadline = NEVER
    if session.window.outstanding is not None:
        deadline = min(session.window.outstanding.next_at, session.window.outstanding.give_up_at)
    for flow in (session.own, session.serving):
        if flow is not None and flow.token:
            deadline = min(deadline, flow.asked_at + settings.question_timeout)
    if session.state in (State.HALF_OPEN, State.AUTHENTICATING):
        return min(deadline, half_open_until(session))
    if session.state in LIVE:
        if session.queue and session.followup is not None and session.own is None:
            deadline = min(deadline, session.followup.until + 0.001)
        if settings.liveness_interval and session.window.outstanding is None:
            deadline = min(deadline, session.heard_at + settings.liveness_interval)
        if session.state is State.REPLACED:
            deadline = min(deadline, session.childless_since + settings.replaced_lifetime)
        if session.state is State.ESTABLISHED:
            deadline = min(deadline, session.rekey_at, ike_expiry(session))
            deadline = min(
                deadline, session.childless_since + settings.childless_lifetime, session.keepalive_at
            )
            deadline = min(deadline, session.reauth_at)
            for child in session.children.values():
                deadline = min(deadline, child.rekey_at, child.expires_at)
    return deadline
