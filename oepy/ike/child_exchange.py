"""CREATE_CHILD_SA of the peer's: a further child, a rekey of one, or of the IKE SA (RFC 7296 §1.3, 2.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike import aggregation, transport
from oepy.ike.algorithms import choose, without_groups
from oepy.ike.child import ChildSa, install, note_tfc
from oepy.ike.flow import ChildRefused, PeerSteps
from oepy.ike.handshake import GROUP_NAMES, NONCE_SIZE
from oepy.ike.header import PayloadType
from oepy.ike.ike_rekey import serve_rekey_ike
from oepy.ike.informational import creates_child
from oepy.ike.key_exchange import Share, generate
from oepy.ike.message import Message
from oepy.ike.narrowing import ask_narrowing, child_payloads, make_child
from oepy.ike.notify import NotifyType
from oepy.ike.payload_sa import PROTOCOL_ESP, PROTOCOL_IKE, SaPayload, TransformType
from oepy.ike.payloads import KeyShareData, Payload, build_ke, notify
from oepy.ike.session import MAX_CHILDREN
from oepy.ike.states import State

if TYPE_CHECKING:
    from oepy.ike.algorithms import Chosen, Offer
    from oepy.ike.session import Session


# ---- the peer's exchange -------------------------------------------------------------------------------


def serve_create_child(session: Session, message: Message) -> PeerSteps:
    if session.state is not State.ESTABLISHED:
        return [notify(NotifyType.TEMPORARY_FAILURE)]
    proposals = message.must(PayloadType.SA, SaPayload).proposals
    if proposals[0].protocol == PROTOCOL_IKE:
        return (yield from serve_rekey_ike(session, message))
    try:
        return (yield from _serve_child(session, message))
    except ChildRefused as refused:
        session.context.counters["children_refused"] += 1
        session.last_error = refused.text
        if refused.notify is NotifyType.CHILD_SA_NOT_FOUND:
            rekey = message.notify(NotifyType.REKEY_SA)
            return [notify(refused.notify, b"", rekey.protocol if rekey else PROTOCOL_ESP, refused.data)]
        return [notify(refused.notify, refused.data)]


def _serve_child(session: Session, message: Message) -> PeerSteps:
    if session.own is not None and session.own.what == "rekey-ike":  # §2.25.2
        raise ChildRefused(NotifyType.TEMPORARY_FAILURE, "the IKE SA is being rekeyed")
    old = _rekeyed(session, message)
    if len(session.children) >= MAX_CHILDREN:
        raise ChildRefused(NotifyType.NO_ADDITIONAL_SAS, f"{MAX_CHILDREN} children are enough")
    nonces = message.must(PayloadType.NONCE, bytes), session.context.random(NONCE_SIZE)
    if old is not None:
        # before any question: a rekey of ours may end while the daemon still thinks about the peer's
        old.peer_rekey = min(nonces)
    try:
        return (yield from _make_successor(session, message, old, nonces))
    except ChildRefused:
        if old is not None:
            old.peer_rekey = b""
            if not old.rekeying and not old.replaced:  # ours may just have given way to it
                retry = session.context.now + session.settings.lifetimes.rekey_retry
                old.rekey_at = min(old.rekey_at, retry)
        raise


def _make_successor(
    session: Session, message: Message, old: ChildSa | None, nonces: tuple[bytes, bytes]
) -> PeerSteps:
    narrowed = yield from ask_narrowing(session, message, old)
    chosen, share, peer_share = _choose(session, message, narrowed.offers)
    shared = share.shared_secret(peer_share) if share else b""
    child = yield from make_child(session, narrowed, chosen)
    note_tfc(child, message)
    sa, *rest = child_payloads(child, chosen)
    answer: list[Payload] = [sa, (PayloadType.NONCE, nonces[1])]
    if share is not None:
        group = chosen.transforms[TransformType.KE].id
        answer.append((PayloadType.KE, build_ke(group, share.public)))
    answer += rest
    if old is not None:
        child.inherit(old)
    elif session.settings.aggregation and child.mode == transport.TUNNEL:
        child.aggregation = aggregation.asked_for(message)
        if child.aggregation is not None:
            answer += aggregation.payloads()
    if old is not None and old.replaced:
        # ours was done first, and won: the peer will see that and delete this one, which it never sends on
        install(session, child, shared, nonces, outbound=False)
    elif old is not None and old.spi_in in session.children:
        old.replaced = True
        # what the peer sent on the old SA is still on its way, and it may not have the new one yet (§2.8)
        install(session, child, shared, nonces, replaces=old.spi_in, outbound=False)
    else:
        install(session, child, shared, nonces)
    return answer


def _rekeyed(session: Session, message: Message) -> ChildSa | None:
    """The child that the request replaces. Its SPI is the peer's inbound one, our outbound (§1.3.3)."""
    rekey = message.notify(NotifyType.REKEY_SA)
    if rekey is None:
        return None
    spi = int.from_bytes(rekey.spi, "big")
    found = next(
        (
            child
            for child in session.children.values()
            if (child.spi_out, child.protocol) == (spi, rekey.protocol)
        ),
        None,
    )
    if found is None and creates_child(session):  # perhaps the one that our own exchange is about to make
        raise ChildRefused(NotifyType.TEMPORARY_FAILURE, f"no child SA {spi:08x} yet")
    if found is None:
        raise ChildRefused(NotifyType.CHILD_SA_NOT_FOUND, f"no child SA {spi:08x} to rekey", rekey.spi)
    if found.deleting or found.replaced:  # §2.25.1
        raise ChildRefused(NotifyType.TEMPORARY_FAILURE, f"child SA {spi:08x} is on its way out")
    return found


def _choose(
    session: Session, message: Message, child_offers: tuple[Offer, ...] | None
) -> tuple[Chosen, Share | None, bytes]:
    """Suite, and the key exchange where there is one. A peer that offers none gets none."""
    offers = child_offers or session.settings.esp_offers
    proposals = message.must(PayloadType.SA, SaPayload).proposals
    ke = message.get(PayloadType.KE, KeyShareData)
    chosen = choose(offers, proposals, prefer_group=ke.group if ke else 0)
    if chosen is None:
        chosen = choose([without_groups(offer) for offer in offers], proposals)
    if chosen is None:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "no suite in common")
    group = chosen.transforms.get(TransformType.KE)
    if group is None:
        return chosen, None, b""
    if ke is None or ke.group != group.id:
        raise ChildRefused(
            NotifyType.INVALID_KE_PAYLOAD, "the key share is of another group", group.id.to_bytes(2, "big")
        )
    return chosen, generate(GROUP_NAMES[group.id], session.context.random), ke.data
