"""What a network card does with packets and their virtio header, done the slow way: nothing of it is oepy's."""

from __future__ import annotations

import struct

from oepy.datapath.esp.offload import Offload

TCP, UDP = 6, 17


def ones_complement_sum(data: bytes) -> int:
    """RFC 1071 §1, word by word."""
    total = 0
    for (word,) in struct.iter_unpack("!H", data + b"\0" * (len(data) & 1)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def transport_sum(packet: bytes) -> int:
    """Over pseudo-header and everything above IP; 0xFFFF where the packet's checksum is right."""
    if packet[0] >> 4 == 4:
        start, protocol, addresses = (packet[0] & 15) * 4, packet[9], packet[12:20]
    else:
        start, protocol, addresses = 40, packet[6], packet[8:40]
    data = packet[start:]
    return ones_complement_sum(addresses + struct.pack("!II", len(data), protocol) + data)


def with_checksums(packet: bytes) -> bytes:
    """The same packet, with right IPv4 header and TCP or UDP checksums."""
    changed = bytearray(packet)
    start = 40
    if packet[0] >> 4 == 4:
        start = (packet[0] & 15) * 4
        changed[10:12] = bytes(2)
        changed[10:12] = struct.pack("!H", ~ones_complement_sum(bytes(changed[:start])) & 0xFFFF)
    protocol = packet[9] if packet[0] >> 4 == 4 else packet[6]
    field = start + (16 if protocol == TCP else 6)
    changed[field : field + 2] = bytes(2)
    value = ~transport_sum(bytes(changed)) & 0xFFFF
    changed[field : field + 2] = struct.pack("!H", value or (0xFFFF if protocol == UDP else 0))
    return bytes(changed)


def cut(packet: bytes, offload: Offload) -> list[bytes]:
    """The packets that leave the card. A checksum that is to be finished is believed, another is kept where the
    packet leaves whole; where it does not, it must have been right for the whole."""
    if not offload.gso:
        if not offload.flags & 1:
            return [packet]
        start = offload.checksum_start
        changed = bytearray(packet)
        value = ~ones_complement_sum(packet[start:]) & 0xFFFF
        field = start + offload.checksum_offset
        changed[field : field + 2] = struct.pack("!H", value or 0xFFFF)
        return [bytes(changed)]
    version = packet[0] >> 4
    transport = (packet[0] & 15) * 4 if version == 4 else 40
    if not offload.flags & 1:
        assert transport_sum(packet) == 0xFFFF, "the kernel drops this super-packet"
    if version == 4:
        assert ones_complement_sum(packet[:transport]) == 0xFFFF, "and this one too"
        assert int.from_bytes(packet[2:4], "big") == len(packet)
    else:
        assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
    tcp = (packet[9] if version == 4 else packet[6]) == TCP
    start = transport + ((packet[transport + 12] >> 4) * 4 if tcp else 8)
    assert start == offload.header_length
    pieces = [
        packet[position : position + offload.segment]
        for position in range(start, len(packet), offload.segment)
    ]
    made = []
    for number, piece in enumerate(pieces):
        header = bytearray(packet[:start])
        if version == 4:
            identification = int.from_bytes(packet[4:6], "big") + number
            header[2:6] = struct.pack("!HH", start + len(piece), identification & 0xFFFF)
        else:
            header[4:6] = struct.pack("!H", start - 40 + len(piece))
        if tcp:
            sequence = int.from_bytes(header[transport + 4 : transport + 8], "big")
            sequence += number * offload.segment
            header[transport + 4 : transport + 8] = struct.pack("!I", sequence & 0xFFFFFFFF)
            if number < len(pieces) - 1:
                header[transport + 13] &= ~0x09  # FIN and PSH belong to the last
            if number:
                header[transport + 13] &= ~0x80  # CWR to the first
        else:
            header[transport + 4 : transport + 6] = struct.pack("!H", 8 + len(piece))
        made.append(with_checksums(bytes(header) + piece))
    return made
