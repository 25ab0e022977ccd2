"""Pairs of daemons in memory over a router that drops, reorders and duplicates, on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from ipaddress import ip_address

import pytest

from oepy.engine.messages import Flush, Terminate
from oepy.engine.table import State
from oepy.keys import HostKey
from oepy.model import (
    Authenticated,
    Direction,
    Flow,
    GatewayType,
    KeyAnswer,
    PeerKey,
    PolicyGroup,
    Secure,
    Unreachable,
    Verdict,
)
from tests.fakes.clock import run_virtual
from tests.sim.world import Host, Router, matching_pairs


def pair_of_hosts(router: Router, **first: object) -> tuple[Host, Host]:
    answers: dict[str, KeyAnswer] = {}
    return Host(router, "198.18.0.1", answers, **first), Host(router, "198.18.0.2", answers)


def lossy(seed: int, loss: float = 0.3) -> Router:
    return Router(random.Random(seed), loss=loss, duplication=0.2, jitter=0.3)


def one_tunnel(one: Host, other: Host) -> None:
    """Exactly one SA pair, the same on both ends, and both traps send into it."""
    assert len(one.datapath.pairs) == 1
    assert matching_pairs(one, other)
    assert (one.verdict_for(other), other.verdict_for(one)) == (Verdict.PRIVATE, Verdict.PRIVATE)


def test_the_first_packet_leads_to_one_tunnel() -> None:
    """Without loss: one lookup, one negotiation, one SA pair with equal keys on both ends."""

    async def main() -> None:
        router = Router(random.Random(1))
        one, other = pair_of_hosts(router)
        one.publish()
        other.publish()
        one.send_to(other)
        await asyncio.sleep(5)
        one_tunnel(one, other)
        pair = next(iter(one.datapath.pairs.values()))
        assert pair.authenticated is Authenticated.DNS
        assert not one.named("internal-error") + other.named("internal-error")

    run_virtual(main())


@pytest.mark.parametrize("seed", range(12))
def test_every_handshake_ends_under_loss(seed: int) -> None:
    """30 % loss, duplicates and reordering: one SA pair in the end, or a decision and nothing left over."""

    async def main() -> None:
        one, other = pair_of_hosts(lossy(seed))
        one.publish()
        other.publish()
        for _ in range(20):
            one.send_to(other)
            await asyncio.sleep(60)
            if one.datapath.pairs:
                break
        assert one.core.engine.find(other.address).state in (State.PRIVATE, State.CLEAR)
        assert len(one.datapath.pairs) == 1
        one_tunnel(one, other)

    run_virtual(main())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_both_sides_starting_at_once_end_with_one_tunnel(seed: int, loss: float) -> None:
    """Simultaneous initiation converges on one SA pair, with and without loss."""

    async def main() -> None:
        router = lossy(seed, loss)
        one, other = pair_of_hosts(router)
        one.publish()
        other.publish()
        one.send_to(other)
        await asyncio.sleep(router.dice.random() * 0.05)
        other.send_to(one)
        await asyncio.sleep(55)
        for host, peer in ((one, other), (other, one)):
            if not host.datapath.pairs:
                host.send_to(peer)
        await asyncio.sleep(3)
        one_tunnel(one, other)

    run_virtual(main())


def test_a_host_without_a_record_is_protected_by_auth_null() -> None:
    """gamma proves nothing, its peer proves its key: private on both sides."""

    async def main() -> None:
        gamma, beta = pair_of_hosts(Router(random.Random(3)))
        beta.publish()
        gamma.send_to(beta)
        await asyncio.sleep(5)
        one_tunnel(gamma, beta)
        assert next(iter(gamma.datapath.pairs.values())).authenticated is Authenticated.DNS
        assert next(iter(beta.datapath.pairs.values())).authenticated is Authenticated.NULL

    run_virtual(main())


@pytest.mark.parametrize("group", [PolicyGroup.PRIVATE_OR_CLEAR, PolicyGroup.PRIVATE])
def test_an_impostor_is_blocked(group: PolicyGroup) -> None:
    """Another key than the published one: blocked in every group, with an alert, and no SA anywhere."""

    async def main() -> None:
        alpha, impostor = pair_of_hosts(Router(random.Random(4)), group=group)
        alpha.publish()
        impostor.publish(HostKey.generate("ed25519").public)
        alpha.send_to(impostor)
        await asyncio.sleep(20)
        assert alpha.verdict_for(impostor) is Verdict.BLOCK
        assert any(event.get("alert") for event in alpha.named("blocked"))
        assert not alpha.datapath.pairs

    run_virtual(main())


@pytest.mark.parametrize(
    ("group", "verdict"),
    [(PolicyGroup.PRIVATE_OR_CLEAR, Verdict.CLEAR), (PolicyGroup.PRIVATE, Verdict.BLOCK)],
)
def test_a_silent_gateway_ends_by_the_table(group: PolicyGroup, verdict: Verdict) -> None:
    """A published key and no IKE: clear where that is allowed, blocked in `private`."""

    async def main() -> None:
        one, other = pair_of_hosts(Router(random.Random(5)), group=group)
        other.publish()
        other.crash()
        one.send_to(other)
        await asyncio.sleep(10)
        assert one.verdict_for(other) is verdict

    run_virtual(main())


@pytest.mark.parametrize("seed", range(6))
def test_a_crashed_and_restarted_peer_gets_one_clean_tunnel(seed: int) -> None:
    """After a restart INITIAL_CONTACT replaces the old SAs: one pair again on both ends."""

    async def main() -> None:
        one, other = pair_of_hosts(lossy(seed, 0.1))
        one.publish()
        other.publish()
        one.send_to(other)
        await asyncio.sleep(20)
        other.crash()
        other.start()
        other.send_to(one)
        await asyncio.sleep(50)
        one_tunnel(one, other)

    run_virtual(main())


def test_terminate_ends_the_tunnel_on_both_sides() -> None:
    """A Delete removes both SAs and puts both traps back; nobody speaks in the clear by it."""

    async def main() -> None:
        one, other = pair_of_hosts(Router(random.Random(6)), group=PolicyGroup.PRIVATE)
        one.publish()
        other.publish()
        one.send_to(other)
        await asyncio.sleep(5)
        one.core.feed(Terminate(other.address))
        await asyncio.sleep(5)
        assert not one.datapath.pairs
        assert not other.datapath.pairs
        assert (one.verdict_for(other), other.verdict_for(one)) == (None, None)
        assert Verdict.CLEAR not in [verdict for _, verdict in one.trap.history + other.trap.history]

    run_virtual(main())


def test_a_day_of_rekeying_keeps_one_tunnel() -> None:
    """24 hours with both lifetimes at their defaults and traffic: always private, never more than a few SAs."""

    async def main() -> None:
        one, other = pair_of_hosts(lossy(7, 0.05))
        one.publish()
        other.publish()

        async def busy(host: Host) -> None:
            from oepy.model import SaCounters

            async def counters(spis: object = None) -> list[SaCounters]:
                now = asyncio.get_running_loop().time()
                return [SaCounters(spi, last_in=now, last_out=now) for spi in host.datapath.pairs]

            host.datapath.counters = counters

        await busy(one)
        await busy(other)
        one.send_to(other)
        await asyncio.sleep(5)
        for _ in range(24 * 4):
            await asyncio.sleep(900)
            if not one.datapath.pairs:
                one.send_to(other)
                await asyncio.sleep(30)
        one_tunnel(one, other)
        assert max(one.datapath.peak, other.datapath.peak) <= 4

    run_virtual(main())


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_a_thousand_simultaneous_starts(loss: float) -> None:
    """Many seeds of the race that both sides start at once: always one tunnel, the same on both ends."""
    for seed in range(1000, 1333):
        test_both_sides_starting_at_once_end_with_one_tunnel(seed, loss)


def test_only_hosts_that_name_us_are_spoken_for() -> None:
    """Forwarded packets: of a host without a record, or with another key, nothing is asked; while DNS is silent,
    and of one whose record has our key, a tunnel is."""

    async def main() -> None:
        router = Router(random.Random(1))
        answers: dict[str, KeyAnswer] = {}
        gateway, peer = Host(router, "198.18.0.1", answers), Host(router, "198.18.0.2", answers)
        peer.publish()

        def record(address: str, key: HostKey) -> Secure:
            found = PeerKey(
                key.public, (gateway.address,), GatewayType.IPV4, "198.18.0.1", 10, "IPSECKEY", "owner.", 300
            )
            return Secure(address, "owner.", 300, keys=(found,))

        answers["10.0.0.2"] = record("10.0.0.2", HostKey.generate("ed25519"))
        answers["10.0.0.3"] = Unreachable("10.0.0.3", "", 0, "silent")
        answers["10.0.0.4"] = record("10.0.0.4", gateway.key)
        for source, passes in (
            ("10.0.0.1", True),
            ("10.0.0.2", True),
            ("10.0.0.3", False),
            ("10.0.0.4", False),
        ):
            gateway.trap.bystanders.clear()
            flow = Flow(ip_address(source), peer.address, 6, 1, 2, Direction.FORWARD)
            gateway.core.on_trapped(PolicyGroup.PRIVATE_OR_CLEAR, flow)
            await asyncio.sleep(0.001)
            asked = bool(gateway.named("trapped"))
            assert (ip_address(source) in gateway.trap.bystanders, asked) == (passes, not passes), source
            assert all(300 <= seconds <= 3600 for seconds in gateway.trap.bystanders.values())
            gateway.events.clear()
            await asyncio.sleep(20)
            gateway.core.feed(Flush(None))
        assert not gateway.named("internal-error")

    run_virtual(main())
