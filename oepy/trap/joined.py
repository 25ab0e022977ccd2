"""What is up of the connections' children, and which held packets ask for them. No IO."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address

from oepy.interfaces import ConfiguredRule, Way
from oepy.model import Flow, IpAddress
from oepy.prefixtable import PrefixTable
from oepy.trap import tables

Range = tuple[int, int]
Ranges = dict[int, list[Range]]  # by IP version: disjoint, in ascending order


def merged(remotes: Iterable[tuple[IpAddress, IpAddress]]) -> Ranges:
    """Ranges that touch or overlap become one: the kernel refuses them side by side."""
    found: Ranges = {4: [], 6: []}
    for version in (4, 6):
        numbers = sorted({(int(first), int(last)) for first, last in remotes if first.version == version})
        whole = found[version]
        for first, last in numbers:
            if whole and first <= whole[-1][1] + 1:
                whole[-1] = (whole[-1][0], max(whole[-1][1], last))
            else:
                whole.append((first, last))
    return found


def range_elements(version: int, ranges: Iterable[Range]) -> list[bytes]:
    """For `tables.add_elements` and `delete_elements`."""
    kind, width = (IPv4Address, 32) if version == 4 else (IPv6Address, 128)
    found: list[bytes] = []
    for first, last in ranges:
        after = None if last + 1 >> width else kind(last + 1).packed
        found += tables.interval(kind(first).packed, after)
    return found


class Asking:
    """Finds the rule by which a queued packet asks: by its destination's prefixes, then the first in order."""

    def __init__(self, rules: Iterable[ConfiguredRule]) -> None:
        self._rules: PrefixTable[tuple[int, ConfiguredRule]] = PrefixTable()
        for order, rule in enumerate(rules):
            if rule.number and rule.required and rule.way is Way.OUT:
                self._rules.add(rule.destination, (order, rule))

    def __bool__(self) -> bool:
        return bool(self._rules)

    def number_of(self, flow: Flow) -> int:
        """0 where no rule with a number asks."""
        return min(self._matching(flow), default=(0, 0))[1]

    def _matching(self, flow: Flow) -> Iterator[tuple[int, int]]:
        for _, rules in self._rules.matching(flow.destination):
            for order, rule in rules:
                if _matches(rule, flow):
                    yield order, rule.number


def _matches(rule: ConfiguredRule, flow: Flow) -> bool:
    return (
        flow.source in rule.source
        and rule.protocol in (0, flow.protocol)
        and rule.source_port in (0, flow.source_port)
        and rule.destination_port in (0, flow.destination_port)
    )


class Joined:
    """The ranges by number, as they are in the kernel's sets."""

    def __init__(self) -> None:
        self._ranges: dict[int, Ranges] = {}

    def change(
        self, number: int, remotes: Collection[tuple[IpAddress, IpAddress]]
    ) -> Iterator[tuple[int, list[Range], list[Range]]]:
        """Take these. Yields IP version, ranges to take out and ranges to put in."""
        before = self._ranges.get(number, {4: [], 6: []})
        after = merged(remotes)
        if remotes:
            self._ranges[number] = after
        else:
            self._ranges.pop(number, None)
        for version in (4, 6):
            old, new = set(before[version]), set(after[version])
            if old != new:
                yield version, sorted(old - new), sorted(new - old)

    def holds(self, number: int, address: IpAddress) -> bool:
        ranges = self._ranges.get(number, {4: [], 6: []})[address.version]
        return any(first <= int(address) <= last for first, last in ranges)

    def all(self) -> Iterator[tuple[int, int, list[Range]]]:
        """Number, IP version and ranges."""
        for number, ranges in self._ranges.items():
            for version in (4, 6):
                if ranges[version]:
                    yield number, version, ranges[version]

    def keep(self, numbers: Collection[int]) -> None:
        """The others' rules and sets are gone."""
        self._ranges = {number: ranges for number, ranges in self._ranges.items() if number in numbers}
