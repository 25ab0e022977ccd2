"""Configured rules by the networks of their peers, so that one connection more changes no other's rules.

Rules whose remote networks lie in one another belong together, as their order counts: an *island*, at the widest
of these networks. Islands have no address in common. Each has a chain of its own in the kernel, with its rules in
their order, and a verdict map leads there: one map for each length of prefix, since ranges would have to be merged
and split. Pure: no IO.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from oepy.exchange import Exchange
from oepy.interfaces import ConfiguredRule, TrapPolicy, Way
from oepy.model import IpNetwork, Verdict

Place = tuple[Way, IpNetwork]
Rules = tuple[ConfiguredRule, ...]


def remote_of(rule: ConfiguredRule) -> IpNetwork:
    return rule.destination if rule.way is Way.OUT else rule.source


def islands(configured: Iterable[ConfiguredRule]) -> dict[Place, Rules]:
    """The rules of each by their rank, and among equals in the order in which they came."""
    by_way: dict[tuple[Way, int], list[tuple[int, int, int, ConfiguredRule]]] = {}
    for order, rule in enumerate(configured):
        remote = remote_of(rule)
        placed = int(remote.network_address), remote.prefixlen, order, rule  # the order is of one rule alone
        by_way.setdefault((rule.way, remote.version), []).append(placed)
    found: dict[Place, Rules] = {}
    for (way, _), rules in by_way.items():
        together: list[tuple[int, ConfiguredRule]] = []
        last = -1
        for start, _, order, rule in sorted(rules):
            if start > last:
                if together:
                    found[way, remote_of(together[0][1])] = _ordered(together)
                last, together = int(remote_of(rule).broadcast_address), []
            together.append((order, rule))
        found[way, remote_of(together[0][1])] = _ordered(together)
    return found


def _ordered(rules: list[tuple[int, ConfiguredRule]]) -> Rules:
    if len(rules) == 1:
        return (rules[0][1],)
    return tuple(rule for _, rule in sorted(rules, key=lambda item: (item[1].rank, item[0])))


@dataclass(frozen=True, slots=True)
class Difference:
    """From one state to another. A changed island is gone and fresh. `same`: those whose rules are equal, by the
    new state's objects."""

    gone: tuple[Place, ...]
    fresh: dict[Place, Rules]
    same: dict[Place, Rules]


def difference(old: dict[Place, Rules], new: dict[Place, Rules]) -> Difference:
    fresh = {place: rules for place, rules in new.items() if old.get(place) != rules}
    return Difference(
        tuple(place for place in old if place in fresh or place not in new),
        fresh,
        {place: rules for place, rules in new.items() if place not in fresh},
    )


class Shores:
    """Where the islands are, so that a change looks at those alone that it meets."""

    def __init__(self, places: Iterable[Place]) -> None:
        # By way and IP version: the first addresses in ascending order, and the networks by them
        self._starts: dict[tuple[Way, int], list[int]] = {}
        self._networks: dict[tuple[Way, int], dict[int, IpNetwork]] = {}
        self._add(places)

    def difference(self, there: dict[Place, Rules], changes: Exchange[ConfiguredRule]) -> Difference:
        """`there`: the rules of all islands."""
        met = dict.fromkeys(place for rule in (*changes.gone, *changes.fresh) for place in self._met(rule))
        leaving = set(map(id, changes.gone))
        stay = (rule for place in met for rule in there[place] if id(rule) not in leaving)
        return difference({place: there[place] for place in met}, islands((*stay, *changes.fresh)))

    def _met(self, rule: ConfiguredRule) -> Iterator[Place]:
        """The islands that have an address in common with the rule's remote network."""
        remote = remote_of(rule)
        kind = rule.way, remote.version
        starts, networks = self._starts.get(kind, []), self._networks.get(kind, {})
        first, last = int(remote.network_address), int(remote.broadcast_address)
        at = bisect_right(starts, first)
        if at and int(networks[starts[at - 1]].broadcast_address) >= first:
            at -= 1
        while at < len(starts) and starts[at] <= last:
            yield rule.way, networks[starts[at]]
            at += 1

    def take(self, found: Difference) -> None:
        for way, network in found.gone:
            kind, start = (way, network.version), int(network.network_address)
            starts = self._starts[kind]
            del starts[bisect_left(starts, start)], self._networks[kind][start]
        self._add(found.fresh)

    def _add(self, places: Iterable[Place]) -> None:
        others = set()
        for way, network in places:
            kind, start = (way, network.version), int(network.network_address)
            others.add(kind)
            self._starts.setdefault(kind, []).append(start)
            self._networks.setdefault(kind, {})[start] = network
        for kind in others:
            self._starts[kind].sort()  # costs little: all but what was added is in order


def lengths(places: Iterable[Place]) -> set[tuple[Way, int, int]]:
    """Way, IP version and length of prefix for which there is a map."""
    return {(way, network.version, max(network.prefixlen, 1)) for way, network in places}


def keys(network: IpNetwork) -> list[bytes]:
    """Of an island in the map of its length. All addresses are two halves: nothing is masked to nothing."""
    if network.prefixlen:
        return [network.network_address.packed]
    return [half.network_address.packed for half in network.subnets(1)]


def map_name(way: Way, version: int, length: int) -> str:
    return f"configured_{way.value}{version}_{length}"


def joined_set(number: int, version: int) -> str:
    """The set of remote addresses that are up of a connection's child. Ends in the version."""
    return f"joined_{number}_{version}"


# ---- verdicts ----------------------------------------------------------------------------------------------

DROP, ACCEPT = "drop", "accept"


@dataclass(frozen=True, slots=True)
class Line:
    """One rule in a chain: what `rule` matches, with `joined` what is up of its child, with `decrypted` what an SA
    of the kernel's has brought. `verdict`: DROP, ACCEPT, or the chain to go to."""

    rule: ConfiguredRule
    verdict: str
    joined: bool = False
    decrypted: bool = False


@dataclass(frozen=True, slots=True)
class Chains:
    """The trap's that configured rules lead to."""

    tunnel: str
    kernel: str
    decrypted: str
    ask: str
    sort: str


def past_device(policy: TrapPolicy, rule: ConfiguredRule) -> bool:
    """Whether the kernel's policies protect it where it is, and not those of the tunnel's device: from there a
    packet in transport mode would be sent to the device again."""
    return rule.transport and policy.kernel_ipsec and policy.tunnel_device is not None


def running_lines(rule: ConfiguredRule, chains: Chains, *, by_kernel: bool) -> list[Line]:
    """While the trap runs. `by_kernel`: see `past_device`."""
    if rule.number:
        if rule.way is Way.OUT:
            rest = [Line(rule, chains.ask)] if rule.required else []
            return [Line(rule, chains.kernel if by_kernel else chains.tunnel, joined=True), *rest]
        protected = [Line(rule, chains.decrypted, joined=True, decrypted=True)] if by_kernel else []
        return [*protected, Line(rule, DROP, joined=not rule.required)]
    verdict = {
        Verdict.BLOCK: DROP,
        Verdict.PRIVATE: chains.tunnel,
        Verdict.CLEAR: chains.sort if rule.way is Way.FORWARD else ACCEPT,
    }
    return [Line(rule, verdict[rule.verdict])]


def shut_lines(rule: ConfiguredRule, chains: Chains, *, bracket: bool, by_kernel: bool) -> list[Line]:
    """In a table that only keeps shut what fails closed. The guard (no `bracket`) has no tunnel to lead to, nor has
    it been told that another one protects what passes here."""
    if rule.number:
        protected = [Line(rule, ACCEPT, decrypted=True)] if by_kernel and rule.way is not Way.OUT else []
        return [*protected, Line(rule, DROP)] if rule.required else []
    if rule.verdict is Verdict.BLOCK:
        return [Line(rule, DROP)]
    if rule.required and (not bracket or rule.verdict is Verdict.PRIVATE):
        return [Line(rule, DROP)]
    return [Line(rule, chains.sort if rule.way is Way.FORWARD else ACCEPT)]
