"""A child SA of the peer's: what the daemon allows of it, and the answer, in IKE_AUTH and in CREATE_CHILD_SA."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from oepy.ike import transport
from oepy.ike.algorithms import esp_suite
from oepy.ike.child import ChildSa, read_selectors, spi_of, within
from oepy.ike.configuration import with_addresses
from oepy.ike.events import FailureKind, Narrowed, NeedNarrowing, NeedSpi, Refused
from oepy.ike.flow import ChildRefused, HandshakeFailed, Questions
from oepy.ike.header import PayloadType
from oepy.ike.notify import NotifyType
from oepy.ike.payload_sa import SaPayload, build_sa
from oepy.ike.payload_ts import build_ts
from oepy.ike.payloads import Payload
from oepy.model import IpAddress, TrafficSelector

if TYPE_CHECKING:
    from oepy.ike.algorithms import Chosen
    from oepy.ike.message import Message
    from oepy.ike.session import Session

Selectors = tuple[TrafficSelector, ...]


def ask_narrowing(
    session: Session, message: Message, old: ChildSa | None, leased: tuple[IpAddress, ...] = ()
) -> Questions[Narrowed]:
    """The daemon's word on the peer's selectors. Raises ChildRefused or HandshakeFailed as it decides."""
    from oepy.ike.duplicates import forbids

    tsi, tsr = read_selectors(message)
    given = leased if old is None else tuple(one.start for one in old.remote_ts if one.start == one.end)
    proposed = with_addresses(tsi, given), tsr
    mode = transport.asked_for(message)
    if old is not None and mode != old.mode:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "a rekey does not change the mode")
    if old is None and forbids(session, proposed[0]):
        raise ChildRefused(
            NotifyType.TS_UNACCEPTABLE, "an authenticated tunnel with this peer is there already"
        )
    seen = proposed if mode == transport.TUNNEL else transport.as_seen(session, *proposed[::-1])[::-1]
    narrowed = yield from _ask_narrowing(session, seen, mode, old, leased)
    if narrowed.mode != mode and mode == transport.TRANSPORT:
        if old is not None:
            narrowed = replace(narrowed, mode=mode)
        elif seen != proposed:
            narrowed = yield from _ask_narrowing(session, proposed, transport.TUNNEL, old, leased)
    elif narrowed.mode != mode:
        narrowed = replace(narrowed, mode=mode)
    session.connection = narrowed.connection
    session.authenticated = narrowed.authenticated or session.authenticated
    if narrowed.settings is not None:
        session.settings = narrowed.settings
    return narrowed


def _ask_narrowing(
    session: Session,
    seen: tuple[Selectors, Selectors],
    mode: str,
    old: ChildSa | None,
    leased: tuple[IpAddress, ...],
) -> Questions[Narrowed]:
    assert session.identity is not None
    assert session.authenticated is not None
    tsi, tsr = seen
    answer = yield NeedNarrowing(
        session.number,
        0,
        session.identity,
        session.authenticated,
        session.key,
        session.remote,
        session.local,
        tsr,
        tsi,
        old.spi_in if old else None,
        leased,
        mode,
    )
    if isinstance(answer, Refused):
        if answer.peer:
            raise HandshakeFailed(
                FailureKind.REFUSED,
                answer.reason,
                NotifyType.AUTHENTICATION_FAILED,
                NotifyType.AUTHENTICATION_FAILED,
            )
        raise ChildRefused(NotifyType.TS_UNACCEPTABLE, answer.reason)
    if not isinstance(answer, Narrowed):
        raise ChildRefused(NotifyType.TS_UNACCEPTABLE, "the policy gave no answer")
    usable = answer.local_ts and answer.remote_ts
    if not usable or not within(answer.local_ts, tsr) or not within(answer.remote_ts, tsi):
        raise ChildRefused(NotifyType.TS_UNACCEPTABLE, "nothing of the proposed selectors is allowed")
    return answer


def make_child(session: Session, narrowed: Narrowed, chosen: Chosen) -> Questions[ChildSa]:
    spi_out = spi_of(session, chosen)
    spi_in = yield NeedSpi(session.number, 0)
    if not isinstance(spi_in, int):
        raise ChildRefused(NotifyType.NO_ADDITIONAL_SAS, "the datapath has no SPI to give")
    child = ChildSa(
        spi_in,
        spi_out,
        esp_suite(chosen),
        local_ts=narrowed.local_ts,
        remote_ts=narrowed.remote_ts,
        initiator=False,
    )
    child.offers, child.mode = narrowed.offers, narrowed.mode
    child.connection, child.label = narrowed.connection, narrowed.label or session.label
    child.lifetimes = narrowed.lifetimes
    return child


def child_payloads(child: ChildSa, chosen: Chosen) -> list[Payload]:
    """SA, TSi, TSr and USE_TRANSPORT_MODE of the answer. TSi is the exchange initiator's side, the remote one. In
    transport mode too they have the addresses that packets have here, and not those that the peer has proposed
    (RFC 7296 §2.23.1)."""
    spi = child.spi_in.to_bytes(4, "big")
    return [
        (PayloadType.SA, build_sa(SaPayload((chosen.proposal(spi),)))),
        (PayloadType.TSI, build_ts(child.remote_ts)),
        (PayloadType.TSR, build_ts(child.local_ts)),
        *transport.payloads(child.mode),
    ]
