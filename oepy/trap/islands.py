"""Configured rules by the networks of their peers, so that one connection more changes no other's rules.

Rules whose remote networks lie in one another belong together, as their order counts: an *island*, at the widest
of these networks. Islands have no address in common. Each has a chain of its own in the kernel, with its rules in
their order, and a verdict map leads there: one map for each length of prefix, since ranges would have to be merged
and split. Pure: no IO.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from oepy.interfaces import ConfiguredRule, TrapPolicy, Way
from oepy.model import IpNetwork, Verdict

Place = tuple[Way, IpNetwork]
Rules = tuple[ConfiguredRule, ...]


def remote_of(rule: ConfiguredRule) -> IpNetwork:
    return rule.destination if rule.way is Way.OUT else rule.source


def islands(configured: Iterable[ConfiguredRule]) -> dict[Place, Rules]:
    """The rules of each, in the order in which they came."""
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


_order = operator.itemgetter(0)


def _ordered(rules: list[tuple[int, ConfiguredRule]]) -> Rules:
    return tuple(rule for _, rule in sorted(rules, key=_order)) if len(rules) > 1 else (rules[0][1],)


@dataclass(frozen=True, slots=True)
class Difference:
    """From one state to another."""

    gone: tuple[Place, ...]
    fresh: dict[Place, Rules]


def difference(old: dict[Place, Rules], new: dict[Place, Rules]) -> Difference:
    """A changed island is gone and fresh."""
    return Difference(
        tuple(place for place, rules in old.items() if new.get(place) != rules),
        {place: rules for place, rules in new.items() if old.get(place) != rules},
    )


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
