"""nfnetlink on top of netlink's framing (linux/netfilter/nfnetlink.h): bytes in, values out, no sockets.

What netfilter puts into attributes is in network byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from oepy.errors import ParseError
from oepy.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLMSG_DONE,
    NLMSG_ERROR,
    attribute,
    frame,
    nested,
    parse_attributes,
    parse_frames,
)

NETLINK_NETFILTER = 12

NFNL_MSG_BATCH_BEGIN = 0x10
NFNL_MSG_BATCH_END = 0x11

_NFGENMSG = struct.Struct("!BBH")  # family, version, resource

__all__ = [
    "NETLINK_NETFILTER",
    "NFNL_MSG_BATCH_BEGIN",
    "NFNL_MSG_BATCH_END",
    "NLMSG_DONE",
    "NLMSG_ERROR",
    "NLM_F_ACK",
    "NLM_F_APPEND",
    "NLM_F_CREATE",
    "Message",
    "attribute",
    "message",
    "nested",
    "parse_attributes",
    "parse_messages",
    "text",
    "u32",
    "u64",
]


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
    return frame(kind, flags, _NFGENMSG.pack(family, 0, resource) + body, sequence)


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
    for found in parse_frames(data):
        if found.kind in (NLMSG_ERROR, NLMSG_DONE):
            yield Message(found.kind, found.flags, found.sequence, error=found.error)
            continue
        if len(found.body) < _NFGENMSG.size:
            raise ParseError(f"nfnetlink message of {len(found.body)} bytes")
        family, _, resource = _NFGENMSG.unpack_from(found.body)
        body = found.body[_NFGENMSG.size :]
        yield Message(found.kind, found.flags, found.sequence, family, resource, body)
