"""The Internet checksum (RFC 1071) in big-integer arithmetic.

Summing 16-bit words with end-around carry is arithmetic modulo 65535, and 2^16 is 1 in it. So a whole packet is
one number, halves of it may be added at any multiple of 16 bits, and the rest modulo 65535 is the sum. In
CPython this takes a quarter of the time of adding words one by one.
"""

from __future__ import annotations

from oepy.datapath.esp.inner import Bytes

_PIECE = 688  # bits, a multiple of 16: from here on one division is faster than another fold
_LADDER = tuple((_PIECE << step, (1 << (_PIECE << step)) - 1) for step in range(9, -1, -1))
# By the length in _PIECEs, rounded up: the folds from the one that halves it on
_FOLDS = tuple(
    tuple(fold for fold in _LADDER if fold[0] < size) for size in range(_PIECE, 65_537 * 8 + _PIECE, _PIECE)
)


def word_sum(data: Bytes) -> int:
    """The sum of all big-endian 16-bit words modulo 65535, an odd last byte padded with zero. Congruent to the
    folded sum of RFC 1071 §1, of which 0 and 0xFFFF are the same here."""
    number = int.from_bytes(data, "big")
    length = len(data)
    if length & 1:
        number <<= 8
    if length > 128:
        for bits, mask in _FOLDS[length * 8 // _PIECE]:
            number = (number >> bits) + (number & mask)
    return number % 65535


def checksum_of(total: int) -> int:
    """The checksum field for a sum of words that is not all zeros: the complement, 0x0000 rather than 0xFFFF."""
    return -total % 65535


def pseudo_header(addresses: Bytes, protocol: int, length: int) -> int:
    """The sum of the pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1), not reduced. `addresses`: both, as they
    stand in the IP header; `length` of header and data above IP."""
    return int.from_bytes(addresses, "big") % 65535 + protocol + length


def finish(packet: memoryview, start: int, offset: int) -> bool:
    """Complete a checksum that holds the pseudo-header's sum only (CHECKSUM_PARTIAL), in place: over all from
    `start` on, into the field at `start + offset`. False where that lies outside of the packet."""
    field = start + offset
    if start < 20 or field + 2 > len(packet):
        return False
    # Zero would say "no checksum" in UDP (RFC 768); its complement means the same everywhere
    packet[field : field + 2] = (checksum_of(word_sum(packet[start:])) or 0xFFFF).to_bytes(2, "big")
    return True
