"""IkeEndpoints in memory: a seeded router that drops, duplicates, delays and reorders on a virtual clock, and
a daemon's stand-in that answers every question and keeps the pairs that it was told to install.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from oepy.ike.authentication import PrivateKey, sign_auth
from oepy.ike.endpoint import IkeEndpoint
from oepy.ike.events import (
    ChildDown,
    ChildUp,
    ChildUsable,
    IkeEvent,
    Narrowed,
    NeedLease,
    NeedNarrowing,
    NeedPeerKey,
    NeedPpk,
    NeedPsk,
    NeedSignature,
    NeedSpi,
    NeedStatus,
    Question,
    Refused,
)
from oepy.ike.settings import IkeSettings, Initiate
from oepy.keys import to_public_key
from oepy.model import Endpoint, PeerIdentity, PublicKey, SaPair, Secret, TrafficSelector

ED25519_A = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ED25519_B = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
P256 = ec.derive_private_key(0x1234567890ABCDEF1234567890ABCDEF, ec.SECP256R1())
P384 = ec.derive_private_key(0x1234567890ABCDEF1234567890ABCDEF, ec.SECP384R1())
_RSA: list[rsa.RSAPrivateKey] = []


def rsa_key() -> rsa.RSAPrivateKey:
    if not _RSA:
        _RSA.append(rsa.generate_private_key(65537, 2048))
    return _RSA[0]


@dataclass
class Host:
    """One endpoint with its daemon's stand-in. `keys` is what DNS would say of identities."""

    name: str
    address: str
    key: PrivateKey | None
    settings: IkeSettings
    seed: int
    keys: dict[str, list[PublicKey]] = field(default_factory=dict)
    psks: dict[str, Secret] = field(default_factory=dict)
    refuse: Refused | None = None
    delay: float = 0.0  # how long the daemon takes for an answer
    events: list[IkeEvent] = field(default_factory=list)
    pairs: dict[int, SaPair] = field(default_factory=dict)
    sendable: set[int] = field(default_factory=set)
    gaps: list[float] = field(default_factory=list)  # times at which the last usable pair went
    replaced: dict[int, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.ike = IkeEndpoint(self.settings, self.random.randbytes)
        self.next_spi = 0x1000 * (self.seed + 1)

    @property
    def at(self) -> Endpoint:
        return Endpoint(ip_address(self.address), 500)

    @property
    def public(self) -> tuple[PublicKey, ...]:
        return () if self.key is None else (to_public_key(self.key.public_key()),)

    @property
    def selector(self) -> tuple[TrafficSelector, ...]:
        return (TrafficSelector.of(ip_address(self.address)),)

    def restart(self) -> None:
        """As after a crash: everything forgotten."""
        self.random = random.Random(self.seed + 7777)
        self.ike = IkeEndpoint(self.settings, self.random.randbytes)
        self.pairs, self.sendable, self.events = {}, set(), []

    def reply(self, question: Question) -> object:
        if isinstance(question, NeedSpi):
            self.next_spi += 1
            return self.next_spi
        if isinstance(question, NeedSignature):
            return None if self.key is None else sign_auth(self.key, question.data, question.peer_hashes)
        if isinstance(question, NeedPeerKey):
            return self.keys.get(str(question.identity))
        if isinstance(question, NeedPsk):
            return self.psks.get(str(question.identity))
        if isinstance(question, NeedStatus):
            return True
        if isinstance(question, (NeedPpk, NeedLease)):
            return None
        assert isinstance(question, NeedNarrowing)
        return self.refuse or Narrowed(question.local_ts, question.remote_ts)

    def note(self, event: IkeEvent, now: float) -> None:
        self.events.append(event)
        if isinstance(event, ChildUp):
            self.pairs[event.pair.spi_in] = event.pair
            self.replaced[event.pair.spi_in] = event.replaces
            if event.outbound:
                self.sendable.add(event.pair.spi_in)
        elif isinstance(event, ChildUsable):
            self.sendable.add(event.spi_in)
        elif isinstance(event, ChildDown):
            del self.pairs[event.spi_in]
            self.sendable.discard(event.spi_in)
            if not self.sendable:
                self.gaps.append(now)
            if event.remaining is not None:
                assert event.remaining in self.pairs

    def of(self, *kinds: type) -> list[IkeEvent]:
        return [event for event in self.events if isinstance(event, kinds)]

    def established(self) -> list[int]:
        return [info.session for info in self.ike.sessions() if info.state == "established"]


class Net:
    """Carries datagrams between hosts by address. `loss` and `copies` are probabilities."""

    def __init__(
        self,
        hosts: Iterable[Host],
        seed: int = 1,
        loss: float = 0.0,
        copies: float = 0.0,
        delay: float = 0.01,
    ) -> None:
        self.hosts = {ip_address(host.address): host for host in hosts}
        self.random = random.Random(seed)
        self.loss, self.copies, self.delay = loss, copies, delay
        self.now = 100.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.carried: list[tuple[float, Endpoint, Endpoint, bytes]] = []
        self.filter: Callable[[Endpoint, Endpoint, bytes], bool] = lambda *_: True

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (when, self._count, action))

    def flush(self, host: Host) -> None:
        """Take events and datagrams of a host, answer its questions."""
        again = True
        while again:
            again = False
            for event in host.ike.events():
                if isinstance(event, Question):
                    host.events.append(event)
                    if host.delay:
                        self._later(host, event)
                    else:
                        host.ike.answer(event.token, host.reply(event), self.now)
                        again = True
                else:
                    host.note(event, self.now)
        for datagram in host.ike.datagrams():
            self._carry(datagram.local, datagram.remote, datagram.data)

    def _later(self, host: Host, question: Question) -> None:
        def answer() -> None:
            host.ike.answer(question.token, host.reply(question), self.now)
            self.flush(host)

        self.at(self.now + host.delay, answer)

    def _carry(self, source: Endpoint, target: Endpoint, data: bytes) -> None:
        self.carried.append((self.now, source, target, data))
        if not self.filter(source, target, data) or self.random.random() < self.loss:
            return
        for _ in range(2 if self.random.random() < self.copies else 1):
            host = self.hosts.get(target.address)
            if host is None:
                continue
            arrival = self.now + self.delay * (0.5 + self.random.random() * (4 if self.copies else 1))

            def deliver(host: Host = host) -> None:
                host.ike.receive(data, target, source, self.now)
                self.flush(host)

            self.at(arrival, deliver)

    def run(self, seconds: float) -> None:
        """Until nothing is left to do, at most `seconds` of virtual time."""
        end = self.now + seconds
        for host in self.hosts.values():
            self.flush(host)
        while True:
            timers = [
                (when, host) for host in self.hosts.values() if (when := host.ike.next_timer()) is not None
            ]
            when, host = min(timers, key=lambda timer: timer[0], default=(end, None))
            if self._queue and self._queue[0][0] <= when:
                moment, _, action = self._queue[0]
                if moment > end:
                    break
                heapq.heappop(self._queue)
                self.now = max(self.now, moment)
                action()
            else:
                if when > end or host is None:
                    break
                self.now = max(self.now, when)
                host.ike.handle_timer(self.now)
                self.flush(host)
        self.now = end


def two_hosts(
    settings: IkeSettings | None = None,
    key_a: PrivateKey | None = ED25519_A,
    key_b: PrivateKey | None = ED25519_B,
) -> tuple[Host, Host]:
    settings = settings or IkeSettings(liveness_interval=0.0)
    a = Host("a", "192.0.2.1", key_a, settings, 1)
    b = Host("b", "192.0.2.2", key_b, settings, 2)
    a.keys[b.address] = list(b.public)
    b.keys[a.address] = list(a.public)
    return a, b


def request(a: Host, b: Host, **changes: object) -> Initiate:
    fields: dict[str, object] = {
        "local": a.at,
        "remote": b.at,
        "local_ts": a.selector,
        "remote_ts": b.selector,
        "remote_keys": b.public,
        "label": f"{a.name}->{b.name}",
    }
    return Initiate(**(fields | changes))  # type: ignore[arg-type]


def assert_one_tunnel(a: Host, b: Host) -> tuple[SaPair, SaPair]:
    """Exactly one pair on both sides, each other's mirror, with the same keys."""
    assert len(a.pairs) == 1, a.pairs
    assert len(b.pairs) == 1, b.pairs
    one, two = next(iter(a.pairs.values())), next(iter(b.pairs.values()))
    assert_mirror(one, two)
    assert a.sendable == {one.spi_in}
    assert b.sendable == {two.spi_in}
    return one, two


def assert_mirror(one: SaPair, two: SaPair) -> None:
    assert (one.spi_in, one.spi_out) == (two.spi_out, two.spi_in)
    assert (one.keys_in, one.keys_out) == (two.keys_out, two.keys_in)
    assert one.keys_in != one.keys_out
    assert (one.local_ts, one.remote_ts) == (two.remote_ts, two.local_ts)
    assert one.suite == two.suite


def identity(host: Host) -> PeerIdentity:
    return PeerIdentity.address(ip_address(host.address))
