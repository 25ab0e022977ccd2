"""The forwarder with super-packets, batches, aggregation and transport mode, between in-memory ends."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.datapath.esp.offload import GSO_UDP, NEEDS_CHECKSUM, NONE, Offload
from oepy.datapath.tun.forwarder import Forwarder
from oepy.datapath.tun.outbox import MAX_PACKETS
from oepy.errors import OepyError
from oepy.interfaces import DatapathEvent
from oepy.model import EspSuite, Lifetime, SaPair
from tests.fakes.datapath import SUITES, MemoryDevice, MemorySocket, ipv4_packet, mirrored, pairs, selector
from tests.fakes.network_card import cut, with_checksums
from tests.unit.test_esp_offload import ACK, PSH, SYN, _super, tcp, udp

A, B = "192.0.2.1", "192.0.2.2"


class End:
    def __init__(self, *installed: SaPair, own: bool = True, coalesces: bool = True) -> None:
        self.device, self.socket = MemoryDevice(), MemorySocket()
        self.device.coalesces = coalesces
        self.events: list[DatapathEvent] = []
        self.forwarder = Forwarder(
            self.device, {4: self.socket}, 1390, self.events.append, lambda *_: None, lambda _: own
        )
        for pair in installed:
            self.forwarder.install(pair, True, 0.0)

    def send(self, *packets: bytes | tuple[bytes, Offload]) -> list[bytes]:
        """In one turn; the datagrams that leave."""
        self.device.incoming += packets
        while self.forwarder.pump_device(100, 1.0):
            pass
        sent = [datagram for datagram, _ in self.socket.sent]
        self.socket.sent.clear()
        return sent

    def take(self, datagrams: list[bytes]) -> list[bytes]:
        """As a socket with UDP_GRO gives them: runs of one size, of which the last may be shorter."""
        run: list[bytes] = []
        for datagram in datagrams:
            if run and (len(run[-1]) < len(run[0]) or len(datagram) > len(run[0])):
                self.socket.deliver(*run)
                run = []
            run.append(datagram)
        if run:
            self.socket.deliver(*run)
        while self.forwarder.pump_outer(self.socket, 100, 1.0):
            pass
        written, self.device.written = self.device.written, []
        return written


def _ends(aggregation: bool = False, super_packets: bool = False, **options: object) -> tuple[End, End]:
    one, _ = pairs(**options)  # type: ignore[arg-type]
    one = dataclasses.replace(one, aggregation=aggregation, super_packets=super_packets)
    return End(one), End(mirrored(one))


MODES = [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize(("aggregation", "super_packets"), MODES)
@pytest.mark.parametrize("suite", SUITES[::3], ids=str)
def test_a_burst_crosses_in_few_calls(suite: EspSuite, aggregation: bool, super_packets: bool) -> None:
    """A super-packet of 40 segments comes out as the network card would have cut it, and crosses into the other
    kernel at once; the network sees one or two system calls."""
    a, b = _ends(aggregation, super_packets, suite=suite)
    packet, offload = _super(4, bytes(range(256)) * 204, 1338, ACK | PSH, b"", 0xFFFFFF00, 0xFFFE)
    datagrams = a.send((packet, offload))
    assert len(a.socket.calls) <= 2
    assert all(len(datagram) + 48 <= 1500 for datagram in datagrams)
    assert b.take(datagrams) == cut(packet, offload)
    assert len(b.device.crossings) == 1
    assert b.forwarder.counters == a.forwarder.counters == {}


@pytest.mark.parametrize(("aggregation", "super_packets"), MODES)
@pytest.mark.parametrize("own", [True, False])
def test_unfinished_checksums_are_right_on_the_other_side(
    aggregation: bool, super_packets: bool, own: bool
) -> None:
    """TCP and UDP, small and large, for the host itself and to be forwarded; SYNs are clamped."""
    a, b = _ends(aggregation, super_packets)
    b.forwarder._is_own = lambda _: own
    b.forwarder.install(
        mirrored(dataclasses.replace(pairs()[0], aggregation=aggregation, super_packets=super_packets)),
        True,
        0.0,
    )
    for whole in (udp(4, b"x"), udp(4, bytes(1300)), tcp(4, b"data"), tcp(4, bytes(1300))):
        offset = 6 if whole[9] == 17 else 16
        packet, _ = _partial(whole, offset)
        offload = Offload(NEEDS_CHECKSUM, 0, 0, 0, 20, offset)
        assert b.take(a.send((packet, offload))) == [whole]
    syn = tcp(4, b"", flags=SYN, options=b"\x02\x04\x05\xb4")
    packet, _ = _partial(syn, 16)
    expected = tcp(4, b"", flags=SYN, options=b"\x02\x04" + (1350).to_bytes(2, "big"))
    assert b.take(a.send((packet, Offload(NEEDS_CHECKSUM, 0, 0, 0, 20, 16)))) == [expected]


def _partial(whole: bytes, offset: int) -> tuple[bytes, int]:
    from oepy.datapath.esp.checksum import pseudo_header

    changed = bytearray(whole)
    value = pseudo_header(whole[12:20], whole[9], len(whole) - 20) % 65535
    changed[20 + offset : 22 + offset] = value.to_bytes(2, "big")
    return bytes(changed), value


@pytest.mark.parametrize(("aggregation", "super_packets"), MODES)
@given(
    st.lists(
        st.one_of(
            st.integers(0, 1360).map(lambda size: udp(4, bytes(size))),
            st.integers(1, 1340).map(lambda size: tcp(4, b"\x55" * size)),
            st.integers(3000, 30_000).map(lambda size: _super(4, b"\x33" * size, 1300, ACK, b"", 5, 7)),
        ),
        max_size=25,
    )
)
def test_any_traffic_comes_out_as_it_went_in(
    aggregation: bool, super_packets: bool, traffic: list[bytes | tuple[bytes, Offload]]
) -> None:
    """In order for each protocol, nothing lost, nothing added, with and without aggregation."""
    a, b = _ends(aggregation, super_packets)
    expected: list[bytes] = []
    for entry in traffic:
        expected += cut(*entry) if isinstance(entry, tuple) else [entry]
    found = b.take(a.send(*traffic))
    for protocol in (6, 17):
        assert [p for p in found if p[9] == protocol] == [p for p in expected if p[9] == protocol]
    assert b.forwarder.counters == {}


def test_small_packets_share_a_payload_and_never_wait() -> None:
    """Fifty datagrams of one turn leave in a few ESP packets; a single one leaves in its own turn."""
    a, b = _ends(aggregation=True)
    packets = [udp(4, bytes([number]) * 64) for number in range(50)]
    datagrams = a.send(*packets)
    assert len(datagrams) == 4
    assert b.take(datagrams) == packets
    assert b.take(a.send(packets[0])) == packets[:1]
    assert a.forwarder._waiting == {}


def test_packets_of_one_peer_leave_together() -> None:
    """Several SAs to one endpoint fill one system call, and each packet is of its own SA; a longer packet
    begins the next one, a shorter one ends it."""
    made = [
        pairs(selectors=(selector(A), selector(f"10.0.0.{n}")), spis=(0x1000 + n, 0x2000 + n))[0]
        for n in range(8)
    ]
    a = End(*made)
    b = End(*map(mirrored, made))
    packets = [ipv4_packet(A, f"10.0.0.{n % 8}", bytes([n]) * 100) for n in range(40)]
    assert b.take(a.send(*packets)) == packets
    assert a.socket.calls == [40]
    a.socket.calls.clear()
    sizes = (100, 100, 60, 60, 200, 200, 10)
    a.send(*(ipv4_packet(A, "10.0.0.1", bytes(size)) for size in sizes))
    assert a.socket.calls == [3, 1, 3]
    a.socket.calls.clear()
    a.send(*(ipv4_packet(A, "10.0.0.1", bytes(8)) for _ in range(MAX_PACKETS + 1)))
    assert a.socket.calls == [MAX_PACKETS, 1]


def test_offloads_are_wanted_only_for_peers_that_take_super_packets() -> None:
    """For all others the kernel cuts faster; the last such SA switches them off again."""
    plain, offloading = pairs()[0], pairs(remote="192.0.2.3", spis=(0x3003, 0x4004))[0]
    a = End(plain)
    assert not a.device.offloads
    a.forwarder.install(dataclasses.replace(offloading, aggregation=True, super_packets=True), True, 0.0)
    assert a.device.offloads
    a.forwarder.remove(0x3003)
    assert not a.device.offloads


@pytest.mark.parametrize(("aggregation", "super_packets"), MODES)
def test_a_device_without_super_packets_gets_segments(aggregation: bool, super_packets: bool) -> None:
    """All of them whole, with their checksums."""
    a, _ = _ends(aggregation, super_packets)
    one = dataclasses.replace(pairs()[0], aggregation=aggregation, super_packets=super_packets)
    b = End(mirrored(one), coalesces=False)
    packet, offload = _super(4, bytes(10_000), 1300, ACK, b"", 1, 1)
    assert b.take(a.send((packet, offload))) == cut(packet, offload)
    assert all(said == NONE for _, said in b.device.crossings)
    whole = udp(4, bytes(600))
    assert b.take(a.send((_partial(whole, 6)[0], Offload(NEEDS_CHECKSUM, 0, 0, 0, 20, 6)))) == [whole]


@pytest.mark.parametrize(("aggregation", "super_packets"), MODES)
def test_a_hard_limit_holds_within_a_burst(aggregation: bool, super_packets: bool) -> None:
    """Ten ESP packets are allowed: not one more leaves, and the pair is gone."""
    one, _ = pairs(lifetime=Lifetime(soft_packets=5, hard_packets=10))
    one = dataclasses.replace(one, aggregation=aggregation, super_packets=super_packets)
    a, b = End(one), End(mirrored(one))
    packet, offload = _super(4, bytes(40_000), 1300, ACK, b"", 1, 1)
    datagrams = a.send((packet, offload))
    assert len(datagrams) == 10
    assert "hard-expire" in [event.kind for event in a.events]
    assert a.send(udp(4, b"more")) == []
    b.take(datagrams)
    assert b.forwarder.counters.get("malformed_in", 0) == 0


def test_without_a_replay_window_bursts_come_in_again_and_again() -> None:
    """Manual keys, window 0: a sender that begins anew is heard, whatever was received before."""
    one, _ = pairs(replay_window=0)
    b = End(mirrored(one))
    packets = [udp(4, bytes([number]) * 600) for number in range(20)]
    for _ in range(2):
        assert b.take(End(one).send(*packets)) == packets
    assert b.forwarder.counters == {}


@pytest.mark.parametrize(("aggregation", "super_packets"), MODES)
def test_a_limit_within_many_batches(aggregation: bool, super_packets: bool) -> None:
    """The limit lies behind the first system call of a burst of a thousand segments."""
    one, _ = pairs(lifetime=Lifetime(hard_packets=70))
    a = End(dataclasses.replace(one, aggregation=aggregation, super_packets=super_packets))
    burst = [_super(4, bytes(50_000), 150, ACK, b"", 1, 1) for _ in range(3)]
    assert len(a.send(*burst)) == 70
    assert a.forwarder.counters["sa_ended"] + a.forwarder.counters["no_sa"] > 0
    assert [event.kind for event in a.events][:1] == ["hard-expire"]


def test_aggregated_packets_outside_of_the_selectors_are_dropped_alone() -> None:
    """Two of three in one payload come through; the third is counted and told of."""
    wide, _ = pairs(selectors=(selector("0.0.0.0/0"), selector("0.0.0.0/0")))
    narrow = pairs()[1]
    a = End(dataclasses.replace(wide, aggregation=True))
    b = End(dataclasses.replace(narrow, aggregation=True))
    good = [ipv4_packet(A, B, b"1"), ipv4_packet(A, B, b"2")]
    datagrams = a.send(good[0], ipv4_packet("10.0.0.1", B), good[1])
    assert len(datagrams) == 1
    assert b.take(datagrams) == good
    assert [event.kind for event in b.events] == ["selector-mismatch"]
    assert b.forwarder.counters == {"selector_mismatch": 1}


def test_an_sa_with_aggregation_takes_nothing_else() -> None:
    """A plain packet from a peer that has agreed on AGGFRAG payloads is malformed, and the other way round."""
    plain, aggregating = End(pairs()[0]), End(dataclasses.replace(pairs()[0], aggregation=True))
    other = End(dataclasses.replace(pairs()[1], aggregation=True))
    assert other.take(plain.send(udp(4, b"x"))) == []
    assert other.forwarder.counters == {"malformed_in": 1}
    other = End(pairs()[1])
    assert other.take(aggregating.send(udp(4, b"x"))) == []
    assert other.forwarder.counters == {"malformed_in": 1}


def test_what_an_unaware_peer_could_not_read_is_not_sent() -> None:
    """Aggregation without super-packets: UDP and TCP bursts are cut and summed up before they go."""
    a, b = _ends(aggregation=True)
    whole = udp(4, bytes(5000))
    offload = Offload(NEEDS_CHECKSUM, GSO_UDP, 28, 1200, 20, 6)
    assert b.take(a.send((whole, offload))) == cut(whole, offload)
    assert [said.flags for _, said in b.device.crossings] == [0] * 5


# -- transport mode --------------------------------------------------------------------------------------


def _transport(**options: object) -> tuple[End, End]:
    one, _ = pairs(**options)  # type: ignore[arg-type]
    one = dataclasses.replace(one, mode="transport")
    return End(one), End(mirrored(one))


def _same_but_header(found: list[bytes], expected: list[bytes]) -> bool:
    return [(p[9], p[12:]) for p in found] == [(p[9], p[12:]) for p in expected]


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_transport_mode_carries_the_payload_alone(suite: EspSuite) -> None:
    """Twenty bytes less than tunnel mode, alignment aside; the IP header is made anew, addresses and protocol
    right, its checksum too."""
    a, b = _transport(suite=suite)
    packets = [udp(4, bytes(100)), tcp(4, bytes(900)), ipv4_packet(A, B, bytes(40), 1)]
    for packet in packets:
        assert _same_but_header(b.take(a.send(packet)), [packet])
    tunnel = End(pairs(suite=suite)[0])
    assert len(a.send(packets[0])[0]) <= len(tunnel.send(packets[0])[0]) - 16
    (again,) = b.take(a.send(packets[0]))
    assert with_checksums(again) == again


def test_transport_mode_cuts_bursts() -> None:
    """A super-packet in transport mode: its segments arrive, in one crossing."""
    a, b = _transport()
    packet, offload = _super(4, bytes(20_000), 1300, ACK, b"", 1, 0)
    found = b.take(a.send((packet, offload)))
    assert [p[20:] for p in found] == [p[20:] for p in cut(packet, offload)]


def test_transport_mode_refuses_what_has_more_than_a_payload() -> None:
    """Fragments (RFC 4303 §3.3.4), IP options and IP in IP are counted, not sent."""
    a, _ = _transport()
    fragment = bytearray(udp(4, bytes(40)))
    fragment[6] = 0x20
    inside = ipv4_packet(A, B, bytes(40), 4)
    options = bytearray(udp(4, bytes(40)))
    options[0] = 0x46
    assert a.send(bytes(fragment), inside, bytes(options)) == []
    assert a.forwarder.counters == {"not_for_transport": 3}


def test_transport_mode_over_ipv6() -> None:
    """With its own header; a tunnelled packet is not taken for a payload."""
    one, other = pairs("2001:db8::1", "2001:db8::2")
    a, b = End(), End()
    for end, pair in ((a, one), (b, other)):
        end.forwarder._outers = {6: end.socket}
        end.forwarder._outbox._outers = {6: end.socket}
        end.forwarder.install(dataclasses.replace(pair, mode="transport"), True, 0.0)
    packet = udp(6, bytes(300))
    assert b.take(a.send(packet)) == [packet]
    assert a.forwarder.counters == b.forwarder.counters == {}


def test_transport_mode_wants_one_address_on_each_side() -> None:
    """Anything wider could not be rebuilt; and aggregation is for tunnels."""
    wide = dataclasses.replace(pairs(inner=("10.0.0.0/8", B))[0], mode="transport")
    with pytest.raises(OepyError, match="one address"):
        End(wide)
    with pytest.raises(OepyError, match="tunnel mode"):
        End(dataclasses.replace(pairs()[0], mode="transport", aggregation=True))
    with pytest.raises(OepyError, match="AH"):
        End(dataclasses.replace(pairs()[0], protocol="ah"))
