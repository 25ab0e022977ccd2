"""A policy of groups as the kernel's own IPsec policies (SPD). No IO.

Theory of operation. A packet that finds a policy with a template, and no SA for it, makes the kernel ask
(XFRM_MSG_ACQUIRE) and hold the packet in that policy. In the order in which the kernel looks:

    exempt         neighbour discovery, DHCP, DNS to the resolvers, multicast: pass
    (the SAs' own) of the datapath
    decided        single destinations that were found to be clear or blocked; they run out by themselves
    groups         longest prefix first: `clear` passes, `block` drops, the others ask

Inward there are policies only where a group fails closed: it drops what comes in the clear, and the prefixes of
other groups within it pass.

The asking policies of groups that fail open run out when nobody renews them: a daemon that was killed locks
nobody out. Those of groups that fail closed stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from ipaddress import ip_network

from oepy.interfaces import TrapPolicy
from oepy.model import IpAddress, IpNetwork, PolicyGroup, Verdict
from oepy.xfrm import values as v
from oepy.xfrm.ids import ASK_REQID, PolicyClass, priority

OUT, IN, FORWARD = v.PolicyDirection.OUT, v.PolicyDirection.IN, v.PolicyDirection.FORWARD
ALLOW, BLOCK = v.PolicyAction.ALLOW, v.PolicyAction.BLOCK
OPEN_SECONDS = 30  # life of the asking policies of groups that fail open
_ANYWHERE: dict[int, IpAddress] = {4: v.ANY_ADDRESS, 6: v.ANY_ADDRESS_6}
_ANY: dict[int, IpNetwork] = {4: v.ANY_NETWORK, 6: v.ANY_NETWORK_6}
_MULTICAST = tuple(map(ip_network, ("224.0.0.0/4", "255.255.255.255/32", "ff00::/8")))
_NEIGHBOUR_DISCOVERY = range(133, 138)  # ICMPv6 types, RFC 4861
_UNLIMITED = v.Limits()
_TCP, _UDP, _ICMP6 = 6, 17, 58
_DNS_PORTS = (53, 853)
_DHCP = {4: (68, 67), 6: (546, 547)}  # a client's port, a server's


def _port(number: int) -> v.Port:
    return number, 0xFFFF


def asks(policy: v.Policy) -> bool:
    """Whether packets that match it are a question to us."""
    return policy.action is ALLOW and any(template.reqid == ASK_REQID for template in policy.templates)


def policies(trap: TrapPolicy, *, guard: bool = False) -> Iterator[v.Policy]:
    """All static policies. With `guard` nothing asks: what fails closed is dropped, the rest passes."""
    closed = any(group.fails_closed for _, group in _prefixes(trap))
    for selector in _exemptions(trap):
        yield _policy(OUT, selector, ALLOW, PolicyClass.EXEMPT)
        if closed:
            for direction in (IN, FORWARD):
                yield _policy(direction, _reversed(selector), ALLOW, PolicyClass.EXEMPT)
    of_class = PolicyClass.CLOSED if guard else PolicyClass.TRAP  # the guard is known by it
    for network, group in _prefixes(trap):
        outward = v.Selector(_ANY[network.version], network)
        yield _guarding(outward, group) if guard else _group_policy(outward, group)
        if closed:
            action = BLOCK if group.fails_closed else ALLOW
            for direction in (IN, FORWARD):
                yield _policy(direction, _reversed(outward), action, of_class)


def decided(destination: IpAddress, verdict: Verdict, lifetime: float | None) -> v.Policy | None:
    """None where the SAs' own policies are all that is needed. `lifetime` in seconds."""
    if verdict is Verdict.PRIVATE:
        return None
    seconds = math.ceil(lifetime) if lifetime is not None else 0
    action = ALLOW if verdict is Verdict.CLEAR else BLOCK
    return _policy(OUT, _to(destination), action, PolicyClass.DECIDED, v.Limits(hard_seconds=seconds))


def decided_id(destination: IpAddress) -> v.PolicyId:
    return v.PolicyId(OUT, _to(destination))


def _to(destination: IpAddress) -> v.Selector:
    return v.Selector(_ANY[destination.version], ip_network(destination))


def _prefixes(trap: TrapPolicy) -> Iterator[tuple[IpNetwork, PolicyGroup]]:
    named = {rule.network for rule in trap.rules}
    for rule in trap.rules:
        yield rule.network, rule.group
    for network in _ANY.values():
        if network not in named:
            yield network, trap.default


def _guarding(selector: v.Selector, group: PolicyGroup) -> v.Policy:
    return _policy(OUT, selector, BLOCK if group.fails_closed else ALLOW, PolicyClass.CLOSED)


def _group_policy(selector: v.Selector, group: PolicyGroup) -> v.Policy:
    if group is PolicyGroup.BLOCK:
        return _policy(OUT, selector, BLOCK, PolicyClass.TRAP)
    if group in (PolicyGroup.CLEAR, PolicyGroup.CLEAR_OR_PRIVATE):
        return _policy(OUT, selector, ALLOW, PolicyClass.TRAP)
    anywhere = _ANYWHERE[selector.version]
    # In transport mode the template takes the packet's own addresses: each destination is a question of its own
    template = v.Template(anywhere, anywhere, v.ESP, v.Mode.TRANSPORT, ASK_REQID)
    return v.Policy(
        OUT,
        selector,
        (template,),
        priority=priority(PolicyClass.TRAP, selector),
        limits=v.Limits() if group.fails_closed else v.Limits(hard_seconds=OPEN_SECONDS),
    )


def _policy(
    direction: v.PolicyDirection,
    selector: v.Selector,
    action: v.PolicyAction,
    of_class: PolicyClass,
    limits: v.Limits = _UNLIMITED,
) -> v.Policy:
    ranked = selector if direction is OUT else _reversed(selector)
    return v.Policy(direction, selector, action=action, priority=priority(of_class, ranked), limits=limits)


def _reversed(selector: v.Selector) -> v.Selector:
    """The same packets on their way back. Of ICMP the type and code stay where they are."""
    ports = (selector.destination_port, selector.source_port)
    if selector.protocol == _ICMP6:
        ports = (selector.source_port, selector.destination_port)
    return v.Selector(selector.destination, selector.source, selector.protocol, *ports)


def _exemptions(trap: TrapPolicy) -> Iterator[v.Selector]:
    for number in _NEIGHBOUR_DISCOVERY:
        yield v.Selector(v.ANY_NETWORK_6, v.ANY_NETWORK_6, _ICMP6, _port(number))
    for version, (client, server) in _DHCP.items():
        yield v.Selector(_ANY[version], _ANY[version], _UDP, _port(client), _port(server))
    for resolver in sorted(set(trap.resolvers), key=str):
        for protocol in (_UDP, _TCP):
            for port in _DNS_PORTS:
                host = ip_network(resolver)
                yield v.Selector(_ANY[host.version], host, protocol, v.ANY_PORT, _port(port))
    for network in _MULTICAST:
        yield v.Selector(_ANY[network.version], network)
