"""Checksums, segmentation and coalescing, each against the slow network card in tests/fakes."""

from __future__ import annotations

import contextlib
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.datapath.esp.checksum import checksum_of, finish, pseudo_header, word_sum
from oepy.datapath.esp.coalesce import MAX_FLOWS, Coalescer
from oepy.datapath.esp.offload import (
    GSO_ECN,
    GSO_TCP4,
    GSO_TCP6,
    GSO_UDP,
    NEEDS_CHECKSUM,
    Offload,
    parse,
)
from oepy.datapath.esp.segment import segments
from oepy.datapath.esp.transport import TransportHeader
from oepy.errors import ParseError
from tests.fakes.network_card import cut, ones_complement_sum, transport_sum, with_checksums

ENDS = {
    4: (ip_address("192.0.2.1").packed, ip_address("192.0.2.2").packed),
    6: (ip_address("2001:db8::1").packed, ip_address("2001:db8::2").packed),
}
ACK, PSH, FIN, SYN, CWR, ECE, URG = 0x10, 0x08, 0x01, 0x02, 0x80, 0x40, 0x20


def tcp(
    version: int,
    payload: bytes,
    *,
    sequence: int = 1,
    flags: int = ACK,
    ident: int = 7,
    options: bytes = b"",
    ports: tuple[int, int] = (1000, 2000),
    window: int = 500,
    ack: int = 99,
    ttl: int = 64,
    fragment: int = 0x4000,
    tos: int = 0,
) -> bytes:
    """One TCP packet with right checksums."""
    head = struct.pack(
        "!HHIIHHHH", *ports, sequence & 0xFFFFFFFF, ack, (5 + len(options) // 4) << 12 | flags, window, 0, 0
    )
    return ip(version, 6, head + options + payload, ident=ident, ttl=ttl, fragment=fragment, tos=tos)


def udp(version: int, payload: bytes, *, ident: int = 7) -> bytes:
    return ip(version, 17, struct.pack("!HHHH", 1000, 2000, 8 + len(payload), 0) + payload, ident=ident)


def ip(
    version: int,
    protocol: int,
    body: bytes,
    *,
    ident: int = 7,
    ttl: int = 64,
    fragment: int = 0x4000,
    tos: int = 0,
) -> bytes:
    source, destination = ENDS[version]
    if version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, tos, 20 + len(body), ident & 0xFFFF, fragment, ttl, protocol, 0)
    else:
        head = struct.pack("!IHBB", 0x60000000 | tos << 20, len(body), protocol, ttl)
    return with_checksums(head + source + destination + body)


def _super(
    version: int, payload: bytes, size: int, flags: int, options: bytes, sequence: int, ident: int
) -> tuple[bytes, Offload]:
    """As the kernel hands it over: one packet, its checksum that of the pseudo-header."""
    packet = bytearray(tcp(version, payload, sequence=sequence, flags=flags, options=options, ident=ident))
    start = 20 if version == 4 else 40
    addresses = packet[12:20] if version == 4 else packet[8:40]
    partial = ones_complement_sum(bytes(addresses) + struct.pack("!II", len(packet) - start, 6))
    packet[start + 16 : start + 18] = partial.to_bytes(2, "big")
    gso = GSO_TCP4 if version == 4 else GSO_TCP6
    return bytes(packet), Offload(NEEDS_CHECKSUM, gso, start + 20 + len(options), size, start, 16)


def _cut_by_us(packet: bytes, offload: Offload) -> list[bytes]:
    count, header_length, pieces = segments(memoryview(bytearray(packet)), offload)
    made = [bytes(header) + bytes(payload) for header, payload in pieces]
    assert len(made) == count
    assert sum(map(len, made)) == len(packet) + (count - 1) * header_length
    return made


# -- checksums -------------------------------------------------------------------------------------------


@given(st.binary(max_size=3000), st.integers(0, 40))
def test_word_sums_are_those_of_the_rfc(data: bytes, shift: int) -> None:
    """Against RFC 1071 word by word, for every length and for all-ones."""
    for sample in (data, data[shift:], b"\xff" * len(data), bytes(len(data))):
        assert word_sum(sample) == ones_complement_sum(sample) % 65535
    assert word_sum(memoryview(data)) == word_sum(bytearray(data)) == word_sum(data)


def test_word_sums_of_every_length() -> None:
    """Up to the longest packet: the folds fit each."""
    data = bytes(range(1, 256)) * 258
    for length in (*range(2100), 8191, 8192, 65_534, 65_535, 65_575):
        assert word_sum(data[:length]) == int.from_bytes(data[:length] + b"\0" * (length & 1), "big") % 65535


@given(st.sampled_from([4, 6]), st.binary(max_size=1500), st.sampled_from([6, 17]))
def test_unfinished_checksums_are_finished(version: int, payload: bytes, protocol: int) -> None:
    """In place, to what a card would have written; a field outside of the packet is refused."""
    whole = tcp(version, payload) if protocol == 6 else udp(version, payload)
    start, offset = 20 if version == 4 else 40, 16 if protocol == 6 else 6
    addresses = whole[12:20] if version == 4 else whole[8:40]
    partial = bytearray(whole)
    partial[start + offset : start + offset + 2] = (
        pseudo_header(addresses, protocol, len(whole) - start) % 65535
    ).to_bytes(2, "big")
    assert finish(memoryview(partial), start, offset)
    assert transport_sum(bytes(partial)) == 0xFFFF
    assert partial == whole or whole[start + offset : start + offset + 2] == b"\0\0"
    assert not finish(memoryview(partial), len(partial), 0)
    assert not finish(memoryview(partial), 0, 0)


def test_the_complement_of_all_ones_is_zero() -> None:
    """As one's complement addition folds it."""
    assert checksum_of(65535) == 0
    assert checksum_of(1) == 0xFFFE


# -- segmentation ----------------------------------------------------------------------------------------

_options = st.sampled_from([b"", b"\x01\x01\x08\x0a" + b"\x11\x22\x33\x44" * 2])
_flags = st.sampled_from([ACK, ACK | PSH, ACK | FIN | PSH, ACK | CWR, ACK | CWR | ECE | PSH, ACK | FIN])


@given(
    st.sampled_from([4, 6]),
    st.binary(min_size=1, max_size=6000),
    st.integers(1, 2000),
    _flags,
    _options,
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFF),
)
def test_segments_are_those_of_a_network_card(
    version: int, payload: bytes, size: int, flags: int, options: bytes, sequence: int, ident: int
) -> None:
    """Byte for byte, numbers that wrap among them; each checksum is right."""
    size = max(size, len(payload) // 60 + 1)
    packet, offload = _super(version, payload, size, flags, options, sequence, ident)
    made = _cut_by_us(packet, offload)
    assert made == cut(packet, offload)
    assert all(transport_sum(segment) == 0xFFFF for segment in made)
    assert _cut_by_us(packet, offload._replace(gso=offload.gso | GSO_ECN)) == made


@given(st.sampled_from([4, 6]), st.binary(min_size=1, max_size=5000), st.integers(1, 2000))
def test_datagrams_are_those_of_a_network_card(version: int, payload: bytes, size: int) -> None:
    """UDP's super-packets (USO): each piece a datagram of its own."""
    size = max(size, len(payload) // 60 + 1)
    packet = udp(version, payload)
    start = 20 if version == 4 else 40
    offload = Offload(NEEDS_CHECKSUM, GSO_UDP, start + 8, size, start, 6)
    made = _cut_by_us(packet, offload)
    assert made == cut(packet, offload)
    assert all(transport_sum(datagram) == 0xFFFF for datagram in made)


@given(st.binary(max_size=120), st.tuples(*[st.integers(0, 255)] * 2, *[st.integers(0, 100)] * 4))
def test_super_packets_of_any_bytes_are_cut_or_refused(packet: bytes, fields: tuple[int, ...]) -> None:
    """ParseError, or segments; never anything else."""
    with contextlib.suppress(ParseError):
        _cut_by_us(packet, Offload(*fields))


# -- coalescing ------------------------------------------------------------------------------------------


class Host:
    """What the coalescer hands over, and what leaves a network card of it."""

    def __init__(self) -> None:
        self.crossings: list[tuple[bytes, Offload]] = []
        self.coalescer = Coalescer(self._write, lambda packet: self.crossings.append((packet, Offload())))

    def _write(self, parts: list[bytes], header: bytes) -> None:
        self.crossings.append((b"".join(parts), parse(memoryview(header))))

    def take(self, packets: list[bytes], *, verify: bool = False) -> list[bytes]:
        for packet in packets:
            self.coalescer.add(packet, verify)
        self.coalescer.flush()
        return [packet for crossing in self.crossings for packet in cut(*crossing)]


@given(
    st.sampled_from([4, 6]),
    st.binary(min_size=1, max_size=6000),
    st.integers(1, 2000),
    st.sampled_from([ACK, ACK | PSH]),
    _options,
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFF),
    st.booleans(),
)
def test_what_was_cut_is_put_together_and_cut_again_alike(
    version: int,
    payload: bytes,
    size: int,
    flags: int,
    options: bytes,
    sequence: int,
    ident: int,
    verify: bool,
) -> None:
    """Segmentation, coalescing and segmentation again are the identity, in one crossing; its checksum is either
    right for the whole, or marked as unfinished."""
    size = max(size, len(payload) // 60 + 1)
    packets = cut(*_super(version, payload, size, flags, options, sequence, ident))
    host = Host()
    assert host.take(packets, verify=verify) == packets
    assert len(host.crossings) == 1
    whole, offload = host.crossings[0]
    if len(packets) > 1:
        assert offload.segment == size
        assert (offload.flags == NEEDS_CHECKSUM) == (verify or size % 2 == 1)
        if not offload.flags:
            assert transport_sum(whole) == 0xFFFF


_variants = st.fixed_dictionaries(
    {},
    optional={
        "flags": st.sampled_from([ACK, ACK | PSH, ACK | FIN, SYN, ACK | URG, ACK | CWR, 0, ACK | 0x100]),
        "ident": st.integers(5, 9),
        "options": _options,
        "ports": st.sampled_from([(1000, 2000), (1001, 2000)]),
        "window": st.sampled_from([500, 501]),
        "ack": st.sampled_from([99, 100]),
        "ttl": st.sampled_from([64, 63]),
        "fragment": st.sampled_from([0, 0x4000, 0x2000, 5]),
        "tos": st.sampled_from([0, 1, 3]),
    },
)
_mixes = st.lists(
    st.tuples(st.sampled_from([4, 6]), st.integers(0, 3), st.integers(0, 3), _variants, st.booleans()),
    max_size=30,
)


@given(_mixes, st.booleans())
def test_any_mix_of_packets_comes_out_as_it_went_in(
    mix: list[tuple[int, int, int, dict[str, int], bool]], verify: bool
) -> None:
    """Flags, options, sizes, gaps, damaged checksums: each packet leaves exactly as it came, and the packets of
    one flow in the order in which they came."""
    packets = []
    for number, (version, sequence, length, variant, damaged) in enumerate(mix):
        arguments = {"ident": 7 + number % 5, **variant}
        packet = bytearray(tcp(version, bytes([number]) * length * 2, sequence=1 + sequence * 2, **arguments))  # type: ignore[arg-type]
        if damaged:
            packet[-1] ^= 0xFF
        packets.append(bytes(packet))
    host = Host()
    try:
        left = host.take(packets, verify=verify)
    except AssertionError as error:
        # the whole was damaged, and the kernel drops it: only where the host itself checks
        assert "drops" in str(error)
        assert not verify
        assert any(damaged for *_, damaged in mix)
        return
    assert sorted(left) == sorted(packets)

    def flow(packet: bytes) -> bytes:
        return packet[12:24] if packet[0] >> 4 == 4 else packet[8:44]

    for key in {flow(packet) for packet in packets}:
        assert [p for p in left if flow(p) == key] == [p for p in packets if flow(p) == key]


@pytest.mark.parametrize("version", [4, 6])
def test_a_damaged_segment_is_found_out(version: int) -> None:
    """To be forwarded, it travels alone as it is and the others together; for this host, the sum of the whole
    says so to the kernel."""
    packets = cut(*_super(version, bytes(8000), 1000, ACK, b"", 1, 7))
    damaged = bytearray(packets[3])
    damaged[-1] ^= 1
    packets[3] = bytes(damaged)
    host = Host()
    assert host.take(packets, verify=True) == packets
    assert [len(cut(*crossing)) for crossing in host.crossings] == [3, 1, 4]
    host = Host()
    with pytest.raises(AssertionError, match="kernel drops"):
        host.take(packets)


def test_a_damaged_ip_header_travels_alone() -> None:
    """First or in the middle of its flow."""
    for place in (0, 2):
        packets = cut(*_super(4, bytes(4000), 1000, ACK, b"", 1, 7))
        damaged = bytearray(packets[place])
        damaged[10] ^= 1
        packets[place] = bytes(damaged)
        host = Host()
        assert host.take(packets) == packets
        assert (packets[place], Offload()) in host.crossings


def test_flows_are_bounded_and_a_packet_is_never_too_long() -> None:
    """More flows than MAX_FLOWS at once, and more data than one packet holds."""
    host = Host()
    packets = [tcp(4, bytes(100), ports=(number, 80)) for number in range(1, 3 * MAX_FLOWS)]
    for packet in packets:
        host.coalescer.add(packet, False)
        assert len(host.coalescer._flows) <= MAX_FLOWS
    host.coalescer.flush()
    assert [packet for packet, _ in host.crossings] == packets
    host = Host()
    stream = [tcp(4, bytes(1000), sequence=1 + number * 1000, ident=number) for number in range(100)]
    assert host.take(stream) == stream
    assert all(len(packet) <= 65_535 for packet, _ in host.crossings)
    assert len(host.crossings) == 2


def test_other_packets_pass_at_once() -> None:
    """UDP, ICMP, IPv4 options and rubbish of any length; nothing is gathered of them."""
    host = Host()
    options = bytearray(tcp(4, b""))
    options[0] = 0x46
    packets = [
        udp(4, bytes(400)),
        udp(6, b"x"),
        ip(6, 58, bytes(20)),
        bytes(options),
        b"\x45",
        b"\x60" + bytes(50),
    ]
    for packet in packets:
        host.coalescer.add(packet, True)
    assert [packet for packet, _ in host.crossings] == packets


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [6, 17])
def test_transport_mode_behind_a_nat_makes_the_checksum_anew(version: int, protocol: int) -> None:
    """RFC 3948 §3.1.2: the sender's checksum is over other addresses. UDP without one stays without."""
    network = "192.0.2" if version == 4 else "2001:db8:"
    addresses = b"".join(ip_address(f"{network}{':' if version == 6 else '.'}{n}").packed for n in (1, 2))
    header = TransportHeader(version, addresses, natted=True)
    at = 16 if protocol == 6 else 6
    for length in (at + 2, 33, 1400):
        payload = bytes((index * 7 + 1) & 0xFF for index in range(length))
        assert transport_sum(header.rebuild(payload + b"trailer", protocol, length)) == 0xFFFF
        none = payload[:at] + bytes(2) + payload[at + 2 :]
        made = header.rebuild(none, protocol, length)
        assert (made[-length:] == none) == (protocol == 17)
    assert header.rebuild(b"short", protocol, 5).endswith(b"short")
    plain = TransportHeader(version, addresses)
    assert plain.rebuild(bytes(range(40)), protocol, 40).endswith(bytes(range(40)))
