"""The datapath's forwarder between in-memory ends, the MSS clamp, and the control messages."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.datapath.esp.mss import clamp
from oepy.datapath.esp.offload import NONE
from oepy.datapath.tun import control
from oepy.datapath.tun.forwarder import MAX_EVENTS_PER_INTERVAL, Forwarder
from oepy.datapath.tun.waiting import LIFE, MAX_BYTES, MAX_OF_ONE, MAX_PACKETS, Waiting
from oepy.errors import ParseError
from oepy.interfaces import DatapathEvent
from oepy.model import Endpoint, EspSuite, Lifetime, SaCounters, SaPair
from tests.fakes.datapath import MemoryDevice, MemorySocket, ipv4_packet, pairs, selector

A, B = "192.0.2.1", "192.0.2.2"


class End:
    """One end: a forwarder with its device, socket, events and IKE messages."""

    def __init__(self, pair: SaPair, *, sending: bool = True) -> None:
        self.device, self.socket = MemoryDevice(), MemorySocket()
        self.events: list[DatapathEvent] = []
        self.ike: list[tuple[bytes, Endpoint, Endpoint]] = []
        self.forwarder = Forwarder(
            self.device,
            {4: self.socket},
            1390,
            self.events.append,
            lambda *message: self.ike.append(message),
        )
        self.forwarder.install(pair, sending, 0.0)

    def send(self, packet: bytes, now: float = 0.0) -> None:
        self.device.incoming.append(packet)
        assert self.forwarder.pump_device(10, now) == 1

    def take(self, data: bytes, now: float = 0.0, source: str = B) -> None:
        self.socket.deliver(data, source=source)
        assert self.forwarder.pump_outer(self.socket, 10, now) == 1


@pytest.fixture
def ends() -> tuple[End, End]:
    one, other = pairs()
    return End(one), End(other)


def test_packets_cross_between_two_forwarders(ends: tuple[End, End]) -> None:
    """From one host's device to the other's, with the prepared route."""
    a, b = ends
    packet = ipv4_packet(A, B)
    a.send(packet)
    ((datagram, route),) = a.socket.sent
    assert route.address == (B, 4500)
    b.take(datagram)
    assert b.device.written == [packet]
    b.take(datagram)
    assert b.device.written == [packet]
    assert b.forwarder.counters["replayed"] == 1


@pytest.mark.parametrize("aggregation", [False, True])
def test_padded_packets_are_all_of_one_size(aggregation: bool) -> None:
    """tfc_padding: sizes on the wire say nothing, and the other side gets what was sent."""
    one, other = pairs()
    one = dataclasses.replace(one, tfc_padding=1200, aggregation=aggregation, super_packets=aggregation)
    other = dataclasses.replace(other, aggregation=aggregation, super_packets=aggregation)
    a, b = End(one), End(other)
    small = [ipv4_packet(A, B, bytes(size)) for size in (0, 1, 500, 1172)]
    large = ipv4_packet(A, B, bytes(1300))
    for packet in (*small, large):
        a.send(packet)
    sizes = [len(data) for data, _ in a.socket.sent]
    assert len(set(sizes[:4])) == 1
    assert sizes[4] > sizes[0] > 1200
    for data, _ in list(a.socket.sent):
        b.take(data)
    assert b.device.written == [*small, large]


def test_padding_goes_up_to_the_mtu_and_not_into_transport_mode() -> None:
    one, other = pairs()
    a, b = End(dataclasses.replace(one, tfc_padding=65_535)), End(other)
    a.send(ipv4_packet(A, B))
    a.send(ipv4_packet(A, B, bytes(1362)))
    (first, _), (second, _) = a.socket.sent
    assert len(first) == len(second)
    b.take(first)
    assert b.device.written == [ipv4_packet(A, B)]
    bare = End(dataclasses.replace(one, tfc_padding=65_535, mode="transport"))
    bare.send(ipv4_packet(A, B))
    assert len(bare.socket.sent[0][0]) < 100


def test_what_has_no_sa_waits_and_is_counted(ends: tuple[End, End]) -> None:
    """Also rubbish from the device, and a pair that only receives: what waited goes first when it may send."""
    a, _ = ends
    a.send(ipv4_packet(A, "192.0.2.3"))
    a.send(b"\x45")
    assert a.socket.sent == []
    assert a.forwarder.counters == {"no_sa": 1, "malformed_out": 1}
    quiet = End(pairs()[0], sending=False)
    quiet.send(ipv4_packet(A, B))
    assert quiet.forwarder.counters["no_sa"] == 1
    quiet.forwarder.install(pairs()[0], True, 1.0)
    quiet.send(ipv4_packet(A, B))
    assert len(quiet.socket.sent) == 2
    assert quiet.forwarder.counters["waited"] == 1


def test_what_waits_leaves_by_its_own_sa_in_time_or_not_at_all() -> None:
    """In order, bounded for each pair of addresses and in all, and never after its time."""
    one = End(pairs()[0], sending=False)
    for number in range(MAX_OF_ONE + 5):
        one.send(ipv4_packet(A, B, bytes((number,))))
    one.send(ipv4_packet(A, "192.0.2.9"))
    one.forwarder.install(pairs()[0], True, 1.0)
    assert len(one.socket.sent) == MAX_OF_ONE
    sequence = [int.from_bytes(data[4:8], "big") for data, _ in one.socket.sent]
    assert sequence == sorted(sequence)
    late = End(pairs()[0], sending=False)
    late.send(ipv4_packet(A, B))
    late.forwarder.tick(LIFE + 1.0)
    late.forwarder.install(pairs()[0], True, LIFE + 1.0)
    assert late.socket.sent == []


def test_nobody_fills_the_memory_with_what_waits() -> None:
    """By many addresses, or by large packets: what was there first stays."""
    waiting = Waiting()
    for number in range(MAX_PACKETS + 100):
        waiting.hold(number.to_bytes(8, "big"), bytes(40), NONE, 0.0)
    assert len(waiting) == MAX_PACKETS
    waiting.expire(LIFE)
    assert len(waiting) == 0
    for number in range(100):
        waiting.hold(number.to_bytes(8, "big"), bytes(65_000), NONE, 0.0)
    assert len(waiting) == MAX_BYTES // 65_000
    assert [len(packet) for packet, _ in waiting.release(bytes(8))] == [65_000]
    assert len(waiting) == MAX_BYTES // 65_000 - 1


def test_ike_and_keepalives_are_told_from_esp(ends: tuple[End, End]) -> None:
    """The marker is stripped; 0xff is nothing; both addresses are known."""
    a, _ = ends
    a.take(bytes(4) + b"ike message")
    a.take(b"\xff")
    assert a.ike == [(b"ike message", Endpoint(ip_address(A), 4500), Endpoint(ip_address(B), 4500))]
    assert a.forwarder.counters == {"keepalives": 1}


def test_unknown_spis_are_reported_rarely(ends: tuple[End, End]) -> None:
    """One event a peer in ten seconds, a bounded number in all, every packet counted."""
    a, _ = ends
    for _ in range(5):
        a.take(b"\x99\x00\x00\x01" + bytes(20))
    assert a.events == [DatapathEvent("unknown-spi", 0x99000001, ip_address(B))]
    a.take(b"\x99\x00\x00\x01" + bytes(20), now=11.0)
    assert len(a.events) == 2
    for number in range(1000):
        a.take(b"\x99\x00\x00\x01" + bytes(20), now=11.5, source=str(ip_address(number + 1)))
    assert len(a.events) <= 2 + MAX_EVENTS_PER_INTERVAL
    assert a.forwarder.counters["unknown_spi"] == 1006


@given(st.binary(max_size=60))
def test_strangers_datagrams_end_in_a_counter(data: bytes) -> None:
    """Whatever arrives on the port, nothing is written to the device and nothing is raised."""
    a = End(pairs()[0])
    a.take(data)
    a.take(b"\x00\x00\x10\x01" + data)
    assert a.device.written == []
    assert sum(a.forwarder.counters.values()) + len(a.ike) == 2


def test_an_authentic_packet_outside_of_its_selectors_is_reported() -> None:
    """Dropped, counted, one event; the peer's SA stays."""
    wide, _ = pairs(selectors=(selector("0.0.0.0/0"), selector("0.0.0.0/0")))
    a, b = End(wide), End(pairs()[1])
    a.send(ipv4_packet("10.0.0.1", B))
    b.take(a.socket.sent[0][0])
    assert b.device.written == []
    assert [event.kind for event in b.events] == ["selector-mismatch"]
    assert b.forwarder.counters["selector_mismatch"] == 1


def test_a_hard_limit_removes_the_pair_and_says_so() -> None:
    """By packets at once, by time with the tick."""
    a = End(pairs(lifetime=Lifetime(soft_packets=1, hard_packets=2))[0])
    for _ in range(3):
        a.send(ipv4_packet(A, B))
    assert [event.kind for event in a.events] == ["soft-expire", "hard-expire", "no-sa"]
    assert len(a.socket.sent) == 2
    assert a.forwarder.counters["no_sa"] == 1
    b = End(pairs(lifetime=Lifetime(hard_seconds=5))[0])
    b.forwarder.tick(4.0)
    assert b.events == []
    b.forwarder.tick(5.0)
    assert b.events == [DatapathEvent("hard-expire", 0x1001, ip_address(B))]
    b.send(ipv4_packet(A, B))
    assert b.socket.sent == []


def test_losses_outside_are_counted(ends: tuple[End, End]) -> None:
    """A socket and a device that refuse."""
    a, b = ends
    b.send(ipv4_packet(B, A))
    a.socket.refuses = a.device.refuses = True
    a.send(ipv4_packet(A, B))
    a.take(b.socket.sent[0][0])
    assert a.forwarder.counters == {"send_failed": 1, "device_refused": 1}


def test_an_spi_of_another_pair_is_refused(ends: tuple[End, End]) -> None:
    """The same pair again is a switch to sending; another with its SPI is a mistake."""
    a, _ = ends
    with pytest.raises(ValueError, match="in use"):
        a.forwarder.install(pairs(spis=(0x1001, 0x9999))[0], True, 0.0)
    a.forwarder.remove(0x1001)
    a.forwarder.remove(0x1001)
    a.forwarder.install(pairs(spis=(0x1001, 0x9999))[0], True, 0.0)
    with pytest.raises(ValueError, match="IPv6"):
        a.forwarder.install(pairs("2001:db8::1", "2001:db8::2", spis=(7777, 1))[0], True, 0.0)


def test_a_moved_peer_is_followed_when_told(ends: tuple[End, End]) -> None:
    """The same pair with other endpoints: the next packet goes there, the sequence number goes on."""
    a, b = ends
    a.send(ipv4_packet(A, B))
    moved = dataclasses.replace(pairs()[0], remote=Endpoint(ip_address("192.0.2.77"), 40123))
    a.forwarder.install(moved, True, 1.0)
    a.send(ipv4_packet(A, B))
    assert [route.address for _, route in a.socket.sent] == [(B, 4500), ("192.0.2.77", 40123)]
    for datagram, _ in a.socket.sent:
        b.take(datagram)
    assert len(b.device.written) == 2


# -- the MSS clamp ---------------------------------------------------------------------------------------


def _checksum(source: bytes, destination: bytes, segment: bytes) -> int:
    data = source + destination + struct.pack("!II", len(segment), 6) + segment + b"\0" * (len(segment) & 1)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _syn(version: int, options: bytes, flags: int = 2) -> bytes:
    padded = options + b"\x01" * (-len(options) & 3)
    segment = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, (5 + len(padded) // 4) << 4, flags, 500, 0, 0) + padded
    source, destination = (
        bytes(range(4 if version == 4 else 16)),
        bytes(range(10, 14 if version == 4 else 26)),
    )
    segment = segment[:16] + struct.pack("!H", _checksum(source, destination, segment)) + segment[18:]
    if version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, 6, 0)
    else:
        head = struct.pack("!IHBB", 0x60000000, len(segment), 6, 64)
    return head + source + destination + segment


@given(st.sampled_from([4, 6]), st.integers(0, 65535), st.integers(0, 3), st.integers(68 + 60, 65535))
def test_a_clamped_syn_is_whole(version: int, announced: int, shift: int, mtu: int) -> None:
    """The MSS is the smaller of what was announced and what fits, at any alignment; the checksum holds; all
    other bytes are as before."""
    packet = _syn(version, b"\x01" * shift + b"\x02\x04" + announced.to_bytes(2, "big") + b"\x01\x03\x03\x07")
    clamped = clamp(packet, mtu)
    start = 20 if version == 4 else 40
    position = start + 20 + shift + 2
    expected = min(announced, mtu - start - 20)
    assert int.from_bytes(clamped[position : position + 2], "big") == expected
    half = 4 if version == 4 else 16
    addresses = clamped[start - 2 * half : start]
    assert _checksum(addresses[:half], addresses[half:], clamped[start:]) == 0
    assert len(clamped) == len(packet)
    if expected == announced:
        assert clamped == packet


@given(st.binary(max_size=40), st.integers(0, 255), st.sampled_from([4, 6]))
def test_any_options_leave_the_clamp_unharmed(options: bytes, flags: int, version: int) -> None:
    """No exception and no other length, for any rubbish in the options."""
    packet = _syn(version, options, flags)
    assert len(clamp(packet, 1390)) == len(packet)
    assert len(clamp(packet[:-3], 1390)) == len(packet) - 3


# -- control messages ------------------------------------------------------------------------------------


def test_pairs_counters_and_events_come_back_from_the_control_channel() -> None:
    """Encoded, through JSON, decoded: equal, keys and all."""
    pair = pairs(
        "2001:db8::1",
        "2001:db8::2",
        suite=EspSuite("aes256", "sha512", False),
        lifetime=Lifetime(1.5, 2.5, 3, 4, 5, 6),
        selectors=(selector("10.0.0.0/8"), selector("192.0.2.0/24", 6, 22)),
    )[0]
    assert control.decode_pair(control.decode(control.encode(control.encode_pair(pair)))) == pair
    counters = SaCounters(1, 2, 3, 4, 5, 6, 7, 8, 9.5, 10.5)
    assert control.decode_counters(control.encode_counters(counters)) == counters
    for event in (DatapathEvent("failed", detail="x"), DatapathEvent("unknown-spi", 5, ip_address(A))):
        assert control.decode_event(control.encode_event(event)) == event


@pytest.mark.parametrize(("local", "remote"), [(A, B), ("2001:db8::1", "2001:db8::2")])
def test_ike_frames_come_back(local: str, remote: str) -> None:
    """Data and both endpoints, in both families."""
    ends = Endpoint(ip_address(local), 4500), Endpoint(ip_address(remote), 40000)
    assert control.decode_ike(control.encode_ike(b"data", *ends)) == (b"data", *ends)


@given(st.binary(max_size=60))
def test_broken_frames_are_refused(data: bytes) -> None:
    """Parse, or ParseError."""
    for parse in (control.decode, control.decode_ike):
        with contextlib.suppress(ParseError):
            parse(data)
