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
_IPV4 = struct.Struct("!HH")  # from the third byte on: length, identification
_UDP_FIELDS = struct.Struct("!HH")  # from the fifth byte on: length, checksum
# Of a TCP header from its fifth byte on: sequence, acknowledgement, offset+flags, window, checksum
_FIELDS = struct.Struct("!IIHHH")


def segments(packet: memoryview, offload: Offload) -> tuple[int, int, Iterator[tuple[bytearray, memoryview]]]:
    """How many segments there are, how long their headers are, and of each its headers and its payload. The
    headers are one buffer that is changed for the next: copy it.

    Raises ParseError where packet and `offload` do not fit.
    """
    gso, size, transport = offload.gso & ~GSO_ECN, offload.segment, offload.checksum_start
    version = packet[0] >> 4 if len(packet) >= 20 else 0
    fits = {GSO_TCP4: version == 4, GSO_TCP6: version == 6, GSO_UDP: version in (4, 6)}.get(gso, False)
    protocol = _UDP if gso == GSO_UDP else _TCP
    if not fits or size < 1 or transport < (20 if version == 4 else 40) or transport + 8 > len(packet):
        raise ParseError("a super-packet whose header does not fit")
    other = packet[9] != protocol if version == 4 else transport == 40 and packet[6] != protocol
    if other or (version == 4 and (packet[0] & 15) * 4 != transport):
        raise ParseError("a super-packet of another protocol than its header says")
    start = transport + 8
    if protocol == _TCP:
        if transport + 20 > len(packet):
            raise ParseError("a super-packet without a whole TCP header")
        start = transport + (packet[transport + 12] >> 4) * 4
        if not transport + 20 <= start <= len(packet):
            raise ParseError("a super-packet with a wrong TCP data offset")
    count = max(1, -(-(len(packet) - start) // size))
    cut = _tcp if protocol == _TCP else _udp
    return count, start, cut(packet, version, transport, start, size)


def _tcp(
    packet: memoryview, version: int, transport: int, start: int, size: int
) -> Iterator[tuple[bytearray, memoryview]]:
    header = bytearray(packet[:start])
    sequence, ack, flags, window, _ = _FIELDS.unpack_from(header, transport + 4)
    _FIELDS.pack_into(header, transport + 4, 0, 0, 0, 0, 0)
    base = pseudo_header(_addresses(header, version), _TCP, start - transport) + word_sum(header[transport:])
    base += ack + window  # ack % 65535 is the sum of its halves
    ipv4 = version == 4
    fixed, ident = _prepare(header, version)
    fields_at, pack = transport + 4, _FIELDS.pack_into
    total, position, now = len(packet), start, flags & ~_FIN_PSH
    while True:
        payload = packet[position : position + size]
        length = len(payload)
        position += size
        if position >= total:
            now |= flags & _FIN_PSH
        if ipv4:
            whole = start + length
            _IPV4.pack_into(header, 2, whole, ident)
            _SHORT.pack_into(header, 10, -(fixed + whole + ident) % 65535)
            ident = ident + 1 & 0xFFFF
        else:
            _SHORT.pack_into(header, 4, start - 40 + length)
        check = -(base + length + sequence + now + word_sum(payload)) % 65535
        pack(header, fields_at, sequence, ack, now, window, check)
        yield header, payload
        if position >= total:
            return
        sequence = sequence + length & 0xFFFFFFFF
        now &= ~_CWR


def _udp(
    packet: memoryview, version: int, transport: int, start: int, size: int
) -> Iterator[tuple[bytearray, memoryview]]:
    header = bytearray(packet[:start])
    base = pseudo_header(_addresses(header, version), _UDP, 0) + word_sum(header[transport : transport + 4])
    fixed, ident = _prepare(header, version)
    for position in range(start, max(len(packet), start + 1), size):
        payload = packet[position : position + size]
        whole, length = start + len(payload), 8 + len(payload)
        if version == 4:
            _IPV4.pack_into(header, 2, whole, ident)
            _SHORT.pack_into(header, 10, -(fixed + whole + ident) % 65535)
            ident = ident + 1 & 0xFFFF
        else:
            _SHORT.pack_into(header, 4, whole - 40)
        check = checksum_of(base + 2 * length + word_sum(payload)) or 0xFFFF
        _UDP_FIELDS.pack_into(header, transport + 4, length, check)
        yield header, payload


def _addresses(header: bytearray, version: int) -> bytearray:
    return header[12:20] if version == 4 else header[8:40]


def _prepare(header: bytearray, version: int) -> tuple[int, int]:
    """The sum of what stays as it is in an IPv4 header, and its identification."""
    if version != 4:
        return 0, 0
    ident = header[4] << 8 | header[5]
    header[2:6] = bytes(4)
    header[10:12] = bytes(2)
    return word_sum(header[: (header[0] & 15) * 4]), ident
