"""Whether a child SA carries AGGFRAG payloads: USE_AGGFRAG (RFC 9347 §5.1), and beside it a notify of our own.

Asked for in the exchange that makes the child, agreed on by answering alike; a rekey takes it over from the old
child without a word (§5.1). Congestion control is neither offered nor accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oepy.ike.flow import ChildRefused
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import Payload, notify

if TYPE_CHECKING:
    from oepy.ike.message import Message

_DONT_FRAGMENT, _CONGESTION_CONTROL = 0x01, 0x02
# The number is from the range for private use, where others may have it too: the text tells
_SUPER_PACKETS = b"oepy super-packets 1"


@dataclass(frozen=True, slots=True)
class Aggregation:
    """What a child's two sides agreed on: whether the peer takes fragments, and both take super-packets."""

    fragments: bool
    super_packets: bool


def payloads() -> list[Payload]:
    """The same in request and answer: fragments are welcome, no congestion control, super-packets too."""
    return [notify(NotifyType.USE_AGGFRAG, b"\0"), notify(NotifyType.OEPY_SUPER_PACKETS, _SUPER_PACKETS)]


def asked_for(message: Message) -> Aggregation | None:
    """By the peer's request. None: no aggregation, which goes on without."""
    item = message.notify(NotifyType.USE_AGGFRAG)
    if item is None or len(item.data) != 1 or item.data[0] & _CONGESTION_CONTROL:
        return None
    return _read(item.data[0], message)


def agreed_on(message: Message, *, asked: bool) -> Aggregation | None:
    """By the peer's answer. Raises ChildRefused where it is no answer to what was asked: the peer would send
    what we could not read."""
    item = message.notify(NotifyType.USE_AGGFRAG)
    if item is None:
        return None
    if not asked or len(item.data) != 1 or item.data[0] & _CONGESTION_CONTROL:
        raise ChildRefused(
            NotifyType.NO_PROPOSAL_CHOSEN, "the peer wants an aggregation that was not asked for"
        )
    return _read(item.data[0], message)


def _read(flags: int, message: Message) -> Aggregation:
    own = message.notify(NotifyType.OEPY_SUPER_PACKETS)
    fragments = not flags & _DONT_FRAGMENT
    return Aggregation(fragments, fragments and own is not None and own.data == _SUPER_PACKETS)
