"""Transport mode (RFC 4303 §3.1.1) in UDP: the payload travels alone, the receiver makes its IP header anew.

The datapath sees no outer IP header, so the inner one is made of the SA's selectors, which therefore must name
one address on each side. Behind a NAT the sender's checksum is over other addresses: it is made anew, as ESP has
shown that nothing was changed (RFC 3948 §3.1.2). TTL, TOS and flow label do not travel; nor do IP options and
extension headers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from oepy.datapath.esp.checksum import checksum_of, pseudo_header, word_sum
from oepy.datapath.esp.inner import Bytes
from oepy.errors import OepyError, ParseError
from oepy.model import SaPair

_HOP_LIMIT = 64
_DONT_FRAGMENT = 0x4000  # RFC 6864 §4.1: an atomic datagram, whose identification has no meaning
_V4 = struct.Struct("!BBHHHBBH8s")
_V6 = struct.Struct("!IHBB32s")
# What may not stand directly in ESP: IP in IP would look like tunnel mode, extension headers have been left out
_REFUSED = frozenset((0, 4, 41, 43, 44, 50, 51, 60, 135))
_CHECKSUM_AT = {6: 16, 17: 6, 58: 2}  # TCP, UDP, ICMPv6: those whose checksum covers the addresses


@dataclass(frozen=True, slots=True)
class TransportHeader:
    """The IP header of every packet that comes in."""

    version: int
    addresses: bytes  # remote, local
    natted: bool = False

    @classmethod
    def of(cls, pair: SaPair) -> TransportHeader:
        """Raises OepyError where the selectors are not one address on each side."""
        selectors = (*pair.remote_ts, *pair.local_ts)
        if len(selectors) != 2 or any(selector.start != selector.end for selector in selectors):
            raise OepyError(
                "transport mode needs selectors of one address on each side",
                "name the two hosts' own addresses, or use tunnel mode",
            )
        addresses = selectors[0].start.packed + selectors[1].start.packed
        return cls(selectors[0].start.version, addresses, pair.natted)

    @staticmethod
    def split(packet: Bytes) -> tuple[int, int] | None:
        """Of an outbound packet: the IP header's length and the protocol behind it. None where transport mode
        cannot carry it: fragments (RFC 4303 §3.3.4), IP options, extension headers, tunnels."""
        if packet[0] >> 4 == 4:
            if packet[0] != 0x45 or (packet[6] << 8 | packet[7]) & 0x3FFF or packet[9] in _REFUSED:
                return None
            return 20, packet[9]
        return None if packet[6] in _REFUSED else (40, packet[6])

    def rebuild(self, payload: bytes, protocol: int, end: int) -> bytes:
        """The IP packet around the first `end` bytes of `payload`. Raises ParseError."""
        if protocol in _REFUSED or end > 65_515:
            raise ParseError(f"next header {protocol} is not for transport mode")
        if self.natted:
            payload, end = self._summed(payload[:end], protocol), min(end, len(payload))
        if self.version == 4:
            header = _V4.pack(
                *(0x45, 0, 20 + end, 0, _DONT_FRAGMENT, _HOP_LIMIT, protocol, 0, self.addresses)
            )
            check = checksum_of(word_sum(header)).to_bytes(2, "big")
            return b"".join((header[:10], check, header[12:], payload[:end]))
        return _V6.pack(0x60000000, end, protocol, _HOP_LIMIT, self.addresses) + payload[:end]

    def _summed(self, payload: bytes, protocol: int) -> bytes:
        """With the checksum that fits our addresses; UDP without one stays without."""
        at = _CHECKSUM_AT.get(protocol, len(payload))
        if at + 2 > len(payload) or (protocol == 17 and payload[at : at + 2] == b"\0\0"):
            return payload
        bare = payload[:at] + b"\0\0" + payload[at + 2 :]
        total = checksum_of(word_sum(bare) + pseudo_header(self.addresses, protocol, len(bare)))
        if protocol == 17:
            total = total or 0xFFFF  # RFC 768: 0 would mean none
        return bare[:at] + total.to_bytes(2, "big") + bare[at + 2 :]
