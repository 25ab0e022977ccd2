"""Addresses that peers give this host (`vips`): on the tunnel's device while their IKE SA lives, with routes that
make them the source of what goes to the peer's side."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import summarize_address_range
from typing import TYPE_CHECKING

from oepy.errors import OepyError
from oepy.ike.events import AddressesAssigned
from oepy.model import IpAddress, IpNetwork, SaPair

if TYPE_CHECKING:
    from oepy.daemon.core import Core

MEND_SECONDS = 10.0  # between two looks whether addresses, routes and the rule are still there
MAX_ROUTES = 1024


@dataclass(frozen=True, slots=True)
class Assigned:
    """What a peer told: nothing but its word."""

    addresses: tuple[IpAddress, ...] = ()
    dns: tuple[IpAddress, ...] = ()


NOTHING = Assigned()


class Vips:
    """One for the daemon. Every change of the host is a step of the daemon's queue."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._of: dict[int, Assigned] = {}  # by IKE session
        self._had: dict[str, tuple[IpAddress, ...]] = {}  # by connection: what it got last time
        self._addresses: frozenset[IpAddress] = frozenset()
        self._routes: dict[IpNetwork, IpAddress] = {}

    def assign(self, connection: str, event: AddressesAssigned) -> None:
        """Before the child of the same exchange: it will find its source there."""
        self._of[event.session] = Assigned(event.addresses, event.dns)
        self._had[connection] = event.addresses
        self._core.journal.add(
            "addresses-assigned",
            connection=connection,
            reason=", ".join(map(str, event.addresses)),
            servers=", ".join(map(str, event.dns)),
        )
        self.settle()

    def of(self, session: int) -> tuple[IpAddress, ...]:
        return self._of.get(session, NOTHING).addresses

    def told(self, session: int) -> Assigned:
        return self._of.get(session, NOTHING)

    def had(self, connection: str) -> tuple[IpAddress, ...]:
        return self._had.get(connection, ())

    def release(self, session: int) -> None:
        if self._of.pop(session, None) is not None:
            self.settle()

    def settle(self) -> None:
        """Bring the host to what sessions and tunnels are now."""
        addresses = frozenset(address for item in self._of.values() for address in item.addresses)
        pairs = [
            (tunnel.pair, self.of(tunnel.session))
            for _, tunnel in (self._core.connections.manager.tunnels() if addresses else ())
        ]
        routes = dict(list(_routes(pairs))[:MAX_ROUTES])
        if (addresses, routes) != (self._addresses, self._routes):
            self._addresses, self._routes = addresses, routes
            self._core.steps.do(self._apply)

    async def _apply(self) -> None:
        try:
            await self._core.given.host.apply(self._addresses, self._routes)
        except OepyError as error:
            self._core.journal.add("address-failed", alert=True, reason=str(error))

    async def watch(self) -> None:
        """Other programs take addresses and routing rules away that they do not know."""
        while True:
            await asyncio.sleep(MEND_SECONDS)
            if self._addresses:
                self._core.steps.do(self._apply)


def _routes(pairs: Iterable[tuple[SaPair, tuple[IpAddress, ...]]]) -> Iterable[tuple[IpNetwork, IpAddress]]:
    """To each remote network, the first assigned address that has a tunnel there."""
    seen: set[IpNetwork] = set()
    for pair, assigned in pairs:
        sources = [ts.start for ts in pair.local_ts if ts.start == ts.end and ts.start in assigned]
        for source in sources:
            for there in pair.remote_ts:
                if there.start.version != source.version:
                    continue
                for network in summarize_address_range(there.start, there.end):
                    if network not in seen:
                        seen.add(network)
                        yield network, source
