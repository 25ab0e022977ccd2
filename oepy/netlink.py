"""Netlink framing (linux/netlink.h), for the trap and the kernel's datapath: bytes in, values out, no sockets.

Headers of messages and attributes are in host byte order, and everything is padded to 4 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from oepy.errors import ParseError
from oepy.wire import Reader

NLM_F_REQUEST = 0x001
NLM_F_MULTI = 0x002
NLM_F_ACK = 0x004
NLM_F_ACK_TLVS = 0x200
NLM_F_CAPPED = 0x100
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_OVERRUN = 4

NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF
_NLMSGERR_ATTR_MSG = 1
MAX_REASON = 200  # characters of a kernel's own words that are kept

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERROR = struct.Struct("=i")


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded. Raises struct.error beyond 65,531 bytes."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) & 3)


def nested(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind | NLA_F_NESTED) + value + bytes(-len(value) & 3)


def frame(kind: int, flags: int, body: bytes, sequence: int = 0) -> bytes:
    """One message; NLM_F_REQUEST is set here. `body` is padded already, as built of attributes it is."""
    return HEADER.pack(HEADER.size + len(body), kind, flags | NLM_F_REQUEST, sequence, 0) + body


@dataclass(frozen=True, slots=True)
class Frame:
    """A received message. Of NLMSG_ERROR, `error` is an errno (0 for an acknowledgement) and `reason` what the
    kernel says of it where it was asked to (NETLINK_EXT_ACK)."""

    kind: int
    flags: int
    sequence: int
    body: bytes = b""
    error: int = 0
    reason: str = ""


def parse_frames(data: bytes) -> Iterator[Frame]:
    """All messages of one datagram. Raises ParseError where a length does not fit."""
    reader = Reader(data, what="netlink message")
    while reader.remaining:
        length, kind, flags, sequence, _ = reader.pull(HEADER)
        if length < HEADER.size:
            raise ParseError(f"netlink message of {length} bytes")
        body = reader.pull_reader(length - HEADER.size)
        reader.pull_bytes(min(reader.remaining, -length & 3))
        if kind == NLMSG_ERROR:
            number = body.pull(_ERROR)[0]
            yield Frame(kind, flags, sequence, error=-number, reason=_reason(body, flags))
        elif kind == NLMSG_DONE:
            yield Frame(kind, flags, sequence)
        else:
            yield Frame(kind, flags, sequence, body.pull_rest())


def _reason(body: Reader, flags: int) -> str:
    """The kernel's own words behind the request that it quotes: whole, or (CAPPED) its header alone."""
    if not flags & NLM_F_ACK_TLVS:
        return ""
    length = body.pull(HEADER)[0]
    if not flags & NLM_F_CAPPED:
        body.pull_bytes(max(length, HEADER.size) - HEADER.size)
        body.pull_bytes(min(body.remaining, -length & 3))
    words = parse_attributes(body.pull_rest()).get(_NLMSGERR_ATTR_MSG, b"")
    return words[:MAX_REASON].rstrip(b"\0").decode("ascii", "backslashreplace")


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """Attribute type → value, without the nested and byte-order flags; of equal types the last one counts.
    Raises ParseError where a length does not fit, or is below the header's own 4 bytes."""
    found: dict[int, bytes] = {}
    reader = Reader(data, what="netlink attribute")
    while reader.remaining:
        length, kind = reader.pull(_ATTRIBUTE)
        if length < 4:
            raise ParseError(f"netlink attribute of {length} bytes")
        found[kind & _NLA_TYPE_MASK] = reader.pull_bytes(length - 4)
        reader.pull_bytes(min(reader.remaining, -length & 3))
    return found
