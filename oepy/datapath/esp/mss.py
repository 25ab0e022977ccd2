"""Clamp TCP's maximum segment size in SYNs (RFC 9293 §3.7.1), so that no segment outgrows the tunnel."""

from __future__ import annotations

from typing import TypeVar

from oepy.datapath.esp.inner import Bytes

_TCP = 6
_SYN = 0x02
_END, _NO_OPERATION, _MSS = 0, 1, 2
_HEADERS = {4: 40, 6: 60}  # IP and TCP without options


_Packet = TypeVar("_Packet", bytes, memoryview)


def clamp(packet: _Packet, mtu: int) -> _Packet:
    """The packet itself, or a copy with a smaller MSS option where a SYN announces more than fits into `mtu`.

    `packet` has a whole IP header. IPv6 SYNs behind extension headers are left alone.
    """
    version = packet[0] >> 4
    if version == 4:
        if packet[9] != _TCP or (packet[6] << 8 | packet[7]) & 0x1FFF:
            return packet
        start = (packet[0] & 15) * 4
    else:
        if packet[6] != _TCP:
            return packet
        start = 40
    if len(packet) < start + 20 or not packet[start + 13] & _SYN:
        return packet
    end = min(len(packet), start + (packet[start + 12] >> 4) * 4)
    position = start + 20
    while position + 1 < end:
        kind = packet[position]
        if kind == _END:
            break
        if kind == _NO_OPERATION:
            position += 1
            continue
        length = packet[position + 1]
        if length < 2:
            break
        if kind == _MSS and length == 4 and position + 4 <= end:
            limit = mtu - _HEADERS[version]
            if packet[position + 2] << 8 | packet[position + 3] <= limit:
                return packet
            changed = _lower(packet, position + 2, start + 16, limit)
            return memoryview(changed) if isinstance(packet, memoryview) else bytes(changed)
        position += length
    return packet


def _lower(packet: Bytes, position: int, checksum_at: int, limit: int) -> bytearray:
    announced = packet[position] << 8 | packet[position + 1]
    changed = bytearray(packet)
    changed[position : position + 2] = limit.to_bytes(2, "big")
    # RFC 1624 §3, eqn. 3: HC' = ~(~HC + ~m + m'). The option may begin at an odd offset: then the two bytes
    # stand in two words, which is the same sum with the bytes swapped.
    old, new = announced, limit
    if position & 1:
        old, new = _swapped(old), _swapped(new)
    checksum = packet[checksum_at] << 8 | packet[checksum_at + 1]
    total = (~checksum & 0xFFFF) + (~old & 0xFFFF) + new
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    changed[checksum_at : checksum_at + 2] = (~total & 0xFFFF).to_bytes(2, "big")
    return changed


def _swapped(word: int) -> int:
    return (word << 8 | word >> 8) & 0xFFFF
