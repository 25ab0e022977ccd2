"""AGGFRAG payloads (RFC 9347 §2.2, §6.1): a stream of inner packets, cut into ESP payloads of one size.

A payload begins with four octets: sub-type 0 (no congestion control), a reserved octet, and how many octets of data
belong to a packet begun before (BlockOffset; more than there are where it does not end here either). Packets follow
each other without a gap and may go on in the next payload, which then has the next sequence number. A data block of
type 0 is padding up to the payload's end.

Between two oepy that have agreed on it (`super_packets`) a packet may have a block of type 1 and four octets before
it, in the same payload: what a network card would still have to do with it, as a TUN device says it. So a TCP burst
of 64 KiB crosses the tunnel as one packet, which is cut where it leaves the other host, into the very segments that
the sender's card would have made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from oepy.datapath.esp.inner import Bytes
from oepy.datapath.esp.offload import (
    GSO_ECN,
    GSO_NONE,
    GSO_TCP4,
    GSO_TCP6,
    GSO_UDP,
    NEEDS_CHECKSUM,
    NONE,
    UDP4_CHECKSUM,
    Offload,
)
from oepy.errors import ParseError

NEXT_HEADER = 144
HEADER = 4
MAX_WAITING = 64  # payloads whose fragments wait for their neighbours
MAX_WAITING_BYTES = 1 << 18  # and what they hold
MAX_PARTS = 256  # of one packet, before they are joined
MAX_PACKET = 40 + 65_535  # an IPv6 packet at its longest
WHOLE = bytes(HEADER)  # the header of a payload that begins with a packet
_PLAIN = 0x45  # an IPv4 header without options
_START = 44  # octets of a packet that the first payload holds at least: our block and a whole IP header
_HEADER = struct.Struct("!BBH")
_OFFLOAD = struct.Struct("!BBH")  # type 1 and GSO_ECN's bit, kind, segment size
_OFFLOAD_TYPE = 0x10
_ECN_BIT = 0x01
_TCP, _UDP = 6, 17
_SHORTEST = {_TCP: 20, _UDP: 8, 0: 1 << 20}  # a whole header; no other protocol is ever long enough
_PADDED_SHARE = 8
_UDP4_BLOCK = _OFFLOAD.pack(_OFFLOAD_TYPE, GSO_NONE, 0)

Payload = tuple[bytes, Sequence[Bytes]]  # AGGFRAG header, and what follows it


def offload_block(packet: Bytes, offload: Offload) -> bytes | None:
    """The block that goes before this packet; None where the receiver could not tell the rest from the packet."""
    if offload is UDP4_CHECKSUM and packet[0] == _PLAIN and packet[9] == _UDP:
        return _UDP4_BLOCK
    transport, protocol = _transport(packet)
    field = 16 if protocol == _TCP else 6
    if (offload.checksum_start, offload.checksum_offset) != (transport, field):
        return None
    first = _OFFLOAD_TYPE | (_ECN_BIT if offload.gso & GSO_ECN else 0)
    return _OFFLOAD.pack(first, offload.gso & ~GSO_ECN, offload.segment)


def _transport(packet: Bytes) -> tuple[int, int]:
    """Where TCP or UDP begins, and which of them; protocol 0 where it is neither."""
    start, protocol = ((packet[0] & 15) * 4, packet[9]) if packet[0] >> 4 == 4 else (40, packet[6])
    return start, protocol if protocol in (_TCP, _UDP) else 0


def _offload_of(block: Bytes, packet: Bytes) -> Offload:
    """The Offload that `block` says of `packet`, which has its whole IP header. Raises ParseError."""
    first, kind, segment = _OFFLOAD.unpack_from(block)
    start, protocol = _transport(packet)
    if kind == GSO_NONE and len(packet) >= start + _SHORTEST[protocol]:
        return _CHECKSUMS.get((start, protocol)) or _checksum_at(start, protocol)
    wanted = {
        GSO_TCP4: packet[0] >> 4 == 4 and protocol == _TCP,
        GSO_TCP6: packet[0] >> 4 == 6 and protocol == _TCP,
        GSO_UDP: protocol == _UDP,
    }.get(kind, False)
    if not wanted or not segment or len(packet) < start + _SHORTEST[protocol]:
        raise ParseError("an offload block that does not fit the packet behind it")
    header = start + ((packet[start + 12] >> 4) * 4 if protocol == _TCP else 8)
    if not start + 8 <= header < len(packet):
        raise ParseError("an offload block before a packet without data")
    gso = kind | (GSO_ECN if first & _ECN_BIT else 0)
    return Offload(NEEDS_CHECKSUM, gso, header, segment, start, 16 if protocol == _TCP else 6)


def _checksum_at(start: int, protocol: int) -> Offload:
    return Offload(NEEDS_CHECKSUM, GSO_NONE, 0, 0, start, 16 if protocol == _TCP else 6)


_CHECKSUMS = {
    (start, protocol): _checksum_at(start, protocol) for start in (20, 40) for protocol in (_TCP, _UDP)
}
_CHECKSUMS[20, _UDP] = UDP4_CHECKSUM


class Packer:
    """Cuts one SA's packets into payloads of up to `room` octets; what does not fill one is kept until `rest`."""

    __slots__ = ("_fragments", "_offset", "_parts", "_room", "_used")

    def __init__(self, room: int, fragments: bool = True) -> None:
        """`room`: octets of data in a payload. Without `fragments` no packet may be longer than that."""
        self._room = room
        self._fragments = fragments
        self._parts: list[Bytes] = []
        self._used = self._offset = 0

    @property
    def waiting(self) -> bool:
        return self._used > 0

    def alone(self, length: int) -> bool:
        """Whether a packet of this length, with its block, had better go out at once in a payload of its own:
        there is nothing to go with it, and no room for another like it."""
        return not self._used and self._room < 2 * length and length <= self._room

    def fits(self, length: int) -> bool:
        """Whether a packet of this length may be added at all."""
        return length <= MAX_PACKET and (self._fragments or length <= self._room)

    def add(self, packet: memoryview, block: bytes = b"") -> list[Payload]:
        """The payloads that are full now; they must be used before `packet` is changed, and sent in this order.
        `block`: from offload_block."""
        room, full = self._room, []
        length = len(packet) + len(block)
        left = room - self._used
        if self._used and left < (length if length <= room else _START):
            # What fits into one payload is not torn apart: that costs both sides more than a few octets. Nearly
            # full payloads are padded, for batches of one size: zeros are a data block of type 0.
            if left <= room // _PADDED_SHARE:
                self._parts.append(bytes(left))
            full.append(self._close(0))
            left = room
        if block:
            self._parts.append(block)
        if length < left:
            self._parts.append(bytes(packet))
            self._used += length
            return full
        position = left - len(block)
        self._parts.append(packet[:position])
        rest = len(packet) - position
        full.append(self._close(rest))
        while rest >= room:
            part = packet[position : position + room]
            full.append((_HEADER.pack(0, 0, rest if rest < 0xFFFF else 0xFFFF), (part,)))
            position += room
            rest -= room
        if rest:
            self._parts.append(bytes(packet[position:]))
            self._used = self._offset = rest
        else:
            self._offset = 0
        return full

    def _close(self, following: int) -> Payload:
        payload = _HEADER.pack(0, 0, self._offset), self._parts
        self._parts, self._used, self._offset = [], 0, min(following, 0xFFFF)
        return payload

    def rest(self) -> Payload:
        """What is waiting, as a shorter payload."""
        return self._close(0)


class _Partial:
    """A packet of which the end is still to come."""

    __slots__ = ("block", "length", "parts", "total")

    def __init__(self, block: bytes, start: Bytes) -> None:
        self.block = block
        self.parts: list[Bytes] = [start]
        self.length = len(start)
        self.total = 0  # 0 while too little is there to know it
        self._know()

    def _know(self) -> None:
        if self.length >= 6:
            if len(self.parts[0]) < 6:
                self.parts = [b"".join(self.parts)]
            self.total = _block_length(self.parts[0])

    def append(self, part: Bytes) -> None:
        """Raises ParseError where that is more than the packet has."""
        self.parts.append(part)
        self.length += len(part)
        if len(self.parts) > MAX_PARTS:
            self.parts = [b"".join(self.parts)]
        if not self.total:
            self._know()
        if self.length > (self.total or MAX_PACKET):
            raise ParseError("fragments that are longer than their packet")


# A packet out of the stream, in pieces of which the first holds its IP header, and what is to be done with it
Packet = tuple[Sequence[Bytes], Offload]


class Unpacker:
    """Puts one SA's packets together again. Whole packets never wait; a fragment waits for its neighbour by
    sequence number, in either order, for as long as MAX_WAITING later ones."""

    __slots__ = ("_ends", "_starts", "_super_packets")

    def __init__(self, super_packets: bool) -> None:
        self._super_packets = super_packets
        self._starts: dict[int, _Partial] = {}  # by the sequence number that goes on with it
        self._ends: dict[int, tuple[Bytes, bool]] = {}  # by their own; whether the packet ends there

    def add(self, payload: memoryview, sequence: int) -> list[Packet]:
        """Of the ESP payload with this number, without trailer. Raises ParseError, before anything of it counts."""
        if len(payload) < HEADER:
            raise ParseError("AGGFRAG payload without a whole header")
        sub_type, _, offset = _HEADER.unpack_from(payload)
        if offset >= len(payload) and not self._ends:
            # In the middle of a long packet, in order: a shorter way through what follows
            partial = self._starts.get(sequence)
            if partial is not None and partial.total - partial.length == offset and not sub_type:
                partial.parts.append(payload[HEADER:])
                partial.length += len(payload) - HEADER
                if len(partial.parts) > MAX_PARTS:
                    partial.parts = [b"".join(partial.parts)]
                del self._starts[sequence]
                self._starts[sequence + 1] = partial
                return []
        if sub_type != 0:
            raise ParseError(f"AGGFRAG sub-type {sub_type} was not agreed on")
        data = payload[HEADER:]
        total = len(data)
        if not offset and total >= 20 and data[0] == _PLAIN and data[2] << 8 | data[3] == total:
            self._starts.pop(sequence, None)
            return [((data,), NONE)]  # one IPv4 packet, and nothing else
        if (
            self._super_packets
            and not offset
            and total >= 24
            and data[0] == _OFFLOAD_TYPE
            and data[4] == _PLAIN
            and data[6] << 8 | data[7] == total - HEADER
        ):
            self._starts.pop(sequence, None)
            packet = data[4:]
            plain = data[1] == GSO_NONE and packet[9] == _UDP and total >= 32
            # the same with an offload block
            return [((packet,), UDP4_CHECKSUM if plain else _offload_of(data, packet))]
        packets, tail = self._blocks(data, min(offset, total))
        found: list[Packet] = []
        partial = self._starts.pop(sequence, None)
        if offset:
            if partial is not None:
                self._go_on(partial, data[:offset], offset <= len(data), sequence, found)
            else:
                self._ends[sequence] = bytes(data[:offset]), offset <= len(data)
                self._bound()
        elif partial is not None and not len(data):
            self._wait(partial, sequence + 1, found)  # nothing at all: it may go on behind that
        found += packets
        if tail is not None:
            self._wait(tail, sequence + 1, found)
        return found

    def _blocks(self, data: memoryview, at: int) -> tuple[list[Packet], _Partial | None]:
        """The whole packets from `at` on, and the one that goes on in the next payload."""
        packets: list[Packet] = []
        total = len(data)
        block = b""
        while at < total:
            kind = data[at] >> 4
            if kind == 0 and not block:
                break
            if kind == 1 and not block:
                if not self._super_packets or total - at < 4 + 20:
                    raise ParseError("an offload block that was not agreed on, or without a packet")
                block = bytes(data[at : at + 4])
                at += 4
                continue
            if kind not in (4, 6):
                raise ParseError(f"AGGFRAG data block of type {kind}")
            length = _block_length(data[at:]) if total - at >= 6 else 0
            if not length or at + length > total:
                if block and total - at < _START - 4:
                    raise ParseError("an offload block whose packet's header is not in the same payload")
                return packets, _Partial(block, bytes(data[at:]))
            packet = data[at : at + length]
            packets.append(((packet,), _offload_of(block, packet) if block else NONE))
            block = b""
            at += length
        if block:
            raise ParseError("an offload block without a packet")
        return packets, None

    def _wait(self, partial: _Partial, sequence: int, found: list[Packet]) -> None:
        """For the payload with this number, which may be here already."""
        waiting = self._ends.pop(sequence, None)
        if waiting is None:
            self._starts[sequence] = partial
            if len(self._starts) > 1 or self._ends:
                self._bound()
        else:
            self._go_on(partial, *waiting, sequence, found)

    def _go_on(self, partial: _Partial, part: Bytes, ends: bool, sequence: int, found: list[Packet]) -> None:
        try:
            partial.append(part)
            if not ends:
                self._wait(partial, sequence + 1, found)
                return
            if partial.length != partial.total:
                raise ParseError("fragments that are shorter than their packet")
            parts = partial.parts
            if len(parts[0]) < 40:
                parts = [b"".join(parts)]
            offload = NONE
            if partial.block:
                joined = b"".join(parts) if len(parts[0]) < _LONGEST_HEADERS else parts[0]
                offload = _offload_of(partial.block, joined)
        except ParseError:
            return  # this packet only: what came with its fragments is good
        found.append((parts, offload))

    def _bound(self) -> None:
        """Forget the oldest where too much is waiting."""
        starts, ends = self._starts, self._ends
        while len(starts) > MAX_WAITING or sum(item.length for item in starts.values()) > MAX_WAITING_BYTES:
            del starts[min(starts)]
        while len(ends) > MAX_WAITING or sum(len(item[0]) for item in ends.values()) > MAX_WAITING_BYTES:
            del ends[min(ends)]


_LONGEST_HEADERS = 128  # IPv4 with options and TCP with options


def _block_length(start: Bytes) -> int:
    """Of an IP packet of which six octets are there. Raises ParseError."""
    if start[0] >> 4 == 4:
        length = start[2] << 8 | start[3]
        if length < (start[0] & 15) * 4 or start[0] & 15 < 5:
            raise ParseError("AGGFRAG data block with a broken IPv4 header")
        return length
    return 40 + (start[4] << 8 | start[5])
