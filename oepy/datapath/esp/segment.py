"""Super-packets cut into the IP packets that a network card would have sent (TSO, USO).

Each segment repeats the headers; sequence numbers, lengths and IPv4 identifications go on, FIN and PSH stand in
the last one only, CWR in the first, and every checksum is whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from oepy.datapath.esp.checksum import checksum_of, pseudo_header, word_sum
from oepy.datapath.esp.offload import GSO_ECN, GSO_TCP4, GSO_TCP6, GSO_UDP, Offload
from oepy.errors import ParseError

_TCP, _UDP = 6, 17
_FIN_PSH, _CWR = 0x09, 0x80
_SHORT = struct.Struct("!H")
_TWO_SHORTS = struct.Struct("!HH")
_WORD = struct.Struct("!I")
_SEQUENCE = struct.Struct(
    "!I4xH2xH"
)  # of a TCP header from its fifth byte on: sequence, offset+flags, checksum


def segments(packet: memoryview, offload: Offload) -> Iterator[tuple[bytearray, memoryview]]:
    """Headers and payload of each segment. The headers are one buffer that is changed for the next: copy it.

    Raises ParseError where packet and `offload` do not fit.
    """
    gso, size, transport = offload.gso & ~GSO_ECN, offload.segment, offload.checksum_start
    version = packet[0] >> 4 if len(packet) >= 40 else 0
    fits = {GSO_TCP4: version == 4, GSO_TCP6: version == 6, GSO_UDP: version in (4, 6)}.get(gso, False)
    protocol = _UDP if gso == GSO_UDP else _TCP
    if not fits or size < 1 or transport < (20 if version == 4 else 40) or transport + 8 > len(packet):
        raise ParseError("a super-packet whose header does not fit")
    if version == 4 and (packet[9] != protocol or (packet[0] & 15) * 4 != transport):
        raise ParseError("a super-packet of another protocol than its header says")
    if protocol == _UDP:
        return _udp(packet, version, transport, size)
    if transport + 20 > len(packet):
        raise ParseError("a super-packet without a whole TCP header")
    end = transport + (packet[transport + 12] >> 4) * 4
    if not transport + 20 <= end <= len(packet):
        raise ParseError("a super-packet with a wrong TCP data offset")
    return _tcp(packet, version, transport, end, size)


def _tcp(
    packet: memoryview, version: int, transport: int, start: int, size: int
) -> Iterator[tuple[bytearray, memoryview]]:
    header = bytearray(packet[:start])
    sequence, flags, _ = _SEQUENCE.unpack_from(header, transport + 4)
    header[transport + 4 : transport + 8] = bytes(4)
    header[transport + 12 : transport + 14] = header[transport + 16 : transport + 18] = bytes(2)
    base = pseudo_header(_addresses(header, version), _TCP, start - transport) + word_sum(header[transport:])
    network = _Network(header, version, start)
    total, position, now = len(packet), start, flags & ~_FIN_PSH
    flags_at, checksum_at, sequence_at = transport + 12, transport + 16, transport + 4
    while True:
        payload = packet[position : position + size]
        length = len(payload)
        position += size
        if position >= total:
            now |= flags & _FIN_PSH
        network.next(length)
        _WORD.pack_into(header, sequence_at, sequence)
        _SHORT.pack_into(header, flags_at, now)
        summed = (
            base + length + sequence + now + word_sum(payload)
        )  # sequence % 65535 is the sum of its halves
        _SHORT.pack_into(header, checksum_at, -summed % 65535)
        yield header, payload
        if position >= total:
            return
        sequence = (sequence + length) & 0xFFFFFFFF
        now &= ~_CWR


def _udp(
    packet: memoryview, version: int, transport: int, size: int
) -> Iterator[tuple[bytearray, memoryview]]:
    start = transport + 8
    header = bytearray(packet[:start])
    ports = word_sum(header[transport : transport + 4])
    base = pseudo_header(_addresses(header, version), _UDP, 0) + ports
    network = _Network(header, version, start)
    for position in range(start, max(len(packet), start + 1), size):
        payload = packet[position : position + size]
        length = len(payload) + 8
        network.next(len(payload))
        summed = checksum_of(base + 2 * length + word_sum(payload)) or 0xFFFF
        _TWO_SHORTS.pack_into(header, transport + 4, length, summed)
        yield header, payload


def _addresses(header: bytearray, version: int) -> bytearray:
    return header[12:20] if version == 4 else header[8:40]


class _Network:
    """The IP header's share: lengths, and IPv4's identification and checksum."""

    def __init__(self, header: bytearray, version: int, length: int) -> None:
        self._header = header
        self._version = version
        self._length = length if version == 4 else length - 40
        if version == 4:
            self._identification = header[4] << 8 | header[5]
            header[2:6] = bytes(4)
            header[10:12] = bytes(2)
            self._base = word_sum(header[: (header[0] & 15) * 4])

    def next(self, payload: int) -> None:
        length = self._length + payload
        if self._version == 4:
            identification = self._identification
            _TWO_SHORTS.pack_into(self._header, 2, length, identification)
            _SHORT.pack_into(self._header, 10, -(self._base + length + identification) % 65535)
            self._identification = (identification + 1) & 0xFFFF
        else:
            _SHORT.pack_into(self._header, 4, length)
