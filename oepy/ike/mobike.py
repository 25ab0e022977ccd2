"""MOBIKE (RFC 4555): an IKE SA and its tunnels move to other addresses.

Only who began the first of the IKE SAs moves them (`decides`), by UPDATE_SA_ADDRESSES; the other side may say which
addresses it has besides. The IKE SA speaks at the new place at once (`Session.local`, `remote`). ESP follows
(`settled`) when it is certain that whoever speaks there also receives there: an authenticated peer could have the
traffic sent to a third party otherwise (§3.7). Who changes its own address alone needs no such check of the peer.

A path has a `generation`. What was asked on an older path decides nothing: an answer to it may come from anywhere,
as requests are sent again to where the peer is now.
"""

from __future__ import annotations

import hmac
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from oepy.ike.events import DownReason, PathLost, PeerMoved
from oepy.ike.flow import OwnSteps, Send
from oepy.ike.handshake import nat_detection, nats_found
from oepy.ike.header import Exchange
from oepy.ike.notify import NotifyType, notify_name
from oepy.ike.payloads import Payload, notify
from oepy.ike.rules import first_error
from oepy.ike.states import State
from oepy.model import Authenticated, Endpoint, IpAddress

if TYPE_CHECKING:
    from oepy.ike.message import Message
    from oepy.ike.session import Session

MAX_ADDITIONAL = 16
MAX_TRIES = 8  # paths that are tried, one after the other, before the peer counts as silent
COOKIE_SIZE = 16
_COOKIE_SIZES = range(8, 65)  # §4.2.5
UPDATE, CHECK, TELL = "mobike-update", "mobike-check", "mobike-tell"


class Mobike:
    """What an IKE SA on which both agreed on MOBIKE knows; its successors by rekeying go on with it."""

    __slots__ = ("decides", "generation", "nat_seen", "peer_addresses", "settled", "tries")

    def __init__(self, session: Session, *, decides: bool, peer_addresses: tuple[IpAddress, ...]) -> None:
        self.decides = decides
        self.peer_addresses = peer_addresses  # besides the one that it speaks from
        self.generation = 0
        self.settled = (session.local, session.remote, session.encap)
        """Where ESP goes."""
        self.nat_seen: tuple[bytes, bytes] | None = None
        """What the peer last said of the address that it sees us at: hashes are of the SPIs, which come first."""
        self.tries = 0


# ---- IKE_AUTH ------------------------------------------------------------------------------------------


def offer(session: Session) -> list[Payload]:
    """§3.1; its data are empty (§4.2.1)."""
    if not session.settings.mobike:
        return []
    return [notify(NotifyType.MOBIKE_SUPPORTED), *_additional(session)]


def agree(session: Session, answer: Message) -> None:
    """The initiator's, when the peer is proven."""
    if session.settings.mobike and _supported(session, answer):
        session.mobike = Mobike(session, decides=True, peer_addresses=_addresses_in(answer))


def accept(session: Session, message: Message) -> list[Payload]:
    """The responder's answer to a peer that is proven."""
    if not session.settings.mobike or not _supported(session, message):
        return []
    session.mobike = Mobike(session, decides=False, peer_addresses=_addresses_in(message))
    return offer(session)


def _supported(session: Session, message: Message) -> bool:
    # Of a peer without proof nothing is known but its address: it stays there
    proven = session.authenticated is not Authenticated.NULL
    return proven and message.notify(NotifyType.MOBIKE_SUPPORTED) is not None


def _additional(session: Session) -> list[Payload]:
    """Those of our addresses that the configuration names, without the one that we speak from (§3.4)."""
    found = [
        notify(
            NotifyType.ADDITIONAL_IP4_ADDRESS if address.version == 4 else NotifyType.ADDITIONAL_IP6_ADDRESS,
            address.packed,
        )
        for address in session.settings.additional_addresses
        if address != session.local.address
    ]
    return found[:MAX_ADDITIONAL]


def _addresses_in(message: Message) -> tuple[IpAddress, ...]:
    found: list[IpAddress] = []
    for item in message.notifies():
        if item.type == NotifyType.ADDITIONAL_IP4_ADDRESS and len(item.data) == 4:
            found.append(IPv4Address(item.data))
        elif item.type == NotifyType.ADDITIONAL_IP6_ADDRESS and len(item.data) == 16:
            found.append(IPv6Address(item.data))
    usable = [one for one in found if not (one.is_multicast or one.is_unspecified or one.is_loopback)]
    return tuple(dict.fromkeys(usable))[:MAX_ADDITIONAL]


# ---- our own moves -------------------------------------------------------------------------------------


def move(session: Session, local: Endpoint, remote: Endpoint) -> bool:
    """We are to be reached at `local`, or (where we decide) go on with the peer at `remote`. Whether that is done:
    not without MOBIKE, nor with children in transport mode, which live at their addresses (§3.3)."""
    mobike = session.mobike
    if mobike is None or session.state is not State.ESTABLISHED or _bound(session):
        return False
    if not mobike.decides and remote != session.remote:
        return False
    if (local, remote) == (session.local, session.remote):
        return True
    _speak_at(session, local, remote)
    _send_anew(session)
    if not mobike.decides:
        session.start(TELL, tell)  # the peer decides what follows from it
        return True
    if remote == mobike.settled[1]:
        _settle(session, session.encap)
    if not _queued(session, UPDATE):
        session.start(UPDATE, update)
    return True


def _bound(session: Session) -> bool:
    return any(child.mode != "tunnel" for child in session.children.values())


def _queued(session: Session, what: str) -> bool:
    """Waiting for its turn; one that is under way has another generation."""
    return any(name == what for name, _ in session.queue or ())


def _speak_at(session: Session, local: Endpoint, remote: Endpoint) -> None:
    assert session.mobike is not None
    if remote.address != session.remote.address:
        session.context.moved(session, remote.address)
    session.local, session.remote = local, remote
    session.mobike.generation += 1
    session.context.counters["mobike_moves"] += 1


def _send_anew(session: Session) -> None:
    """What waits for its answer goes to the new place, with all the time that a request has."""
    outstanding = session.window.outstanding
    if outstanding is not None:
        now = session.context.now
        outstanding.pause = outstanding.schedule.first
        outstanding.next_at = now
        outstanding.give_up_at = now + outstanding.schedule.total


def _settle(session: Session, encap: bool) -> None:
    """ESP follows to where IKE is."""
    current = session.context.by_number.get(session.number)
    if current is None or current.mobike is None:
        return
    fresh = (current.local, current.remote, encap)
    if current.mobike.settled != fresh:
        current.mobike.settled = fresh
        current.encap = encap
        current.context.emit(PeerMoved(current.number, current.local, current.remote, encap))


def update(session: Session) -> OwnSteps:
    """UPDATE_SA_ADDRESSES (§3.5), anew for as long as addresses change while one is under way."""
    mobike = session.mobike
    assert mobike is not None
    while session.state is State.ESTABLISHED:
        generation, checks = mobike.generation, session.remote.address != mobike.settled[1].address
        cookie = session.context.random(COOKIE_SIZE) if checks else b""
        payloads = [notify(NotifyType.UPDATE_SA_ADDRESSES), *nat_detection(session, session.spi_r)]
        payloads += [*_cookie(cookie), *_additional(session)]
        answer: Message = yield Send(Exchange.INFORMATIONAL, payloads)
        if cookie and not _same(answer, cookie):
            _close(session, "another COOKIE2 came back")
            return
        if generation != mobike.generation or session.state is not State.ESTABLISHED:
            continue
        error = first_error(answer.chain)
        if error is not None:
            _close(session, f"the peer answers UPDATE_SA_ADDRESSES with {notify_name(error.type)}")
            return
        mobike.tries = 0
        _take_nats(session, nats_found(session, answer, session.spi_r))
        note_nat(session, answer)
        _settle(session, session.encap)
        return


def check(session: Session) -> OwnSteps:
    """Return routability (§3.7) of the place that the peer says it is at: only then ESP goes there."""
    mobike = session.mobike
    assert mobike is not None
    generation, encap = mobike.generation, session.encap
    cookie = session.context.random(COOKIE_SIZE)
    # libreswan returns the cookie only beside NAT detection
    payloads = [*nat_detection(session, session.spi_r), *_cookie(cookie)]
    answer: Message = yield Send(Exchange.INFORMATIONAL, payloads)
    if not _same(answer, cookie):
        _close(session, "another COOKIE2 came back")
        return
    if generation == mobike.generation:
        session.context.counters["mobike_checked"] += 1
        _settle(session, encap)


def tell(session: Session) -> OwnSteps:
    """The addresses that we have now, to who decides (§3.6)."""
    found = _additional(session)
    yield Send(Exchange.INFORMATIONAL, found or [notify(NotifyType.NO_ADDITIONAL_ADDRESSES)])


def _cookie(cookie: bytes) -> list[Payload]:
    return [notify(NotifyType.COOKIE2, cookie)] if cookie else []


def _same(answer: Message, cookie: bytes) -> bool:
    returned = answer.notify(NotifyType.COOKIE2)
    return returned is not None and hmac.compare_digest(returned.data, cookie)


def _close(session: Session, text: str) -> None:
    from oepy.ike.lifetimes import terminate

    session.last_error = text
    session.context.counters["mobike_failed"] += 1
    terminate(session, DownReason.IKE_DOWN)


def _take_nats(session: Session, found: tuple[bool, bool] | None) -> None:
    """Whether ESP needs UDP between the places where IKE is now (§3.5), and a NAT before us keepalives."""
    if found is None:
        return
    session.nat_remote, session.nat_local = found
    session.encap = session.nat_local or session.nat_remote or session.settings.force_encap
    if not session.nat_local:
        session.keepalive_at = float("inf")
    elif session.keepalive_at == float("inf"):
        session.keepalive_at = session.context.now + session.settings.keepalive_interval


# ---- the peer's ----------------------------------------------------------------------------------------


def serve(session: Session, message: Message) -> list[Payload]:
    """What an INFORMATIONAL of the peer's means, and what goes into the answer. Its addresses are in
    `session.arrived`."""
    mobike = session.mobike
    if mobike is None:
        return []
    answer: list[Payload] = []
    cookie = message.notify(NotifyType.COOKIE2)
    if cookie is not None and len(cookie.data) in _COOKIE_SIZES:
        answer.append(notify(NotifyType.COOKIE2, cookie.data))
    if message.notify(NotifyType.UPDATE_SA_ADDRESSES) is not None:
        refusal = _refusal(session, message)
        if refusal is not None:
            session.context.counters["mobike_refused"] += 1
            return [*answer, notify(refusal)]
        _peer_moves(session, message)
    if message.notify(NotifyType.NAT_DETECTION_SOURCE_IP) is not None:  # §3.8
        answer += nat_detection(session, session.spi_r, session.arrived)
    _peer_tells(session, message)
    return answer


def _refusal(session: Session, message: Message) -> NotifyType | None:
    assert session.mobike is not None
    local, remote = session.arrived
    if session.mobike.decides or _bound(session):
        return NotifyType.UNACCEPTABLE_ADDRESSES
    if remote.address.is_multicast or remote.address.is_unspecified or not remote.port:
        return NotifyType.UNACCEPTABLE_ADDRESSES
    claimed = message.notify(NotifyType.NO_NATS_ALLOWED)  # §3.9: source and destination as the peer has them
    ports = remote.port.to_bytes(2, "big") + local.port.to_bytes(2, "big")
    if claimed is not None and claimed.data != remote.address.packed + local.address.packed + ports:
        return NotifyType.UNEXPECTED_NAT_DETECTED
    return None


def _peer_moves(session: Session, message: Message) -> None:
    """IKE goes on at the new place; ESP when the peer has shown that it receives there."""
    current = session.context.by_number.get(session.number)
    if current is None or current.mobike is None:
        return
    encap = current.encap
    if session.arrived != (current.local, current.remote):
        _speak_at(current, *session.arrived)
        _send_anew(current)
    session.local, session.remote = (
        session.arrived
    )  # also of one that was rekeyed meanwhile, with its own SPIs
    _take_nats(current, nats_found(session, message, session.spi_r))
    if (current.local, current.remote) == current.mobike.settled[:2]:
        _settle(current, current.encap)  # a NAT has come in between, or is gone, and nobody has moved
        return
    current.context.counters["mobike_checks"] += 1
    if encap != current.encap:
        current.mobike.generation += 1
    if not _queued(current, CHECK) and not current.start(CHECK, check):
        current.context.counters["mobike_refused"] += 1
    current.reschedule()


def _peer_tells(session: Session, message: Message) -> None:
    """A new set of addresses takes the place of the old one (§3.6)."""
    mobike = session.mobike
    assert mobike is not None
    found = _addresses_in(message)
    if not found and message.notify(NotifyType.NO_ADDITIONAL_ADDRESSES) is None:
        return
    mobike.peer_addresses = found
    known = (session.arrived[1].address, *found)
    if mobike.decides and session.remote.address not in known:
        mobike.peer_addresses = known
        session.context.emit(PathLost(session.number, session.remote))


# ---- paths that fail, and NATs that forget -------------------------------------------------------------


def another_path(session: Session) -> bool:
    """The peer is silent: whether there are other addresses of it to try. The daemon hears of it, and moves."""
    mobike = session.mobike
    outstanding = session.window.outstanding
    if mobike is None or not mobike.decides or not mobike.peer_addresses or outstanding is None:
        return False
    if mobike.tries >= min(MAX_TRIES, len(mobike.peer_addresses) + 1):
        return False
    mobike.tries += 1
    _send_anew(session)
    session.context.emit(PathLost(session.number, session.remote))
    return True


def probe(session: Session) -> list[Payload]:
    """For the question whether the peer lives: how it sees us, as a NAT may have forgotten us (§3.8)."""
    mobike = session.mobike
    return nat_detection(session, session.spi_r) if mobike is not None and mobike.decides else []


def note_nat(session: Session, answer: Message) -> bool:
    """Whether the peer sees us elsewhere than before."""
    mobike = session.mobike
    seen = answer.notify(NotifyType.NAT_DETECTION_DESTINATION_IP)
    if mobike is None or seen is None:
        return False
    before, mobike.nat_seen = mobike.nat_seen, (session.spi_i, seen.data)
    return before is not None and before[0] == session.spi_i and before[1] != seen.data


def after_probe(session: Session, answer: Message) -> None:
    mobike = session.mobike
    if mobike is None or not mobike.decides:
        return
    mobike.tries = 0
    if note_nat(session, answer) and not _queued(session, UPDATE):
        mobike.generation += 1
        session.start(UPDATE, update)


def take_over(old: Session, new: Session) -> None:
    """A rekeyed IKE SA is where the old one was; a move that was not complete is begun again."""
    mobike = new.mobike
    if mobike is None:
        return
    new.local, new.remote = old.local, old.remote
    mobike.nat_seen = None
    if old.busy_with(TELL):
        new.start(TELL, tell)
    if old.busy_with(UPDATE) or (new.local, new.remote) != mobike.settled[:2]:
        mobike.generation += 1
        what, steps = (UPDATE, update) if mobike.decides else (CHECK, check)
        new.start(what, steps)
