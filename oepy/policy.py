"""Which policy group a flow belongs to: the longest matching prefix wins, then a rule that names a protocol
or port over one that doesn't, then the stricter group.

Lookup costs one dictionary probe for each prefix length in use, whatever the number of rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network

from oepy.interfaces import PolicyRule
from oepy.model import Flow, IpAddress, IpNetwork, PolicyGroup
from oepy.prefixtable import PrefixTable

_Key = tuple[int, int]  # (prefix length, network bits)


@dataclass(frozen=True, slots=True)
class Match:
    """`rule` is None where the default decided."""

    group: PolicyGroup
    rule: PolicyRule | None

    @property
    def prefix(self) -> str:
        if self.rule is None:
            return "default"
        text = str(self.rule.network)
        if self.rule.protocol:
            port = f"/{self.rule.port}" if self.rule.port else ""
            text = f"{_PROTOCOL_NAMES.get(self.rule.protocol, str(self.rule.protocol))}{port} {text}"
        return text


_PROTOCOL_NAMES = {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp", 132: "sctp"}
PROTOCOL_NUMBERS = {name: number for number, name in _PROTOCOL_NAMES.items()}


def parse_prefix(text: str, example: str) -> IpNetwork:
    """As written in a configuration. Raises ValueError with the mend, of which `example` shows the form."""
    try:
        return ip_network(text)
    except ValueError as error:
        try:
            mend = f"write {ip_network(text, strict=False)}"
        except ValueError:
            mend = f"write it like {example}"
        raise ValueError(f"{text[:80]!r} is no prefix ({str(error)[:80]}); {mend}") from None


class PrefixSet:
    """Whether any of some prefixes holds an address."""

    def __init__(self, networks: Iterable[IpNetwork] = ()) -> None:
        self._networks = frozenset(networks)
        self._table: PrefixTable[None] = PrefixTable()
        for network in self._networks:
            self._table.add(network, None)

    def __contains__(self, address: IpAddress) -> bool:
        return any(self._table.matching(address))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrefixSet) and self._networks == other._networks

    def __hash__(self) -> int:
        return hash(self._networks)


NO_PREFIXES = PrefixSet()


class PolicyTable:
    """Longest-prefix match over the configured rules."""

    def __init__(self, rules: Iterable[PolicyRule], default: PolicyGroup) -> None:
        self.default = default
        rules = tuple(rules)
        self._specific = tuple(rule for rule in rules if rule.protocol or rule.port)
        self._by_network: dict[int, dict[_Key, list[PolicyRule]]] = {4: {}, 6: {}}
        for rule in rules:
            network = rule.network
            shift = network.max_prefixlen - network.prefixlen
            key = (network.prefixlen, int(network.network_address) >> shift)
            self._by_network[network.version].setdefault(key, []).append(rule)
        for tables in self._by_network.values():
            for entries in tables.values():
                entries.sort(key=lambda r: (r.port != 0, r.protocol != 0, r.group.strictness), reverse=True)
        self._lengths = {
            version: sorted({length for length, _ in tables}, reverse=True)
            for version, tables in self._by_network.items()
        }

    def match(self, flow: Flow) -> Match:
        return self._match(flow.destination, flow.protocol, flow.destination_port)

    def match_address(self, address: IpAddress) -> Match:
        """The group of an address as such: rules that name a protocol or port do not count."""
        return self._match(address, None, 0)

    def groups_of(self, address: IpAddress) -> frozenset[PolicyGroup]:
        """All groups that flows to an address may have: its own, and those of rules for one protocol or port
        that cover it."""
        specific = {rule.group for rule in self._specific if address in rule.network}
        return frozenset(specific | {self.match_address(address).group})

    def _match(self, address: IpAddress, protocol: int | None, port: int) -> Match:
        tables = self._by_network[address.version]
        number, width = int(address), address.max_prefixlen
        for length in self._lengths[address.version]:
            for rule in tables.get((length, number >> (width - length)), ()):
                if rule.protocol and rule.protocol != protocol:
                    continue
                if rule.port and rule.port != port:
                    continue
                return Match(rule.group, rule)
        return Match(self.default, None)
