"""Packets from the device through ESP to the network, and back. All IO is behind the seams.

What a stranger can send ends in a counter; at most a few events a second come of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from itertools import islice
from weakref import WeakValueDictionary

from oepy.datapath.esp.aggfrag import HEADER as AGGFRAG_HEADER
from oepy.datapath.esp.aggfrag import NEXT_HEADER as AGGFRAG
from oepy.datapath.esp.aggfrag import WHOLE, Packer, Payload, offload_block
from oepy.datapath.esp.checksum import finish
from oepy.datapath.esp.coalesce import Coalescer
from oepy.datapath.esp.database import SaDatabase
from oepy.datapath.esp.inner import Bytes, addresses, dscp
from oepy.datapath.esp.mss import clamp
from oepy.datapath.esp.offload import NEEDS_CHECKSUM, NONE, NONE_BYTES, UDP4_CHECKSUM, Offload
from oepy.datapath.esp.sa import NEXT_HEADER, EspPair, ReplayError, SaEnded, SelectorError
from oepy.datapath.esp.segment import segments
from oepy.datapath.esp.suites import IntegrityError
from oepy.datapath.tun.outbox import Outbox
from oepy.datapath.tun.seams import MarkedDevices, OuterSocket, PacketDevice, Received, Route
from oepy.datapath.tun.waiting import Waiting
from oepy.errors import MisuseError, OepyError, ParseError
from oepy.interfaces import DatapathEvent
from oepy.model import Endpoint, IpAddress, Mark, SaPair
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
    this host's addresses from those behind it. What has a connection's mark comes from a device of `marked`; all
    that is for the host goes to `device`."""

    def __init__(
        self,
        device: PacketDevice,
        outers: Mapping[int, OuterSocket],
        mtu: int,
        on_event: Callable[[DatapathEvent], None],
        on_ike: OnIke,
        is_own: Callable[[IpAddress], bool] = lambda _: False,
        marked: MarkedDevices | None = None,
    ) -> None:
        self._device = device
        self._marked_devices = marked
        self._marked: dict[Mark, tuple[PacketDevice, set[EspPair]]] = {}
        self._outers = outers
        self._mtu = mtu
        self._on_event = on_event
        self._on_ike = on_ike
        self._is_own = is_own
        self._limit = _EventLimit()
        self._routes: dict[EspPair, Route] = {}
        self._dscp_routes: dict[EspPair, dict[int, Route]] = {}  # of those that copy it to the outer header
        self._shared: WeakValueDictionary[tuple[Endpoint, Endpoint, Mark | None], Route] = (
            WeakValueDictionary()
        )
        self.database = SaDatabase()
        self.counters: Counter[str] = Counter()
        self._outbox = Outbox(outers, self.counters, lambda pair: self._alarms(pair, self._now))
        self._now = 0.0
        self._super: set[EspPair] = set()  # those that carry super-packets whole
        self._kept = Waiting()
        self._waiting: dict[EspPair, Packer] = {}  # AGGFRAG payloads that are not full
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
            try:
                self._take_mark(known)
            except OepyError:
                self.database.remove(pair.spi_in)
                raise
        elif dataclasses.replace(known.pair, local=pair.local, remote=pair.remote) != pair:
            raise ValueError(f"SPI {pair.spi_in:#x} is in use")
        known.pair = pair
        ends = (pair.local, pair.remote, pair.marks.set_outward)
        route = self._shared.get(ends) or Route.between(*ends)
        self._shared[ends] = self._routes[known] = route
        self._dscp_routes.pop(known, None)
        known.for_this_host = all(ts.start == ts.end and self._is_own(ts.start) for ts in pair.local_ts)
        if sending:
            self.database.enable_sending(known)
            if pair.super_packets:
                self._super.add(known)
                self._offload()
            self._send_waiting(now)

    def _take_mark(self, pair: EspPair) -> None:
        mark = pair.pair.marks.outward
        if mark is None:
            return
        if mark not in self._marked:
            if self._marked_devices is None:
                raise OepyError(f"there is no device for the mark {mark}")
            self._marked[mark] = self._marked_devices.open(mark), set()
            self._offload()
        self._marked[mark][1].add(pair)

    def _give_mark_back(self, pair: EspPair) -> None:
        mark = pair.pair.marks.outward
        if mark is None or self._marked_devices is None:
            return
        users = self._marked[mark][1]
        users.discard(pair)
        if not users:
            del self._marked[mark]
            self._marked_devices.close(mark)

    def _offload(self) -> None:
        for device in (self._device, *(device for device, _ in self._marked.values())):
            device.offload(bool(self._super))

    def remove(self, spi_in: int) -> None:
        pair = self.database.remove(spi_in)
        if pair is not None:
            del self._routes[pair]
            self._dscp_routes.pop(pair, None)
            if pair in self._super:
                self._super.remove(pair)
                self._offload()
            self._give_mark_back(pair)

    def _route(self, pair: EspPair, packet: Bytes) -> Route | None:
        """Where this packet inside goes; None where the pair has ended."""
        route = self._routes.get(pair)
        if route is None or not pair.pair.copied.dscp_out or not (value := dscp(packet)):
            return route
        routes, it = self._dscp_routes.setdefault(pair, {}), pair.pair
        if value not in routes:
            routes[value] = Route.between(it.local, it.remote, it.marks.set_outward, value)
        return routes[value]

    def tick(self, now: float) -> None:
        """Once a second: the lifetimes in time."""
        for pair in self.database:
            self._alarms(pair, now)
        self._kept.expire(now)

    def _alarms(self, pair: EspPair, now: float) -> None:
        for kind in pair.new_alarms(now):
            if kind == "hard-expire":
                self.remove(pair.pair.spi_in)
            self._on_event(DatapathEvent(kind, pair.pair.spi_in, pair.pair.remote.address))

    # -- packets -------------------------------------------------------------------------------------

    def pump_device(self, limit: int, now: float, mark: Mark | None = None) -> int:
        """Seal and send up to `limit` packets of the host, super-packets of any size among them: those with this
        mark. Returns how many there were."""
        self._now = now
        device = self._device if mark is None else self._marked[mark][0]
        count = taken = 0
        while count < limit and taken < MAX_TURN_BYTES:
            read = device.read()
            if read is None:
                break
            taken += len(read[0])
            self._outward(*read, now, mark)
            count += 1
        self._lay_rests()
        self._outbox.flush()
        return count

    def _outward(self, packet: memoryview, offload: Offload, now: float, mark: Mark | None = None) -> None:
        length = len(packet)
        if length < 20 or (packet[0] >> 4 != 4 and (packet[0] >> 4 != 6 or length < 40)):
            self.counters["malformed_out"] += 1
            return
        pair = self.database.outbound(packet, mark)
        if pair is None:
            self._no_sa(packet, offload, now, mark)
            return
        try:
            if pair.packer is not None:
                self._pack(pair, pair.packer, packet, offload)
            elif offload.gso:
                self._lay_burst(pair, clamp(packet, self._mtu), offload)
            elif offload.flags & NEEDS_CHECKSUM and not finish(packet, *offload[4:]):
                raise ParseError("a checksum to be put outside of the packet")
            else:
                self._lay(pair, clamp(packet, self._mtu))
        except ParseError:
            self.counters["malformed_out"] += 1
        pair.last_out = now

    def _pack(self, pair: EspPair, packer: Packer, packet: memoryview, offload: Offload) -> None:
        """Into AGGFRAG payloads; the last one waits for more, until the end of this turn."""
        block = b""
        if offload.gso or offload.flags & NEEDS_CHECKSUM:
            clamped = clamp(packet, self._mtu) is not packet
            wanted = (
                pair.pair.super_packets and pair.pair.fragments and not clamped and not pair.pair.tfc_padding
            )
            block = (wanted and offload_block(packet, offload)) or b""
            if not block and offload.gso:
                for header, payload in segments(clamp(packet, self._mtu), offload)[2]:
                    self._pack(pair, packer, memoryview(b"".join((header, payload))), NONE)
                return
            if not block and not finish(packet, *offload[4:]):
                raise ParseError("a checksum to be put outside of the packet")
        if not packer.fits(len(packet)):
            self.counters["too_big"] += 1
            return
        alone = pair.pair.tfc_padding or pair.pair.copied.dscp_out
        if alone or packer.alone(len(packet) + len(block)):
            self._lay(pair, clamp(packet, self._mtu), WHOLE + block)
            return
        full = packer.add(clamp(packet, self._mtu), block)
        if full:
            if full[0] is not full[-1] and _size(full[0]) != _size(full[-1]):  # the first was closed early
                self._lay_payloads(pair, full[:1])
                del full[0]
            self._lay_payloads(pair, full)
        if packer.waiting:
            self._waiting[pair] = packer

    def _lay_payloads(self, pair: EspPair, payloads: Sequence[Payload]) -> None:
        """All of one size."""
        route, length = self._routes.get(pair), _size(payloads[0])
        if route is None:
            self.counters["sa_ended"] += len(payloads)
            return
        sealed, trailer = pair.sealed_length(length), pair.trailer(length, AGGFRAG)
        done = 0
        while done < len(payloads):
            batch, fitting = self._outbox.place(pair, route, sealed, len(payloads) - done)
            view, start = batch.view, batch.used + pair.prefix
            for head, parts in payloads[done : done + fitting]:
                at = start + AGGFRAG_HEADER
                view[start:at] = head
                for part in parts:
                    end = at + len(part)
                    view[at:end] = part
                    at = end
                view[at : at + len(trailer)] = trailer
                start += sealed
            self._outbox.laid(batch, fitting * length, fitting)
            done += fitting

    def _lay_rests(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, {}
            for pair, packer in waiting.items():
                payload = packer.rest()
                self._lay_payloads(pair, (payload,))

    def _lay(self, pair: EspPair, packet: memoryview, head: bytes = b"") -> None:
        """One packet; `head` before it where it is an AGGFRAG payload."""
        route = self._route(pair, packet)
        next_header = AGGFRAG if head else NEXT_HEADER[packet[0] >> 4]
        if pair.transport is not None:
            split = pair.transport.split(packet)
            if split is None:
                self.counters["not_for_transport"] += 1
                return
            packet, next_header = packet[split[0] :], split[1]
        length = size = len(head) + len(packet)
        if pair.pair.tfc_padding and pair.transport is None:
            # RFC 4303 §2.7; behind a packet alone in an AGGFRAG payload it is a pad block (RFC 9347)
            length = max(size, min(pair.pair.tfc_padding, self._mtu))
        if route is None:  # it has ended amid this turn
            self.counters["sa_ended"] += 1
            return
        batch, _ = self._outbox.place(pair, route, pair.sealed_length(length))
        view, start = batch.view, batch.used + pair.prefix
        end, trailer = start + length, pair.trailer(length, next_header)
        if length > size:
            view[start + size : end] = bytes(length - size)
        if head:
            view[start : start + len(head)] = head
            start += len(head)
        view[start : start + len(packet)] = packet
        view[end : end + len(trailer)] = trailer
        self._outbox.laid(batch, length)

    def _lay_burst(self, pair: EspPair, packet: memoryview, offload: Offload) -> None:
        """A super-packet, cut right where its pieces are encrypted and sent from."""
        count, header_length, pieces = segments(packet, offload)
        skip, next_header = 0, NEXT_HEADER[packet[0] >> 4]
        if pair.transport is not None:
            split = pair.transport.split(packet)
            if split is None:
                self.counters["not_for_transport"] += count
                return
            skip, next_header = split
        header_length -= skip
        # All but the last one are of one length
        route = self._route(pair, packet)
        self._lay_segments(pair, route, pieces, count - 1, header_length + offload.segment, skip, next_header)
        rest = len(packet) - skip - header_length - (count - 1) * offload.segment
        self._lay_segments(pair, route, pieces, 1, header_length + rest, skip, next_header)

    def _lay_segments(
        self,
        pair: EspPair,
        route: Route | None,
        pieces: Iterator[tuple[bytearray, memoryview]],
        count: int,
        length: int,
        skip: int,
        next_header: int,
    ) -> None:
        """`count` segments of one length, without the first `skip` bytes of their headers."""
        if pair.pair.tfc_padding and pair.transport is None:
            for header, payload in islice(pieces, count):
                self._lay(pair, memoryview(b"".join((header, payload))))
            return
        prefix = pair.prefix
        if route is None:
            self.counters["sa_ended"] += count
            return
        sealed, trailer = pair.sealed_length(length), pair.trailer(length, next_header)
        while count > 0:
            batch, fitting = self._outbox.place(pair, route, sealed, count)
            view, start = batch.view, batch.used + prefix
            for header, payload in islice(pieces, fitting):
                middle, end = start + len(header) - skip, start + length
                view[start:middle] = header[skip:] if skip else header
                view[middle:end] = payload
                view[end : end + len(trailer)] = trailer
                start += sealed
            self._outbox.laid(batch, fitting * length, fitting)
            count -= fitting

    def _no_sa(self, packet: memoryview, offload: Offload, now: float, mark: Mark | None) -> None:
        """The tunnel to this destination was made for another source: of a host with several addresses, or behind a
        gateway. The packet waits for one of its own, unless it has a connection's mark."""
        if _is_multicast(packet):  # the kernel's own listener reports (MLD) on the device
            self.counters["multicast"] += 1
            return
        self.counters["no_sa"] += 1
        ends = addresses(packet)
        if mark is None:
            self._kept.hold(b"".join(ends), bytes(packet), offload, now)
        source, destination = (_inner_address(part) for part in ends)
        if self._limit.allows("no-sa", (source, destination), now):
            self._on_event(DatapathEvent("no-sa", 0, destination, source=source))

    def _send_waiting(self, now: float) -> None:
        """What has an SA now goes on."""
        self._now = now
        for ends in self._kept.ends():
            packet = self._kept.first(ends)
            if self.database.outbound(packet) is None:
                continue
            for data, offload in self._kept.release(ends):
                self.counters["waited"] += 1
                self._outward(memoryview(data), offload, now)
            self._lay_rests()
            self._outbox.flush()

    def pump_outer(self, outer: OuterSocket, limit: int, now: float) -> int:
        """Take datagrams off the network, up to `limit` system calls. Returns how many datagrams there were."""
        count = 0
        inbound = self.database.by_spi.get
        for _ in range(limit):
            received = outer.receive()
            if received is None:
                break
            data, _, _, size = received
            start, total = 0, len(data)
            while start < total or not total:
                pair = inbound(bytes(data[start : start + 4]))
                opened = pair.open_ahead(data, start, size) if pair is not None else ()
                if opened:
                    assert pair is not None
                    self._opened(pair, opened, now)
                else:
                    self._datagram(pair, data[start : start + size], received, outer.port, now)
                taken = len(opened) or 1
                start += taken * size
                count += taken
                if not total:
                    break
        self._inbox.flush()
        return count

    def _datagram(
        self, pair: EspPair | None, data: memoryview, received: Received, port: int, now: float
    ) -> None:
        """One that does not simply follow those before."""
        if pair is None:
            self._stranger(data, received, port, now)
            return
        try:
            plaintext = pair.open(data)
        except (ReplayError, IntegrityError, ParseError, SaEnded) as error:
            self.counters[_REFUSALS[type(error)]] += 1
        else:
            self._opened(pair, (plaintext,), now)

    def _opened(self, pair: EspPair, plaintexts: Sequence[bytes], now: float) -> None:
        """Authentic plaintexts, of which the last has the pair's latest number."""
        sequence = pair.latest - len(plaintexts)
        aggregated, coalesces, verify = (
            pair.packer is not None,
            self._device.coalesces,
            not pair.for_this_host,
        )
        for plaintext in plaintexts:
            sequence += 1
            try:
                if aggregated:
                    for parts, offload in pair.packets(plaintext, sequence, now):
                        self._unpacked(pair, parts, offload, now)
                    continue
                packet = pair.packet(plaintext, now)
            except (ParseError, SaEnded) as error:
                self.counters[_REFUSALS[type(error)]] += 1
            except SelectorError:
                self._mismatch(pair, now)
            else:
                if packet is None:
                    self.counters["dummies"] += 1
                elif coalesces:
                    self._inbox.add(packet, verify)
                else:
                    self._deliver_one(packet)
        if pair.budget_in.alarm:
            self._alarms(pair, now)

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

    def _mismatch(self, pair: EspPair, now: float) -> None:
        self.counters["selector_mismatch"] += 1
        self._report(
            "selector-mismatch",
            pair.pair.remote.address,
            now,
            spi=pair.pair.spi_in,
            detail="inbound packet outside of the selectors",
        )

    def _unpacked(self, pair: EspPair, parts: Sequence[Bytes], offload: Offload, now: float) -> None:
        """A packet out of AGGFRAG payloads."""
        if not pair.permits(parts[0]):
            self._mismatch(pair, now)
        elif not offload.flags:
            packet = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
            if self._device.coalesces:
                self._inbox.add(packet, not pair.for_this_host)
            else:
                self._deliver_one(packet)
        elif self._device.coalesces:
            if offload is UDP4_CHECKSUM:
                self._inbox.add_unfinished(bytes(parts[0]) if len(parts) == 1 else b"".join(parts))
            else:
                self._inbox.flush()  # what came before goes before
                self._deliver(parts, offload.pack())
        else:
            packet_view = memoryview(bytearray(b"".join(parts)))
            if not offload.gso:
                finish(packet_view, *offload[4:])
                self._deliver((packet_view,), NONE_BYTES)
            else:
                for header, payload in segments(packet_view, offload)[2]:
                    self._deliver((header, payload), NONE_BYTES)

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


def _size(payload: Payload) -> int:
    return AGGFRAG_HEADER + sum(map(len, payload[1]))


def _is_multicast(packet: Bytes) -> bool:
    return packet[16] >> 4 == 0xE if packet[0] >> 4 == 4 else packet[24] == 0xFF


def _address(received: Received) -> IpAddress:
    text = received[2][0]
    if not isinstance(text, str):
        raise MisuseError("a socket of another family")
    return IPv6Address(text.partition("%")[0]) if ":" in text else IPv4Address(text)


def _inner_address(packed: bytes) -> IpAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
