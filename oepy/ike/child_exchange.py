"""CREATE_CHILD_SA for child SAs: rekey by either side, a further child by the peer (RFC 7296 §1.3, 2.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oepy.ike import aggregation
from oepy.ike.algorithms import accepted, choose, esp_suite, to_proposals, without_groups
from oepy.ike.child import ChildSa, install, read_selectors, spi_of, within
from oepy.ike.events import DownReason, NeedSpi
from oepy.ike.flow import ChildRefused, OwnSteps, PeerSteps, Send, Steps
from oepy.ike.handshake import GROUP_NAMES, NONCE_SIZE
from oepy.ike.header import Exchange, PayloadType
from oepy.ike.ike_rekey import serve_rekey_ike
from oepy.ike.key_exchange import Share, generate
from oepy.ike.message import Message
from oepy.ike.notify import NotifyType, notify_name
from oepy.ike.payload_sa import PROTOCOL_ESP, PROTOCOL_IKE, SaPayload, TransformType, build_sa
from oepy.ike.payload_ts import build_ts
from oepy.ike.payloads import Delete, KeyShareData, Notify, Payload, build_delete, build_ke, notify
from oepy.ike.responder import ask_narrowing, child_payloads, make_child
from oepy.ike.rules import first_error
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
            return [notify(refused.notify, b"", PROTOCOL_ESP, refused.data)]
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
                retry = session.context.now + session.context.settings.lifetimes.rekey_retry
                old.rekey_at = min(old.rekey_at, retry)
        raise


def _make_successor(
    session: Session, message: Message, old: ChildSa | None, nonces: tuple[bytes, bytes]
) -> PeerSteps:
    narrowed = yield from ask_narrowing(session, message, old.spi_in if old else None)
    chosen, share, peer_share = _choose(session, message, narrowed.offers)
    shared = share.shared_secret(peer_share) if share else b""
    child = yield from make_child(session, narrowed, chosen)
    sa, tsi, tsr = child_payloads(child, chosen)
    answer: list[Payload] = [sa, (PayloadType.NONCE, nonces[1])]
    if share is not None:
        group = chosen.transforms[TransformType.KE].id
        answer.append((PayloadType.KE, build_ke(group, share.public)))
    answer += [tsi, tsr]
    if old is not None:
        child.aggregation = old.aggregation  # RFC 9347 §5.1: a rekey says nothing of it
    elif session.context.settings.aggregation:
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
    found = next((child for child in session.children.values() if child.spi_out == spi), None)
    if found is None:
        raise ChildRefused(NotifyType.CHILD_SA_NOT_FOUND, f"no child SA {spi:08x} to rekey", rekey.spi)
    if found.deleting or found.replaced:  # §2.25.1
        raise ChildRefused(NotifyType.TEMPORARY_FAILURE, f"child SA {spi:08x} is on its way out")
    return found


def _choose(
    session: Session, message: Message, child_offers: tuple[Offer, ...] | None
) -> tuple[Chosen, Share | None, bytes]:
    """Suite, and the key exchange where there is one. A peer that offers none gets none."""
    offers = child_offers or session.context.settings.esp_offers
    proposals = message.must(PayloadType.SA, SaPayload).proposals
    ke = message.get(PayloadType.KE, KeyShareData)
    chosen = choose(offers, proposals, PROTOCOL_ESP, prefer_group=ke.group if ke else 0)
    if chosen is None:
        chosen = choose([without_groups(offer) for offer in offers], proposals, PROTOCOL_ESP)
    if chosen is None:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "no ESP suite in common")
    group = chosen.transforms.get(TransformType.KE)
    if group is None:
        return chosen, None, b""
    if ke is None or ke.group != group.id:
        raise ChildRefused(
            NotifyType.INVALID_KE_PAYLOAD, "the key share is of another group", group.id.to_bytes(2, "big")
        )
    return chosen, generate(GROUP_NAMES[group.id], session.context.random), ke.data


# ---- our exchange --------------------------------------------------------------------------------------


def rekey_child(session: Session, spi_in: int) -> OwnSteps:
    """Make a new pair first, then let the old one go; a simultaneous rekey of the peer's ends with one."""
    old = session.children.get(spi_in)
    if old is None or old.replaced or old.deleting or session.state is not State.ESTABLISHED:
        return
    old.rekeying = True
    try:
        child, shared, nonces = yield from _create(session, old)
    except ChildRefused as refused:
        _not_rekeyed(session, old, refused)
        return
    finally:
        old.rekeying = False
    if old.peer_rekey and min(nonces) < old.peer_rekey:
        # §2.8.1: the lowest of the four nonces is ours, so ours is the one too many
        session.context.counters["rekey_collisions_lost"] += 1
        spis = (child.spi_in.to_bytes(4, "big"),)
        yield Send(Exchange.INFORMATIONAL, [(PayloadType.DELETE, build_delete(Delete(PROTOCOL_ESP, spis)))])
        return
    if old.peer_rekey:
        session.context.counters["rekey_collisions_won"] += 1
    install(session, child, shared, nonces, replaces=spi_in)
    old.replaced = True
    if spi_in not in session.children:
        return  # the peer deleted the old one meanwhile
    old.deleting = True
    spis = (spi_in.to_bytes(4, "big"),)
    yield Send(Exchange.INFORMATIONAL, [(PayloadType.DELETE, build_delete(Delete(PROTOCOL_ESP, spis)))])
    session.child_down(spi_in, DownReason.REKEYED)


def _not_rekeyed(session: Session, old: ChildSa, refused: ChildRefused) -> None:
    session.last_error = refused.text
    session.context.counters["rekeys_refused"] += 1
    if old.spi_in not in session.children or old.replaced:
        return  # the peer was quicker with its own
    if refused.notify is NotifyType.CHILD_SA_NOT_FOUND:
        session.child_down(old.spi_in, DownReason.PEER_DELETE)
    else:
        old.rekey_at = session.context.now + session.context.settings.lifetimes.rekey_retry


def _create(session: Session, old: ChildSa) -> Steps[tuple[ChildSa, bytes, tuple[bytes, bytes]]]:
    """The exchange itself; the new child, the shared secret and the nonces. Raises ChildRefused."""
    context = session.context
    spi_in = yield NeedSpi(session.number, 0)
    if not isinstance(spi_in, int):
        raise ChildRefused(NotifyType.NO_ADDITIONAL_SAS, "the datapath has no SPI to give")
    offers = old.offers or context.settings.esp_offers
    groups = [t for offer in offers for t in offer.get(TransformType.KE, ())]
    share = generate(GROUP_NAMES[groups[0].id], context.random) if groups else None
    error: Notify | None = None
    for _ in range(3):  # again in the group that the peer wants, or in none: the peer is proven already
        nonce_i = context.random(NONCE_SIZE)
        answer = yield Send(Exchange.CREATE_CHILD_SA, _request(old, offers, spi_in, nonce_i, share))
        error = first_error(answer.chain)
        if error is None:
            child = _agreed(old, offers, spi_in, answer)
            peer_share = answer.get(PayloadType.KE, KeyShareData)
            shared = _finish(answer, offers, share, peer_share)
            return child, shared, (nonce_i, answer.must(PayloadType.NONCE, bytes))
        wanted = next((t.id for t in groups if error.data == t.id.to_bytes(2, "big")), 0)
        if error.type == NotifyType.INVALID_KE_PAYLOAD and wanted:
            share = generate(GROUP_NAMES[wanted], context.random)
        elif error.type == NotifyType.NO_PROPOSAL_CHOSEN and share is not None:
            # strongSwan's defaults have no key exchange for child SAs, and refuse one that is proposed
            offers, share, groups = tuple(without_groups(offer) for offer in offers), None, []
        else:
            break
    assert error is not None
    try:
        kind = NotifyType(error.type)
    except ValueError:
        kind = NotifyType.NO_PROPOSAL_CHOSEN
    raise ChildRefused(kind, f"the peer answers the rekey with {notify_name(error.type)}")


def _request(
    old: ChildSa, offers: tuple[Offer, ...], spi_in: int, nonce: bytes, share: Share | None
) -> list[Payload]:
    spi = spi_in.to_bytes(4, "big")
    payloads: list[Payload] = [
        notify(NotifyType.REKEY_SA, b"", PROTOCOL_ESP, old.spi_in.to_bytes(4, "big")),
        (PayloadType.SA, build_sa(SaPayload(to_proposals(offers, PROTOCOL_ESP, spi)))),
        (PayloadType.NONCE, nonce),
    ]
    if share is not None:
        group = next(number for number, name in GROUP_NAMES.items() if name == share.group)
        payloads.append((PayloadType.KE, build_ke(group, share.public)))
    return [
        *payloads,
        (PayloadType.TSI, build_ts(old.local_ts)),
        (PayloadType.TSR, build_ts(old.remote_ts)),
    ]


def _agreed(old: ChildSa, offers: tuple[Offer, ...], spi_in: int, answer: Message) -> ChildSa:
    proposals = answer.must(PayloadType.SA, SaPayload).proposals
    chosen = accepted(offers, proposals, PROTOCOL_ESP)
    if chosen is None:
        chosen = accepted([without_groups(offer) for offer in offers], proposals, PROTOCOL_ESP)
    if chosen is None:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "the peer chose an ESP suite that was not proposed")
    local_ts, remote_ts = read_selectors(answer)
    if not within(local_ts, old.local_ts) or not within(remote_ts, old.remote_ts):
        raise ChildRefused(NotifyType.TS_UNACCEPTABLE, "the peer widened the traffic selectors")
    child = ChildSa(
        spi_in,
        spi_of(chosen),
        esp_suite(chosen),
        local_ts=local_ts,
        remote_ts=remote_ts,
        offers=old.offers,
        connection=old.connection,
        initiator=True,
    )
    child.aggregation = old.aggregation
    return child


def _finish(
    answer: Message, offers: tuple[Offer, ...], share: Share | None, peer: KeyShareData | None
) -> bytes:
    """The new shared secret; a peer must use the key exchange exactly where it chose one."""
    chosen = accepted(offers, answer.must(PayloadType.SA, SaPayload).proposals, PROTOCOL_ESP)
    group = chosen.transforms.get(TransformType.KE) if chosen else None
    if group is None:
        if any(TransformType.KE in offer for offer in offers) and peer is not None:
            raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "a key share without a key exchange")
        return b""
    if (
        share is None
        or peer is None
        or not GROUP_NAMES[group.id] == share.group == GROUP_NAMES.get(peer.group)
    ):
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "the peer's key share is of another group")
    return share.shared_secret(peer.data)
