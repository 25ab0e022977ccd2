"""From nested prefixes to disjoint address ranges, each with the rule that wins there.

The kernel looks an address up in one interval map; it knows no "longest prefix wins". So the winner is worked
out here once, by the order that `PolicyTable` uses: longer prefix, then port, then protocol, then strictness.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from oepy.interfaces import PolicyRule
from oepy.model import PolicyGroup


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses `first` to `last`, both included, as integers of one IP version."""

    first: int
    last: int
    rule: PolicyRule


def _rank(rule: PolicyRule) -> tuple[bool, bool, int]:
    return (rule.port != 0, rule.protocol != 0, rule.group.strictness)


def winning_ranges(rules: Iterable[PolicyRule], version: int) -> list[Range]:
    """Disjoint ranges in ascending order; addresses that no rule covers are in none of them. All `rules` are
    taken to apply (to any protocol and port)."""
    best: dict[tuple[int, int], PolicyRule] = {}
    for rule in rules:
        if rule.network.version != version:
            continue
        key = (int(rule.network.network_address), rule.network.prefixlen)
        if key not in best or _rank(rule) > _rank(best[key]):
            best[key] = rule
    found: list[Range] = []
    open_ranges: list[Range] = []  # nested, the innermost last
    position = 0

    def close_until(first: int) -> None:
        nonlocal position
        while open_ranges and open_ranges[-1].last < first:
            inner = open_ranges.pop()
            if position <= inner.last:
                found.append(Range(position, inner.last, inner.rule))
                position = inner.last + 1

    for (first, length), rule in sorted(best.items(), key=lambda item: item[0]):
        close_until(first)
        if open_ranges and position < first:
            found.append(Range(position, first - 1, open_ranges[-1].rule))
        position = first
        width = rule.network.max_prefixlen
        open_ranges.append(Range(first, first + (1 << (width - length)) - 1, rule))
    close_until(1 << 128)
    return found


@dataclass(frozen=True, slots=True)
class GroupRange:
    first: int
    last: int
    group: PolicyGroup


def merge(ranges: Iterable[Range]) -> list[GroupRange]:
    """Neighbours of one group become one range."""
    merged: list[GroupRange] = []
    for item in ranges:
        group = item.rule.group
        if merged and merged[-1].group is group and merged[-1].last + 1 == item.first:
            merged[-1] = GroupRange(merged[-1].first, item.last, group)
        else:
            merged.append(GroupRange(item.first, item.last, group))
    return merged


@dataclass(frozen=True, slots=True)
class Lookup:
    """One step of the classification: flows of this protocol and port (0: any) to these ranges."""

    protocol: int
    port: int
    version: int
    ranges: list[GroupRange]

    @property
    def name(self) -> str:
        return f"p{self.protocol}_{self.port}_v{self.version}"

    @property
    def specific(self) -> bool:
        """Whether it asks for a protocol or port."""
        return (self.protocol, self.port) != (0, 0)


def lookups(rules: Iterable[PolicyRule]) -> list[Lookup]:
    """The steps in the order in which to try them: protocol and port, port alone, protocol alone, neither.

    Each step is worked out from all rules that apply to such a flow, and leaves only those ranges to the
    last step that a rule without protocol and port wins; that rule then also wins in the steps between.
    """
    every = list(rules)
    pairs = {(rule.protocol, rule.port) for rule in every}
    protocols = {rule.protocol for rule in every}
    pairs |= {(protocol, rule.port) for rule in every if rule.port for protocol in protocols}
    steps: list[Lookup] = []
    for protocol, port in sorted(pairs, key=lambda pair: (pair[1] == 0, pair[0] == 0, pair)):
        applying = [rule for rule in every if rule.protocol in (0, protocol) and rule.port in (0, port)]
        for version in (4, 6):
            general = (protocol, port) == (0, 0)
            won = [
                item
                for item in winning_ranges(applying, version)
                if ((item.rule.protocol, item.rule.port) == (0, 0)) == general
            ]
            if won:
                steps.append(Lookup(protocol, port, version, merge(won)))
    return steps
