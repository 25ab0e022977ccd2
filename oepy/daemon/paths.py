"""Paths of connections: when this host's addresses, links or routes change, MOBIKE sessions move to where the
routes lead now (RFC 4555), and others are asked whether they still live."""

from __future__ import annotations

import asyncio
import errno
import functools
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from oepy.ike.endpoint import SessionInfo
from oepy.ike.events import PathLost
from oepy.model import NAT_T_PORT, Endpoint, IpAddress

if TYPE_CHECKING:
    from oepy.connections.model import Connection
    from oepy.daemon.core import Core

QUIET_SECONDS = 0.5  # changes come in swarms: one look at what they make together
MAX_SHARE = 0.05  # of the time for looking, however often routes change
READS_PER_WAKEUP = 64
_BUFFER = 1 << 16
# linux/rtnetlink.h: RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400


class Paths:
    """One for the daemon."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._timer: asyncio.TimerHandle | None = None
        self._not_before = float("-inf")

    # ------------------------------------------------------------ the kernel's news

    async def watch(self) -> None:
        """Until it is cancelled. What the messages say is not read: the kernel is asked instead."""
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        ) as news:
            news.setblocking(False)
            news.bind((0, _GROUPS))
            loop = asyncio.get_running_loop()
            loop.add_reader(news.fileno(), self._readable, news)
            try:
                await loop.create_future()
            finally:
                loop.remove_reader(news.fileno())

    def _readable(self, news: socket.socket) -> None:
        for _ in range(READS_PER_WAKEUP):
            try:
                news.recv(_BUFFER)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # some were lost: a change all the same
                    raise
        self.changed()

    def changed(self) -> None:
        """Look in a while, once for what comes together."""
        if self._timer is None:
            now = self._core.given.monotonic()
            delay = max(QUIET_SECONDS, self._not_before - now)
            self._timer = asyncio.get_running_loop().call_later(delay, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        began = self._core.given.monotonic()
        self.check()
        ended = self._core.given.monotonic()
        self._not_before = ended + (ended - began) / MAX_SHARE

    # ------------------------------------------------------------ sessions

    def check(self) -> None:
        """Every session of a connection to where it belongs now."""
        core = self._core
        is_own = functools.lru_cache(maxsize=4096)(core.given.is_own)  # most sessions have the same end here
        for info in core.negotiator.endpoint.sessions():
            connection = core.connections.connection_of(info.session)
            if connection is None or info.state != "established":
                continue
            if info.mobike == "decides":
                self._choose(info, next(self._candidates(connection, info), None))
            elif not is_own(info.local.address):
                local = core.connections.whereabouts.local_towards(connection, info.remote.address)
                here = (local, info.remote.address) if local is not None and info.mobike else None
                if not self._choose(info, here):
                    core.negotiator.check_liveness(info.session)

    def lost(self, event: PathLost) -> None:
        """Silence where we speak to: the next of the peer's addresses that there is a way to."""
        info = self._core.negotiator.endpoint.session(event.session)
        connection = self._core.connections.connection_of(event.session)
        if info is None or connection is None:
            return
        found = list(self._candidates(connection, info))
        after = [end for end in found if end[1] != event.remote.address]
        self._choose(info, next(iter(after), None))

    def _candidates(self, connection: Connection, info: SessionInfo) -> Iterator[tuple[IpAddress, IpAddress]]:
        """Ours and the peer's, those in use first, then in order after them, so that all have their turn."""
        known = (*info.peer_addresses, *self._core.connections.whereabouts.remotes_of(connection))
        others = sorted({*known} - {info.remote.address}, key=_order)
        later = [one for one in others if _order(one) > _order(info.remote.address)]
        for remote in (info.remote.address, *later, *(one for one in others if one not in later)):
            local = self._core.connections.whereabouts.local_towards(connection, remote)
            if local is not None:
                yield local, remote

    def _choose(self, info: SessionInfo, ends: tuple[IpAddress, IpAddress] | None) -> bool:
        if ends is None:
            return False
        local, remote = ends
        if (local, remote) == (info.local.address, info.remote.address):
            return True
        port = info.remote.port if remote == info.remote.address else NAT_T_PORT
        done = self._core.negotiator.move(
            info.session, Endpoint(local, info.local.port), Endpoint(remote, port)
        )
        if done:
            self._core.journal.add(
                "connection-moves",
                connection=info.connection,
                peer=str(remote),
                reason=f"from {info.local.address} - {info.remote.address} to {local} - {remote}",
            )
        return done


def _order(address: IpAddress) -> tuple[int, int]:
    return address.version, int(address)
