"""nfnetlink_queue messages (linux/netfilter/nfnetlink_queue.h): configure, receive packets, give verdicts."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from oepy.errors import ParseError
from oepy.trap import netlink as nl

_SUBSYSTEM = 3 << 8
MSG_PACKET = _SUBSYSTEM | 0
_MSG_VERDICT = _SUBSYSTEM | 1
_MSG_CONFIG = _SUBSYSTEM | 2

_CFG_CMD, _CFG_PARAMS, _CFG_QUEUE_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_CMD_BIND, _CMD_UNBIND = 1, 2
_COPY_PACKET = 2
FLAG_GSO = 1 << 2  # hand over super-packets whole instead of segmenting them for us

_PACKET_HDR, _VERDICT_HDR, _MARK, _PAYLOAD, _CAP_LEN = 1, 2, 3, 10, 13
_VERDICT = struct.Struct("!II")
_HEADER = struct.Struct("!IHB")

DROP, ACCEPT = 0, 1
HOOK_PREROUTING = 0

# Enough for an IPv6 header, two extension headers and the ports: packets stay in the kernel.
COPY_RANGE = 160


@dataclass(frozen=True, slots=True)
class QueuedPacket:
    """A packet that waits in the kernel. `payload` is its beginning, `length` its real length in bytes."""

    queue: int
    id: int
    hook: int
    mark: int
    length: int
    payload: bytes


def bind(queue: int, sequence: int = 0) -> bytes:
    command = nl.attribute(_CFG_CMD, struct.pack("!BBH", _CMD_BIND, 0, 0))
    return nl.message(_MSG_CONFIG, nl.NLM_F_ACK, command, resource=queue, sequence=sequence)


def unbind(queue: int, sequence: int = 0) -> bytes:
    command = nl.attribute(_CFG_CMD, struct.pack("!BBH", _CMD_UNBIND, 0, 0))
    return nl.message(_MSG_CONFIG, nl.NLM_F_ACK, command, resource=queue, sequence=sequence)


def configure(queue: int, max_length: int, sequence: int = 0) -> bytes:
    """Copy the first COPY_RANGE bytes, hold at most `max_length` packets, take super-packets whole."""
    body = (
        nl.attribute(_CFG_PARAMS, struct.pack("!IB", COPY_RANGE, _COPY_PACKET))
        + nl.u32(_CFG_QUEUE_MAXLEN, max_length)
        + nl.u32(_CFG_MASK, FLAG_GSO)
        + nl.u32(_CFG_FLAGS, FLAG_GSO)
    )
    return nl.message(_MSG_CONFIG, nl.NLM_F_ACK, body, resource=queue, sequence=sequence)


def verdict(queue: int, packet_id: int, decision: int, mark: int | None = None) -> bytes:
    """Let a packet go or drop it. Several of these may be sent in one datagram.

    A local packet is only routed again where `mark` differs from the one it was queued with.
    """
    body = nl.attribute(_VERDICT_HDR, _VERDICT.pack(decision, packet_id))
    if mark is not None:
        body += nl.u32(_MARK, mark)
    return nl.message(_MSG_VERDICT, 0, body, resource=queue)


def parse_packet(message: nl.Message) -> QueuedPacket:
    """Raises ParseError where the packet header is missing. The payload is empty for packets that were queued
    before the queue was configured."""
    found = nl.parse_attributes(message.body)
    header, payload = found.get(_PACKET_HDR, b""), found.get(_PAYLOAD, b"")
    if len(header) != _HEADER.size:
        raise ParseError("queued packet without its header")
    packet_id, _, hook = _HEADER.unpack(header)
    length = int.from_bytes(found[_CAP_LEN], "big") if _CAP_LEN in found else len(payload)
    mark = int.from_bytes(found.get(_MARK, b""), "big")
    return QueuedPacket(message.resource, packet_id, hook, mark, length, payload)
