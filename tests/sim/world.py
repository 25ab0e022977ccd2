"""Whole daemons (engine, IKE, wiring) in memory, on a virtual clock, joined by a router that misbehaves."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from oepy.connections.model import EMPTY, ConnectionSet
from oepy.daemon.core import Core, Surroundings
from oepy.daemon.journal import Journal
from oepy.daemon.revocation import Fetcher, nothing_fetched
from oepy.ike.events import Datagram
from oepy.ike.settings import IkeSettings
from oepy.interfaces import PolicyRule
from oepy.keys import HostKey
from oepy.model import (
    Flow,
    GatewayType,
    IpAddress,
    KeyAnswer,
    PeerIdentity,
    PeerKey,
    PolicyGroup,
    PublicKey,
    Secure,
)
from oepy.policy import NO_PREFIXES, PolicyTable, PrefixSet
from tests.fakes.rooms import FakeDatapath, FakeHostAddresses, FakeKeys, FakeTrap


@dataclass
class Router:
    """Carries datagrams with a delay; drops, duplicates and reorders by seeded dice."""

    dice: random.Random
    loss: float = 0.0
    duplication: float = 0.0
    jitter: float = 0.0
    delay: float = 0.01
    hosts: dict[IpAddress, Host] = field(default_factory=dict)
    carried: int = 0
    longest: dict[IpAddress, int] = field(default_factory=dict)  # bytes of a datagram, by its sender
    bytes_of: Counter[IpAddress] = field(default_factory=Counter)  # of all its datagrams

    def send(self, datagram: Datagram) -> None:
        self.carried += 1
        sender = datagram.local.address
        self.bytes_of[sender] += len(datagram.data)
        self.longest[sender] = max(self.longest.get(sender, 0), len(datagram.data))
        copies = 2 if self.dice.random() < self.duplication else 1
        for _ in range(copies):
            if self.dice.random() < self.loss:
                continue
            delay = self.delay + self.dice.random() * self.jitter
            asyncio.get_running_loop().call_later(delay, self._deliver, datagram)

    def _deliver(self, datagram: Datagram) -> None:
        host = self.hosts.get(datagram.remote.address)
        if host is not None and host.up and not datagram.keepalive:
            host.core.on_ike(datagram.data, datagram.remote, datagram.local)


class Host:
    """One daemon with one address."""

    def __init__(
        self,
        router: Router,
        address: str,
        answers: dict[str, KeyAnswer],
        *,
        group: PolicyGroup = PolicyGroup.PRIVATE_OR_CLEAR,
        key: HostKey | None = None,
        rules: tuple[PolicyRule, ...] = (),
        configured: ConnectionSet = EMPTY,
        keys: dict[str, HostKey] | None = None,
        wall_clock: float = 0.0,
        leases: Path | None = None,
        fetch: Fetcher = nothing_fetched,
        force_encap: bool = True,
        certified: PrefixSet = NO_PREFIXES,
    ) -> None:
        self.force_encap = force_encap
        self.address = ip_address(address)
        self.key = key or HostKey.generate("ed25519")
        self.router = router
        self.answers = answers
        self.group = group
        self.rules = rules
        self.configured, self.keys = configured, keys or {}
        self.certified = certified
        self.wall_clock = wall_clock
        self.fetch = fetch
        self.identity: str | None = None
        self.leases = leases
        self.make_keys: Callable[[], FakeKeys] = lambda: FakeKeys(self.answers)
        self.start()

    def start(self) -> None:
        """A fresh daemon, as after a crash: nothing is remembered."""
        self.up = True
        dice = self.router.dice
        self.trap, self.datapath = FakeTrap(), FakeDatapath(dice.randbytes)
        self.host_addresses = FakeHostAddresses()
        self.events: list[dict[str, object]] = []
        self.core = Core(
            PolicyTable(self.rules, self.group),
            Journal(lambda: 0.0, self.events.append),
            insecure_keys=False,
            block=False,
            by_certificate=self.certified,
        )
        self.core.wire(
            Surroundings(
                keys=self.make_keys(),
                trap=self.trap,
                datapath=self.datapath,
                send=self.router.send,
                monotonic=asyncio.get_running_loop().time,
                host_key=self.key,
                identity=self.identity,
                ike_settings=IkeSettings(
                    identity=PeerIdentity.parse(self.identity) if self.identity else None,
                    force_encap=self.force_encap,
                ),
                random=dice.randbytes,
                wall_clock=lambda: self.wall_clock,
                host=self.host_addresses,
                leases=self.leases,
                own_addresses=lambda: frozenset((self.address,)),
                fetch=self.fetch,
                is_own=lambda address: address == self.address,
                source_towards=lambda _: self.address,
            )
        )
        self.router.hosts[self.address] = self
        if self.configured != EMPTY:
            self.core.connections.load(self.configured, self.keys)

    def crash(self) -> None:
        self.up = False

    def publish(self, key: PublicKey | None = None) -> None:
        record = PeerKey(
            key or self.key.public, (self.address,), GatewayType.NONE, ".", 10, "IPSECKEY", "owner.", 300
        )
        self.answers[str(self.address)] = Secure(str(self.address), "owner.", 300, keys=(record,))

    def send_to(self, other: Host) -> None:
        """The first packet of a flow."""
        group = self.core.policy.match_address(other.address).group
        self.core.on_trapped(group, Flow(self.address, other.address, 6, 40000, 80))

    def verdict_for(self, other: Host) -> object:
        group = self.core.policy.match_address(other.address).group
        return self.trap.verdicts.get((group, other.address))

    def named(self, event: str) -> list[dict[str, object]]:
        return [entry for entry in self.events if entry["event"] == event]


def matching_pairs(one: Host, other: Host) -> bool:
    """Both ends hold the same SA pairs, keys included, crosswise."""
    ours = {(p.spi_in, p.spi_out): p for p in one.datapath.pairs.values()}
    theirs = {(p.spi_out, p.spi_in): p for p in other.datapath.pairs.values()}
    return ours.keys() == theirs.keys() and all(
        pair.keys_in == theirs[key].keys_out and pair.keys_out == theirs[key].keys_in
        for key, pair in ours.items()
    )
