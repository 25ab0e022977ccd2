"""Child SAs: what is kept of one, what is offered, and what two sides agree upon (RFC 7296 §2.9, 2.17)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from oepy.ike.algorithms import Chosen, Offer
from oepy.ike.crypto import derive_child_keys
from oepy.ike.events import ChildUp
from oepy.ike.flow import ChildRefused
from oepy.ike.header import PayloadType
from oepy.ike.notify import NotifyType
from oepy.ike.payload_sa import PROTOCOL_AH, PROTOCOL_ESP, TransformType
from oepy.model import Lifetime, SaPair, TrafficSelector

if TYPE_CHECKING:
    from oepy.ike.aggregation import Aggregation
    from oepy.ike.message import Message
    from oepy.ike.session import Session
    from oepy.ike.settings import Lifetimes
    from oepy.model import EspSuite

MIN_SPI = 256


class ChildSa:
    """One pair of ESP or AH, without its keys. `spi_in` is ours, its name everywhere in this host."""

    __slots__ = (
        "aggregation",
        "connection",
        "deleting",
        "expires_at",
        "initiator",
        "installed_at",
        "label",
        "lifetimes",
        "local_ts",
        "mode",
        "offers",
        "peer_rekey",
        "rekey_at",
        "rekeying",
        "remote_ts",
        "replaced",
        "spi_in",
        "spi_out",
        "suite",
        "takes_tfc",
        "usable",
    )

    def __init__(
        self,
        spi_in: int,
        spi_out: int,
        suite: EspSuite,
        *,
        local_ts: tuple[TrafficSelector, ...],
        remote_ts: tuple[TrafficSelector, ...],
        initiator: bool,
    ) -> None:
        self.spi_in = spi_in
        self.spi_out = spi_out
        self.suite = suite
        self.local_ts = local_ts
        self.remote_ts = remote_ts
        self.initiator = initiator
        self.offers: tuple[Offer, ...] | None = None  # for rekeys; None: the settings'
        self.connection = ""
        self.label = ""
        self.lifetimes: Lifetimes | None = None  # None: the settings'
        self.mode = "tunnel"
        self.aggregation: Aggregation | None = None
        self.takes_tfc = True
        self.installed_at = 0.0
        self.rekey_at = float("inf")
        self.expires_at = float("inf")
        self.rekeying = False  # an exchange of ours to replace it is under way
        self.deleting = False  # our Delete is on its way
        self.replaced = False  # a successor is up
        self.usable = True  # we may send on it
        self.peer_rekey = b""
        """Of the peer's rekey, from the moment that it is being served: the lower of its two nonces."""

    @property
    def protocol(self) -> int:
        return PROTOCOL_ESP if self.suite.encryption else PROTOCOL_AH

    def inherit(self, old: ChildSa) -> None:
        """What a rekey does not negotiate anew. RFC 9347 §5.1: it says nothing of aggregation."""
        self.offers, self.connection, self.label = old.offers, old.connection, old.label
        self.aggregation, self.lifetimes = old.aggregation, old.lifetimes

    @property
    def likeness(self) -> int:
        """The same for children of one connection with the same selectors; they never change."""
        return hash((self.connection, frozenset(self.local_ts), frozenset(self.remote_ts)))

    def same_selectors(self, other: ChildSa) -> bool:
        return set(self.local_ts) == set(other.local_ts) and set(self.remote_ts) == set(other.remote_ts)


def within(selectors: Iterable[TrafficSelector], proposed: Sequence[TrafficSelector]) -> bool:
    return all(any(wide.covers(narrow) for wide in proposed) for narrow in selectors)


def read_selectors(message: Message) -> tuple[tuple[TrafficSelector, ...], tuple[TrafficSelector, ...]]:
    """TSi and TSr of a message. Raises ChildRefused where one has no selector that we understand."""
    tsi: tuple[TrafficSelector, ...] = message.get(PayloadType.TSI, tuple) or ()
    tsr: tuple[TrafficSelector, ...] = message.get(PayloadType.TSR, tuple) or ()
    if not tsi or not tsr:
        raise ChildRefused(NotifyType.TS_UNACCEPTABLE, "no traffic selector that is known here")
    return tsi, tsr


def spi_of(session: Session, chosen: Chosen) -> int:
    """The peer's SPI. Raises ChildRefused for one that RFC 4303 §2.1 reserves, and for AH through a NAT."""
    if TransformType.ENCR not in chosen.transforms and (session.nat_local or session.nat_remote):
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "AH does not pass a NAT (RFC 3948 §1)")
    spi = int.from_bytes(chosen.spi, "big")
    if len(chosen.spi) != 4 or spi < MIN_SPI:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, f"SPI {chosen.spi.hex()}")
    return spi


def note_tfc(child: ChildSa, message: Message) -> None:
    """RFC 7296 §1.3.1: whether the peer takes padding for traffic flow confidentiality."""
    child.takes_tfc = message.notify(NotifyType.ESP_TFC_PADDING_NOT_SUPPORTED) is None


def install(
    session: Session,
    child: ChildSa,
    shared: bytes,
    nonces: tuple[bytes, bytes],
    *,
    replaces: int | None = None,
    outbound: bool = True,
) -> None:
    """Derive the keys and announce the pair. `nonces`: of the exchange's initiator and responder."""
    assert session.suite is not None
    assert session.sk_d is not None
    assert session.identity is not None
    assert session.authenticated is not None
    context = session.context
    lifetimes = child.lifetimes or session.settings.lifetimes
    first, second = derive_child_keys(session.suite.prf, session.sk_d, child.suite, shared, nonces)
    keys_out, keys_in = (first, second) if child.initiator else (second, first)
    child.installed_at = context.now
    soft = context.jitter(lifetimes.child_rekey, lifetimes.child_jitter or lifetimes.jitter)
    child.rekey_at = context.now + (soft or float("inf"))
    child.expires_at = context.now + (lifetimes.child_hard or float("inf"))
    child.usable = outbound
    session.children[child.spi_in] = child
    context.add_child(session, child)
    session.childless_since = float("inf")
    local, remote, encap = session.esp_ends
    pair = SaPair(
        spi_in=child.spi_in,
        spi_out=child.spi_out,
        local=local,
        remote=remote,
        suite=child.suite,
        keys_in=keys_in,
        keys_out=keys_out,
        local_ts=child.local_ts,
        remote_ts=child.remote_ts,
        authenticated=session.authenticated,
        peer=session.identity,
        encap=encap and child.protocol == PROTOCOL_ESP,
        protocol="esp" if child.protocol == PROTOCOL_ESP else "ah",
        mode=child.mode,
        natted=child.mode == "transport" and (session.nat_local or session.nat_remote),
        lifetime=Lifetime(
            soft_seconds=soft,
            hard_seconds=lifetimes.child_hard,
            soft_bytes=lifetimes.child_soft_bytes,
            hard_bytes=lifetimes.child_hard_bytes,
            soft_packets=lifetimes.child_soft_packets,
            hard_packets=lifetimes.child_hard_packets,
        ),
        connection=child.connection,
        aggregation=child.aggregation is not None,
        fragments=child.aggregation is None or child.aggregation.fragments,
        super_packets=child.aggregation is not None and child.aggregation.super_packets,
        takes_tfc=child.takes_tfc,
    )
    context.counters["children"] += 1
    context.emit(ChildUp(session.number, pair, child.initiator, replaces, outbound, child.label))


__all__ = ["PROTOCOL_ESP", "ChildSa", "install", "read_selectors", "spi_of", "within"]
