"""A hub and a thousand peers: after a restart all come up again, and nobody is stormed. A whole daemon on a virtual
clock; the peers are endpoints."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from ipaddress import IPv4Address
from typing import Any

from oepy.connections.manager import STARTS_A_SECOND, State
from oepy.connections.model import ConnectionSet
from oepy.ike.events import Datagram, Question, SessionFailed
from oepy.ike.header import NO_SPI, Exchange, parse_header
from oepy.ike.settings import IkeSettings, Initiate
from oepy.model import IpAddress, KeyAnswer, PeerIdentity, Secret
from tests.fakes.clock import run_virtual
from tests.fakes.connections import read_data
from tests.sim import ike_net
from tests.sim.world import Host, Router

HUB = IPv4Address("198.18.0.1")
PEERS = 1_000
SECRET = b"of a thousand peers\n"
QUIET = IkeSettings(liveness_interval=0.0, identity=None)


class Peer:
    """An endpoint at the router, with the interface of a daemon as far as that needs it."""

    def __init__(self, router: Router, address: IpAddress, seed: int) -> None:
        settings = IkeSettings(identity=PeerIdentity.parse(f"p{address}"), liveness_interval=0.0)
        self.host = ike_net.Host("peer", str(address), None, settings, seed)
        self.host.psks["hub.example"] = Secret(SECRET.strip())
        self.router = router
        self.up = True
        self.core = self
        router.hosts[address] = self  # type: ignore[assignment]
        self._timer: asyncio.TimerHandle | None = None

    def on_ike(self, data: bytes, local: Any, remote: Any) -> None:
        self.host.ike.receive(data, local, remote, asyncio.get_running_loop().time())
        self.pump()

    def pump(self) -> None:
        loop = asyncio.get_running_loop()
        while events := self.host.ike.events():
            for event in events:
                if isinstance(event, Question):
                    self.host.ike.answer(event.token, self.host.reply(event), loop.time())
                else:
                    self.host.note(event, loop.time())
        for datagram in self.host.ike.datagrams():
            self.router.send(datagram)
        if self._timer is not None:
            self._timer.cancel()
        when = self.host.ike.next_timer()
        self._timer = None if when is None else loop.call_at(when, self._wake)

    def _wake(self) -> None:
        self.host.ike.handle_timer(asyncio.get_running_loop().time())
        self.pump()

    def begin(self) -> None:
        hub = ike_net.Host("hub", str(HUB), None, QUIET, 1)
        self.host.ike.initiate(
            Initiate(
                local=self.host.at,
                remote=hub.at,
                local_ts=self.host.selector,
                remote_ts=hub.selector,
                own_auth="psk",
                psk=Secret(SECRET.strip()),
                expected_identity=PeerIdentity.parse("hub.example"),
            ),
            asyncio.get_running_loop().time(),
        )
        self.pump()


def addresses() -> list[IpAddress]:
    return [IPv4Address("198.18.1.0") + number for number in range(PEERS)]


def hub_configuration(start: str) -> ConnectionSet:
    """Each peer has a connection of its own."""
    connections = {
        f"c{number}": {
            "local_addrs": [str(HUB)],
            "remote_addrs": [str(address)],
            "local": {"auth": "psk", "id": "hub.example"},
            "remote": {"auth": "psk", "id": f"p{address}"},
            "dpd_delay": 0,
            "keyingtries": 0,
            "children": {
                "net": {"local_ts": [f"{HUB}/32"], "remote_ts": [f"{address}/32"], "start_action": start}
            },
        }
        for number, address in enumerate(addresses())
    }
    secrets = [{"type": "ike", "secret_file": "psk"}]
    found, problems = read_data({"connections": connections, "secrets": secrets}, {"psk": SECRET})
    assert problems == []
    return found


class Watched(Router):
    """Counts the negotiations that the hub begins, by second."""

    def watch(self) -> None:
        self.begun: Counter[int] = Counter()
        self.seen: set[bytes] = set()

    def send(self, datagram: Datagram) -> None:
        header = parse_header(datagram.data) if not datagram.keepalive else None
        first = header is not None and header.exchange == Exchange.IKE_SA_INIT and header.spi_r == NO_SPI
        if first and datagram.local.address == HUB and not header.is_response:
            if header.spi_i not in self.seen:
                self.begun[int(asyncio.get_running_loop().time())] += 1
            self.seen.add(header.spi_i)
        super().send(datagram)


def up(hub: Host) -> int:
    return sum(state.state is State.UP for state in hub.core.connections.manager.children.values())


def test_a_hub_that_begins_with_all_of_them() -> None:
    """At most a hundred new negotiations a second, with 5 % loss; all are up in the end, after a crash too, and
    each peer has one tunnel, as INITIAL_CONTACT says that the old one is gone."""

    async def main() -> None:
        router = Watched(random.Random(1), loss=0.05, jitter=0.02)
        router.watch()
        peers = [Peer(router, address, 10 + number) for number, address in enumerate(addresses())]
        answers: dict[str, KeyAnswer] = {}
        hub = Host(router, str(HUB), answers, configured=hub_configuration("start"))
        for _ in range(2):
            router.watch()
            await asyncio.sleep(60)
            assert up(hub) == PEERS
            assert all(len(peer.host.pairs) == 1 for peer in peers)
            # The first second's end and the second's beginning may fall into one
            assert max(router.begun.values()) <= STARTS_A_SECOND + 1
            assert sum(router.begun.values()) < PEERS * 1.1
            assert not hub.named("internal-error")
            hub.crash()
            hub.start()

    run_virtual(main())


def test_all_of_them_come_to_a_hub_at_once() -> None:
    """In the same instant, with 10 % loss: cookies, and the limit of half-open ones by prefix, keep the hub's load
    in bounds; all but very few are up in the end without beginning anew."""

    async def main() -> None:
        router = Router(random.Random(2), loss=0.1, jitter=0.02)
        peers = [Peer(router, address, 10 + number) for number, address in enumerate(addresses())]
        hub = Host(router, str(HUB), {}, configured=hub_configuration("none"))
        for peer in peers:
            peer.begin()
        most = 0
        for _ in range(100):
            await asyncio.sleep(0.1)
            most = max(most, hub.core.negotiator.endpoint.counters["half_open"])
        await asyncio.sleep(20)
        failed = sum(len(peer.host.of(SessionFailed)) for peer in peers)
        # Very few lose the last answer each time that it is sent, and give up; the hub cannot know
        assert 0 <= up(hub) - (PEERS - failed) <= PEERS * 0.005
        assert failed < PEERS * 0.02
        counters = hub.core.negotiator.endpoint.counters
        assert counters["cookies_sent"] > PEERS / 2
        assert 0 < most <= 4 * IkeSettings().max_half_open_per_prefix
        assert counters["half_open"] == 0
        assert not hub.named("internal-error")

    run_virtual(main())
