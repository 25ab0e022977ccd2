"""Where the peers of connections are, and from which of our addresses they are reached; names in `remote_addrs`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

from oepy.connections.model import Connection
from oepy.daemon.book import Book
from oepy.ike.endpoint import SessionInfo
from oepy.model import IpAddress

if TYPE_CHECKING:
    from oepy.daemon.core import Core

RESOLVE_SECONDS = 60.0  # between two looks at the names
RESOLVE_LIMIT = 10.0


class Whereabouts:
    """One for the daemon's connections."""

    def __init__(self, core: Core, book: Book) -> None:
        self._core = core
        self._book = book

    def ends(self, connection: Connection) -> tuple[IpAddress, IpAddress] | None:
        """The first remote address that there is a way to, and ours towards it."""
        for remote in self.remotes_of(connection):
            local = self.local_towards(connection, remote)
            if local is not None:
                return local, remote
        return None

    def remotes_of(self, connection: Connection) -> list[IpAddress]:
        """The addresses of the peer that are known, in the order of the configuration."""
        found: list[IpAddress] = []
        for place in connection.remote_addrs:
            found += (
                [place.address] if place.address else sorted(self._book.resolved.get(place.name, ()), key=str)
            )
        return found

    def local_towards(self, connection: Connection, remote: IpAddress) -> IpAddress | None:
        """Ours, as the routes have it where that is allowed, else the first of those named that this host has."""
        routed = self._core.given.source_towards(remote)
        places = connection.local_addrs
        if routed is not None and any(place.network is None or routed in place.network for place in places):
            return routed
        for place in places:
            address = place.address
            if address and address.version == remote.version and self._core.given.is_own(address):
                return address
        return None

    async def resolve(self, connection: Connection) -> None:
        names = [place.name for place in connection.remote_addrs if place.name]
        for name in names:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(RESOLVE_LIMIT):
                    found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_DGRAM)
                addresses = frozenset(ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)
                if addresses != self._book.resolved.get(name):
                    self._core.journal.add(
                        "name-resolved", subject=name, reason=", ".join(sorted(map(str, addresses)))
                    )
                self._book.resolved[name] = addresses

    async def watch_names(self) -> None:
        """Peers known by a name may begin from a new address, and are followed to it."""
        while True:
            for connection in self._book.configured.connections:
                if not any(place.name for place in connection.remote_addrs):
                    continue
                await self.resolve(connection)
                for session in self._core.connections.manager.session_of(connection.name):
                    info = self._core.negotiator.endpoint.session(session)
                    moved = info is not None and not self._is_known(connection, info)
                    if moved:
                        self._core.journal.add(
                            "connection-moved",
                            connection=connection.name,
                            reason="its name leads elsewhere now",
                        )
                        self._core.negotiator.check_liveness(session)
            await asyncio.sleep(RESOLVE_SECONDS)

    def _is_known(self, connection: Connection, info: SessionInfo) -> bool:
        """Whether the peer may still be where the session has it."""
        if info.mobike:  # who decides moves where it likes
            known = (*self.remotes_of(connection), *info.peer_addresses)
            return info.mobike == "follows" or info.remote.address in known
        ends = info.local.address, info.remote.address
        return bool(self._book.matcher.by_address(*ends, self._book.resolved))
