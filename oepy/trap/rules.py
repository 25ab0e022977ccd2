"""The ruleset as text for `nft -f -`.

Theory of operation. All stands in one table of the inet family:

    output   (type route, -150: a changed mark is routed again)
        own marks, loopback and the exempt are accepted; the rest goes to `sort`
    arriving (filter prerouting, -140: after conntrack, before routing)
        from the tunnel: accepted, the connection is remembered as private (bit in the ct mark)
        for this host:   exempt accepted, then dropped where the source's prefix fails closed
        to be forwarded: dropped where the source's prefix fails closed, then `sort`
    leaving  (filter postrouting) a packet marked private that is about to leave by anything but the tunnel's
             device, and without an SA of the kernel's own IPsec, is dropped: somebody has removed the mark's
             routing rule, or there is no datapath
    kernel   what the kernel's SAs of transport mode protect is marked so that it is routed again, past the
             tunnel's device, and finds its policy on the way; it comes back from no device of ours, but with
             the kernel's word that an SA has decrypted it (`decrypted`)
    sort     one verdict map for each (protocol, port) named by a rule, then one for all others, of disjoint
             ranges (see prefixes.py): from here on a packet belongs to exactly one group
    configured_*
             what the configuration settles before any group: manual policies, connections. For each way, family and
             length of prefix a map, which leads to the chain of the island (islands.py) in which the peer's address
             lies; there the first rule that matches counts. Outward it comes first in `sort`, inward before the
             groups' prefixes. The rules of a connection's child look into a set of remote addresses of its own.
             Chains, elements and these sets come and go over netlink (configured.py), without a new ruleset.
    group_*  what the group does with a packet. What comes from a source in @bystander is none of ours to protect:
             it is neither led into tunnels nor a question. The order of the other lines is the group's policy:
             clear accepts. block drops. private never looks at @clear, at replies or at the open queue.
    ask_open, ask_closed
             the queues. Loaded as "accept" and "drop"; the queue rule is put before that over netlink, for
             where nft's own queue is missing only netlink can say it.

A reply is let out in the clear where its connection came in in the clear, but not where any packet of the
connection has been private.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address

from oepy.interfaces import TrapPolicy, Way
from oepy.model import (
    FOREIGN_BITS,
    MARK_KERNEL,
    MARK_MASK,
    MARK_OWN,
    MARK_PRIVATE,
    PolicyGroup,
    Verdict,
    marked_device,
)
from oepy.trap import islands
from oepy.trap.islands import map_name
from oepy.trap.prefixes import GroupRange, Lookup, lookups

TABLE = "oepy"
GUARD_TABLE = "oepy_guard"  # what a stopped trap leaves
BRACKET_TABLE = "oepy_bracket"  # there only while another table is changed, see switch.py
TABLES = (TABLE, GUARD_TABLE, BRACKET_TABLE)
COMMENT = "made by oepy"

ASK_OPEN, ASK_CLOSED = "ask_open", "ask_closed"
TUNNEL, KERNEL, DECRYPTED, SORT = "tunnel", "kernel", "decrypted", "sort"

# Sets of decided addresses, each in a v4 and a v6 form. `refused` is BLOCK for the private group: apart from
# `block`, so that one port's failed-closed verdict does not take the address's other traffic along.
PRIVATE, CLEAR, BLOCK, REFUSED = "private", "clear", "block", "refused"
SETS = (PRIVATE, CLEAR, BLOCK, REFUSED)
# Hosts behind this one that have not made it their gateway
BYSTANDER = "bystander"

_ADDRESS_TYPE = {4: "ipv4_addr", 6: "ipv6_addr"}
_IP = {4: "ip", 6: "ip6"}
# Protocols by number: nft looks names up in /etc/protocols, which small systems lack
_TCP_UDP = "{ 6, 17 }"
_WITH_PORTS = "{ 6, 17, 33, 132, 136 }"  # TCP, UDP, DCCP, SCTP, UDP-Lite
_NEIGHBOUR_DISCOVERY = "icmpv6 type 133-137"
_REMEMBER = f"ct mark set (ct mark & {FOREIGN_BITS:#x}) | {MARK_PRIVATE:#x}"  # the connection as private


def _marked(mark: int) -> str:
    return f"meta mark set (meta mark & {FOREIGN_BITS:#x}) | {mark:#x}"


def _address(version: int, number: int) -> str:
    return str(IPv4Address(number) if version == 4 else IPv6Address(number))


def _chain_of(group: PolicyGroup) -> str:
    return "group_" + group.value.replace("-", "_")


def _interval(version: int, item: GroupRange) -> str:
    first, last = _address(version, item.first), _address(version, item.last)
    return first if first == last else f"{first}-{last}"


def _verdict_map(step: Lookup, prefix: str, verdicts: dict[PolicyGroup, str]) -> str:
    elements = ", ".join(
        f"{_interval(step.version, item)} : {verdicts[item.group]}"
        for item in step.ranges
        if item.group in verdicts
    )
    kind = f"type {_ADDRESS_TYPE[step.version]} : verdict; flags interval;"
    return f"map {prefix}_{step.name} {{ {kind} elements = {{ {elements} }} }}\n"


def _flow_match(step: Lookup, side: str) -> str:
    """The match for a step's protocol and port; `side` is `dport` or `sport`."""
    if step.port:
        protocol = str(step.protocol) if step.protocol else _WITH_PORTS
        return f"meta l4proto {protocol} th {side} {step.port} "
    return f"meta l4proto {step.protocol} " if step.protocol else ""


def _vmap(step: Lookup, address: str, prefix: str) -> str:
    port = "dport" if address == "daddr" else "sport"
    return f"{_flow_match(step, port)}{_IP[step.version]} {address} vmap @{prefix}_{step.name}"


class Ruleset:
    """The text for one policy. GUARD_TABLE and BRACKET_TABLE are the small variants that only keep shut what
    fails closed; the bracket lets pass what the trap beside it has marked private."""

    def __init__(self, policy: TrapPolicy, table: str = TABLE) -> None:
        self._policy = policy
        self.islands = islands.islands(policy.configured)
        self.lengths = islands.lengths(self.islands)
        self._guard = table != TABLE
        self._steps = lookups(policy.rules)
        self._table = table
        self._later = 1 if self._guard else 0  # its chains come behind the trap's, to see its marks

    @property
    def needed(self) -> bool:
        """Whether anything in it fails closed."""
        return fails_closed(self._policy)

    # -- transactions --------------------------------------------------------------------------------

    def loading(self, *removed: str) -> str:
        """Remove these tables and load this one, in the place of one of the same name: one transaction. It is
        no seamless change of base chains, see switch.py."""
        return f"{removing(self._table, *removed)}{self._load(self._static_sets())}"

    def replacing(self, old: Ruleset) -> str:
        """Change from `old`, loaded before, and keep the sets of decided addresses with their elements, the queue
        rules and what is configured: one transaction."""
        flushes = [f"flush chain inet {self._table} {name}\n" for name in self._chains()]
        deletions = [f"delete map inet {self._table} {name}\n" for name in old.map_names()]
        return "".join((*flushes, *deletions, self._load("")))

    def without(self, lengths: set[tuple[Way, int, int]]) -> str:
        """Remove the maps of these lengths, which nothing refers to any more."""
        return "".join(
            f"delete map inet {self._table} {map_name(*length)}\n" for length in sorted_lengths(lengths)
        )

    def map_names(self) -> list[str]:
        return [f"{prefix}_{step.name}" for prefix, step in self._maps()]

    # -- pieces --------------------------------------------------------------------------------------

    def _load(self, extra: str) -> str:
        chains = "".join(
            f"chain {name} {{\n{''.join(f'  {line}{chr(10)}' for line in lines)}}}\n"
            for name, lines in self._chains().items()
        )
        return (
            f"table inet {self._table} {{\n  comment {json.dumps(COMMENT)}\n"
            f"{extra}{self._bare_chains()}{self._configured_maps()}{self._map_texts()}{chains}}}\n"
        )

    def _bare_chains(self) -> str:
        """The maps refer to chains, which must be there first."""
        names = ["reply_in_clear", *(_chain_of(group) for group in PolicyGroup)]
        return "".join(f"chain {name} {{ }}\n" for name in names)

    def _static_sets(self) -> str:
        if self._guard:
            return ""
        sets = "".join(
            f"set {name}{version} {{ type {kind}; flags timeout; }}\n"
            for name in (*SETS, BYSTANDER)
            for version, kind in _ADDRESS_TYPE.items()
        )
        return f"{sets}chain {ASK_OPEN} {{ accept; }}\nchain {ASK_CLOSED} {{ drop; }}\n"

    def _maps(self) -> list[tuple[str, Lookup]]:
        return [(prefix, step) for prefix in ("to", "from") for step in self._steps]

    def _map_texts(self) -> str:
        outward = {group: f"goto {_chain_of(group)}" for group in PolicyGroup}
        texts = []
        for prefix, step in self._maps():
            if prefix == "to":
                verdicts = outward
            else:
                passing = "goto reply_in_clear" if step.specific else "return"
                verdicts = {group: "drop" if group.fails_closed else passing for group in PolicyGroup}
            texts.append(_verdict_map(step, prefix, verdicts))
        return "".join(texts)

    def _chains(self) -> dict[str, list[str]]:
        policy = self._policy
        return {
            "refuse_any": [
                *(_vmap(step, "saddr", "from") for step in self._steps if not step.specific),
                "drop" if policy.default.fails_closed else "return",
            ],
            "reply_in_clear": ["ct direction reply return", "goto refuse_any"],
            TUNNEL: [_marked(MARK_PRIVATE), _REMEMBER, "accept"],
            KERNEL: [_marked(MARK_KERNEL), _REMEMBER, "accept"],
            DECRYPTED: [_REMEMBER, "accept"],
            **{_chain_of(group): self._group(group) for group in PolicyGroup},
            SORT: [
                *self._to_configured(Way.OUT),
                *(_vmap(step, "daddr", "to") for step in self._steps),
                f"goto {_chain_of(policy.default)}",
            ],
            "refuse": self._refuse(),
            "to_host": [*self._exempt_in(), *self._to_configured(Way.IN), "jump refuse", "accept"],
            "output": [
                f"type route hook output priority {-150 + self._later}; policy accept;",
                f"meta mark & {MARK_MASK:#x} == {MARK_OWN:#x} accept",
                *self._pass_marked(),
                'oifname "lo" accept',
                *self._exempt_out(),
                "goto sort",
            ],
            "from_tunnel": self._from_tunnel(),
            "arriving": self._arriving(),
            **({} if self._guard else {"leaving": self._leaving()}),
        }

    def _group(self, group: PolicyGroup) -> list[str]:
        if group is PolicyGroup.BLOCK or (self._guard and group.fails_closed):
            return ["drop"]
        if group is PolicyGroup.CLEAR or self._guard:
            return ["accept"]
        lines = [
            f"{_IP[version]} saddr @{BYSTANDER}{version} {'drop' if group.fails_closed else 'accept'}"
            for version in (4, 6)
            if self._policy.forward
        ]
        lines += _in_set(PRIVATE, "goto tunnel")
        if group is PolicyGroup.PRIVATE:
            return [*lines, *_in_set(REFUSED, "drop"), f"goto {ASK_CLOSED}"]
        lines += _in_set(BLOCK, "drop")
        if group is PolicyGroup.CLEAR_OR_PRIVATE:
            return [*lines, "accept"]
        return [
            *lines,
            *_in_set(CLEAR, "accept"),
            f"ct direction reply ct mark & {MARK_MASK:#x} != {MARK_PRIVATE:#x} accept",
            f"goto {ASK_OPEN}",
        ]

    def _to_configured(self, way: Way) -> list[str]:
        """Only for addresses of a rule: all others pay for one lookup, however many rules there are."""
        lines = []
        field = "daddr" if way is Way.OUT else "saddr"
        for place in sorted_lengths(self.lengths):
            _, version, length = place
            if place[0] is way:
                whole = length == (32 if version == 4 else 128)
                mask = "" if whole else f" & {_mask(version, length)}"
                lines.append(f"{_IP[version]} {field}{mask} vmap @{map_name(*place)}")
        return lines

    def _configured_maps(self) -> str:
        return "".join(
            f"map {map_name(*length)} {{ type {_ADDRESS_TYPE[length[1]]} : verdict; }}\n"
            for length in sorted_lengths(self.lengths)
        )

    def _pass_marked(self) -> list[str]:
        """The bracket stands beside a running trap, whose marked packets go into the tunnel. Without a trap
        nothing may rely on the mark: its routes may be gone."""
        if self._table != BRACKET_TABLE:
            return []
        return [f"meta mark & {MARK_MASK:#x} == {{ {MARK_PRIVATE:#x}, {MARK_KERNEL:#x} }} accept"]

    def _exempt_out(self) -> list[str]:
        return [
            "fib daddr type { local, broadcast, multicast } accept",
            f"{_NEIGHBOUR_DISCOVERY} accept",
            *_dhcp(("68", "67"), ("546", "547")),
            *self._resolver("daddr", "dport", ""),
        ]

    def _exempt_in(self) -> list[str]:
        ports = ", ".join(str(port) for port in sorted(set(self._policy.ike_ports)))
        return [
            f"ip6 hoplimit 255 {_NEIGHBOUR_DISCOVERY} accept",
            *([f"udp dport {{ {ports} }} accept"] if ports else []),
            "meta l4proto { 50, 51 } accept",  # ESP and AH
            *_dhcp(("67", "68"), ("547", "546")),
            *self._resolver("saddr", "sport", "ct direction reply "),
        ]

    def _resolver(self, address: str, port: str, condition: str) -> list[str]:
        lines = []
        for version in (4, 6):
            servers = sorted({str(item) for item in self._policy.resolvers if item.version == version})
            if servers:
                lines.append(
                    f"{_IP[version]} {address} {{ {', '.join(servers)} }} meta l4proto {_TCP_UDP} "
                    f"th {port} {{ 53, 853 }} {condition}accept"
                )
        return lines

    def _refuse(self) -> list[str]:
        """Drop what comes in the clear from prefixes that fail closed, else return. PMTU errors may pass that
        quote one of our connections, but not a private one: a router on the way never sees those."""
        related = f"ct state related ct mark & {MARK_MASK:#x} != {MARK_PRIVATE:#x} return"
        return [
            f"icmp type destination-unreachable icmp code frag-needed {related}",
            f"icmpv6 type packet-too-big {related}",
            *(_vmap(step, "saddr", "from") for step in self._steps if step.specific),
            "goto refuse_any",
        ]

    def _leaving(self) -> list[str]:
        """Routes are not ours alone (systemd-networkd removes rules that it does not know when it starts, an
        admin may flush them): a marked packet that finds the main table must not go out in the clear."""
        device, unprotected = self._policy.tunnel_device, ""
        if device is not None:
            unprotected += f"oifname != {json.dumps(device)} "
        by_kernel = self._policy.kernel_ipsec
        if device is not None and not by_kernel:  # userland has one more for each mark of connections
            unprotected += f"oifname != {json.dumps(marked_device(device, '*'))} "
        if by_kernel:
            # Here comes by, too, what has found its SA behind the device and is about to be encrypted
            unprotected += "rt ipsec missing "
        return [
            "type filter hook postrouting priority -140; policy accept;",
            *self._clamp("rt ipsec exists" if device is None else f"oifname {json.dumps(device)}"),
            f"meta mark & {MARK_MASK:#x} == {MARK_PRIVATE:#x} {unprotected}drop",
            *([f"meta mark & {MARK_MASK:#x} == {MARK_KERNEL:#x} rt ipsec missing drop"] if by_kernel else []),
        ]

    def _clamp(self, through: str) -> list[str]:
        """TCP has chosen its MSS before the mark was given, by the route that the packet does not take. Both ways,
        as the peer may not do it. nft never makes an MSS larger."""
        mtu = 0 if self._guard else self._policy.clamp_mtu
        return [
            f"{through} meta nfproto {family} tcp flags & syn == syn tcp option maxseg size set {mtu - headers}"
            for family, headers in (("ipv4", 40), ("ipv6", 60))
            if mtu
        ]

    def _from_tunnel(self) -> list[str]:
        """What has come out of a tunnel, and is for others, goes where the configuration has it: into the tunnel of
        another connection for a hub with spokes. Groups are not asked: it may be for a network of our own."""
        onward = self._to_configured(Way.OUT) if self._policy.forward else []
        return [
            *([] if self._guard else [_REMEMBER]),
            *(["fib daddr type { local, broadcast, multicast } accept", *onward] if onward else []),
            "accept",
        ]

    def _arriving(self) -> list[str]:
        device = self._policy.tunnel_device
        decrypted = "meta ipsec exists" if device is None else f"iifname {json.dumps(device)}"
        return [
            f"type filter hook prerouting priority {-140 + self._later}; policy accept;",
            *self._pass_marked(),
            'iifname "lo" accept',
            *self._clamp(decrypted),
            f"{decrypted} goto from_tunnel",
            "fib daddr type { local, broadcast, multicast } goto to_host",
            *(
                [*self._to_configured(Way.FORWARD), "jump refuse", "goto sort"]
                if self._policy.forward
                else []
            ),
        ]


def fails_closed(policy: TrapPolicy) -> bool:
    """Whether anything must stay shut while no daemon runs."""
    groups = {rule.group for rule in policy.rules} | {policy.default}
    return any(group.fails_closed for group in groups) or any(
        rule.required or (rule.verdict is Verdict.BLOCK and not rule.number) for rule in policy.configured
    )


def sorted_lengths(lengths: set[tuple[Way, int, int]]) -> list[tuple[Way, int, int]]:
    return sorted(lengths, key=lambda item: (item[0].value, item[1], -item[2]))


def _mask(version: int, length: int) -> str:
    width = 32 if version == 4 else 128
    return _address(version, (1 << width) - (1 << width - length))


def _in_set(name: str, verdict: str) -> list[str]:
    return [f"{_IP[version]} daddr @{name}{version} {verdict}" for version in (4, 6)]


def _dhcp(four: Sequence[str], six: Sequence[str]) -> Iterator[str]:
    for source, destination in (four, six):
        yield f"udp sport {source} udp dport {destination} accept"


def _removal(table: str) -> str:
    """Deleting what is not there would fail the transaction; adding first does nothing where it is."""
    return f"add table inet {table}\ndelete table inet {table}\n"


def removing(*tables: str) -> str:
    """One transaction that removes these tables, whether they are there or not."""
    return "".join(_removal(table) for table in tables)
