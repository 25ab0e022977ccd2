"""How long a responder lets the proofs of a peer last (RFC 4478): it cannot begin anew itself, and says so."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from oepy.ike.notify import NotifyType
from oepy.ike.payloads import Payload, notify

if TYPE_CHECKING:
    from oepy.ike.message import Message
    from oepy.ike.session import Session

HEED_AFTER = 0.9  # of the time that the responder gives
LEAST_SECONDS = 10.0  # however little it gives: a peer must not keep us busy
_MOST = 0xFFFFFFFF


def announce(session: Session) -> list[Payload]:
    """As responder, where proofs last for a limited time: how long, in seconds (RFC 4478 §3)."""
    seconds = session.settings.lifetimes.ike_reauth
    if not seconds:
        return []
    return [notify(NotifyType.AUTH_LIFETIME, min(math.ceil(seconds), _MOST).to_bytes(4, "big"))]


def heed(session: Session, message: Message) -> None:
    """What the responder says of it, in IKE_AUTH or at any time after: from now on so many seconds. Not where the
    session is the responder's to renew, or opportunistic: those are negotiated anew as their keys are asked for."""
    said = message.notify(NotifyType.AUTH_LIFETIME)
    if said is None or session.request is None or not session.request.connection:
        return
    if len(said.data) != 4:
        session.context.counters["auth_lifetimes_malformed"] += 1
        return
    session.context.counters["auth_lifetimes"] += 1
    seconds = max(HEED_AFTER * int.from_bytes(said.data, "big"), LEAST_SECONDS)
    pause = session.context.jitter(seconds, session.settings.lifetimes.jitter)
    session.reauth_at = min(session.reauth_at, session.context.now + pause)
