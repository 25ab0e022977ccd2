"""A new IKE SA beside the old one, with the proofs made anew and all children, and then the end of the old one
(RFC 7296 §2.8.3): make before break, so that no packet waits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from oepy.ike.child_request import create_child
from oepy.ike.events import DownReason, ReauthenticationBegun
from oepy.ike.flow import OwnSteps
from oepy.ike.settings import ChildRequest, Initiate
from oepy.ike.states import State

if TYPE_CHECKING:
    from oepy.ike.child import ChildSa
    from oepy.ike.context import Context
    from oepy.ike.session import Session


def begin(context: Context, request: Initiate) -> Session:
    """A session of ours, with its first message on the way."""
    from oepy.ike.initiator import initiate
    from oepy.ike.session import Session

    session = Session(
        *(context, context.new_number(), request.local, request.remote),
        initiator=True,
        settings=request.settings,
    )
    session.label = request.label
    session.connection = request.connection
    session.retransmission = request.retransmission
    session.request = request
    session.start("initiate", lambda it: initiate(it, request))
    session.reschedule()
    return session


def reauthenticate(old: Session, request: Initiate | None = None) -> Session | None:
    """The new session; None where the old one is on its way out or replaced by another one already, or where nobody
    knows how to begin: a session of the peer's has no request of ours."""
    request = request or _from_here(old)
    context = old.context
    known = context.by_number.get(old.reauthenticated_by)
    if request is None or old.state is not State.ESTABLISHED or known is not None:
        return None
    new = begin(context, replace(request, initial_contact=False))
    new.request = request
    new.reauthenticates = old.number
    old.reauthenticated_by = new.number
    context.emit(ReauthenticationBegun(new.number, old.number))
    return new


def _from_here(old: Session) -> Initiate | None:
    """As last time, but between the addresses that both have moved to since (RFC 4555)."""
    if old.request is None:
        return None
    local, remote = old.request.local, old.request.remote
    return replace(
        old.request,
        local=replace(local, address=old.local.address),
        remote=replace(remote, address=old.remote.address),
    )


def are_successive(one: Session, two: Session) -> bool:
    """Whether one of them is the reauthentication of the other: both may live for a while."""
    return one.reauthenticates == two.number or two.reauthenticates == one.number


def after_establishment(new: Session) -> bool:
    """The children that the new session does not have yet, then the end of the old one. Whether there is one."""
    if not new.reauthenticates:
        return False
    old = new.context.by_number.get(new.reauthenticates)
    if old is None or old.state is not State.ESTABLISHED:
        return False
    missing = [_asked_again(child) for child in old.children.values() if _is_missing(new, child)]
    new.start("carry-over", lambda it: _carry_over(it, missing))
    return True


def _is_missing(new: Session, child: ChildSa) -> bool:
    return not (child.deleting or child.replaced) and not any(
        mine.connection == child.connection and mine.same_selectors(child) for mine in new.children.values()
    )


def _asked_again(child: ChildSa) -> ChildRequest:
    return ChildRequest(
        *(child.local_ts, child.remote_ts, child.offers, child.mode),
        transport_required=True,
        connection=child.connection,
        label=child.label,
        lifetimes=child.lifetimes,
    )


def _carry_over(new: Session, missing: list[ChildRequest]) -> OwnSteps:
    from oepy.ike.lifetimes import terminate

    for request in missing:
        yield from create_child(new, request)
    current = new.context.by_number.get(new.number)
    old = new.context.by_number.get(new.reauthenticates)
    if current is not None:
        current.reauthenticates = 0
    if old is not None and current is not None and current.state is State.ESTABLISHED:
        terminate(old, DownReason.SUPERSEDED)
        old.reschedule()
