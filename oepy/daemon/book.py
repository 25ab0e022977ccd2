"""What the connections' parts of the daemon share: the configuration in force, and which IKE session is whose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from oepy.connections.match import Matcher
from oepy.connections.model import EMPTY, Connection, ConnectionSet
from oepy.daemon.trust import Trusts
from oepy.keys import HostKey
from oepy.model import IpAddress
from oepy.x509.path import Path


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

    def load(
        self, configured: ConnectionSet, matcher: Matcher, trusts: Trusts, keys: dict[str, HostKey]
    ) -> None:
        self.configured, self.matcher, self.trusts, self.keys = configured, matcher, trusts, keys
        self.by_name = {connection.name: connection for connection in configured.connections}
