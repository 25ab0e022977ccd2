"""CREATE_CHILD_SA for the IKE SA itself (RFC 7296 §1.3.2, 2.18), with its collisions (§2.8.1, 2.25.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike import mobike
from oepy.ike.algorithms import accepted, choose, ike_suite, to_proposals
from oepy.ike.crypto import derive_ike_keys, skeyseed_rekey
from oepy.ike.events import DownReason, IkeRekeyed
from oepy.ike.flow import OwnSteps, PeerSteps, Send
from oepy.ike.followup import LINK_SIZE, Agreed, Followup, follow_up
from oepy.ike.handshake import GROUP_NAMES, NONCE_SIZE
from oepy.ike.header import NO_SPI, Exchange, PayloadType
from oepy.ike.informational import delete_ike
from oepy.ike.key_exchange import generate
from oepy.ike.notify import NotifyType, notify_name
from oepy.ike.payload_sa import SaPayload, TransformType, build_sa
from oepy.ike.payloads import KeyShareData, build_ke, notify
from oepy.ike.rules import first_error
from oepy.ike.session import Session
from oepy.ike.states import Happening, State

if TYPE_CHECKING:
    from oepy.ike.message import Message

_HARMLESS = frozenset(("liveness", "confirm", "rekey-ike", mobike.UPDATE, mobike.CHECK, mobike.TELL))
"""Exchanges of ours during which the peer may rekey the IKE SA (§2.25.2): they are begun again in the new one."""
MAX_PREDECESSORS = 4  # a peer that rekeys on and on, and never deletes, fills no memory


def serve_rekey_ike(session: Session, message: Message) -> PeerSteps:
    yield from ()  # a generator like the others, which asks nothing
    context = session.context
    if session.candidate is not None or is_busy(session):
        return [notify(NotifyType.TEMPORARY_FAILURE)]
    if session.followup is not None and session.own is not None and session.own.what == "rekey-ike":
        return [notify(NotifyType.TEMPORARY_FAILURE)]
    ke = message.must(PayloadType.KE, KeyShareData)
    proposals = message.must(PayloadType.SA, SaPayload).proposals
    chosen = choose(session.settings.ike_offers, proposals, prefer_group=ke.group)
    if chosen is None or len(chosen.spi) != 8 or chosen.spi == NO_SPI:
        return [notify(NotifyType.NO_PROPOSAL_CHOSEN)]
    wanted = chosen.transforms[TransformType.KE].id
    if wanted != ke.group:
        return [notify(NotifyType.INVALID_KE_PAYLOAD, wanted.to_bytes(2, "big"))]
    share = generate(GROUP_NAMES[wanted], context.random)
    shared = share.shared_secret(ke.data)
    nonces = (message.must(PayloadType.NONCE, bytes), context.random(NONCE_SIZE))
    spi = context.new_spi()
    session.followup = None
    answer = [
        (PayloadType.SA, build_sa(SaPayload((chosen.proposal(spi),)))),
        (PayloadType.NONCE, nonces[1]),
        (PayloadType.KE, build_ke(wanted, share.public)),
    ]
    made = Agreed(chosen, spi, shared, nonces)
    if not ike_suite(chosen).additional:
        accept_successor(session, made)
        return answer
    session.followup = Followup(made, context.random(LINK_SIZE), context.now)
    return [*answer, notify(NotifyType.ADDITIONAL_KEY_EXCHANGE, session.followup.link)]


def is_busy(session: Session) -> bool:
    """Whether an exchange of ours is under way during which the peer may not rekey the IKE SA."""
    return session.own is not None and session.own.what not in _HARMLESS


def accept_successor(session: Session, made: Agreed) -> None:
    """The peer's rekey is complete."""
    successor = _successor(session, made, initiator=False)
    if session.own is not None and session.own.what == "rekey-ike":
        # both at once: which of the two stays is known when our own answer is here
        successor.candidate_for = session
        successor.childless_since = session.context.now
        session.candidate = (successor, min(made.nonces))
        successor.reschedule()
    else:
        take_over(session, successor)


def _successor(session: Session, made: Agreed, *, initiator: bool) -> Session:
    """Keys and inheritance of the new IKE SA. Its evidence is that of the old one."""
    assert session.suite is not None
    assert session.sk_d is not None
    successor = Session(
        *(session.context, session.number, session.local, session.remote),
        initiator=initiator,
        spi=made.spi,
    )
    nonces = made.nonces
    successor.spi_peer = made.chosen.spi
    suite = ike_suite(made.chosen)
    skeyseed = skeyseed_rekey(session.suite, session.sk_d, made.shared, *nonces, made.additional)
    successor.set_keys(suite, derive_ike_keys(suite, skeyseed, nonces, successor.spi_i, successor.spi_r))
    for name in INHERITED:
        setattr(successor, name, getattr(session, name))
    successor.move(Happening.BORN_OF_REKEY)
    return successor


INHERITED = (
    "authenticated",
    "connection",
    "encap",
    "identity",
    "key",
    "label",
    "last_error",
    "mobike",
    "nat_local",
    "nat_remote",
    "origin",
    "own_proof",
    "peer_fragments",
    "reauth_at",
    "reauthenticated_by",
    "reauthenticates",
    "request",
    "settings",
)


def take_over(old: Session, new: Session) -> None:
    """The new IKE SA gets the children, the number, and what was queued. The old one awaits its Delete."""
    context = old.context
    new.children, old.children = old.children, {}
    new.queue = old.queue
    old.queue = None
    new.created = old.created
    new.established_at = context.now
    new.childless_since = old.childless_since
    new.rekey_at = context.now + context.jitter(
        new.settings.lifetimes.ike_rekey, new.settings.lifetimes.jitter
    )
    new.keepalive_at = old.keepalive_at
    new.candidate_for = None
    old.candidate = old.followup = None
    old.childless_since = context.now
    old.move(Happening.REPLACED)
    old.moved_to = new
    context.moved(old, None)
    mobike.take_over(old, new)
    context.established(new)
    context.by_number[new.number] = new
    context.counters["ike_rekeyed"] += 1
    context.emit(IkeRekeyed(new.number, str(new.suite)))
    new.next_queued()
    new.reschedule()
    alive = [*(one for one in old.predecessors if one.state is not State.CLOSED), old]
    old.predecessors = ()
    new.predecessors = tuple(alive[-MAX_PREDECESSORS:])
    for superfluous in alive[:-MAX_PREDECESSORS]:
        superfluous.end(DownReason.REKEYED)


def resolve_candidate(session: Session) -> None:
    """Where the peer's rekey is the only one left, or the peer already uses it, it takes over."""
    if session.candidate is not None and session.state is State.ESTABLISHED:
        take_over(session, session.candidate[0])


def rekey_ike(session: Session) -> OwnSteps:
    context = session.context
    if session.state is not State.ESTABLISHED:
        return
    offers = session.settings.ike_offers
    ids = {GROUP_NAMES[t.id]: t.id for offer in offers for t in offer[TransformType.KE]}
    assert session.suite is not None
    group = session.suite.group if session.suite.group in ids else next(iter(ids))
    spi = context.new_spi()
    sa = build_sa(SaPayload(to_proposals(offers, spi)))
    for attempt in range(2):
        share = generate(group, context.random)
        nonce = context.random(NONCE_SIZE)
        payloads = [
            (PayloadType.SA, sa),
            (PayloadType.NONCE, nonce),
            (PayloadType.KE, build_ke(ids[group], share.public)),
        ]
        answer: Message = yield Send(Exchange.CREATE_CHILD_SA, payloads)
        error = first_error(answer.chain)
        if error is None:
            break
        wanted = GROUP_NAMES.get(int.from_bytes(error.data[:2], "big"), "")
        if attempt == 0 and error.type == NotifyType.INVALID_KE_PAYLOAD and wanted in ids:
            group = wanted
            continue
        _not_rekeyed(session, f"the peer answers the IKE rekey with {notify_name(error.type)}")
        return
    chosen = accepted(offers, answer.must(PayloadType.SA, SaPayload).proposals)
    ke = answer.must(PayloadType.KE, KeyShareData)
    right = chosen is not None and len(chosen.spi) == 8 and ke.group == ids[group]
    if chosen is None or not right or ike_suite(chosen).group != group:
        _not_rekeyed(session, "the peer chose what was not proposed")
        return
    nonces = (nonce, answer.must(PayloadType.NONCE, bytes))
    made = Agreed(chosen, spi, share.shared_secret(ke.data), nonces)
    problem = yield from follow_up(session, made, answer)
    if problem:
        _not_rekeyed(session, problem)
        return
    _settle(session, _successor(session, made, initiator=True), min(nonces))


def _not_rekeyed(session: Session, text: str) -> None:
    session.last_error = text
    session.context.counters["rekeys_refused"] += 1
    session.rekey_at = session.context.now + session.settings.lifetimes.rekey_retry
    resolve_candidate(session)


def _settle(session: Session, successor: Session, lowest: bytes) -> None:
    """§2.8.1: of two new IKE SAs the one with the lowest nonce is closed by whoever began it, and the one
    who began the other closes the old SA."""
    counters = session.context.counters
    rival = b""  # the lower nonce of the peer's own rekey, complete or not
    if session.candidate is not None:
        rival = session.candidate[1]
    elif session.followup is not None:
        rival = min(session.followup.made.nonces)
    if session.moved_to is not None or lowest < rival:
        counters["rekey_collisions_lost"] += 1
        session.rekey_at = session.context.now + session.settings.lifetimes.rekey_retry
        if session.followup is not None:
            session.followup.decided = True
        resolve_candidate(session)
        successor.start("delete-ike", lambda it: delete_ike(it, DownReason.REKEYED))
        successor.reschedule()
        return
    if rival:
        counters["rekey_collisions_won"] += 1
    take_over(session, successor)
    session.start("delete-ike", lambda it: delete_ike(it, DownReason.REKEYED))
