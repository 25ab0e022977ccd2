"""What a TUN device says of a packet beside it: struct virtio_net_hdr (linux/virtio_net.h), host byte order.

With it the kernel hands over TCP streams in super-packets of up to 64 KiB which are still to be cut into
segments, and checksums still to be finished; and takes the same from us.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

NEEDS_CHECKSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM: the field holds the pseudo-header's sum only
GSO_NONE, GSO_TCP4, GSO_TCP6, GSO_UDP = 0, 1, 4, 5  # GSO_UDP: cut UDP datagrams, not fragments (UDP_L4)
GSO_ECN = 0x80  # only the first segment carries CWR (RFC 3168 §6.1.2)
_HEADER = struct.Struct("=BBHHHH")
SIZE = _HEADER.size


class Offload(NamedTuple):
    """All lengths in bytes; `checksum_start` from the IP header on, `checksum_offset` from there."""

    flags: int = 0
    gso: int = GSO_NONE
    header_length: int = 0
    segment: int = 0  # payload of each segment but the last
    checksum_start: int = 0
    checksum_offset: int = 0

    def pack(self) -> bytes:
        return _HEADER.pack(*self)


NONE = Offload()
NONE_BYTES = NONE.pack()
UDP4_CHECKSUM = Offload(NEEDS_CHECKSUM, GSO_NONE, 0, 0, 20, 6)  # of a datagram in IPv4 without options
_MAX_KNOWN = 256
_known = {offload.pack(): offload for offload in (NONE, UDP4_CHECKSUM)}


def parse(header: memoryview) -> Offload:
    """Of the SIZE bytes before a packet. The two above are always these very objects."""
    packed = bytes(header[:SIZE])
    found = _known.get(packed)
    if found is None:
        found = Offload(*_HEADER.unpack(packed))
        if len(_known) < _MAX_KNOWN:
            _known[packed] = found
    return found
