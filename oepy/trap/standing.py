"""The configured rules in force, as the trap looks them up: changed by what goes and what comes. No IO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from oepy.exchange import Exchange
from oepy.interfaces import ConfiguredRule, TrapPolicy
from oepy.trap.islands import Difference, Place, Rules, Shores, past_device
from oepy.trap.joined import Asking


class Standing:
    """Of one policy. `islands`: of its rules."""

    def __init__(self, policy: TrapPolicy, islands: Collection[Place]) -> None:
        self._shores = Shores(islands)
        self.asking = Asking()
        self._numbers: Counter[int] = Counter()  # of children, by how many rules have them
        self._past_device: Counter[int] = (
            Counter()
        )  # the same, of rules that the kernel's own policies protect
        self._take(policy, Exchange((), policy.configured))

    def difference(self, there: dict[Place, Rules], changes: Exchange[ConfiguredRule]) -> Difference:
        """What becomes of the islands, of which `there` has the rules."""
        return self._shores.difference(there, changes)

    def take(self, policy: TrapPolicy, changes: Exchange[ConfiguredRule], found: Difference) -> None:
        """Of a policy that is another by its configured rules alone."""
        self._shores.take(found)
        self._take(policy, changes)

    def _take(self, policy: TrapPolicy, changes: Exchange[ConfiguredRule]) -> None:
        self.asking.take(changes)
        for rules, one in ((changes.gone, -1), (changes.fresh, 1)):
            for rule in rules:
                _count(self._numbers, rule.number, one)
                if past_device(policy, rule):
                    _count(self._past_device, rule.number, one)

    def has(self, number: int) -> bool:
        """Whether it is a child's that has a rule."""
        return number in self._numbers

    def is_past_device(self, number: int) -> bool:
        """Whether the kernel's own policies protect the child's packets."""
        return number in self._past_device


def _count(counts: Counter[int], number: int, more: int) -> None:
    counts[number] += more
    if not counts[number]:
        del counts[number]


__all__ = ["Standing"]
