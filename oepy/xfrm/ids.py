"""By which numbers our entries in the kernel are known, and which of two policies comes first. All in here.

A `reqid` ties a policy to its SAs, and tells ours from everybody else's: nothing outside of our ranges, our
if_id and our mark is ever changed. Priorities are the kernel's: the lower number comes first. Within one class
the longer destination prefix does, then the longer source prefix, then a named protocol and ports, then a mark.
"""

from __future__ import annotations

import enum

from oepy.model import MAX_PRIORITY
from oepy.xfrm.values import ANY_PORT, Selector

# "o" in the top byte, then who made it
AUTOMATIC_REQIDS = range(0x6F00_0000, 0x6F7F_FF00)  # negotiated
MANUAL_REQIDS = range(0x6F80_0000, 0x7000_0000)  # `manual:` and `oepy sa`
# Of policies that ask for an SA; none ever has them
TRAP_REQID = 0x6F7F_FFFF  # the datapath's: only to hear of packets that no SA covers
ASK_REQID = 0x6F7F_FFFE  # the trap's: to hear of first packets
QUESTION_REQIDS = (TRAP_REQID, ASK_REQID)


class PolicyClass(enum.IntEnum):
    """In the order in which the kernel looks."""

    EXEMPT = 1
    MANUAL = 2
    FIXED = 3  # of connections' children with a priority, which is counted on from here, from 1 on
    CONFIGURED = FIXED + MAX_PRIORITY + 1
    OPPORTUNISTIC = CONFIGURED + 1
    DECIDED = CONFIGURED + 2  # single destinations, by the trap
    TRAP = CONFIGURED + 3  # asks for an SA
    CLOSED = CONFIGURED + 4  # nothing else has matched: drop


# Behind those of other IPsec programs, as opportunistic policies should be; and ours are known by it
_BASE = 0x6F00_0000
_STEP = 100_000  # priorities of a class; all of `_rank` fits in twice
_WIDTH = {4: 32, 6: 128}


def priority(of_class: int, selector: Selector, *, marked: bool = False) -> int:
    """See above. Policies of the two families never compete, so a rank is of its own family."""
    return class_start(of_class) + 2 * _rank(selector) + (not marked)


def class_start(of_class: int) -> int:
    """Below every priority of the class, and 100,000 below the next one's. Manual policies add the user's own
    (1 to 65,535) to it."""
    return _BASE + of_class * _STEP


def is_trap_priority(number: int) -> bool:
    """Whether a policy of this priority, without if_id and mark, is the trap's own, and not one of SAs."""
    return (number - _BASE) // _STEP in (
        PolicyClass.EXEMPT,
        PolicyClass.DECIDED,
        PolicyClass.TRAP,
        PolicyClass.CLOSED,
    )


def is_closed_priority(number: int) -> bool:
    """Whether it is of the class CLOSED."""
    return (number - _BASE) // _STEP == PolicyClass.CLOSED


def _rank(selector: Selector) -> int:
    width = _WIDTH[selector.version]
    wide = (width - selector.destination.prefixlen) * (width + 1) + width - selector.source.prefixlen
    ports = selector.source_port != ANY_PORT or selector.destination_port != ANY_PORT
    return 3 * wide + (0 if ports else 1 if selector.protocol else 2)
