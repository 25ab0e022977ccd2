"""The IKE header (RFC 7296 §3.1) and the numbers of exchanges and payloads. IKEv1 shares this header."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from oepy.errors import ParseError
from oepy.wire import Reader

_HEADER = struct.Struct("!8s8sBBBBII")
HEADER_SIZE = _HEADER.size
MAX_MESSAGE = 65535
NO_SPI = bytes(8)

FLAG_INITIATOR = 0x08
FLAG_VERSION = 0x10
FLAG_RESPONSE = 0x20
VERSION_2 = 0x20


class Exchange(enum.IntEnum):
    IKE_SA_INIT = 34
    IKE_AUTH = 35
    CREATE_CHILD_SA = 36
    INFORMATIONAL = 37
    IKE_INTERMEDIATE = 43  # RFC 9242
    IKE_FOLLOWUP_KE = 44  # RFC 9370


class PayloadType(enum.IntEnum):
    NONE = 0
    SA = 33
    KE = 34
    IDI = 35
    IDR = 36
    CERT = 37
    CERTREQ = 38
    AUTH = 39
    NONCE = 40
    NOTIFY = 41
    DELETE = 42
    VENDOR = 43
    TSI = 44
    TSR = 45
    SK = 46
    CP = 47
    EAP = 48
    SKF = 53


@dataclass(frozen=True, slots=True)
class Header:
    """`exchange` stays a plain number, because a peer may send any. SPIs are 8 bytes."""

    spi_i: bytes
    spi_r: bytes
    next_payload: int
    version: int
    exchange: int
    flags: int
    message_id: int
    length: int = 0

    @property
    def is_response(self) -> bool:
        return bool(self.flags & FLAG_RESPONSE)

    @property
    def from_initiator(self) -> bool:
        """Whether the sender is the original initiator of the IKE SA (not of this exchange)."""
        return bool(self.flags & FLAG_INITIATOR)


def parse_header(data: bytes) -> Header:
    """Raises ParseError; `length` must be the datagram's (RFC 7296 §3.1). The version is not judged."""
    if len(data) > MAX_MESSAGE:
        raise ParseError(f"IKE header: {len(data)} bytes are more than a datagram")
    header = Header(*Reader(data, what="IKE header").pull(_HEADER))
    if header.length != len(data):
        raise ParseError(f"IKE header: length {header.length} in a datagram of {len(data)}")
    if header.spi_i == NO_SPI:
        raise ParseError("IKE header: the initiator's SPI is zero")
    return header


def build_header(header: Header, length: int, first: int | None = None) -> bytes:
    """`first`: the type of the first payload, where the header does not know it yet."""
    return _HEADER.pack(
        header.spi_i,
        header.spi_r,
        header.next_payload if first is None else first,
        header.version,
        header.exchange,
        header.flags,
        header.message_id,
        length,
    )
