"""Packets from the device through ESP to the network, and back. All IO is behind the seams.

What a stranger can send ends in a counter; at most a few events a second come of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from weakref import WeakValueDictionary

from oepy.datapath.esp.checksum import finish
from oepy.datapath.esp.coalesce import Coalescer
from oepy.datapath.esp.database import SaDatabase
from oepy.datapath.esp.inner import Bytes, addresses
from oepy.datapath.esp.mss import clamp
from oepy.datapath.esp.offload import NEEDS_CHECKSUM, NONE_BYTES, Offload
from oepy.datapath.esp.sa import NEXT_HEADER, EspPair, ReplayError, SaEnded, SelectorError
from oepy.datapath.esp.segment import segments
from oepy.datapath.esp.suites import IntegrityError
from oepy.datapath.tun.outbox import Outbox
from oepy.datapath.tun.seams import OuterSocket, PacketDevice, Received, Route
from oepy.errors import MisuseError, ParseError
from oepy.interfaces import DatapathEvent
from oepy.model import Endpoint, IpAddress, SaPair
from oepy.udp import NON_ESP_MARKER, Kind, classify, received_at

EVENT_INTERVAL = 10.0  # seconds between events of one kind about one peer or SA
MAX_EVENT_SUBJECTS = 1024
MAX_TURN_BYTES = 1 << 20  # taken from the device before the other direction has its turn
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
    """`on_event` and `on_ike` are called from within the pumps; `counters` are the process's own. `is_own` tells
    this host's addresses from those behind it."""

    def __init__(
        self,
        device: PacketDevice,
        outers: Mapping[int, OuterSocket],
        mtu: int,
        on_event: Callable[[DatapathEvent], None],
        on_ike: OnIke,
        is_own: Callable[[IpAddress], bool] = lambda _: False,
    ) -> None:
        self._device = device
        self._outers = outers
        self._mtu = mtu
        self._on_event = on_event
        self._on_ike = on_ike
        self._is_own = is_own
        self._limit = _EventLimit()
        self._routes: dict[EspPair, Route] = {}
        self._shared: WeakValueDictionary[tuple[Endpoint, Endpoint], Route] = WeakValueDictionary()
        self.database = SaDatabase()
        self.counters: Counter[str] = Counter()
        self._outbox = Outbox(outers, self.counters)
        self._inbox = Coalescer(self._deliver, self._deliver_one)

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
        ends = (pair.local, pair.remote)
        route = self._shared.get(ends) or Route.between(*ends)
        self._shared[ends] = self._routes[known] = route
        known.for_this_host = all(ts.start == ts.end and self._is_own(ts.start) for ts in pair.local_ts)
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
        """Seal and send up to `limit` packets of the host, super-packets of any size among them. Returns how
        many there were."""
        count = taken = 0
        while count < limit and taken < MAX_TURN_BYTES:
            read = self._device.read()
            if read is None:
                break
            taken += len(read[0])
            self._outward(*read, now)
            count += 1
        self._outbox.flush()
        return count

    def _outward(self, packet: memoryview, offload: Offload, now: float) -> None:
        if len(packet) < 40 and (len(packet) < 20 or packet[0] >> 4 != 4):
            self.counters["malformed_out"] += 1
            return
        pair = self.database.outbound(packet)
        if pair is None:
            self._no_sa(packet, now)
            return
        try:
            if offload.gso:
                self._cut_and_seal(pair, clamp(packet, self._mtu), offload)
            elif offload.flags & NEEDS_CHECKSUM and not finish(packet, *offload[4:]):
                raise ParseError("a checksum to be put outside of the packet")
            else:
                self._seal(pair, clamp(packet, self._mtu))
        except SaEnded:
            self.counters["sa_ended"] += 1
        except ParseError:
            self.counters["malformed_out"] += 1
        pair.last_out = now
        if pair.alarmed:
            self._alarms(pair, now)

    def _seal(self, pair: EspPair, packet: memoryview) -> None:
        next_header = NEXT_HEADER[packet[0] >> 4]
        if pair.transport is not None:
            split = pair.transport.split(packet)
            if split is None:
                self.counters["not_for_transport"] += 1
                return
            packet, next_header = packet[split[0] :], split[1]
        length = len(packet)
        sequence, _ = pair.reserve(1, length)
        batch = self._outbox.batch_for(self._routes[pair], pair.sealed_length(length))
        start = batch.used + pair.prefix
        batch.view[start : start + length] = packet
        self._outbox.add(batch, pair.seal(batch.view, batch.used, length, next_header, sequence))

    def _cut_and_seal(self, pair: EspPair, packet: memoryview, offload: Offload) -> None:
        """A super-packet, in pieces made right where they are encrypted and sent from."""
        count, header_length, pieces = segments(packet, offload)
        skip, next_header = 0, NEXT_HEADER[packet[0] >> 4]
        if pair.transport is not None:
            split = pair.transport.split(packet)
            if split is None:
                self.counters["not_for_transport"] += count
                return
            skip, next_header = split
            header_length -= skip
        first, count = pair.reserve(count, len(packet) + (count - 1) * header_length)
        outbox, route, prefix = self._outbox, self._routes[pair], pair.prefix
        for sequence, (header, payload) in zip(range(first, first + count), pieces, strict=False):
            length = header_length + len(payload)
            batch = outbox.batch_for(route, pair.sealed_length(length))
            view, used = batch.view, batch.used
            start = used + prefix
            middle = start + header_length
            view[start:middle] = header[skip:] if skip else header
            view[middle : start + length] = payload
            outbox.add(batch, pair.seal(view, used, length, next_header, sequence))

    def _no_sa(self, packet: memoryview, now: float) -> None:
        """A host with several addresses: the tunnel to this destination was made for another of them."""
        if _is_multicast(packet):  # the kernel's own listener reports (MLD) on the device
            self.counters["multicast"] += 1
            return
        self.counters["no_sa"] += 1
        source, destination = (_inner_address(part) for part in addresses(packet))
        if self._limit.allows("no-sa", (source, destination), now):
            self._on_event(DatapathEvent("no-sa", 0, destination, source=source))

    def pump_outer(self, outer: OuterSocket, limit: int, now: float) -> int:
        """Take datagrams off the network, up to `limit` system calls. Returns how many datagrams there were."""
        count = 0
        for _ in range(limit):
            received = outer.receive()
            if received is None:
                break
            data, _, _, size = received
            inbound = self.database.inbound
            for start in range(0, len(data) or 1, size or 1):
                datagram = data[start : start + size]
                pair = inbound(bytes(datagram[:4]))
                if pair is None:
                    self._stranger(datagram, received, outer.port, now)
                else:
                    self._inward(pair, datagram, now)
                count += 1
        self._inbox.flush()
        return count

    def _stranger(self, data: memoryview, received: Received, port: int, now: float) -> None:
        """A datagram with no SA of ours."""
        kind = classify(data)
        if kind is Kind.IKE:
            self._ike(data, received, port)
        elif kind is Kind.KEEPALIVE:
            self.counters["keepalives"] += 1
        else:
            self.counters["unknown_spi"] += 1
            if len(data) >= 8:
                peer = _address(received)
                self._report("unknown-spi", peer, now, spi=int.from_bytes(data[:4], "big"))

    def _ike(self, data: memoryview, received: Received, port: int) -> None:
        local = received_at(received[1])
        if local is None:
            self.counters["malformed_in"] += 1
            return
        remote = Endpoint(_address(received), received[2][1])
        self._on_ike(bytes(data[len(NON_ESP_MARKER) :]), Endpoint(local, port), remote)

    def _inward(self, pair: EspPair, data: memoryview, now: float) -> None:
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
        elif self._device.coalesces:
            self._inbox.add(packet, not pair.for_this_host)
        else:
            self._deliver_one(packet)
        if pair.alarmed:
            self._alarms(pair, now)

    def _deliver_one(self, packet: bytes) -> None:
        self._deliver((clamp(packet, self._mtu),), NONE_BYTES)

    def _deliver(self, parts: Sequence[Bytes], header: bytes) -> None:
        if not self._device.write(parts, header):
            self.counters["device_refused"] += 1

    def _report(self, kind: str, peer: IpAddress, now: float, *, spi: int, detail: str = "") -> None:
        if self._limit.allows(kind, peer, now):
            self._on_event(DatapathEvent(kind, spi, peer, detail))


_REFUSALS: dict[type[Exception], str] = {
    ReplayError: "replayed",
    IntegrityError: "integrity_failed",
    ParseError: "malformed_in",
    SaEnded: "sa_ended",
}


def _is_multicast(packet: Bytes) -> bool:
    return packet[16] >> 4 == 0xE if packet[0] >> 4 == 4 else packet[24] == 0xFF


def _address(received: Received) -> IpAddress:
    text = received[2][0]
    if not isinstance(text, str):
        raise MisuseError("a socket of another family")
    return IPv6Address(text.partition("%")[0]) if ":" in text else IPv4Address(text)


def _inner_address(packed: bytes) -> IpAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
