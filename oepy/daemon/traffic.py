"""Whose traffic is whose: what connections claim, carry and hold, for the trap's rules and for the engine, which
keeps off it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from ipaddress import ip_network, summarize_address_range
from typing import TYPE_CHECKING

from oepy.connections import messages as m
from oepy.connections.manager import ChildState
from oepy.connections.model import ConnectionSet
from oepy.daemon.connection_values import both_ways, first_of, narrowest, past_the_trap, rank_of
from oepy.engine import messages as engine_messages
from oepy.interfaces import ConfiguredRule, Way
from oepy.model import MAX_PRIORITY, AddressRange, IpAddress
from oepy.prefixtable import PrefixTable

if TYPE_CHECKING:
    from oepy.daemon.core import Core

_Ranked = tuple[tuple[tuple[int, ...], ConfiguredRule], ...]
_ANYWHERE = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


class Traffic:
    """One for the daemon's connections."""

    def __init__(self, core: Core) -> None:
        self._core = core
        # All fixed remote selectors: opportunistic peers get none of it
        self._claimed: PrefixTable[str] = PrefixTable()
        # Remote selectors of children that take packets with a mark alone: without it they are the groups'
        self._marked: PrefixTable[str] = PrefixTable()
        # What connections carry or hold now: the engine keeps off
        self._settled: PrefixTable[str] = PrefixTable()
        # Of each child: its priority, and where it is in the file
        self._places: dict[str, tuple[int, int]] = {}
        self._rules: dict[int, tuple[tuple[object, ...], _Ranked]] = {}  # by child's number, and of what
        self._joined: dict[int, set[AddressRange]] = {}  # by child's number: what its tunnels carry
        # What is others' now, and the engine does not know; None: all
        self._untold: list[AddressRange] | None = []

    def load(self, configured: ConnectionSet) -> None:
        self._claimed, self._marked, self._places = PrefixTable(), PrefixTable(), {}
        for connection in configured.connections:
            for child in connection.children:
                self._places[connection.label(child)] = first_of(child), len(self._places)
                for selector in child.remote_ts:
                    if selector.network is None or selector.protocol:
                        continue
                    if child.marks.outward is not None:
                        self._marked.add(selector.network, connection.label(child))
                    if child.marks.outward is None or child.marks.inward is None:
                        self._claimed.add(selector.network, connection.label(child))

    def settles(self, address: IpAddress) -> str | None:
        """Which child has this destination now, so that the engine has nothing to do with it: the first in the
        order of the trap's rules."""
        found = [
            (priority, -length, place, label)
            for length, labels in self._settled.matching(address)
            for label in labels
            for priority, place in (self._places.get(label, (MAX_PRIORITY + 1, len(self._places))),)
        ]
        return min(found)[-1] if found else None

    def claims(self, address: IpAddress) -> str | None:
        """Which child names this destination, up or not."""
        return narrowest(self._claimed, address) or self.settles(address)

    def marked(self, address: IpAddress) -> list[str]:
        """The children that may have packets to this destination which carry their marks."""
        return [label for _, labels in self._marked.matching(address) for label in labels]

    def rules(self) -> tuple[ConfiguredRule, ...]:
        """For the trap: by priority, narrower destinations first, then in the order of the file."""
        found: list[tuple[tuple[int, ...], int, ConfiguredRule]] = []
        states = self._core.connections.manager.children.values()
        for order, state in enumerate(states):
            found += [(rank, order, rule) for rank, rule in self._ranked(state)]
        if len(self._rules) > 2 * len(states) + 64:
            self._rules = {state.number: self._rules[state.number] for state in states}
        return tuple(rule for _, _, rule in sorted(found, key=lambda item: item[:2]))

    def _ranked(self, state: ChildState) -> _Ranked:
        """The same objects as last time, where nothing has changed: with ten thousand connections only the new ones
        have to be made and compared."""
        ends = self._fixed(state)
        of = (state.trapped, *ends)
        known = self._rules.get(state.number)
        if known is None or known[0] != of:
            first = first_of(state.child)
            known = of, tuple(((first, *rank_of(rule)), rule) for rule in self._rules_of(state, *ends))
            self._rules[state.number] = known
        return known[1]

    def _rules_of(
        self, state: ChildState, here: IpAddress | None, there: IpAddress | None
    ) -> Iterable[ConfiguredRule]:
        for local in state.child.local_ts:
            for remote in state.child.remote_ts:
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
                        transport=state.child.mode == "transport",
                        marks=state.child.marks,
                    ):
                        outward = rule.way is Way.OUT
                        by_interface = state.child.if_id_out if outward else state.child.if_id_in
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
        return here, there

    def carry(self, state: ChildState, action: m.Join) -> None:
        if state.child.marks.outward is not None:
            return
        joined = self._joined.setdefault(action.number, set())
        for gone in joined.intersection(action.gone):
            for network in summarize_address_range(*gone):
                self._settled.remove(network, state.label)
        for fresh in set(action.fresh) - joined:
            for network in summarize_address_range(*fresh):
                self._settled.add(network, state.label)
        joined.difference_update(action.gone)
        joined.update(action.fresh)
        if action.gone or action.fresh:
            self._later((*action.gone, *action.fresh))

    def settle(self) -> None:
        """The rules of children are others."""
        self._settled = PrefixTable()
        for number in list(self._joined):
            joined_by = self._core.connections.manager.by_number(number)
            if joined_by is None:
                del self._joined[number]
                continue
            for carried in self._joined[number]:
                for network in summarize_address_range(*carried):
                    self._settled.add(network, joined_by.label)
        for state in self._core.connections.manager.children.values():
            for _, rule in self._ranked(state) if state.trapped else ():
                if rule.way is Way.OUT and not rule.protocol and rule.mark is None:
                    self._settled.add(rule.destination, state.label)
        self._core.reload_trap()
        self._later(None)

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
