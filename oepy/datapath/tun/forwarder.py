"""Packets from the device through ESP to the network, and back. All IO is behind the seams.

What a stranger can send ends in a counter; at most a few events a second come of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address

from oepy.datapath.esp.database import SaDatabase
from oepy.datapath.esp.inner import addresses
from oepy.datapath.esp.mss import clamp
from oepy.datapath.esp.sa import EspPair, ReplayError, SaEnded, SelectorError
from oepy.datapath.esp.suites import IntegrityError
from oepy.datapath.tun.seams import OuterSocket, PacketDevice, Received, Route
from oepy.errors import MisuseError, ParseError
from oepy.interfaces import DatapathEvent
from oepy.model import Endpoint, IpAddress, SaPair
from oepy.udp import NON_ESP_MARKER, Kind, classify, received_at

EVENT_INTERVAL = 10.0  # seconds between events of one kind about one peer or SA
MAX_EVENT_SUBJECTS = 1024
MAX_EVENTS_PER_INTERVAL = 100

OnIke = Callable[[bytes, Endpoint, Endpoint], None]


class _EventLimit:
    """At most one event in EVENT_INTERVAL about one subject, and MAX_EVENTS_PER_INTERVAL in all."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, object], float] = {}
        self._since = 0.0
        self._count = 0

    def allows(self, kind: str, subject: object, now: float) -> bool:
        if now - self._since >= EVENT_INTERVAL:
            self._since, self._count = now, 0
        if self._count >= MAX_EVENTS_PER_INTERVAL:
            return False
        key = (kind, subject)
        if now - self._last.get(key, -EVENT_INTERVAL) < EVENT_INTERVAL:
            return False
        if len(self._last) >= MAX_EVENT_SUBJECTS:
            self._last.clear()
        self._last[key] = now
        self._count += 1
        return True


class Forwarder:
    """`on_event` and `on_ike` are called from within the pumps; `counters` are the process's own."""

    def __init__(
        self,
        device: PacketDevice,
        outers: Mapping[int, OuterSocket],
        mtu: int,
        on_event: Callable[[DatapathEvent], None],
        on_ike: OnIke,
    ) -> None:
        self._device = device
        self._outers = outers
        self._mtu = mtu
        self._on_event = on_event
        self._on_ike = on_ike
        self._limit = _EventLimit()
        self._routes: dict[EspPair, Route] = {}
        self.database = SaDatabase()
        self.counters: Counter[str] = Counter()

    # -- SAs -----------------------------------------------------------------------------------------

    def install(self, pair: SaPair, sending: bool, now: float) -> None:
        """Add it, or let a pair that is there begin to send, or move it to other outer endpoints. Raises
        OepyError for what is not supported, and ValueError where the SPI is in use by another pair."""
        if pair.remote.address.version not in self._outers:
            raise ValueError(f"no socket for IPv{pair.remote.address.version}")
        if not pair.encap:
            raise ValueError("the userland datapath speaks ESP in UDP only, and this pair has none")
        known = self.database.get(pair.spi_in)
        if known is None:
            known = EspPair(pair, now)
            self.database.add(known)
        elif dataclasses.replace(known.pair, local=pair.local, remote=pair.remote) != pair:
            raise ValueError(f"SPI {pair.spi_in:#x} is in use")
        known.pair = pair
        self._routes[known] = Route.between(pair.local, pair.remote)
        if sending:
            self.database.enable_sending(known)

    def remove(self, spi_in: int) -> None:
        pair = self.database.remove(spi_in)
        if pair is not None:
            del self._routes[pair]

    def tick(self, now: float) -> None:
        """Once a second: the lifetimes in time."""
        for pair in self.database:
            self._alarms(pair, now)

    def _alarms(self, pair: EspPair, now: float) -> None:
        for kind in pair.new_alarms(now):
            if kind == "hard-expire":
                self.remove(pair.pair.spi_in)
            self._on_event(DatapathEvent(kind, pair.pair.spi_in, pair.pair.remote.address))

    # -- packets -------------------------------------------------------------------------------------

    def pump_device(self, limit: int, now: float) -> int:
        """Seal and send up to `limit` packets of the host. Returns how many there were."""
        for count in range(limit):
            packet = self._device.read()
            if packet is None:
                return count
            self._outward(packet, now)
        return limit

    def _outward(self, packet: bytes, now: float) -> None:
        if len(packet) < 40 and (len(packet) < 20 or packet[0] >> 4 != 4):
            self.counters["malformed_out"] += 1
            return
        pair = self.database.outbound(packet)
        if pair is None:
            self._no_sa(packet, now)
            return
        try:
            datagram = pair.seal(clamp(packet, self._mtu), now)
        except SaEnded:
            self.counters["sa_ended"] += 1
            return
        route = self._routes[pair]
        if not self._outers[route.version].send(datagram, route):
            self.counters["send_failed"] += 1
        if pair.alarmed:
            self._alarms(pair, now)

    def _no_sa(self, packet: bytes, now: float) -> None:
        """A host with several addresses: the tunnel to this destination was made for another of them."""
        if _is_multicast(packet):  # the kernel's own listener reports (MLD) on the device
            self.counters["multicast"] += 1
            return
        self.counters["no_sa"] += 1
        source, destination = (_inner_address(part) for part in addresses(packet))
        if self._limit.allows("no-sa", (source, destination), now):
            self._on_event(DatapathEvent("no-sa", 0, destination, source=source))

    def pump_outer(self, outer: OuterSocket, limit: int, now: float) -> int:
        """Take up to `limit` datagrams off the network. Returns how many there were."""
        for count in range(limit):
            received = outer.receive()
            if received is None:
                return count
            kind = classify(received[0])
            if kind is Kind.ESP:
                self._inward(received, now)
            elif kind is Kind.IKE:
                self._ike(received, outer.port)
            else:
                self.counters["keepalives"] += 1
        return limit

    def _ike(self, received: Received, port: int) -> None:
        data, ancillary, _ = received
        local = received_at(ancillary)
        if local is None:
            self.counters["malformed_in"] += 1
            return
        remote = Endpoint(_address(received), received[2][1])
        self._on_ike(bytes(data[len(NON_ESP_MARKER) :]), Endpoint(local, port), remote)

    def _inward(self, received: Received, now: float) -> None:
        data = received[0]
        pair = self.database.inbound(bytes(data[:4]))
        if pair is None:
            self.counters["unknown_spi"] += 1
            if len(data) >= 8:
                peer = _address(received)
                self._report("unknown-spi", peer, now, spi=int.from_bytes(data[:4], "big"))
            return
        try:
            packet = pair.open(data, now)
        except (ReplayError, IntegrityError, ParseError, SaEnded) as error:
            self.counters[_REFUSALS[type(error)]] += 1
            return
        except SelectorError as error:
            self.counters["selector_mismatch"] += 1
            self._report(
                "selector-mismatch",
                pair.pair.remote.address,
                now,
                spi=pair.pair.spi_in,
                detail=str(error),
            )
            return
        if packet is None:
            self.counters["dummies"] += 1
        elif not self._device.write(clamp(packet, self._mtu)):
            self.counters["device_refused"] += 1
        if pair.alarmed:
            self._alarms(pair, now)

    def _report(self, kind: str, peer: IpAddress, now: float, *, spi: int, detail: str = "") -> None:
        if self._limit.allows(kind, peer, now):
            self._on_event(DatapathEvent(kind, spi, peer, detail))


_REFUSALS: dict[type[Exception], str] = {
    ReplayError: "replayed",
    IntegrityError: "integrity_failed",
    ParseError: "malformed_in",
    SaEnded: "sa_ended",
}


def _is_multicast(packet: bytes) -> bool:
    return packet[16] >> 4 == 0xE if packet[0] >> 4 == 4 else packet[24] == 0xFF


def _address(received: Received) -> IpAddress:
    text = received[2][0]
    if not isinstance(text, str):
        raise MisuseError("a socket of another family")
    return IPv6Address(text.partition("%")[0]) if ":" in text else IPv4Address(text)


def _inner_address(packed: bytes) -> IpAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
