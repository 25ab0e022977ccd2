"""Validated NSEC and NSEC3 records by zone, in order, so that one answers for all names in its range (RFC 8198).

Of NSEC3 none with the opt-out flag (§5.2), and none with more than `MAX_REUSED_ITERATIONS`: their hashes would cost
what they save. A zone has records of one kind at a time, NSEC3 with one set of parameters.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import dns.name

from oepy.dns.denial import Nsec, Nsec3, is_usable_nsec3, nsec3_digest, nsec3_hash
from oepy.dns.message import NameKey, name_key

Name = dns.name.Name
Record = tuple[Name, Nsec | Nsec3]

MAX_ZONES = 500
MAX_IN_ZONE = 2000
MAX_REUSED_ITERATIONS = 10
MAX_HASHES = 34  # labels between a name and its zone: an address below ip6.arpa has that many

_Key = TypeVar("_Key", NameKey, bytes)
_Found = tuple[_Key, float, Name, Nsec | Nsec3]  # key, end, owner, data


@dataclass(slots=True)
class _Held(Generic[_Key]):
    """Records of one zone in the order of their keys; `parameters` of NSEC3 are iterations and salt."""

    parameters: tuple[int, bytes] | None = None
    order: list[_Key] = field(default_factory=list)
    entries: dict[_Key, tuple[float, Name, Nsec | Nsec3]] = field(default_factory=dict)

    def put(self, key: _Key, entry: tuple[float, Name, Nsec | Nsec3]) -> None:
        if key not in self.entries:
            if len(self.order) >= MAX_IN_ZONE:
                self.order.clear()
                self.entries.clear()
            insort(self.order, key)
        self.entries[key] = entry

    def remove(self, key: _Key) -> None:
        if self.entries.pop(key, None) is not None:
            del self.order[bisect_left(self.order, key)]

    def before(self, key: _Key, now: float, *, around: bool = False) -> _Found[_Key] | None:
        """The record at the key or next before it; with `around` the last of all stands before the first."""
        index = bisect_right(self.order, key)
        if not index and not (around and self.order):
            return None
        found = self.order[index - 1]
        end, owner, rdata = self.entries[found]
        if end <= now:
            self.remove(found)
            return None
        return found, end, owner, rdata


class Ranges:
    """At most `MAX_ZONES` zones, the least recently used goes first. Times are seconds on one clock."""

    def __init__(self) -> None:
        self._plain: OrderedDict[NameKey, _Held[NameKey]] = OrderedDict()
        self._hashed: OrderedDict[NameKey, _Held[bytes]] = OrderedDict()

    def __len__(self) -> int:
        plain = sum(len(zone.order) for zone in self._plain.values())
        return plain + sum(len(zone.order) for zone in self._hashed.values())

    def clear(self) -> None:
        self._plain.clear()
        self._hashed.clear()

    def put(self, zone: Name, owner: Name, rdata: Nsec | Nsec3, ttl: float, now: float) -> None:
        """Only what is verified, and no wildcard expansion. A `ttl` of 0 stores nothing."""
        if ttl <= 0 or not owner.is_subdomain(zone):
            return
        if isinstance(rdata, Nsec3):
            self._put_hashed(zone, owner, rdata, now + ttl)
        else:
            self._hashed.pop(name_key(zone), None)
            _zone_of(self._plain, zone).put(_order_key(owner), (now + ttl, owner, rdata))

    def _put_hashed(self, zone: Name, owner: Name, rdata: Nsec3, end: float) -> None:
        digest = nsec3_digest(owner, zone)
        is_good = is_usable_nsec3(rdata) and not rdata.flags and rdata.iterations <= MAX_REUSED_ITERATIONS
        if digest is None or not is_good:
            return
        self._plain.pop(name_key(zone), None)
        held = _zone_of(self._hashed, zone)
        parameters = (rdata.iterations, rdata.salt)
        if held.parameters != parameters:  # the zone was salted anew
            held = self._hashed[name_key(zone)] = _Held(parameters)
        held.put(digest, (end, owner, rdata))

    def around(self, zone: Name, name: Name, now: float) -> tuple[list[Record], float]:
        """The records that may prove something of `name`: its own or the one before it, and the same for the
        wildcard that would serve it. With the seconds that they have left, 0 where there is none."""
        plain = self._plain.get(name_key(zone))
        if plain is not None:
            return _plain_around(plain, name, now)
        hashed = self._hashed.get(name_key(zone))
        if hashed is not None and len(name.labels) - len(zone.labels) <= MAX_HASHES:
            return _hashed_around(hashed, zone, name, now)
        return [], 0.0

    def forget(self, name: Name) -> None:
        """So that the next question about `name` is asked in earnest."""
        for depth in range(len(name.labels)):
            key = name_key(name)[depth:]
            plain = self._plain.get(key)
            if plain and (found := plain.before(_order_key(name), 0.0)):
                plain.remove(found[0])
            hashed = self._hashed.get(key)
            for ancestor in range(len(name.labels) - len(key) + 1) if hashed else ():
                assert hashed is not None
                assert hashed.parameters is not None
                digest = nsec3_hash(Name(name.labels[ancestor:]), *hashed.parameters)
                if found_hashed := hashed.before(digest, 0.0, around=True):
                    hashed.remove(found_hashed[0])


def _zone_of(zones: OrderedDict[NameKey, _Held[_Key]], zone: Name) -> _Held[_Key]:
    held = zones.setdefault(name_key(zone), _Held())
    zones.move_to_end(name_key(zone))
    while len(zones) > MAX_ZONES:
        zones.popitem(last=False)
    return held


def _plain_around(held: _Held[NameKey], name: Name, now: float) -> tuple[list[Record], float]:
    first = held.before(_order_key(name), now)
    if first is None:
        return [], 0.0
    _, end, owner, rdata = first
    if owner == name:
        return [(owner, rdata)], end - now
    assert isinstance(rdata, Nsec)
    shared = max(name.fullcompare(owner)[2], name.fullcompare(rdata.next)[2])
    second = held.before(_order_key(Name((b"*", *name.labels[-shared:]))), now)
    if second is None:
        return [(owner, rdata)], end - now
    return [(owner, rdata), second[2:]], min(end, second[1]) - now


def _hashed_around(held: _Held[bytes], zone: Name, name: Name, now: float) -> tuple[list[Record], float]:
    """The match of the name; else the match of its closest encloser, the cover of the name one label longer,
    and what stands for the wildcard (RFC 5155 §8.4 to §8.6)."""
    assert held.parameters is not None
    cover: list[_Found[bytes]] = []  # of the next closer name, once the closest encloser is found
    for depth in range(len(name.labels) - len(zone.labels) + 1):
        ancestor = Name(name.labels[depth:])
        digest = nsec3_hash(ancestor, *held.parameters)
        entry = held.before(digest, now, around=True)
        if entry is None or entry[0] != digest:
            cover = [entry] if entry else []
            continue
        found = [entry, *cover]
        if depth:
            wildcard = nsec3_hash(Name((b"*", *ancestor.labels)), *held.parameters)
            third = held.before(wildcard, now, around=True)
            found += [third] if third else []
        unique = {each[0]: each[2:] for each in found}
        return list(unique.values()), min(each[1] for each in found) - now
    return [], 0.0


def _order_key(name: Name) -> NameKey:
    """RFC 4034 §6.1: label by label from the root."""
    return name_key(name)[::-1]
