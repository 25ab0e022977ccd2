"""Whole daemons in memory and keys that only names publish: both sides, and an attacker's name."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

from oepy.daemon.core import MAX_AHEAD
from oepy.engine.table import State
from oepy.keys import HostKey
from oepy.model import (
    Absent,
    Authenticated,
    GatewayType,
    IpAddress,
    KeyAnswer,
    PeerKey,
    PolicyGroup,
    PublicKey,
    Secure,
    Verdict,
)
from tests.fakes.clock import run_virtual
from tests.fakes.rooms import FakeKeys
from tests.sim.world import Host, Router, matching_pairs


class NamedKeys(FakeKeys):
    """Also knows which key stands at which name, and where the name leads."""

    def __init__(self, answers: dict[str, KeyAnswer], names: dict[str, tuple[IpAddress, PublicKey]]) -> None:
        super().__init__(answers)
        self.by_name = names

    async def peer_keys(self, subject: IpAddress | str, names: Sequence[str] = ()) -> KeyAnswer:
        if isinstance(subject, str) and subject in self.by_name:
            address, key = self.by_name[subject]
            return Secure(subject, subject, 300, keys=(_record(address, key, subject),))
        answer = await super().peer_keys(subject, names)
        found = [(name, *self.by_name[name]) for name in names if name in self.by_name]
        claims = tuple(_record(address, key, name) for name, address, key in found if address == subject)
        return replace(answer, claims=claims) if isinstance(answer, Absent) else answer


def _record(address: IpAddress, key: PublicKey, owner: str) -> PeerKey:
    return PeerKey(key, (address,), GatewayType.NONE, ".", 10, "IPSECKEY", owner, 300)


def hosts(**first: object) -> tuple[Host, Host, dict[str, tuple[IpAddress, PublicKey]]]:
    """Two hosts without reverse records, and the names that both can look up."""
    answers: dict[str, KeyAnswer] = {}
    names: dict[str, tuple[IpAddress, PublicKey]] = {}
    router = Router(random.Random(3))
    pair = Host(router, "198.18.0.1", answers, **first), Host(router, "198.18.0.2", answers)  # type: ignore[arg-type]
    for number, host in enumerate(pair):
        _use(host, names, f"host{number}.example")
    return *pair, names


def _use(host: Host, names: dict[str, tuple[IpAddress, PublicKey]], identity: str) -> None:
    host.identity = identity
    host.make_keys = lambda: NamedKeys(host.answers, names)
    host.start()


def test_both_by_name() -> None:
    """Neither has a reverse record: the initiator by its host's question, the responder by the proven identity."""

    async def main() -> None:
        one, other, names = hosts()
        names["host0.example"] = (one.address, one.key.public)
        names["host1.example"] = (other.address, other.key.public)
        one.core.on_name("host1.example", (other.address,), 300)
        await asyncio.sleep(3)
        assert one.verdict_for(other) is Verdict.PRIVATE, "before any packet"
        one.send_to(other)
        await asyncio.sleep(1)
        assert matching_pairs(one, other)
        for host in (one, other):
            (pair,) = host.datapath.pairs.values()
            assert pair.authenticated is Authenticated.NAME
        assert str(next(iter(other.datapath.pairs.values())).peer) == "host0.example"

    run_virtual(main())


def test_without_the_hosts_question_nothing_is_known() -> None:
    async def main() -> None:
        one, other, names = hosts()
        names["host1.example"] = (other.address, other.key.public)
        one.send_to(other)
        await asyncio.sleep(15)
        assert one.verdict_for(other) is Verdict.CLEAR

    run_virtual(main())


def test_an_attackers_name_gains_nothing() -> None:
    """Its key cannot be proven by the address: clear as without it, within seconds, and no alert. With the true
    name beside it the peer proves that one."""

    async def main() -> None:
        one, other, names = hosts()
        names["evil.example"] = (other.address, HostKey.generate("ed25519").public)
        one.core.on_name("evil.example", (other.address,), 300)
        one.send_to(other)
        await asyncio.sleep(4)
        assert one.verdict_for(other) is Verdict.CLEAR
        assert not [event for event in one.events if event.get("alert")]
        names["host1.example"] = (other.address, other.key.public)
        one.core.on_name("host1.example", (other.address,), 300)
        await asyncio.sleep(4)
        assert one.verdict_for(other) is Verdict.PRIVATE

    run_virtual(main())


def test_an_attackers_name_at_a_silent_host_holds_packets_for_seconds_only() -> None:
    """Nothing answers IKE there: three seconds, once; then in the clear for an hour."""

    async def main() -> None:
        one, other, names = hosts()
        other.crash()
        names["evil.example"] = (other.address, HostKey.generate("ed25519").public)
        one.core.on_name("evil.example", (other.address,), 300)
        one.send_to(other)
        await asyncio.sleep(3.5)
        assert one.verdict_for(other) is Verdict.CLEAR
        await asyncio.sleep(600)
        one.send_to(other)
        await asyncio.sleep(0.1)
        assert one.verdict_for(other) is Verdict.CLEAR

    run_virtual(main())


def test_an_attackers_key_never_stands_beside_the_peers_own() -> None:
    """The peer publishes at its reverse name: that key counts, whoever names the address."""

    async def main() -> None:
        one, other, names = hosts()
        other.publish()
        names["evil.example"] = (other.address, HostKey.generate("ed25519").public)
        one.core.on_name("evil.example", (other.address,), 300)
        one.send_to(other)
        await asyncio.sleep(4)
        assert one.verdict_for(other) is Verdict.PRIVATE
        (pair,) = one.datapath.pairs.values()
        assert pair.authenticated is Authenticated.DNS

    run_virtual(main())


def test_private_is_not_satisfied_by_a_name() -> None:
    async def main() -> None:
        one, other, names = hosts(group=PolicyGroup.PRIVATE)
        names["host1.example"] = (other.address, other.key.public)
        one.core.on_name("host1.example", (other.address,), 300)
        one.send_to(other)
        await asyncio.sleep(10)
        assert one.verdict_for(other) is Verdict.BLOCK
        assert not one.datapath.pairs

    run_virtual(main())


def test_a_responder_takes_no_name_for_somebody_elses_address() -> None:
    """The name that the peer proves leads elsewhere."""

    async def main() -> None:
        one, other, names = hosts()
        names["host0.example"] = (other.address, one.key.public)
        names["host1.example"] = (other.address, other.key.public)
        one.core.on_name("host1.example", (other.address,), 300)
        one.send_to(other)
        await asyncio.sleep(5)
        assert not other.datapath.pairs
        assert other.named("offer-refused")

    run_virtual(main())


def test_lookups_ahead_are_bounded() -> None:
    """A page full of names starts some lookups a second; the others wait for their packets."""

    async def main() -> None:
        one, _, _ = hosts()
        many = [type(one.address)(int(one.address) + 1000 + number) for number in range(MAX_AHEAD * 3)]
        for address in many:
            one.core.on_name("many.example", (address,), 300)
        assert len(one.core.engine.entries) == MAX_AHEAD
        assert all(entry.state is State.LOOKUP for entry in one.core.engine.entries.values())
        assert len(one.core.names) == MAX_AHEAD * 3

    run_virtual(main())
