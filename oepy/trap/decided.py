"""What was decided for which destination, until when, and which set elements follow from it. No IO.

One entry costs one integer key and one float: there may be hundreds of thousands of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from oepy.model import IpAddress, PolicyGroup, Verdict
from oepy.trap.rules import BLOCK, CLEAR, PRIVATE, REFUSED

MAX_DECIDED = 1 << 20

_GROUPS = tuple(PolicyGroup)
_GROUP_INDEX = {group: index for index, group in enumerate(_GROUPS)}
# A key: address << 4 | IPv6 << 3 | group. The lower 4 bits name (family, group), the rest the address.
_V6 = 8


def _key(group: PolicyGroup, address: IpAddress) -> int:
    return int(address) << 4 | (_V6 if address.version == 6 else 0) | _GROUP_INDEX[group]


def _unkey(key: int) -> tuple[PolicyGroup, IpAddress]:
    number = key >> 4
    address = IPv6Address(number) if key & _V6 else IPv4Address(number)
    return _GROUPS[key & 7], address


def set_name(group: PolicyGroup, verdict: Verdict) -> str | None:
    """The set (without the IP version) in which the kernel looks for this; None where it needs none."""
    if verdict is Verdict.PRIVATE:
        return PRIVATE
    if verdict is Verdict.BLOCK:
        return REFUSED if group is PolicyGroup.PRIVATE else BLOCK
    # Only private-or-clear asks @clear. The others are clear anyway, or never.
    return CLEAR if group is PolicyGroup.PRIVATE_OR_CLEAR else None


@dataclass(frozen=True, slots=True)
class SetChange:
    """One change of one set (`name` with the IP version). `present`: it may be in the kernel already, so it
    has to be taken out; `add`: it has to be (again) in there, until `end` on the monotonic clock."""

    name: str
    key: bytes
    present: bool
    add: bool
    end: float = math.inf


class Decided:
    """Entries with their ends, by the caller's monotonic clock."""

    def __init__(self) -> None:
        self._ends: dict[Verdict, dict[int, float]] = {verdict: {} for verdict in Verdict}
        self._due: dict[int, list[int]] = {}  # second → keys that may end in it
        self._swept = 0

    def __len__(self) -> int:
        return sum(len(ends) for ends in self._ends.values())

    def count(self, verdict: Verdict) -> int:
        return len(self._ends[verdict])

    def verdict(self, group: PolicyGroup, address: IpAddress, now: float) -> Verdict | None:
        """What holds for it now; None where nothing was decided, or that is over."""
        key = _key(group, address)
        for verdict, ends in self._ends.items():
            if (end := ends.get(key)) is not None:
                return verdict if now < end else None
        return None

    def decide(
        self, group: PolicyGroup, address: IpAddress, verdict: Verdict, lifetime: float | None, now: float
    ) -> list[SetChange]:
        """Enter it in the place of an earlier decision. Beyond MAX_DECIDED an old entry is given up first."""
        changes: list[SetChange] = []
        if len(self) >= MAX_DECIDED and self.verdict(group, address, now) is None:
            changes += self.forget(*self._oldest())
        end = math.inf if lifetime is None else now + lifetime
        key = _key(group, address)
        for other, ends in self._ends.items():
            if other is not verdict and ends.pop(key, None) is not None:
                changes += self._change(group, address, other)
        present = self._in_set(group, address, verdict)
        self._ends[verdict][key] = end
        if lifetime is not None:
            self._due.setdefault(int(end) + 1, []).append(key)
        changes += self._change(group, address, verdict, present=present)
        return changes

    def forget(self, group: PolicyGroup, address: IpAddress) -> list[SetChange]:
        key = _key(group, address)
        changes: list[SetChange] = []
        for verdict, ends in self._ends.items():
            if ends.pop(key, None) is not None:
                changes += self._change(group, address, verdict)
        return changes

    def expire(self, now: float) -> None:
        """Drop what is over; the kernel's elements end by themselves."""
        for second in range(self._swept or min(self._due, default=0), int(now) + 1):
            for key in self._due.pop(second, ()):
                for ends in self._ends.values():
                    if ends.get(key, math.inf) <= now:
                        del ends[key]
        self._swept = int(now) + 1

    def items(self) -> Iterator[tuple[PolicyGroup, IpAddress, Verdict]]:
        for verdict, ends in self._ends.items():
            for key in ends:
                yield (*_unkey(key), verdict)

    def all_elements(self) -> list[SetChange]:
        """Every element that has to be there, for a kernel that has none of them."""
        changes = [
            change
            for group, address, verdict in self.items()
            for change in self._change(group, address, verdict, present=False)
        ]
        return list({(change.name, change.key): change for change in changes}.values())

    def _oldest(self) -> tuple[PolicyGroup, IpAddress]:
        largest = max(self._ends.values(), key=len)
        return _unkey(next(iter(largest)))

    def _sharers(self, group: PolicyGroup, verdict: Verdict) -> list[PolicyGroup]:
        """The groups whose entries for one address are one element: @private and @block are shared."""
        name = set_name(group, verdict)
        return [other for other in _GROUPS if name is not None and set_name(other, verdict) == name]

    def _in_set(self, group: PolicyGroup, address: IpAddress, verdict: Verdict) -> bool:
        ends = self._ends[verdict]
        return any(_key(other, address) in ends for other in self._sharers(group, verdict))

    def _change(
        self, group: PolicyGroup, address: IpAddress, verdict: Verdict, present: bool = True
    ) -> list[SetChange]:
        """The element as it must be now: there for as long as the last of the groups that share it."""
        name = set_name(group, verdict)
        if name is None:
            return []
        ends = self._ends[verdict]
        keys = [_key(other, address) for other in self._sharers(group, verdict)]
        latest = max((ends[key] for key in keys if key in ends), default=None)
        full_name = f"{name}{address.version}"
        if latest is None:
            return [SetChange(full_name, address.packed, present, False)]
        return [SetChange(full_name, address.packed, present, True, latest)]
