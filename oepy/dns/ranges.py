"""Validated NSEC records by zone, in order, so that one answers for all names in its range (RFC 8198).

NSEC3 is left out: a hash for each name asked would cost what it saves, and opt-out ranges prove nothing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from dataclasses import dataclass, field

import dns.name
import dns.rdtypes.ANY.NSEC

from oepy.dns.message import NameKey, name_key

Nsec = dns.rdtypes.ANY.NSEC.NSEC
Name = dns.name.Name

MAX_ZONES = 500
MAX_IN_ZONE = 2000


@dataclass(slots=True)
class _Zone:
    order: list[NameKey] = field(default_factory=list)
    entries: dict[NameKey, tuple[float, Name, Nsec]] = field(default_factory=dict)

    def remove(self, key: NameKey) -> None:
        if self.entries.pop(key, None) is not None:
            del self.order[bisect_left(self.order, key)]


class NsecRanges:
    """At most `MAX_ZONES` zones, the least recently used goes first. Times are seconds on one clock."""

    def __init__(self) -> None:
        self._zones: OrderedDict[NameKey, _Zone] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(zone.order) for zone in self._zones.values())

    def clear(self) -> None:
        self._zones.clear()

    def put(self, zone: Name, owner: Name, rdata: Nsec, ttl: float, now: float) -> None:
        """Only what is verified, and no wildcard expansion. A `ttl` of 0 stores nothing."""
        if ttl <= 0 or not owner.is_subdomain(zone):
            return
        held = self._zones.setdefault(name_key(zone), _Zone())
        self._zones.move_to_end(name_key(zone))
        key = _order_key(owner)
        if key not in held.entries:
            if len(held.order) >= MAX_IN_ZONE:
                held.order.clear()
                held.entries.clear()
            insort(held.order, key)
        held.entries[key] = (now + ttl, owner, rdata)
        while len(self._zones) > MAX_ZONES:
            self._zones.popitem(last=False)

    def around(self, zone: Name, name: Name, now: float) -> tuple[list[tuple[Name, Nsec]], float]:
        """The records that may prove something of `name`: its own or the one before it, and the same for the
        wildcard that would serve it. With the seconds that they have left, 0 where there is none."""
        held = self._zones.get(name_key(zone))
        first = _before(held, name, now) if held else None
        if held is None or first is None:
            return [], 0.0
        end, owner, rdata = first
        if owner == name:
            return [(owner, rdata)], end - now
        shared = max(name.fullcompare(owner)[2], name.fullcompare(rdata.next)[2])
        second = _before(held, Name((b"*", *name.labels[-shared:])), now)
        if second is None:
            return [(owner, rdata)], end - now
        return [(owner, rdata), (second[1], second[2])], min(end, second[0]) - now

    def forget(self, name: Name) -> None:
        """So that the next question about `name` is asked in earnest."""
        for depth in range(len(name.labels)):
            held = self._zones.get(name_key(name)[depth:])
            index = bisect_right(held.order, _order_key(name)) if held else 0
            if held and index:
                held.remove(held.order[index - 1])


def _before(held: _Zone, name: Name, now: float) -> tuple[float, Name, Nsec] | None:
    index = bisect_right(held.order, _order_key(name))
    if not index:
        return None
    key = held.order[index - 1]
    entry = held.entries[key]
    if entry[0] <= now:
        held.remove(key)
        return None
    return entry


def _order_key(name: Name) -> NameKey:
    """RFC 4034 §6.1: label by label from the root."""
    return name_key(name)[::-1]
