"""What the connections' parts of the daemon share: the configuration in force, and which IKE session is whose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from oepy.connections.match import Matcher
from oepy.connections.model import EMPTY, Connection, ConnectionSet, SharedSecret
from oepy.daemon.trust import Trusts
from oepy.exchange import Exchange, exchange
from oepy.keys import HostKey
from oepy.model import IpAddress
from oepy.x509.path import Path


@dataclass(frozen=True, slots=True)
class Changes:
    """From the configuration in force to another one. Whoever keeps something of each looks at these alone."""

    configured: ConnectionSet
    connections: Exchange[Connection]
    secrets: Exchange[SharedSecret]


@dataclass(slots=True)
class Book:
    """`keys`: the private keys that local sides name, by file; `resolved`: addresses of names in remote_addrs."""

    trusts: Trusts
    configured: ConnectionSet = EMPTY
    by_name: dict[str, Connection] = field(default_factory=dict)
    matcher: Matcher = field(default_factory=lambda: Matcher(EMPTY))
    keys: dict[str, HostKey] = field(default_factory=dict)
    resolved: dict[str, frozenset[IpAddress]] = field(default_factory=dict)
    connection_of: dict[int, Connection] = field(default_factory=dict)  # by IKE session
    path_of: dict[int, Path] = field(default_factory=dict)  # the certificates that prove its peer
    ppk_used: set[int] = field(default_factory=set)  # whose peers have proved a PPK (RFC 8784)

    @classmethod
    def empty(cls, wall_clock: Callable[[], float]) -> Book:
        return cls(Trusts(EMPTY, wall_clock))

    def load(self, changes: Changes, trusts: Trusts, keys: dict[str, HostKey]) -> None:
        self.configured, self.trusts, self.keys = changes.configured, trusts, keys
        self.matcher.take(changes.connections, changes.secrets)
        for connection in changes.connections.gone:
            del self.by_name[connection.name]
        self.by_name.update((connection.name, connection) for connection in changes.connections.fresh)

    def changes(self, configured: ConnectionSet) -> Changes:
        """To another configuration."""
        return Changes(
            configured,
            exchange(self.configured.connections, configured.connections),
            exchange(self.configured.secrets, configured.secrets),
        )
