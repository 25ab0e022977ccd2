"""Several IKE SAs with one peer: which one stays (see the end of states.py), and INITIAL_CONTACT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from oepy.ike.events import DownReason
from oepy.ike.flow import OwnSteps, Send
from oepy.ike.header import Exchange
from oepy.ike.reauthentication import are_successive
from oepy.ike.states import State
from oepy.model import Authenticated, TrafficSelector

if TYPE_CHECKING:
    from oepy.ike.child import ChildSa
    from oepy.ike.session import Session


def rank(session: Session) -> tuple[int, bytes]:
    """Lower stays. Both sides compute the same, whichever of the sessions were rekeyed meanwhile: how many of the
    two proved a key, then the first SPIs."""
    proofs = int(session.own_proof) + int(session.authenticated is not Authenticated.NULL)
    return -proofs, session.origin[1]


def _others(session: Session) -> Iterator[Session]:
    for other in session.context.by_remote.get(session.remote.address, ()):
        if other is not session and other.state is State.ESTABLISHED:
            yield other


def _others_like(session: Session, child: ChildSa) -> list[Session]:
    """Those of the others that have a child like this: found without looking at all that the peer's address has."""
    remote = session.remote.address
    return [
        other
        for other in session.context.with_child_like(child)
        if other is not session and other.state is State.ESTABLISHED and other.remote.address == remote
    ]


def _children_alike(one: Session, two: Session) -> bool:
    return any(
        mine.connection == theirs.connection and mine.same_selectors(theirs)
        for mine in one.children.values()
        for theirs in two.children.values()
    )


def after_establishment(session: Session) -> None:
    """A child just came up in `session`: if another session has the same, one of them is too many."""
    others = {other: None for child in session.children.values() for other in _others_like(session, child)}
    for other in others:
        if not _children_alike(session, other) or are_successive(session, other):
            continue
        winner, loser = sorted((session, other), key=rank)
        session.context.counters["duplicates"] += 1
        if loser.origin[0]:
            confirm_and_drop(winner, loser)
        elif other.established_at < session.created:
            # Not begun at the same time: a peer that still had the older tunnel would not have come again
            from oepy.ike.lifetimes import start_liveness

            start_liveness(other)


def confirm_and_drop(winner: Session, loser: Session) -> None:
    """Either may be rekeyed meanwhile: then it is the successor that stays, or goes."""

    def steps(_: Session) -> OwnSteps:
        yield Send(Exchange.INFORMATIONAL, [])
        from oepy.ike.lifetimes import terminate

        stays, goes = (winner.context.by_number.get(one.number) for one in (winner, loser))
        if stays is None or goes is None or stays.state is not State.ESTABLISHED:
            return
        if stays.children and _children_alike(stays, goes):
            terminate(goes, DownReason.SUPERSEDED)
            goes.reschedule()

    winner.start("confirm", steps)
    winner.reschedule()


def remaining_child(session: Session, gone: ChildSa) -> int | None:
    """Our SPI of a live child with the same selectors to the same peer, the best session's first."""
    candidates = [session, *sorted(_others_like(session, gone), key=rank)]
    for candidate in candidates:
        for child in candidate.children.values():
            if child.same_selectors(gone) and not child.deleting and child.connection == gone.connection:
                return child.spi_in
    return None


def has_replacement(session: Session) -> bool:
    """Whether a failed attempt of ours does not matter, for the peer's own attempt has made a tunnel."""
    return session.initiator and any(
        other.children and not other.origin[0] and other.connection == session.connection
        for other in _others(session)
    )


def forbids(session: Session, remote_ts: tuple[TrafficSelector, ...]) -> bool:
    """A NULL peer gets no child whose traffic an authenticated session already carries; that session is
    asked whether it still lives, so that a peer which lost its key is not locked out for long."""
    if session.authenticated is not Authenticated.NULL:
        return False
    found = False
    for other in list(_others(session)):
        if other.authenticated is Authenticated.NULL:
            continue
        overlap = any(
            mine.intersect(wanted) is not None
            for child in other.children.values()
            for mine in child.remote_ts
            for wanted in remote_ts
        )
        if overlap:
            from oepy.ike.lifetimes import start_liveness

            start_liveness(other)
            other.reschedule()
            found = True
    return found


def initial_contact(session: Session) -> None:
    """The peer says that it knows no other IKE SA between its identity and ours (RFC 7296 §2.4): older ones of
    the same proven identity go at once. Of several addresses of ours each is an identity of its own: tunnels to
    the others stay. A session that came up while this one was being negotiated is no leftover: the
    peer wrote INITIAL_CONTACT before it knew of it."""
    if session.authenticated is Authenticated.NULL or not session.settings.heeds_initial_contact:
        return
    assert session.identity is not None
    for other in list(session.context.by_identity.get(session.identity, ())):
        same = other.authenticated is session.authenticated and other.state is State.ESTABLISHED
        if other is session or not same or other.established_at >= session.created:
            continue
        if other.local.address != session.local.address:
            continue
        session.context.counters["initial_contact"] += 1
        other.end(DownReason.SUPERSEDED)
