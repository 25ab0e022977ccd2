"""What the control socket can ask of a running daemon, and what `oepy` commands make it do."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Any

from oepy import __version__
from oepy.connections import messages
from oepy.connections.manager import State as ChildPhase
from oepy.daemon import views
from oepy.daemon.connection_values import order_of
from oepy.daemon.forecast import foretell
from oepy.engine import messages as engine_messages
from oepy.engine.table import State
from oepy.errors import OepyError, UsageError
from oepy.interfaces import PolicyRule
from oepy.keys import describe, fingerprint
from oepy.manual.model import ManualPolicy
from oepy.model import IpAddress, PolicyGroup
from oepy.policy import PROTOCOL_NUMBERS

if TYPE_CHECKING:
    from oepy.daemon.runtime import Daemon

TERMINATE_SECONDS = 3.0
ENTRIES_PER_TURN = 1000


class ControlApi:
    """Implements `control.server.Controllable` for one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def status(self) -> dict[str, Any]:
        counts: dict[str, int] = {}
        for entry in self._daemon.engine.entries.values():
            name = views.disposition(entry.state)
            counts[name] = counts.get(name, 0) + 1
        groups: dict[str, list[str]] = {group.value: [] for group in PolicyGroup}
        for rule in self._daemon.config.rules:
            groups[rule.group.value].append(str(rule.network))
        return {
            "version": __version__,
            "pid": os.getpid(),
            "ready": self._daemon.ready,
            "uptime": round(time.monotonic() - self._daemon.started, 3),
            "config": self._daemon.config.source,
            "reloads": self._daemon.reloads,
            "datapath": self._daemon.chosen.name,
            "datapath_mode": self._daemon.chosen.mode,
            "datapath_reason": self._daemon.chosen.reason,
            "trap": self._daemon.trap_name,
            "trap_reason": self._daemon.trap_reason,
            "device": self._daemon.config.device,
            "default_group": self._daemon.config.default_group.value,
            "groups": groups,
            "resolvers": [str(resolver) for resolver in self._daemon.config.resolvers],
            "resolver_states": [asdict(state) for state in self._daemon.keys.resolver_states()],
            "relay": self._daemon.relay_view(),
            "key": {
                "type": describe(self._daemon.host_key.public),
                "fingerprint": fingerprint(self._daemon.host_key.public),
                "file": str(self._daemon.config.key),
            },
            "key_log": str(self._daemon.config.key_log) if self._daemon.config.key_log else None,
            "own_records": [
                {"subject": r.subject, "state": r.state, "reason": r.reason} for r in self._daemon.own.known()
            ],
            "destinations": counts,
            "sas": len(self._daemon.engine.pairs)
            + sum(1 for _ in self._daemon.connections.manager.tunnels()),
            "held": sum(self._daemon.trap.held().values()),
            "counts": {
                "engine": dict(self._daemon.engine.counts),
                "events": dict(self._daemon.journal.counts),
                "trap": dict(self._daemon.trap.statistics()),
                "ike": dict(self._daemon.negotiator.endpoint.counters),
                "datapath": dict(await self._daemon.datapath.statistics()),
            },
            "connections": self._connection_counts(),
            "manual": {
                "sas": len(self._daemon.manual.effective.sas),
                "policies": len(self._daemon.manual.effective.policies),
            },
            "alerts": list(self._daemon.journal.last_alerts),
        }

    async def peers(self) -> list[dict[str, Any]]:
        held, now = self._daemon.trap.held(), time.monotonic()
        listed = []
        for number, entry in enumerate(list(self._daemon.engine.entries.values()), 1):
            listed.append(views.entry_view(entry, held.get(entry.key, 0), now))
            if number % ENTRIES_PER_TURN == 0:
                await asyncio.sleep(0)  # packets are held meanwhile
        return listed

    async def sas(self) -> list[dict[str, Any]]:
        counters = {c.spi_in: c for c in await self._daemon.datapath.counters()}
        now = time.monotonic()
        manual = await self._daemon.manual.in_use()
        return [
            *(views.sa_view(pair, counted, since, now) for pair, counted, since in manual),
            *(
                views.sa_view(pair, counters.get(spi), since, now)
                for spi, (pair, since) in self._daemon.engine.pairs.items()
            ),
            *(
                views.sa_view(tunnel.pair, counters.get(spi), tunnel.since, now)
                for spi, tunnel in self._daemon.connections.manager.tunnels()
            ),
        ]

    def _connection_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for state in self._daemon.connections.manager.children.values():
            counts[state.state.value] = counts.get(state.state.value, 0) + 1
        return counts

    async def connections(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        held: dict[int, int] = {}
        for (number, _), count in self._daemon.trap.held().items():
            if isinstance(number, int):
                held[number] = held.get(number, 0) + count
        children = self._daemon.connections.manager.in_order()
        return [views.child_view(state, held.get(state.number, 0), now) for state in children]

    async def connection_change(self, operation: str, name: str, seconds: float) -> dict[str, Any]:
        """`load` applies the file's difference; `up` and `down` wait for the outcome, `seconds` at most."""
        if operation == "load":
            problems = self._daemon.reload()
            if problems:
                raise UsageError("; ".join(problems))
            await self._daemon.steps.idle()
            return {"done": "load", "connections": len(self._daemon.connections.book.configured.connections)}
        if operation not in ("up", "down"):
            raise UsageError(f"{operation!r} is no operation", "up, down or load")
        manager = self._daemon.connections.manager
        states = manager.find(name)
        if not states:
            raise OepyError(f"no connection or child {name!r} is configured", "see `oepy connection list`")
        up = operation == "up"
        for state in states:
            self._daemon.connections.feed(messages.Up(state.label) if up else messages.Down(state.label))

        def pending() -> bool:
            if not up:
                return any(state.tunnels for state in states)
            return any(
                state.state is not ChildPhase.UP
                and state.failures == 0
                and manager.children.get(state.label) is state
                for state in states
            )

        deadline = time.monotonic() + seconds
        await asyncio.sleep(0)
        while pending() and time.monotonic() < deadline:  # noqa: ASYNC110 - a command waits
            await asyncio.sleep(0.005)
        await self._daemon.steps.idle()
        now = time.monotonic()
        return {"done": operation, "children": [views.child_view(state, 0, now) for state in states]}

    async def manual_list(self, *, everybodys: bool) -> dict[str, Any]:
        manual = self._daemon.manual
        return {
            "sas": await manual.backend.sa_views(manual.effective, everybodys=everybodys),
            "policies": await manual.backend.policy_views(manual.effective, everybodys=everybodys),
        }

    async def manual_change(self, operation: str, entry: object) -> dict[str, Any]:
        before, after = await self._daemon.change_manual(operation, entry)
        removed = len(before.sas) + len(before.policies) - len(after.sas) - len(after.policies)
        return {
            "done": operation,
            "by": "daemon",
            "sas": len(after.sas),
            "policies": len(after.policies),
            "removed": max(removed, 0),
        }

    async def policies(self) -> list[dict[str, Any]]:
        default = self._daemon.config.default_group.value
        rules = sorted(self._daemon.config.rules, key=_match_order)
        listed = [
            {
                "prefix": str(rule.network),
                "protocol": _PROTOCOL_NAMES.get(rule.protocol, str(rule.protocol)) if rule.protocol else None,
                "port": rule.port or None,
                "group": rule.group.value,
            }
            for rule in rules
        ]
        manual = [views.manual_policy_view(policy) for policy in self._daemon.manual.in_order()]
        children = self._daemon.connections.manager.in_order()
        selectors = [
            (state, local, remote)
            for state in children
            for local, remote in product(state.child.local_ts, state.child.remote_ts)
        ]
        selectors.sort(key=lambda item: order_of(item[0].child, *item[1:]))
        manual += [views.connection_policy_view(*item) for item in selectors]
        return [*manual, *listed, {"prefix": "default", "protocol": None, "port": None, "group": default}]

    async def explain(self, destination: IpAddress) -> dict[str, Any]:
        manual = self._daemon.manual.concerns(destination)
        if manual is not None:
            return await self._explain_manual(destination, manual)
        label = self._daemon.connections.traffic.settles(destination)
        if label is not None:
            return await self._explain_connection(destination, label)
        entry = self._daemon.engine.find(destination)
        if entry is None:
            daemon = self._daemon
            data = await foretell(destination, daemon.policy, daemon.keys, daemon.config)
        else:
            sa = None
            if entry.tunnels and entry.tunnels[-1].spi_in in self._daemon.engine.pairs:
                spi = entry.tunnels[-1].spi_in
                pair, since = self._daemon.engine.pairs[spi]
                counters = await self._daemon.datapath.counters([spi])
                sa = views.sa_view(pair, next(iter(counters), None), since, time.monotonic())
            held = self._daemon.trap.held().get(entry.key, 0)
            session = self._daemon.negotiator.session_with(entry.tunnels[-1].spi_in) if sa else None
            ike = None
            if session is not None:
                ike = views.ike_view(session)
                ike["last_error"] = session.last_error or entry.last_error
            data = views.explanation(entry, held, time.monotonic(), sa, ike)
        where = (
            "own traffic and forwarded"
            if not self._daemon.given.is_own(destination)
            else "own address: never"
        )
        data["trap"] = f"{self._daemon.trap_name}, {where}"
        data["marked"] = self._marked(destination)
        return data

    def _marked(self, destination: IpAddress) -> list[dict[str, Any]]:
        """Children that take what goes there with their mark."""
        children = self._daemon.connections.manager.children
        labels = self._daemon.connections.traffic.marked(destination)
        return [views.marked_view(children[label], destination) for label in labels]

    async def _explain_manual(self, destination: IpAddress, policy: ManualPolicy) -> dict[str, Any]:
        now = time.monotonic()
        sa = next(
            (
                views.sa_view(pair, counted, since, now)
                for pair, counted, since in await self._daemon.manual.in_use()
                if any(ts.contains_address(destination) for ts in pair.remote_ts)
            ),
            None,
        )
        return views.manual_explanation(destination, policy, sa)

    async def _explain_connection(self, destination: IpAddress, label: str) -> dict[str, Any]:
        now = time.monotonic()
        daemon = self._daemon
        state = daemon.connections.manager.children[label]
        sa = ike = None
        for spi, tunnel in state.tunnels.items():
            if any(ts.contains_address(destination) for ts in tunnel.pair.remote_ts):
                counters = await daemon.datapath.counters([spi])
                sa = views.sa_view(tunnel.pair, next(iter(counters), None), tunnel.since, now)
                session = daemon.negotiator.session_with(spi)
                ike = None if session is None else views.ike_view(session)
        held = daemon.trap.held().get((state.number, destination), 0)
        data = views.connection_explanation(destination, state, sa, ike, held, now)
        data["trap"] = f"{daemon.trap_name}, connections come before the groups"
        data["marked"] = self._marked(destination)
        return data

    async def initiate(self, destination: IpAddress, seconds: float) -> dict[str, Any]:
        if self._daemon.given.is_own(destination):
            raise OepyError(f"{destination} is an address of this host", "name a peer's")
        manual = self._daemon.manual.concerns(destination)
        if manual is not None:
            raise OepyError(f"{destination} is keyed by hand ({manual})", "there is nothing to negotiate")
        label = self._daemon.connections.traffic.settles(destination)
        if label is not None:
            raise OepyError(
                f"{destination} belongs to the connection {label}", f"use `oepy connection up {label}`"
            )
        match = self._daemon.policy.match_address(destination)
        if match.group in (PolicyGroup.CLEAR, PolicyGroup.BLOCK):
            raise OepyError(
                f"{destination} is in group {match.group.value} ({match.prefix}), which never negotiates",
                "put it into another group first",
            )
        self._daemon.feed(engine_messages.Initiate(destination, match.group, match.prefix))
        deadline = time.monotonic() + seconds
        pending = (State.LOOKUP, State.NEGOTIATING)
        while (entry := self._daemon.engine.find(destination)) and entry.state in pending:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.005)
        return await self.explain(destination)

    async def terminate(self, destination: IpAddress) -> dict[str, Any]:
        """Returns when the peer has confirmed, or after a few seconds without it."""
        engine = self._daemon.engine
        label = self._daemon.connections.traffic.settles(destination)
        if label is not None:
            raise OepyError(
                f"{destination} belongs to the connection {label}", f"use `oepy connection down {label}`"
            )
        spis = {
            tunnel.spi_in
            for entry in engine.entries.values()
            if entry.destination == destination
            for tunnel in entry.tunnels
        }
        self._daemon.feed(engine_messages.Terminate(destination))
        deadline = time.monotonic() + TERMINATE_SECONDS
        while spis & engine.pairs.keys() and time.monotonic() < deadline:  # noqa: ASYNC110 - a command waits
            await asyncio.sleep(0.005)
        await self._daemon.steps.idle()
        return {"destination": str(destination), "closed": len(spis)}

    async def rekey(self, destination: IpAddress, *, ike: bool = False) -> dict[str, Any]:
        """Asks for new SAs (`ike`: for new IKE SAs, which take over the tunnels as they are); the old ones serve
        until those are there. Returns at once."""
        spis = [
            tunnel.spi_in
            for entry in self._daemon.engine.entries.values()
            if entry.destination == destination
            for tunnel in entry.tunnels
        ]
        spis += [
            spi_in
            for spi_in, found in self._daemon.connections.manager.tunnels()
            if any(selector.contains_address(destination) for selector in found.pair.remote_ts)
        ]
        negotiator = self._daemon.negotiator
        if ike:
            sessions = {info.session for spi_in in spis if (info := negotiator.session_with(spi_in))}
            for session in sorted(sessions):
                negotiator.rekey_ike(session)
            return {"destination": str(destination), "rekeyed": len(sessions)}
        for spi_in in spis:
            negotiator.rekey(spi_in)
        return {"destination": str(destination), "rekeyed": len(spis)}

    async def flush(self, destination: IpAddress | None, dns: IpAddress | str | None) -> dict[str, Any]:
        """`dns`: forget cached answers too, of one address or ("all") of everything."""
        if dns is not None:
            self._daemon.keys.forget(None if dns == "all" else dns)
        before = len(self._daemon.engine.entries)
        self._daemon.feed(engine_messages.Flush(destination))
        await self._daemon.steps.idle()
        return {"forgotten": before - len(self._daemon.engine.entries)}

    def recent_events(self, limit: int) -> list[dict[str, Any]]:
        return self._daemon.journal.recent(limit)

    def follow_events(self) -> AsyncIterator[dict[str, Any]]:
        return self._daemon.journal.follow()


_PROTOCOL_NAMES = {number: name for name, number in PROTOCOL_NUMBERS.items()}


def _match_order(rule: PolicyRule) -> tuple[int, int, bool, bool, int]:
    """Longest prefix first, then the rules with a port or protocol, then the stricter group."""
    network = rule.network
    return (network.version, -network.prefixlen, not rule.port, not rule.protocol, -rule.group.strictness)
