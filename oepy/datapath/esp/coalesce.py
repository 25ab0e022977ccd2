"""TCP segments of one flow put together again, for one crossing into the kernel instead of dozens (GRO).

Only what segmentation would give back: same flow and headers, in order, whole IPv4 header checksum, ACK (and PSH
at the end) as the only flags, no fragments, no extension headers. Everything else passes alone, after what was
gathered of its flow. Nothing waits: `flush` at the end of each batch of datagrams. UDP datagrams of one size are
put together too (IPv4), where their checksums are still to be made, or quickly verified.

Checksums. A super-packet for this host keeps the end-to-end check: its checksum is made from those that its
segments carry, so that the kernel, which sums it up once more, finds any byte that has changed since the sender.
One that is to be forwarded gets new checksums from the kernel (NEEDS_CSUM), which would cover up such a change;
so there each segment is verified first.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from oepy.datapath.esp.checksum import pseudo_header, word_sum
from oepy.datapath.esp.inner import Bytes
from oepy.datapath.esp.offload import (
    GSO_TCP4,
    GSO_TCP6,
    GSO_UDP,
    NEEDS_CHECKSUM,
    UDP4_CHECKSUM,
    Offload,
)

MAX_FLOWS = 64  # open at a time
MAX_PACKET = 65_535
MAX_DATAGRAMS = 64  # in one super-packet, as the kernel wants
MAX_VERIFIED = 300  # bytes of a datagram that is summed up here: for longer ones another crossing is quicker
_TCP, _UDP = 6, 17
_ACK, _PSH = 0x10, 0x08
_FLAGS = 0x0FFF & ~_PSH  # all of them, and the bits that have no meaning yet
# IPv4: version+TOS, length, identification, fragment, TTL+protocol, checksum, addresses+ports; then TCP's sequence,
# acknowledgement, offset+flags, window, checksum, urgent pointer
_V4 = struct.Struct("!HHHHHH12sIIHHHH")
# IPv6: version+class+label, length, next header+hop limit, addresses+ports; then TCP's
_V6 = struct.Struct("!IHH36sIIHHHH")
_V4_UDP = struct.Struct("!HHHHHH12sHH")
_V4_UDP_END = struct.Struct("!HH")
_UDP_KEY = b"u"  # behind addresses and ports, apart from a TCP flow with the same
_UNFINISHED_UDP = UDP4_CHECKSUM.pack()
_SHORT = struct.Struct("!H")

Write = Callable[[Sequence[Bytes], bytes], object]


class _Flow:
    """What is gathered of one flow: the first packet whole, of the later ones the payload."""

    __slots__ = (
        "checked",
        "claimed",
        "first",
        "identification",
        "length",
        "next_sequence",
        "options",
        "options_at",
        "parts",
        "residue",
        "residue_ident",
        "same",
        "size",
        "start",
        "udp",
        "unfinished",
        "verify",
        "word",
    )

    first: bytes
    udp: bool
    unfinished: bool  # UDP: whether the checksums are those of the pseudo-headers
    parts: list[Bytes]  # without the first
    same: tuple[int, ...]  # header fields that do not change within a flow's burst
    options: Bytes  # TCP's
    options_at: int
    start: int  # of the payload
    size: int  # payload of each segment but the last
    length: int  # of the whole packet so far
    next_sequence: int
    identification: int
    residue_ident: int  # UDP: the first datagram's identification
    residue: int  # what length, identification and header checksum add up to
    claimed: int  # what the segments' checksums and changing fields add up to
    word: int
    verify: bool
    checked: bool  # whether the first packet's checksum was verified


class Coalescer:
    """`write(parts, virtio header)` hands a super-packet to the device, in pieces; `write_one` takes packets that
    pass as they came."""

    def __init__(self, write: Write, write_one: Callable[[bytes], object]) -> None:
        self._write = write
        self._write_one = write_one
        self._flows: dict[bytes, _Flow] = {}

    def add(self, packet: bytes, verify: bool) -> None:
        """One IP packet with its whole header and nothing behind it. `verify`: it may be forwarded."""
        length = len(packet)
        if length >= 28 and packet[0] == 0x45:
            if packet[9] == _TCP and length >= 40:
                self._add4(packet, length, verify)
                return
            if packet[9] == _UDP:
                if length <= MAX_VERIFIED:
                    self._add_udp(packet, length, False)
                else:
                    self._alone(packet[12:24] + _UDP_KEY, packet)
                return
        elif length >= 60 and packet[0] >> 4 == 6 and packet[6] == _TCP:
            self._add6(packet, length, verify)
            return
        self._write_one(packet)

    def flush(self) -> None:
        """Write everything that was gathered."""
        if self._flows:
            flows, self._flows = self._flows, {}
            for flow in flows.values():
                self._emit(flow)

    def add_unfinished(self, packet: bytes) -> None:
        """A UDP datagram in IPv4 without options, with its whole header; its checksum is that of the
        pseudo-header (UDP4_CHECKSUM)."""
        self._add_udp(packet, len(packet), True)

    def _add_udp(self, packet: bytes, length: int, unfinished: bool) -> None:
        first, _, ident, fragment, ttl, check, key, udp_length, udp_check = _V4_UDP.unpack_from(packet)
        key += _UDP_KEY
        flow = self._flows.get(key)
        same = (first, fragment, ttl, unfinished)
        fine = not fragment & 0xBFFF and udp_length == length - 20 and length > 28
        if flow is not None:
            # An identification that stays 0 is what Linux gives to datagrams that are not to be fragmented
            # (RFC 6864 §4.1: there it says nothing)
            follows = ident == flow.identification or (fragment and ident == 0 == flow.residue_ident)
            if (
                fine
                and follows
                and same == flow.same
                and length - 28 <= flow.size
                and flow.length + length - 28 <= MAX_PACKET
                and (check + length + ident) % 65535 == flow.residue
                and (unfinished or (udp_check and _is_whole(packet)))
            ):
                flow.parts.append(memoryview(packet)[28:])
                flow.length += length - 28
                flow.identification = ident + 1 & 0xFFFF
                if length - 28 < flow.size or len(flow.parts) >= MAX_DATAGRAMS - 1:
                    del self._flows[key]
                    self._emit_udp(flow)
                return
            del self._flows[key]
            self._emit(flow)
        residue = -(first + fragment + ttl + word_sum(key[:8])) % 65535
        if not fine or (check + length + ident) % 65535 != residue:
            whole = False
        else:
            whole = unfinished or (udp_check != 0 and _is_whole(packet))
        if not whole:
            self._pass(packet, unfinished)
            return
        if len(self._flows) >= MAX_FLOWS:
            self.flush()
        flow = _Flow()
        flow.same, flow.first, flow.parts = same, packet, []
        flow.start, flow.length, flow.size = 28, length, length - 28
        flow.identification, flow.residue, flow.residue_ident = ident + 1 & 0xFFFF, residue, ident
        flow.udp, flow.unfinished = True, unfinished
        self._flows[key] = flow

    def _pass(self, packet: bytes, unfinished: bool) -> None:
        if unfinished:
            self._write((packet,), _UNFINISHED_UDP)
        else:
            self._write_one(packet)

    def _emit_udp(self, flow: _Flow) -> None:
        first = flow.first
        if not flow.parts:
            self._pass(first, flow.unfinished)
            return
        header = bytearray(first[:28])
        ident = header[4] << 8 | header[5]
        pseudo = pseudo_header(first[12:20], _UDP, flow.length - 20) % 65535
        _SHORT.pack_into(header, 2, flow.length)
        _SHORT.pack_into(header, 10, (flow.residue - flow.length - ident) % 65535)
        _V4_UDP_END.pack_into(header, 24, flow.length - 20, pseudo)
        offload = Offload(NEEDS_CHECKSUM, GSO_UDP, 28, flow.size, 20, 6)
        self._write([header, memoryview(first)[28:], *flow.parts], offload.pack())

    def _add4(self, packet: bytes, length: int, verify: bool) -> None:
        (first, _, ident, fragment, ttl, check, key, sequence, ack, word, window, tcp_check, urgent) = (
            _V4.unpack_from(packet)
        )
        start = 20 + (word >> 10 & 0x3C)
        if word & _FLAGS != _ACK or urgent or fragment & 0xBFFF or not 40 <= start < length:
            self._alone(key, packet)
            return
        flow = self._flows.get(key)
        if flow is not None:
            if (
                sequence == flow.next_sequence
                and (first, fragment, ttl, ack, window) == flow.same
                and ident == flow.identification
                and (check + length + ident) % 65535 == flow.residue
                and self._joins(flow, packet, start, length - start)
            ):
                flow.identification = ident + 1 & 0xFFFF
                flow.claimed += length - 20 + sequence + word + tcp_check
                flow.word = word
                if word & _PSH or length - start < flow.size:
                    del self._flows[key]
                    self._emit(flow)
                return
            del self._flows[key]
            self._emit(flow)
        residue = -(first + fragment + ttl + word_sum(key[:8])) % 65535
        if (check + length + ident) % 65535 != residue:
            self._write_one(packet)  # its header is damaged: the kernel's to refuse
            return
        flow = _Flow()
        flow.same = (first, fragment, ttl, ack, window)
        flow.identification, flow.residue = (ident + 1) & 0xFFFF, residue
        flow.claimed = length - 20 + sequence + word + tcp_check
        self._begin(key, flow, packet, start, sequence, word, verify)

    def _add6(self, packet: bytes, length: int, verify: bool) -> None:
        first, _, hops, key, sequence, ack, word, window, tcp_check, urgent = _V6.unpack_from(packet)
        start = 40 + (word >> 10 & 0x3C)
        if word & _FLAGS != _ACK or urgent or not 60 <= start < length:
            self._alone(key, packet)
            return
        flow = self._flows.get(key)
        if flow is not None:
            if (
                sequence == flow.next_sequence
                and (first, hops, ack, window) == flow.same
                and self._joins(flow, packet, start, length - start)
            ):
                flow.claimed += length - 40 + sequence + word + tcp_check
                flow.word = word
                if word & _PSH or length - start < flow.size:
                    del self._flows[key]
                    self._emit(flow)
                return
            del self._flows[key]
            self._emit(flow)
        flow = _Flow()
        flow.same = (first, hops, ack, window)
        flow.claimed = length - 40 + sequence + word + tcp_check
        self._begin(key, flow, packet, start, sequence, word, verify)

    def _alone(self, key: bytes, packet: bytes) -> None:
        """A packet that is no plain segment, after what was gathered of its flow."""
        flow = self._flows.pop(key, None)
        if flow is not None:
            self._emit(flow)
        self._write_one(packet)

    @staticmethod
    def _joins(flow: _Flow, packet: bytes, start: int, payload: int) -> bool:
        """Where the IP header and sequence fit: take it if the rest does."""
        if (
            start != flow.start
            or payload > flow.size
            or flow.length + payload > MAX_PACKET
            or packet[flow.options_at : start] != flow.options
        ):
            return False
        if flow.verify:
            flow.checked = flow.checked or _is_whole(flow.first)
            if not flow.checked or not _is_whole(packet):
                return False
        flow.parts.append(memoryview(packet)[start:])
        flow.length += payload
        flow.next_sequence = flow.next_sequence + payload & 0xFFFFFFFF
        return True

    def _begin(
        self, key: bytes, flow: _Flow, packet: bytes, start: int, sequence: int, word: int, verify: bool
    ) -> None:
        if word & _PSH:
            self._write_one(packet)
            return
        if len(self._flows) >= MAX_FLOWS:
            self.flush()
        flow.first, flow.parts = packet, []
        flow.start, flow.length, flow.size = start, len(packet), len(packet) - start
        flow.options_at = 40 if packet[0] == 0x45 else 60
        flow.options = packet[flow.options_at : start]
        flow.next_sequence = (sequence + flow.size) & 0xFFFFFFFF
        flow.word = word
        flow.udp = False
        # At odd offsets words would be added with their bytes swapped: such segments are summed up here
        flow.verify, flow.checked = verify or flow.size & 1 == 1, False
        self._flows[key] = flow

    def _emit(self, flow: _Flow) -> None:
        if flow.udp:
            self._emit_udp(flow)
            return
        start, first = flow.start, flow.first
        if not flow.parts:
            self._write_one(first)
            return
        header = bytearray(first[:start])
        if first[0] == 0x45:
            transport, gso, addresses = 20, GSO_TCP4, first[12:20]
            _SHORT.pack_into(header, 2, flow.length)
            ident = header[4] << 8 | header[5]
            _SHORT.pack_into(header, 10, (flow.residue - flow.length - ident) % 65535)
        else:
            transport, gso, addresses = 40, GSO_TCP6, first[8:40]
            _SHORT.pack_into(header, 4, flow.length - 40)
        _SHORT.pack_into(header, transport + 12, flow.word)
        pseudo = pseudo_header(addresses, _TCP, flow.length - transport)
        if flow.verify:
            _SHORT.pack_into(header, transport + 16, pseudo % 65535)
            offload = Offload(NEEDS_CHECKSUM, gso, start, flow.size, transport, 16)
        else:
            _SHORT.pack_into(header, transport + 16, self._claimed(flow, header, transport, pseudo))
            offload = Offload(0, gso, start, flow.size)
        self._write([header, memoryview(first)[start:], *flow.parts], offload.pack())

    @staticmethod
    def _claimed(flow: _Flow, header: bytearray, transport: int, pseudo: int) -> int:
        """The checksum of the whole, from those of its segments: each says what its payload adds up to."""
        sequence = int.from_bytes(header[transport + 4 : transport + 8], "big")
        rest = word_sum(header[transport : transport + 16]) - sequence - flow.word
        options = word_sum(header[transport + 20 :])
        fixed = pseudo - (flow.length - transport) + rest + options  # what all segments have in common
        payload = -((1 + len(flow.parts)) * fixed + flow.claimed)
        return -(fixed + flow.length - transport + sequence + flow.word + payload) % 65535


def _is_whole(packet: bytes) -> bool:
    """Whether the TCP or UDP checksum fits."""
    if packet[0] == 0x45:
        transport, protocol, addresses = 20, packet[9], packet[12:20]
    else:
        transport, protocol, addresses = 40, packet[6], packet[8:40]
    segment = memoryview(packet)[transport:]
    return (pseudo_header(addresses, protocol, len(segment)) + word_sum(segment)) % 65535 == 0
