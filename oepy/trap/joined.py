"""What is up of the connections' children, and which held packets ask for them. No IO."""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address

from oepy.exchange import Exchange
from oepy.interfaces import ConfiguredRule, Way
from oepy.model import AddressRange, Flow, IpAddress
from oepy.prefixtable import PrefixTable
from oepy.trap import tables

Range = tuple[int, int]


class Coverage:
    """The numbers that lie in at least one of many ranges, which may touch and overlap, as runs: the kernel refuses
    ranges that touch side by side. A change costs what lies around it, whatever else there is."""

    def __init__(self) -> None:
        # Segments, by their first number: from each to the next, so many ranges hold it; before the first, none
        self._starts: list[int] = []
        self._counts: list[int] = []

    def add(self, first: int, last: int) -> None:
        self._change(first, last, 1)

    def remove(self, first: int, last: int) -> None:
        """Of a range that was added."""
        self._change(first, last, -1)

    def _change(self, first: int, last: int, by: int) -> None:
        begin, end = self._cut(first), self._cut(last + 1)
        for index in range(begin, end):
            self._counts[index] += by
        for index in (end, begin):
            if self._counts[index] == (self._counts[index - 1] if index else 0):
                del self._starts[index], self._counts[index]

    def _cut(self, at: int) -> int:
        """The index of the segment that begins there, made where there was none."""
        index = bisect_left(self._starts, at)
        if index == len(self._starts) or self._starts[index] != at:
            self._counts.insert(index, self._counts[index - 1] if index else 0)
            self._starts.insert(index, at)
        return index

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self._starts, number) - 1
        return index >= 0 and self._counts[index] > 0

    def near(self, first: int, last: int) -> list[Range]:
        """The runs that overlap or touch this range, in ascending order."""
        index = max(bisect_right(self._starts, first - 1) - 1, 0)
        while index and self._counts[index - 1] and self._counts[index]:
            index -= 1
        return self._runs(index, last + 1)

    def runs(self) -> list[Range]:
        return self._runs(0, self._starts[-1]) if self._starts else []

    def _runs(self, index: int, until: int) -> list[Range]:
        """From the segment of this index to the last one that begins no later."""
        found: list[Range] = []
        open_since: int | None = None
        for at in range(index, len(self._starts)):
            start = self._starts[at]
            if open_since is not None and not self._counts[at]:
                found.append((open_since, start - 1))
                open_since = None
            if start > until and open_since is None:
                break
            if open_since is None and self._counts[at]:
                open_since = start
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
    """Finds the rule by which a queued packet asks: by its destination's prefixes, then that of the lowest rank."""

    def __init__(self, rules: Sequence[ConfiguredRule] = ()) -> None:
        self._rules: PrefixTable[ConfiguredRule] = PrefixTable(_rank)
        self.take(Exchange((), rules))

    def take(self, changes: Exchange[ConfiguredRule]) -> None:
        for rule in filter(_asks, changes.gone):
            self._rules.remove(rule.destination, rule)
        for rule in filter(_asks, changes.fresh):
            self._rules.add(rule.destination, rule)

    def __bool__(self) -> bool:
        return bool(self._rules)

    def number_of(self, flow: Flow, mark: int) -> int:
        """Of a packet with this mark; 0 where no rule with a number asks."""
        firsts = (
            next((rule for rule in rules if _matches(rule, flow, mark)), None)
            for _, rules in self._rules.matching(flow.destination)
        )
        found = min((rule for rule in firsts if rule is not None), key=_rank, default=None)
        return 0 if found is None else found.number


_rank = operator.attrgetter("rank")


def _asks(rule: ConfiguredRule) -> bool:
    return bool(rule.number) and rule.required and rule.way is Way.OUT


def _matches(rule: ConfiguredRule, flow: Flow, mark: int) -> bool:
    return (
        (rule.mark is None or rule.mark.matches(mark))
        and flow.source in rule.source
        and rule.protocol in (0, flow.protocol)
        and rule.source_port in (0, flow.source_port)
        and rule.destination_port in (0, flow.destination_port)
    )


class Joined:
    """The ranges by number, as they are in the kernel's sets."""

    def __init__(self) -> None:
        self._ranges: dict[int, set[AddressRange]] = {}
        self._covered: dict[tuple[int, int], Coverage] = {}  # by number and IP version

    def change(
        self, number: int, gone: Iterable[AddressRange], fresh: Iterable[AddressRange]
    ) -> Iterator[tuple[int, list[Range], list[Range]]]:
        """Drop and take these; what is in both stays. Yields IP version, and the runs to take out of the kernel's
        set and to put in."""
        there = self._ranges.setdefault(number, set())
        out: dict[int, set[Range]] = {4: set(), 6: set()}
        into: dict[int, set[Range]] = {4: set(), 6: set()}
        comes = set(fresh) - there
        goes = there.intersection(gone).difference(fresh)
        changes = [*((each, False) for each in goes), *((each, True) for each in comes)]
        for (start, end), is_fresh in changes:
            version, first, last = start.version, int(start), int(end)
            covered = self._covered.setdefault((number, version), Coverage())
            before = set(covered.near(first, last))
            (covered.add if is_fresh else covered.remove)(first, last)
            after = set(covered.near(first, last))
            for one, other, runs in ((out, into, before - after), (into, out, after - before)):
                one[version] |= runs - other[version]
                other[version] -= runs
        there -= goes
        there |= comes
        if not there:
            self.forget(number)
        for version in (4, 6):
            if out[version] or into[version]:
                yield version, sorted(out[version]), sorted(into[version])

    def holds(self, number: int, address: IpAddress) -> bool:
        return int(address) in self._covered.get((number, address.version), ())

    def all(self) -> Iterator[tuple[int, int, list[Range]]]:
        """Number, IP version and runs."""
        for (number, version), covered in self._covered.items():
            yield number, version, covered.runs()

    def forget(self, number: int) -> None:
        """Its rules and sets are gone."""
        self._ranges.pop(number, None)
        for version in (4, 6):
            self._covered.pop((number, version), None)
