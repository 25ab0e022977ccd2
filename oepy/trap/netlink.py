"""Netlink and nfnetlink framing (linux/netlink.h, linux/nfnetlink.h): bytes in, values out, no sockets.

Headers of messages and attributes are in host byte order; what netfilter puts into attributes is in network
byte order. Everything is padded to 4 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from oepy.errors import ParseError
from oepy.wire import Reader

NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x001
NLM_F_MULTI = 0x002
NLM_F_ACK = 0x004
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

NLMSG_ERROR = 2
NLMSG_DONE = 3
NFNL_MSG_BATCH_BEGIN = 0x10
NFNL_MSG_BATCH_END = 0x11

NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF

_MESSAGE = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_NFGENMSG = struct.Struct("!BBH")  # family, version, resource
_ERROR = struct.Struct("=i")


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded. Raises struct.error beyond 65,531 bytes."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) & 3)


def nested(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind | NLA_F_NESTED) + value + bytes(-len(value) & 3)


def text(kind: int, value: str) -> bytes:
    """A string with its final NUL."""
    return attribute(kind, value.encode("ascii") + b"\0")


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(4, "big"))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(8, "big"))


def message(
    kind: int, flags: int, body: bytes, *, family: int = 0, resource: int = 0, sequence: int = 0
) -> bytes:
    """One nfnetlink message: netlink header, nfgenmsg (`resource` in host order here), attributes."""
    length = _MESSAGE.size + _NFGENMSG.size + len(body)
    head = _MESSAGE.pack(length, kind, flags | NLM_F_REQUEST, sequence, 0)
    return head + _NFGENMSG.pack(family, 0, resource) + body


@dataclass(frozen=True, slots=True)
class Message:
    """A received message. `error` is an errno (0 for an acknowledgement) where `kind` is NLMSG_ERROR."""

    kind: int
    flags: int
    sequence: int
    family: int = 0
    resource: int = 0
    body: bytes = b""
    error: int = 0


def parse_messages(data: bytes) -> Iterator[Message]:
    """All messages of one datagram. Raises ParseError where a length does not fit."""
    reader = Reader(data, what="netlink message")
    while reader.remaining:
        length, kind, flags, sequence, _ = _MESSAGE.unpack(reader.pull_bytes(_MESSAGE.size))
        if length < _MESSAGE.size:
            raise ParseError(f"netlink message of {length} bytes")
        body = reader.pull_reader(length - _MESSAGE.size)
        reader.pull_bytes(min(reader.remaining, -length & 3))
        if kind == NLMSG_ERROR:
            number = _ERROR.unpack(body.pull_bytes(4))[0]
            yield Message(kind, flags, sequence, error=-number)
        elif kind == NLMSG_DONE:
            yield Message(kind, flags, sequence)
        else:
            family, _, resource = _NFGENMSG.unpack(body.pull_bytes(_NFGENMSG.size))
            yield Message(kind, flags, sequence, family, resource, body.pull_rest())


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """Attribute type → value, without the nested and byte-order flags; of equal types the last one counts.
    Raises ParseError where a length does not fit, or is below the header's own 4 bytes."""
    found: dict[int, bytes] = {}
    reader = Reader(data, what="netlink attribute")
    while reader.remaining:
        length, kind = _ATTRIBUTE.unpack(reader.pull_bytes(4))
        if length < 4:
            raise ParseError(f"netlink attribute of {length} bytes")
        found[kind & _NLA_TYPE_MASK] = reader.pull_bytes(length - 4)
        reader.pull_bytes(min(reader.remaining, -length & 3))
    return found
