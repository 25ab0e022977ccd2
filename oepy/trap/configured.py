"""The configured rules in one table of the kernel, changed by the difference: a transaction of what is new and what
is gone, whatever else there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from oepy.errors import OepyError
from oepy.interfaces import ConfiguredRule
from oepy.trap import islands, kernel, programs
from oepy.trap.islands import Difference, Line, Place, Rules, joined_set, map_name

MAX_AT_ONCE = (
    2000  # islands of one transaction: a netlink message has a limit. More only while a bracket stands
)

LinesOf = Callable[[ConfiguredRule], list[Line]]


class Configured:
    """What is in `table`. The maps of the lengths in use are there before (rules.py)."""

    def __init__(self, table: str, lines_of: LinesOf) -> None:
        self._table = table
        self._lines_of = lines_of
        self._serial = 0
        self.there: dict[Place, Rules] = {}
        self._chains: dict[Place, str] = {}
        self._sets: dict[str, int] = {}  # joined sets, by how many islands refer to them

    def change(self, changer: kernel.Tables, wanted: dict[Place, Rules]) -> None:
        """Raises OepyError: then nothing has changed, or (with more than MAX_AT_ONCE) a part."""
        self.apply(changer, islands.difference(self.there, wanted))

    def apply(self, changer: kernel.Tables, found: Difference) -> None:
        """The same, by the difference from what is there."""
        gone = list(found.gone)
        leaving = set(gone)
        new = [item for item in found.fresh.items() if item[0] not in leaving]
        coming: Counter[str] = (
            Counter()
        )  # sets that following transactions refer to, where there is more than one
        if max(len(gone), len(new)) > MAX_AT_ONCE:
            coming.update(name for rules in found.fresh.values() for name in self._sets_of(rules))
        while gone or new:
            some, gone = gone[:MAX_AT_ONCE], gone[MAX_AT_ONCE:]
            # What replaces an island comes in the transaction in which that goes; the rest when all are gone
            now = [(place, found.fresh[place]) for place in some if place in found.fresh]
            if not gone:
                now += new[:MAX_AT_ONCE]
                new = new[MAX_AT_ONCE:]
            if coming:
                coming.subtract(name for _, rules in now for name in self._sets_of(rules))
            self._transaction(changer, some, now, coming)
        self.there |= found.same

    def _transaction(
        self,
        changer: kernel.Tables,
        gone: list[Place],
        fresh: list[tuple[Place, Rules]],
        coming: Counter[str],
    ) -> None:
        """`coming`: sets that a following one refers to; with what is in them they stay."""
        sets = Counter[str]()  # of those that these islands refer to, by how many more do
        for place in gone:
            sets.subtract(self._sets_of(self.there[place]))
        for _, rules in fresh:
            sets.update(self._sets_of(rules))
        counts = {name: self._sets.get(name, 0) + more for name, more in sets.items()}
        chains = {place: f"configured_{self._serial + n}" for n, (place, _) in enumerate(fresh, 1)}
        messages = [
            programs.new_interval_set(self._table, name, int(name[-1]), number)
            for number, name in enumerate((name for name in sets if name not in self._sets), 1)
        ]
        for place, rules in fresh:
            messages += self._program(chains[place], rules)
        messages += [programs.delete_jumps(self._table, name, keys) for name, keys in _by_map(gone)]
        messages += [programs.add_jumps(self._table, name, jumps) for name, jumps in _jumps(chains)]
        messages += [programs.delete_chain(self._table, self._chains[place]) for place in gone]
        unused = {name for name, count in counts.items() if not count and not coming[name]}
        messages += [programs.delete_set(self._table, name) for name in sorted(unused)]
        try:
            changer.transaction(messages)
        except kernel.NetlinkRefused as refused:
            raise OepyError(
                f"the kernel refused the rules of connections and manual policies: {refused}",
                "fewer of them, perhaps",
            ) from refused
        self._serial += len(fresh)
        self._sets.update(counts)
        for name in unused:
            del self._sets[name]
        for place in gone:
            del self.there[place], self._chains[place]
        self.there.update(fresh)
        self._chains.update(chains)

    def _program(self, chain: str, rules: Rules) -> Iterator[bytes]:
        yield programs.new_chain(self._table, chain)
        for rule in rules:
            for line in self._lines_of(rule):
                yield programs.new_rule(
                    self._table, chain, line, joined_set(rule.number, rule.source.version)
                )

    def _sets_of(self, rules: Rules) -> set[str]:
        return {
            joined_set(rule.number, rule.source.version)
            for rule in rules
            if any(line.joined for line in self._lines_of(rule))
        }

    def has_set(self, name: str) -> bool:
        return name in self._sets


def _jumps(chains: dict[Place, str]) -> Iterator[tuple[str, list[tuple[bytes, str]]]]:
    found: dict[str, list[tuple[bytes, str]]] = {}
    for (way, network), chain in chains.items():
        name = map_name(way, network.version, max(network.prefixlen, 1))
        found.setdefault(name, []).extend((key, chain) for key in islands.keys(network))
    yield from found.items()


def _by_map(places: list[Place]) -> Iterator[tuple[str, list[bytes]]]:
    found: dict[str, list[bytes]] = {}
    for way, network in places:
        name = map_name(way, network.version, max(network.prefixlen, 1))
        found.setdefault(name, []).extend(islands.keys(network))
    yield from found.items()


__all__ = ["MAX_AT_ONCE", "Configured"]
