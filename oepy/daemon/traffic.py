"""Whose traffic is whose: what connections claim, carry and hold, for the trap's rules and for the engine, which
keeps off it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from itertools import chain, product
from typing import TYPE_CHECKING

from oepy.connections import messages as m
from oepy.connections.manager import ChildState
from oepy.connections.model import Child, Connection, Order
from oepy.daemon.connection_values import both_ways, first_of, past_the_trap
from oepy.engine import messages as engine_messages
from oepy.exchange import Exchange
from oepy.interfaces import ConfiguredRule, Way
from oepy.model import AddressRange, IpAddress, IpNetwork
from oepy.prefixtable import PrefixTable

if TYPE_CHECKING:
    from oepy.daemon.core import Core

_Standing = tuple[int, Order, int, str]
"""Priority of a child, where its connection and then it itself stand in the configuration, and its label."""

_ANYWHERE = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a child has in the trap's rules, and which destinations it settles: what its rules hold, and what its
    tunnels carry (`joined`, which changes)."""

    standing: _Standing
    of: tuple[object, ...]  # what the rules were made of
    rules: tuple[ConfiguredRule, ...]
    joined: set[AddressRange]
    held: tuple[IpNetwork, ...]


class Traffic:
    """One for the daemon's connections."""

    def __init__(self, core: Core) -> None:
        self._core = core
        # All fixed remote selectors: opportunistic peers get none of it
        self._claimed: PrefixTable[_Standing] = PrefixTable(_as_it_is)
        # Remote selectors of children that take packets with a mark alone: without it they are the groups'
        self._marked: PrefixTable[_Standing] = PrefixTable(_as_it_is)
        # What connections carry or hold now: the engine keeps off
        self._settled: PrefixTable[_Standing] = PrefixTable(_as_it_is)
        self._entries: dict[int, _Entry] = {}  # by child's number
        self._routed: set[int] = set()  # of these, those whose rules depend on a route
        self._rules: tuple[ConfiguredRule, ...] | None = ()  # of all entries; None: others than they were
        # What is others' now, and the engine does not know; None: all
        self._untold: list[AddressRange] | None = []

    def load(self, connections: Exchange[Connection]) -> None:
        for connection in connections.gone:
            for table, network, standing in self._claims(connection):
                table.remove(network, standing)
        for connection in connections.fresh:
            for table, network, standing in self._claims(connection):
                table.add(network, standing)

    def _claims(
        self, connection: Connection
    ) -> Iterator[tuple[PrefixTable[_Standing], IpNetwork, _Standing]]:
        for child in connection.children:
            standing = _standing(connection, child)
            for selector in child.remote_ts:
                if selector.network is None or selector.protocol:
                    continue
                if child.marks.outward is not None:
                    yield self._marked, selector.network, standing
                if child.marks.outward is None or child.marks.inward is None:
                    yield self._claimed, selector.network, standing

    def settles(self, address: IpAddress) -> str | None:
        """Which child has this destination now, so that the engine has nothing to do with it: the first in the
        order of the trap's rules."""
        found = [
            (standings[0][0], -length, standings[0]) for length, standings in self._settled.matching(address)
        ]
        return min(found)[-1][-1] if found else None

    def claims(self, address: IpAddress) -> str | None:
        """Which child names this destination, up or not: by the longest prefix."""
        found = max(self._claimed.matching(address), key=lambda item: item[0], default=None)
        return self.settles(address) if found is None else found[1][0][-1]

    def marked(self, address: IpAddress) -> list[str]:
        """The children that may have packets to this destination which carry their marks."""
        return [standing[-1] for _, standings in self._marked.matching(address) for standing in standings]

    def rules(self) -> tuple[ConfiguredRule, ...]:
        """For the trap. By `rank`: by priority, narrower destinations first, then in the order of the
        configuration."""
        if self._rules is None:
            self._rules = tuple(chain.from_iterable(entry.rules for entry in self._entries.values()))
        return self._rules

    def _rules_of(
        self, state: ChildState, here: IpAddress | None, there: IpAddress | None
    ) -> Iterator[ConfiguredRule]:
        child = state.child
        priority, *stands, _ = _standing(state.connection, child)
        for number, (local, remote) in enumerate(product(child.local_ts, child.remote_ts)):
            for version in (4, 6):
                ours = local.network or (ip_network(here) if here else _ANYWHERE[version])
                theirs = remote.network or (ip_network(there) if there else _ANYWHERE[version])
                both = local.protocol and remote.protocol and local.protocol != remote.protocol
                if ours.version != version or theirs.version != version or both:
                    continue
                for rule in both_ways(
                    *(ours, theirs, local.protocol or remote.protocol, local.port, remote.port),
                    number=state.number,
                    required=state.trapped,
                    transport=child.mode == "transport",
                    marks=child.marks,
                    first=priority,
                    stands=(*stands, number),
                ):
                    by_interface = child.if_id_out if rule.way is Way.OUT else child.if_id_in
                    yield past_the_trap(rule) if by_interface else rule

    def _fixed(self, state: ChildState) -> tuple[IpAddress | None, IpAddress | None]:
        """What `dynamic` is on each side, where it can be one address only: the outer one, unless one is assigned.
        A route is asked for only where ours is `dynamic`."""
        connection = state.connection
        remotes = [place.address for place in connection.remote_addrs]
        there = remotes[0] if len(remotes) == 1 and not connection.pools else None
        locals_ = [place.address for place in connection.local_addrs]
        here = locals_[0] if len(locals_) == 1 else None
        if connection.vips:
            return None, there  # our side is what the peer will give us
        is_dynamic = any(selector.network is None for selector in state.child.local_ts)
        if here is None and there is not None and is_dynamic:
            here = self._core.given.source_towards(there)
            self._routed.add(state.number)
        return here, there

    def carry(self, state: ChildState, action: m.Join) -> None:
        entry = self._entries.get(action.number)
        if entry is None or state.child.marks.outward is not None:
            return
        for gone in entry.joined.intersection(action.gone):
            self._settled.remove_range(gone, entry.standing)
        for fresh in set(action.fresh) - entry.joined:
            self._settled.add_range(fresh, entry.standing)
        entry.joined.difference_update(action.gone)
        entry.joined.update(action.fresh)
        if action.gone or action.fresh:
            self._later((*action.gone, *action.fresh))

    def settle(self, numbers: Iterable[int]) -> None:
        """The rules of the children of these numbers are others, or gone; so may those be that go by a route."""
        for number in dict.fromkeys((*numbers, *self._routed)):
            before = self._entries.get(number)
            state = self._core.connections.manager.by_number(number)
            after = None if state is None else self._entry(state, before)
            if after is before:
                continue
            if before is not None:
                for network in before.held:
                    self._settled.remove(network, before.standing)
                for carried in before.joined:
                    self._settled.remove_range(carried, before.standing)
            if after is None:
                self._entries.pop(number, None)
                self._routed.discard(number)
            else:
                self._entries[number] = after
                for network in after.held:
                    self._settled.add(network, after.standing)
                for carried in after.joined:
                    self._settled.add_range(carried, after.standing)
            self._rules = None
        self._core.reload_trap()
        self._later(None)

    def _entry(self, state: ChildState, before: _Entry | None) -> _Entry:
        """The same object as before, where nothing has changed."""
        ends = self._fixed(state)
        of = state.trapped, state.connection.order, ends
        if before is not None and before.of == of:
            return before
        rules = tuple(self._rules_of(state, *ends))
        held = (
            rule.destination
            for rule in rules
            if rule.way is Way.OUT and not rule.protocol and rule.mark is None
        )
        joined = set() if before is None else before.joined
        return _Entry(
            _standing(state.connection, state.child), of, rules, joined, tuple(held) if state.trapped else ()
        )

    def _later(self, changed: tuple[AddressRange, ...] | None) -> None:
        """The engine looks at its destinations there (None: at all) once for what happens together."""
        if self._untold == []:
            asyncio.get_running_loop().call_soon(self._tell)
        if changed is None or self._untold is None:
            self._untold = None
        else:
            self._untold += changed

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        if self._core.engine.entries:
            self._core.feed(engine_messages.Reloaded(None if untold is None else tuple(untold)))


def _standing(connection: Connection, child: Child) -> _Standing:
    return first_of(child), connection.order, connection.children.index(child), connection.label(child)


def _as_it_is(standing: _Standing) -> _Standing:
    return standing
