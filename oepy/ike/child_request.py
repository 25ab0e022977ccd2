"""CREATE_CHILD_SA of ours for child SAs: a further one, or one in the place of an old one (RFC 7296 §1.3, 2.8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oepy.ike import aggregation, transport
from oepy.ike.algorithms import accepted, esp_suite, to_proposals, without_groups
from oepy.ike.child import ChildSa, install, note_tfc, read_selectors, spi_of, within
from oepy.ike.events import ChildFailed, DownReason, FailureKind, NeedSpi
from oepy.ike.flow import ChildRefused, OwnSteps, Send, Steps
from oepy.ike.handshake import GROUP_NAMES, NONCE_SIZE
from oepy.ike.header import Exchange, PayloadType
from oepy.ike.informational import delete_child
from oepy.ike.key_exchange import Share, generate
from oepy.ike.notify import NotifyType, notify_name
from oepy.ike.payload_sa import SaPayload, TransformType, build_sa
from oepy.ike.payload_ts import build_ts
from oepy.ike.payloads import Delete, KeyShareData, Notify, Payload, build_delete, build_ke, notify
from oepy.ike.rules import first_error
from oepy.ike.session import MAX_CHILDREN
from oepy.ike.states import State

if TYPE_CHECKING:
    from oepy.ike.algorithms import Offer
    from oepy.ike.context import Context
    from oepy.ike.message import Message
    from oepy.ike.session import Session
    from oepy.ike.settings import ChildRequest
    from oepy.model import TrafficSelector

Made = tuple[ChildSa, bytes, tuple[bytes, bytes]]
"""The new child, the shared secret of its own key exchange (empty without one), and the nonces."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What to ask for. `old`: the child that it replaces."""

    local_ts: tuple[TrafficSelector, ...]
    remote_ts: tuple[TrafficSelector, ...]
    offers: tuple[Offer, ...]
    mode: str
    transport_required: bool
    old: ChildSa | None


def create_child(session: Session, request: ChildRequest) -> OwnSteps:
    """A further child: ends in ChildUp or ChildFailed (or with the session)."""
    if session.state is not State.ESTABLISHED or len(session.children) >= MAX_CHILDREN:
        full = session.state is State.ESTABLISHED
        text = f"{MAX_CHILDREN} children are enough" if full else "the IKE SA is on its way out"
        report_failure(session.context, session.number, request, FailureKind.LOCAL, text)
        return
    offers = request.offers or session.settings.esp_offers
    wanted = _Wanted(
        request.local_ts, request.remote_ts, offers, request.mode, request.transport_required, None
    )
    try:
        child, shared, nonces = yield from _exchange(session, wanted)
    except ChildRefused as refused:
        session.context.counters["children_refused"] += 1
        session.last_error = refused.text
        name = refused.notify.name
        report_failure(session.context, session.number, request, FailureKind.REJECTED, refused.text, name)
        return
    if _deleted_early(session, child):
        text = "the peer has deleted it again"
        report_failure(session.context, session.number, request, FailureKind.REJECTED, text)
        return
    child.offers = request.offers
    child.connection, child.label = request.connection, request.label
    child.lifetimes = request.lifetimes
    install(session, child, shared, nonces)


def report_failure(
    context: Context, number: int, request: ChildRequest, kind: FailureKind, text: str, name: str = ""
) -> None:
    context.emit(ChildFailed(number, kind, name, text, request.connection, request.label))


def rekey_child(session: Session, spi_in: int) -> OwnSteps:
    """Make a new pair first, then let the old one go; a simultaneous rekey of the peer's ends with one."""
    old = session.children.get(spi_in)
    if old is None or old.replaced or old.deleting or session.state is not State.ESTABLISHED:
        return
    if not old.usable:  # the peer may not have it yet
        old.rekey_at = session.context.now + session.settings.lifetimes.rekey_retry
        return
    offers = old.offers or session.settings.esp_offers
    wanted = _Wanted(old.local_ts, old.remote_ts, offers, old.mode, True, old)
    old.rekeying = True
    try:
        child, shared, nonces = yield from _exchange(session, wanted)
    except ChildRefused as refused:
        _not_rekeyed(session, old, refused)
        return
    finally:
        old.rekeying = False
    if _deleted_early(session, child):  # the peer wants none: then the old one goes as well
        yield from delete_child(session, spi_in, DownReason.PEER_DELETE)
        return
    if old.peer_rekey and min(nonces) < old.peer_rekey:
        # §2.8.1: the lowest of the four nonces is ours, so ours is the one too many
        session.context.counters["rekey_collisions_lost"] += 1
        yield _delete(child.spi_in, child.protocol)
        return
    if old.peer_rekey:
        session.context.counters["rekey_collisions_won"] += 1
    child.inherit(old)
    install(session, child, shared, nonces, replaces=spi_in)
    old.replaced = True
    if spi_in not in session.children:
        return  # the peer deleted the old one meanwhile
    old.deleting = True
    yield _delete(spi_in, old.protocol)
    session.child_down(spi_in, DownReason.REKEYED)


def _deleted_early(session: Session, child: ChildSa) -> bool:
    early, session.early_deletes = session.early_deletes, ()
    return child.spi_out in early


def _delete(spi_in: int, protocol: int) -> Send:
    spis = (spi_in.to_bytes(4, "big"),)
    return Send(Exchange.INFORMATIONAL, [(PayloadType.DELETE, build_delete(Delete(protocol, spis)))])


def _not_rekeyed(session: Session, old: ChildSa, refused: ChildRefused) -> None:
    session.last_error = refused.text
    session.context.counters["rekeys_refused"] += 1
    if old.spi_in not in session.children or old.replaced:
        return  # the peer was quicker with its own
    if refused.notify is NotifyType.CHILD_SA_NOT_FOUND:
        session.child_down(old.spi_in, DownReason.PEER_DELETE)
    else:
        old.rekey_at = session.context.now + session.settings.lifetimes.rekey_retry


def _exchange(session: Session, wanted: _Wanted) -> Steps[Made]:
    """The exchange itself. Raises ChildRefused; what the peer made by then is deleted again."""
    context = session.context
    spi_in = yield NeedSpi(session.number, 0)
    if not isinstance(spi_in, int):
        raise ChildRefused(NotifyType.NO_ADDITIONAL_SAS, "the datapath has no SPI to give")
    offers = wanted.offers
    groups = [t for offer in offers for t in offer.get(TransformType.KE, ())]
    share = generate(GROUP_NAMES[groups[0].id], context.random) if groups else None
    error: Notify | None = None
    for _ in range(3):  # again in the group that the peer wants, or in none: the peer is proven already
        nonce_i = context.random(NONCE_SIZE)
        answer = yield Send(
            Exchange.CREATE_CHILD_SA, _request(session, wanted, offers, spi_in, nonce_i, share)
        )
        error = first_error(answer.chain)
        if error is None:
            try:
                child = _agreed(session, wanted, offers, spi_in, answer)
                shared = _finish(answer, offers, share, answer.get(PayloadType.KE, KeyShareData))
            except ChildRefused:
                # the peer has it already
                yield _delete(spi_in, answer.must(PayloadType.SA, SaPayload).proposals[0].protocol)
                raise
            return child, shared, (nonce_i, answer.must(PayloadType.NONCE, bytes))
        group = next((t.id for t in groups if error.data == t.id.to_bytes(2, "big")), 0)
        if error.type == NotifyType.INVALID_KE_PAYLOAD and group:
            share = generate(GROUP_NAMES[group], context.random)
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
    raise ChildRefused(kind, f"the peer answers CREATE_CHILD_SA with {notify_name(error.type)}")


def _request(
    session: Session,
    wanted: _Wanted,
    offers: tuple[Offer, ...],
    spi_in: int,
    nonce: bytes,
    share: Share | None,
) -> list[Payload]:
    spi = spi_in.to_bytes(4, "big")
    payloads: list[Payload] = []
    if wanted.old is not None:
        payloads.append(
            notify(NotifyType.REKEY_SA, b"", wanted.old.protocol, wanted.old.spi_in.to_bytes(4, "big"))
        )
    elif session.settings.aggregation and wanted.mode == transport.TUNNEL:
        payloads += aggregation.payloads()
    payloads += [
        *transport.payloads(wanted.mode),
        (PayloadType.SA, build_sa(SaPayload(to_proposals(offers, spi)))),
        (PayloadType.NONCE, nonce),
    ]
    if share is not None:
        group = next(number for number, name in GROUP_NAMES.items() if name == share.group)
        payloads.append((PayloadType.KE, build_ke(group, share.public)))
    return [
        *payloads,
        (PayloadType.TSI, build_ts(wanted.local_ts)),
        (PayloadType.TSR, build_ts(wanted.remote_ts)),
    ]


def _agreed(
    session: Session, wanted: _Wanted, offers: tuple[Offer, ...], spi_in: int, answer: Message
) -> ChildSa:
    proposals = answer.must(PayloadType.SA, SaPayload).proposals
    chosen = accepted(offers, proposals)
    if chosen is None:
        chosen = accepted([without_groups(offer) for offer in offers], proposals)
    if chosen is None:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "the peer chose a suite that was not proposed")
    mode = transport.agreed_on(answer, wanted.mode, required=wanted.transport_required)
    local_ts, remote_ts = read_selectors(answer)
    if mode == transport.TRANSPORT:
        local_ts, remote_ts = transport.as_seen(session, local_ts, remote_ts)
    if not within(local_ts, wanted.local_ts) or not within(remote_ts, wanted.remote_ts):
        raise ChildRefused(NotifyType.TS_UNACCEPTABLE, "the peer widened the traffic selectors")
    child = ChildSa(
        spi_in,
        spi_of(session, chosen),
        esp_suite(chosen),
        local_ts=local_ts,
        remote_ts=remote_ts,
        initiator=True,
    )
    child.mode = mode
    note_tfc(child, answer)
    if wanted.old is None:
        asked = session.settings.aggregation and wanted.mode == transport.TUNNEL
        child.aggregation = aggregation.agreed_on(answer, asked=asked)
    return child


def _finish(
    answer: Message, offers: tuple[Offer, ...], share: Share | None, peer: KeyShareData | None
) -> bytes:
    """The new shared secret; a peer must use the key exchange exactly where it chose one."""
    chosen = accepted(offers, answer.must(PayloadType.SA, SaPayload).proposals)
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
