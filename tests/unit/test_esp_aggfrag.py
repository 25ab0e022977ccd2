"""AGGFRAG payloads: whatever goes in comes out, in any order of arrival that keeps its neighbours."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.datapath.esp import aggfrag
from oepy.datapath.esp.aggfrag import MAX_WAITING, Packer, Unpacker, offload_block
from oepy.datapath.esp.offload import GSO_ECN, GSO_TCP4, GSO_TCP6, GSO_UDP, NEEDS_CHECKSUM, NONE, Offload
from oepy.errors import ParseError
from tests.fakes.datapath import ipv4_packet, ipv6_packet

A, B, A6, B6 = "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"


def _packed(packer: Packer, packets: list[bytes], *, turns: int = 1000) -> list[bytes]:
    """The payloads of these packets; what is left over goes out after every `turns` of them."""
    made = []
    for number, packet in enumerate(packets, 1):
        buffer = bytearray(packet)  # as the device's, which the next read overwrites
        made += [head + b"".join(parts) for head, parts in packer.add(memoryview(buffer))]
        buffer[:] = bytes(len(buffer))
        if packer.waiting and (number % turns == 0 or number == len(packets)):
            head, parts = packer.rest()
            made.append(head + b"".join(parts))
    return made


def _joined(found: list[aggfrag.Packet]) -> list[bytes]:
    return [b"".join(parts) for parts, _ in found]


def _unpacked(unpacker: Unpacker, payloads: list[bytes], first: int = 1) -> list[bytes]:
    found = []
    for sequence, payload in enumerate(payloads, first):
        found += _joined(unpacker.add(memoryview(payload), sequence))
    return found


_packets = st.lists(
    st.tuples(st.sampled_from([4, 6]), st.one_of(st.integers(0, 200), st.integers(0, 9000))), max_size=40
).map(
    lambda kinds: [
        ipv4_packet(A, B, bytes([number]) * length)
        if version == 4
        else ipv6_packet(A6, B6, bytes([number]) * length)
        for number, (version, length) in enumerate(kinds)
    ]
)


@given(_packets, st.integers(64, 2000), st.integers(1, 10))
def test_packing_and_unpacking_is_the_identity(packets: list[bytes], room: int, turns: int) -> None:
    """Any mix of packets, payload size and breaks; no payload above the size, each begins as it says."""
    payloads = _packed(Packer(room), packets, turns=turns)
    assert all(4 < len(payload) <= room + 4 for payload in payloads)
    assert all(payload[:2] == b"\0\0" for payload in payloads)
    assert _unpacked(Unpacker(False), payloads) == packets


@given(_packets, st.integers(64, 2000), st.randoms(use_true_random=False))
def test_neighbours_may_change_places(packets: list[bytes], room: int, random: object) -> None:
    """Payloads that swap places with their neighbours lose nothing, and nothing comes out twice."""
    payloads = list(enumerate(_packed(Packer(room), packets), 1))
    for index in range(0, len(payloads) - 1, 2):
        if random.random() < 0.5:  # type: ignore[attr-defined]
            payloads[index : index + 2] = reversed(payloads[index : index + 2])
    unpacker, found = Unpacker(False), []
    for sequence, payload in payloads:
        found += _joined(unpacker.add(memoryview(payload), sequence))
    assert sorted(found) == sorted(packets)


@given(_packets, st.integers(64, 2000), st.sets(st.integers(0, 60)))
def test_a_lost_payload_takes_only_its_own_packets_along(
    packets: list[bytes], room: int, lost: set[int]
) -> None:
    """What comes out is part of what went in, in order; every packet with no part in a lost payload is there."""
    payloads = _packed(Packer(room), packets)
    unpacker, found = Unpacker(False), []
    for index, payload in enumerate(payloads):
        if index not in lost:
            found += _joined(unpacker.add(memoryview(payload), index + 1))
    remaining = iter(packets)
    assert all(packet in remaining for packet in found)
    if not lost & set(range(len(payloads))):
        assert found == packets


def test_the_bytes_are_those_of_the_rfc() -> None:
    """Sub-type, reserved and BlockOffset by hand: 100 octets in payloads of 64, then a short packet behind."""
    long, short = ipv4_packet(A, B, bytes(76)), ipv4_packet(A, B, bytes(4))
    assert (len(long), len(short)) == (100, 28)
    payloads = _packed(Packer(64), [long, short])
    assert payloads == [
        b"\0\0\0\0" + long[:64],
        b"\0\0\0\x24" + long[64:] + short,  # 36 octets of the first packet, then the second one begins
    ]
    # in the middle of a packet the offset points past the payload's end
    middle = _packed(Packer(64), [ipv4_packet(A, B, bytes(176))])
    assert [payload[:4] for payload in middle] == [b"\0\0\0\0", b"\0\0\0\x88", b"\0\0\0\x48", b"\0\0\0\x08"]


def test_padding_ends_a_payload() -> None:
    """RFC 9347 §6.1.3: a block of type 0 reaches to the end, whatever it holds."""
    packet = ipv4_packet(A, B)
    assert _unpacked(Unpacker(False), [bytes(4) + packet + b"\x0f" + b"\x45" * 50]) == [packet]
    assert _unpacked(Unpacker(False), [bytes(4) + bytes(90), bytes(4)]) == []


def test_a_payload_of_nothing_may_stand_between_fragments() -> None:
    """Its sequence number is skipped."""
    long = ipv4_packet(A, B, bytes(76))
    first, second = _packed(Packer(64), [long])
    assert _unpacked(Unpacker(False), [first, bytes(4), second]) == [long]


def test_a_packet_that_fits_is_not_torn_apart() -> None:
    """Two packets of two thirds of a payload each: two payloads, closed early or padded, without fragments."""
    packet = ipv4_packet(A, B, bytes(900))
    payloads = _packed(Packer(1400), [packet, packet])
    assert payloads == [bytes(4) + packet] * 2
    nearly = ipv4_packet(A, B, bytes(1300))
    assert [len(payload) for payload in _packed(Packer(1400), [nearly] * 2)] == [1404, 4 + len(nearly)]


def test_a_peer_without_fragments_gets_none() -> None:
    """The D flag: long packets do not fit, all others are whole in their payloads."""
    packer = Packer(200, fragments=False)
    assert not packer.fits(201)
    packets = [ipv4_packet(A, B, bytes(number * 7)) for number in range(25)]
    for payload in _packed(packer, packets):
        assert payload[:4] == bytes(4)
        unpacker = Unpacker(False)
        unpacker.add(memoryview(payload), 1)
        assert not unpacker._starts


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0",
        b"\1\0\0\0" + bytes(40),  # congestion control
        bytes(4) + b"\x50" + bytes(40),  # block of an unknown type
        bytes(4) + b"\x44\0\0\x14" + bytes(40),  # IPv4 header of four words
        bytes(4) + b"\x45\0\0\x13" + bytes(40),  # shorter than its header
        bytes(4) + b"\x10\0\0\0" + ipv4_packet(A, B, bytes(40)),  # an offload block that was not agreed on
    ],
)
def test_what_was_not_agreed_on_is_refused(payload: bytes) -> None:
    """By ParseError, and nothing of it is kept."""
    unpacker = Unpacker(False)
    with pytest.raises(ParseError):
        unpacker.add(memoryview(payload), 1)
    assert not unpacker._starts
    assert not unpacker._ends


@given(st.lists(st.tuples(st.binary(max_size=120), st.integers(0, 80)), max_size=60), st.booleans())
def test_any_payloads_end_in_packets_or_parse_errors(payloads: list[tuple[bytes, int]], known: bool) -> None:
    """Of a peer that holds the keys; whatever comes out is a packet of the length that it says."""
    unpacker = Unpacker(known)
    for payload, sequence in payloads:
        with contextlib.suppress(ParseError):
            for parts, offload in unpacker.add(memoryview(payload), sequence):
                packet = b"".join(parts)
                version = packet[0] >> 4
                said = (
                    int.from_bytes(packet[2:4], "big")
                    if version == 4
                    else 40 + int.from_bytes(packet[4:6], "big")
                )
                assert version in (4, 6)
                assert len(packet) == said
                assert len(parts) == 1 or len(parts[0]) >= 20
                assert not offload.flags or known
        assert len(unpacker._starts) <= MAX_WAITING
        assert len(unpacker._ends) <= MAX_WAITING


def test_fragments_of_a_hostile_peer_stay_bounded() -> None:
    """Ten thousand beginnings without an end, and as many ends without a beginning, of 1400 octets each."""
    unpacker = Unpacker(False)
    start = bytes(4) + ipv4_packet(A, B, bytes(60_000))[:1400]
    for number in range(10_000):
        assert unpacker.add(memoryview(start), number * 2) == []
        assert unpacker.add(memoryview(b"\0\0\xff\xff" + bytes(1400)), 1_000_000 + number * 2) == []
    held = sum(item.length for item in unpacker._starts.values()) + sum(
        len(part) for part, _ in unpacker._ends.values()
    )
    assert held <= 2 * aggfrag.MAX_WAITING_BYTES
    # and a packet in single octets keeps few pieces
    unpacker = Unpacker(False)
    packet = ipv4_packet(A, B, bytes(3000))
    assert unpacker.add(memoryview(bytes(4) + packet[:30]), 1) == []
    for number, octet in enumerate(packet[30:-1], 2):
        rest = len(packet) - 30 - (number - 2)
        assert unpacker.add(memoryview(struct.pack("!HH", 0, rest) + bytes([octet])), number) == []
        assert all(len(item.parts) <= aggfrag.MAX_PARTS for item in unpacker._starts.values())
    last = memoryview(struct.pack("!HH", 0, 1) + packet[-1:])
    assert _joined(unpacker.add(last, len(packet) - 29)) == [packet]


# -- offload blocks --------------------------------------------------------------------------------------


def _tcp(version: int, length: int) -> bytes:
    rest = struct.pack("!IIHHHH", 1, 2, 0x8010, 500, 0, 0) + bytes(12) + bytes(length)
    make, ends = (ipv4_packet, (A, B)) if version == 4 else (ipv6_packet, (A6, B6))
    return make(*ends, rest, 6, (1000, 2000))


@pytest.mark.parametrize(
    ("packet", "offload"),
    [
        (_tcp(4, 5000), Offload(NEEDS_CHECKSUM, GSO_TCP4, 52, 1338, 20, 16)),
        (_tcp(4, 5000), Offload(NEEDS_CHECKSUM, GSO_TCP4 | GSO_ECN, 52, 1338, 20, 16)),
        (_tcp(6, 60_000), Offload(NEEDS_CHECKSUM, GSO_TCP6, 72, 1318, 40, 16)),
        (_tcp(4, 100), Offload(NEEDS_CHECKSUM, 0, 0, 0, 20, 16)),
        (ipv4_packet(A, B, bytes(4000)), Offload(NEEDS_CHECKSUM, GSO_UDP, 28, 1200, 20, 6)),
        (ipv6_packet(A6, B6, bytes(400)), Offload(NEEDS_CHECKSUM, 0, 0, 0, 40, 6)),
    ],
)
def test_offload_blocks_bring_what_the_device_said(packet: bytes, offload: Offload) -> None:
    """A super-packet crosses whole, and all of its Offload is there again."""
    block = offload_block(packet, offload)
    assert block is not None
    packer, unpacker, found = Packer(1400), Unpacker(True), []
    other = ipv4_packet(A, B)
    payloads = [*packer.add(memoryview(other)), *packer.add(memoryview(packet), block)]
    if packer.waiting:
        payloads.append(packer.rest())
    for sequence, (head, parts) in enumerate(payloads, 1):
        found += unpacker.add(memoryview(head + b"".join(parts)), sequence)
    assert [(b"".join(parts), said) for parts, said in found] == [(other, NONE), (packet, offload)]


def test_what_the_other_side_could_not_tell_has_no_block() -> None:
    """Checksums at another place: extension headers, other protocols."""
    assert offload_block(_tcp(4, 10), Offload(NEEDS_CHECKSUM, 0, 0, 0, 24, 16)) is None
    assert offload_block(ipv4_packet(A, B, bytes(30), 132), Offload(NEEDS_CHECKSUM, 0, 0, 0, 20, 8)) is None


@pytest.mark.parametrize(
    ("block", "packet"),
    [
        (b"\x10\x01\0\0", _tcp(4, 100)),  # no segment size
        (b"\x10\x04\x05\0", _tcp(4, 100)),  # IPv6's kind
        (b"\x10\x05\x05\0", _tcp(4, 100)),  # UDP's kind
        (b"\x10\x01\x05\0", _tcp(4, 0)),  # nothing to cut
        (b"\x10\x07\x05\0", _tcp(4, 100)),
        (b"\x10\0\0\0", ipv4_packet(A, B, bytes(60), 1)),
    ],
)
def test_blocks_that_do_not_fit_their_packet_are_refused(block: bytes, packet: bytes) -> None:
    """Alone in a payload by ParseError; in fragments the packet is dropped."""
    with pytest.raises(ParseError):
        Unpacker(True).add(memoryview(bytes(4) + block + packet), 1)
    unpacker = Unpacker(True)
    assert unpacker.add(memoryview(bytes(4) + block + packet[:-1]), 1) == []
    assert unpacker.add(memoryview(b"\0\0\0\1" + packet[-1:]), 2) == []
