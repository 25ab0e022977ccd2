"""The kernel's datapath over a kernel in memory: what is installed, in which order, and what is left of it."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address, ip_network

import pytest
import pytest_asyncio

from oepy.datapath.xfrm import datapath as module
from oepy.datapath.xfrm.datapath import SEQUENCE_LEAP, XfrmDatapath
from oepy.datapath.xfrm.plan import BY_DEVICE, BY_MARK
from oepy.errors import OepyError
from oepy.interfaces import DatapathEvent
from oepy.model import XFRM_IF_ID, Endpoint, EspSuite, Lifetime, Mark, SaKeys, SaPair, Secret
from oepy.xfrm import pieces as p
from oepy.xfrm import requests
from oepy.xfrm import values as v
from oepy.xfrm.ids import AUTOMATIC_REQIDS, TRAP_REQID
from oepy.xfrm.requests import Request
from tests.fakes.datapath import keys_of, pairs, selector
from tests.fakes.xfrm import FakeEvents, FakeKernel

IN, OUT, FORWARD = v.PolicyDirection.IN, v.PolicyDirection.OUT, v.PolicyDirection.FORWARD
FIRST, _ = pairs(spis=(0x1001, 0x2001))
SECOND, _ = pairs(spis=(0x1002, 0x2002))
HERE, THERE = "192.0.2.1/32", "192.0.2.2/32"


class Bed:
    """A running datapath and its surroundings."""

    def __init__(self, **options: object) -> None:
        self.kernel = FakeKernel()
        self.events, self.news = FakeEvents(), FakeEvents()
        self.told: list[DatapathEvent] = []
        self.now = 100.0
        self.datapath = XfrmDatapath(
            open_xfrm=lambda: self.kernel,
            open_events=lambda groups: self.events if groups else self.news,  # type: ignore[arg-type,return-value]
            monotonic=lambda: self.now,
            **options,  # type: ignore[arg-type]
        )

    async def start(self) -> None:
        await self.datapath.start(self.told.append)
        self.kernel.asked.clear()

    @property
    def own(self) -> dict[v.PolicyId, v.Policy]:
        """Policies that belong to a pair."""
        return {
            name: policy
            for name, policy in self.kernel.policies.items()
            if any(template.reqid in AUTOMATIC_REQIDS for template in policy.templates)
        }

    def out_spi(self) -> int | None:
        found = [policy.templates[0].spi for policy in self.own.values() if policy.direction is OUT]
        assert len(found) < 2
        return found[0] if found else None


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices and routes are the kernel tests'."""
    done: list[str] = []

    def noted(word: str) -> Callable[..., None]:
        return lambda *_: done.append(word)

    monkeypatch.setattr(module.device, "make", noted("make"))
    monkeypatch.setattr(module.device, "remove", noted("remove"))
    monkeypatch.setattr(module.routes, "set_up", noted("set_up"))
    monkeypatch.setattr(module.routes, "tear_down", noted("tear_down"))
    monkeypatch.setattr(module.routes, "forget_marks", lambda: None)
    return done


@pytest_asyncio.fixture
async def bed() -> AsyncIterator[Bed]:
    made = Bed()
    await made.start()
    yield made
    await made.datapath.stop()
    assert not made.kernel.sas
    assert not made.own


async def test_a_pair_is_two_sas_and_its_policies(bed: Bed) -> None:
    """SAs before the policies that name them, inward policies before the outward one."""
    await bed.datapath.install(FIRST)
    assert bed.kernel.kinds() == [p.MSG_NEWSA, p.MSG_NEWSA, p.MSG_NEWPOLICY, p.MSG_NEWPOLICY]
    inbound = bed.kernel.sas[ip_address("192.0.2.1"), 0x1001, v.ESP]
    outbound = bed.kernel.sas[ip_address("192.0.2.2"), 0x2001, v.ESP]
    assert inbound.if_id == outbound.if_id == XFRM_IF_ID
    assert inbound.reqid == outbound.reqid
    assert inbound.reqid in AUTOMATIC_REQIDS
    assert inbound.set_mark is None
    assert outbound.set_mark == Mark(0x20000000, 0x30000000)
    assert inbound.aead is not None
    assert outbound.aead is not None
    assert (inbound.aead.key, outbound.aead.key) == (FIRST.keys_in.encryption, FIRST.keys_out.encryption)
    assert inbound.encapsulation == outbound.encapsulation == v.Encapsulation(4500, 4500)
    assert inbound.replay is not None
    assert inbound.replay.window == 1024
    assert v.SaFlag.ESN in inbound.flags & outbound.flags
    directions = [policy.direction for policy in bed.own.values()]
    assert directions == [IN, OUT]  # for ourselves alone: nothing to forward
    assert bed.out_spi() == 0x2001


async def test_a_gateways_subnets_are_policies_of_all_directions(bed: Bed) -> None:
    """`in`, `fwd` and `out` for each pair of networks."""
    here = tuple(selector(text) for text in ("10.1.0.0/24", "10.2.0.0/24"))
    there = tuple(selector(text) for text in ("10.3.0.0/24", "10.4.0.0/24"))
    await bed.datapath.install(dataclasses.replace(FIRST, local_ts=here, remote_ts=there))
    assert [policy.direction for policy in bed.own.values()].count(FORWARD) == 4
    assert len(bed.own) == 12


async def test_ports_of_the_selectors_are_in_the_policies(bed: Bed) -> None:
    """And turned round in the inward one."""
    here, there = selector(HERE), selector(THERE, 6, 80)
    await bed.datapath.install(dataclasses.replace(FIRST, local_ts=(here,), remote_ts=(there,)))
    out, inward = bed.kernel.policy(OUT, THERE), bed.kernel.policy(IN, HERE)
    assert out is not None
    assert inward is not None
    assert out.selector.destination_port == (80, 0xFFFF)
    assert inward.selector.source_port == (80, 0xFFFF)
    assert out.selector.protocol == inward.selector.protocol == 6


async def test_a_rekey_changes_one_policy_and_when_told(bed: Bed) -> None:
    """The responder only receives on the new SA until the initiator has shown that it has it."""
    await bed.datapath.install(FIRST)
    bed.kernel.asked.clear()
    await bed.datapath.install(SECOND, outbound=False)
    assert bed.kernel.kinds() == [p.MSG_NEWSA, p.MSG_NEWSA]  # the policies let it in already: same reqid
    assert len({sa.reqid for sa in bed.kernel.sas.values()}) == 1
    assert bed.out_spi() == 0x2001
    await bed.datapath.install(SECOND, outbound=True)
    assert bed.kernel.kinds()[2:] == [p.MSG_UPDPOLICY]
    assert bed.out_spi() == 0x2002
    bed.kernel.asked.clear()
    await bed.datapath.remove(0x1001)
    assert bed.kernel.kinds() == [p.MSG_DELSA, p.MSG_DELSA]
    assert bed.out_spi() == 0x2002
    await bed.datapath.remove(0x1002)
    assert not bed.own


async def test_removing_the_newer_pair_gives_the_policy_back(bed: Bed) -> None:
    """After a simultaneous start the newer of two may be the one that goes."""
    await bed.datapath.install(FIRST)
    await bed.datapath.install(SECOND)
    await bed.datapath.remove(0x1002)
    assert bed.out_spi() == 0x2001


async def test_policies_go_before_their_sas(bed: Bed) -> None:
    """So that nothing asks for an SA which has just gone."""
    await bed.datapath.install(FIRST)
    bed.kernel.asked.clear()
    await bed.datapath.remove(0x1001)
    assert bed.kernel.kinds() == [p.MSG_DELPOLICY, p.MSG_DELPOLICY, p.MSG_DELSA, p.MSG_DELSA]


async def test_another_peer_has_another_reqid(bed: Bed) -> None:
    """Its SAs do not pass for those of the first, with the same selectors or not."""
    await bed.datapath.install(FIRST)
    other = dataclasses.replace(SECOND, remote=Endpoint(ip_address("192.0.2.3"), 4500))
    await bed.datapath.install(other)
    assert len({sa.reqid for sa in bed.kernel.sas.values()}) == 2


async def test_ah_is_padded_as_its_family_wants(bed: Bed) -> None:
    """RFC 4302 §3.3.3.2.1: to 32 bits over IPv4, to 64 over IPv6; other systems refuse what has more."""
    ah = dataclasses.replace(
        FIRST,
        protocol="ah",
        encap=False,
        suite=EspSuite("", "sha256"),
        keys_in=SaKeys(Secret(b""), Secret(bytes(32))),
        keys_out=SaKeys(Secret(b""), Secret(bytes(32))),
    )
    await bed.datapath.install(ah)
    assert all(v.SaFlag.ALIGN4 in sa.flags for sa in bed.kernel.sas.values())
    await bed.datapath.remove(0x1001)
    over6 = {
        "local": Endpoint(ip_address("2001:db8::1"), 500),
        "remote": Endpoint(ip_address("2001:db8::2"), 500),
    }
    await bed.datapath.install(dataclasses.replace(ah, **over6))
    assert not any(v.SaFlag.ALIGN4 in sa.flags for sa in bed.kernel.sas.values())
    await bed.datapath.remove(0x1001)
    await bed.datapath.install(FIRST)
    assert not any(v.SaFlag.ALIGN4 in sa.flags for sa in bed.kernel.sas.values())


async def test_configured_connections_come_first(bed: Bed) -> None:
    """Before an opportunistic SA for the same addresses."""
    await bed.datapath.install(FIRST)
    await bed.datapath.install(
        dataclasses.replace(
            SECOND, connection="office", local_ts=(selector("192.0.2.0/24"),), remote_ts=(selector(THERE),)
        )
    )
    priorities = {
        str(policy.selector.source): policy.priority for policy in bed.own.values() if policy.direction is OUT
    }
    assert priorities["192.0.2.0/24"] < priorities[HERE]


async def test_what_no_sa_covers_is_closed() -> None:
    """Below all others: inward a block, outward a policy that asks."""
    bed = Bed()
    await bed.start()
    await bed.datapath.install(FIRST)
    lowest = {
        direction: max(
            (policy for policy in bed.kernel.policies.values() if policy.direction is direction),
            key=lambda policy: policy.priority,
        )
        for direction in (IN, FORWARD, OUT)
    }
    assert lowest[IN].action is lowest[FORWARD].action is v.PolicyAction.BLOCK
    assert lowest[OUT].templates[0].reqid == TRAP_REQID
    assert all(policy.if_id == XFRM_IF_ID for policy in bed.kernel.policies.values())
    await bed.datapath.stop()
    assert not bed.kernel.policies


async def test_a_refusal_leaves_nothing_and_names_the_mend(bed: Bed) -> None:
    """The kernel lacks an algorithm, or the SPI is somebody's: what had been done is undone."""
    bed.kernel.refusing[p.MSG_NEWPOLICY] = errno.ENOBUFS
    with pytest.raises(OepyError, match="out of memory"):
        await bed.datapath.install(FIRST)
    assert not bed.kernel.sas
    assert not bed.own
    bed.kernel.refusing = {p.MSG_NEWSA: errno.ENOSYS}
    with pytest.raises(OepyError, match="modprobe -a esp4 gcm"):
        await bed.datapath.install(FIRST)
    bed.kernel.refusing.clear()
    await bed.datapath.install(FIRST)
    assert bed.out_spi() == 0x2001


async def test_foreign_entries_with_our_names_stay(bed: Bed) -> None:
    """An SA of the SPI, or a policy of the selector, that another program has: refused, and not removed."""
    await bed.datapath.install(FIRST)
    taken = dict(bed.kernel.sas), dict(bed.kernel.policies)
    clash = dataclasses.replace(SECOND, spi_out=FIRST.spi_out)
    with pytest.raises(OepyError, match="0x00002001"):
        await bed.datapath.install(clash)
    assert (bed.kernel.sas, bed.kernel.policies) == taken
    await bed.datapath.remove(0x1001)
    foreign = v.Policy(OUT, v.Selector(ip_network(HERE), ip_network(THERE)), if_id=XFRM_IF_ID)
    bed.kernel.policies[foreign.id] = foreign
    with pytest.raises(OepyError, match="one already"):
        await bed.datapath.install(FIRST)
    assert bed.kernel.policies[foreign.id] == foreign
    assert not bed.kernel.sas
    del bed.kernel.policies[foreign.id]


async def test_leftovers_go_and_foreign_entries_stay() -> None:
    """At start; by reqid and if_id."""
    bed = Bed()
    ours, _ = pairs()
    await bed.start()
    await bed.datapath.install(ours)
    left_sas, left_policies = dict(bed.kernel.sas), dict(bed.kernel.policies)
    await bed.datapath.stop()
    bed = Bed()
    sa = next(iter(left_sas.values()))
    foreign_sa = dataclasses.replace(sa, spi=0x9999, reqid=7)
    selectors = v.Selector(ip_network("10.0.0.0/8"), ip_network("10.0.0.0/8"))
    foreign = v.Policy(OUT, selectors, (v.Template(sa.source, sa.destination, reqid=7),))
    key = (foreign_sa.destination, foreign_sa.spi, foreign_sa.protocol)
    bed.kernel.sas = {**left_sas, key: foreign_sa}
    bed.kernel.policies = {**left_policies, foreign.id: foreign}
    await bed.start()
    assert list(bed.kernel.sas) == [key]
    assert foreign.id in bed.kernel.policies
    assert not bed.own
    await bed.datapath.stop()
    assert list(bed.kernel.sas) == [key]
    assert list(bed.kernel.policies) == [foreign.id]


async def test_a_moved_peer_gets_a_new_outbound_sa(bed: Bed) -> None:
    """Its sequence numbers leap over whatever is sent meanwhile; limits and counters go on; the inbound SA,
    with its replay window, stays."""
    lifetime = Lifetime(soft_packets=1000, hard_packets=2000, hard_bytes=50_000)
    first = dataclasses.replace(FIRST, lifetime=lifetime)
    await bed.datapath.install(first)
    key = (ip_address("192.0.2.2"), 0x2001, v.ESP)
    sent = v.Usage(bytes=20_000, packets=300, added=1)
    bed.kernel.sas[key] = dataclasses.replace(
        bed.kernel.sas[key], usage=sent, replay=v.Replay(1, sequence_out=300, bitmap=bytes(4))
    )
    moved = dataclasses.replace(first, remote=Endpoint(ip_address("198.51.100.9"), 1024))
    await bed.datapath.install(moved)
    assert key not in bed.kernel.sas
    fresh = bed.kernel.sas[ip_address("198.51.100.9"), 0x2001, v.ESP]
    assert fresh.replay is not None
    assert fresh.replay.sequence_out == 300 + SEQUENCE_LEAP
    assert (fresh.limits.soft_packets, fresh.limits.hard_packets) == (700, 1700)
    assert fresh.limits.hard_bytes == 30_000
    assert fresh.encapsulation == v.Encapsulation(4500, 1024)
    out = bed.kernel.policy(OUT, THERE)
    assert out is not None
    assert str(out.templates[0].destination) == "198.51.100.9"
    (counters,) = await bed.datapath.counters()
    assert (counters.packets_out, counters.bytes_out) == (300, 20_000)
    # A rekey after the move is let in by the same policies
    bed.kernel.asked.clear()
    await bed.datapath.install(dataclasses.replace(SECOND, remote=moved.remote))
    assert bed.kernel.kinds() == [p.MSG_NEWSA, p.MSG_NEWSA, p.MSG_UPDPOLICY]


@pytest.mark.parametrize("encap", [False, True])
async def test_our_own_end_moves(bed: Bed, encap: bool) -> None:
    """The inbound SA is made anew at the new address, with what it had received at its very end and not at the last
    look; limits and counters go on, and a NAT that is there now has ESP go in UDP."""
    first = dataclasses.replace(FIRST, encap=not encap, lifetime=Lifetime(hard_packets=2000))
    await bed.datapath.install(first)
    key = (ip_address("192.0.2.1"), 0x1001, v.ESP)
    bed.kernel.sas[key] = dataclasses.replace(
        bed.kernel.sas[key], usage=v.Usage(bytes=900, packets=30, added=1)
    )
    old = bed.kernel.sas[key].id
    last = v.Replay(first.replay_window, sequence_in=31, bitmap=b"\xff\xff\xff\x7f" + bytes(12))
    elsewhere = dataclasses.replace(old, destination=ip_address("192.0.2.50"))
    bed.news.send(v.SaDeleted(elsewhere, v.Replay(32, bitmap=bytes(4))), v.SaDeleted(old, last))
    moved = dataclasses.replace(first, local=Endpoint(ip_address("192.0.2.7"), 4500), encap=encap)
    await bed.datapath.install(moved)
    assert bed.news.groups == [p.GROUP_SA]
    assert key not in bed.kernel.sas
    fresh = bed.kernel.sas[ip_address("192.0.2.7"), 0x1001, v.ESP]
    assert fresh.replay is not None
    assert fresh.replay.sequence_in == 31
    assert fresh.replay.bitmap.startswith(last.bitmap)
    assert fresh.limits.hard_packets == 1970
    assert (fresh.encapsulation is not None) is encap
    outbound = bed.kernel.sas[ip_address("192.0.2.2"), 0x2001, v.ESP]
    assert str(outbound.source) == "192.0.2.7"
    assert (outbound.encapsulation is not None) is encap
    out = bed.kernel.policy(OUT, THERE)
    assert out is not None
    assert str(out.templates[0].source) == "192.0.2.7"
    (counters,) = await bed.datapath.counters()
    assert (counters.packets_in, counters.bytes_in) == (30, 900)


async def test_a_packet_during_a_move_does_not_stand_in_its_way(bed: Bed) -> None:
    """The kernel has asked for an SA (ACQUIRE) between the old one and the new, and what waits has the same name:
    it is filled. Where it is an SA of somebody else's, the tunnel ends."""
    await bed.datapath.install(FIRST)
    key = (ip_address("192.0.2.2"), 0x2001, v.ESP)
    change = bed.kernel._change
    larval: list[v.Sa] = []

    def and_then(request: Request) -> int:
        outcome = change(request)
        if request.kind == p.MSG_DELSA and larval and key not in bed.kernel.sas:
            bed.kernel.sas[key] = larval.pop()
        return outcome

    bed.kernel._change = and_then  # type: ignore[method-assign]
    for number, place in enumerate(("192.0.2.7", "192.0.2.8")):
        old = bed.kernel.sas[key]
        larval.append(dataclasses.replace(old, reqid=0))
        inbound = next(sa for sa in bed.kernel.sas.values() if sa.spi == 0x1001)
        bed.news.send(v.SaDeleted(inbound.id, v.Replay(32, bitmap=bytes(4))))
        moved = dataclasses.replace(FIRST, local=Endpoint(ip_address(place), 4500))
        bed.kernel.keeps = number == 1
        if number == 0:
            await bed.datapath.install(moved)
            assert bed.kernel.sas[key].source == ip_address(place)
        else:
            with pytest.raises(OepyError, match="another SA"):
                await bed.datapath.install(moved)
    del bed.kernel.sas[key]


async def test_moves_that_would_weaken_something_are_refused(bed: Bed) -> None:
    """Our own end's, where the kernel does not say what was received; and sequence numbers near their end."""
    await bed.datapath.install(SECOND)
    with pytest.raises(OepyError, match="had received"):
        await bed.datapath.install(dataclasses.replace(SECOND, local=Endpoint(ip_address("192.0.2.7"), 4500)))
    no_esn = dataclasses.replace(FIRST, suite=EspSuite("aes128gcm16", esn=False))
    await bed.datapath.install(no_esn)
    key = (ip_address("192.0.2.2"), 0x2001, v.ESP)
    used = v.Replay(1, sequence_out=2**32 - SEQUENCE_LEAP, bitmap=bytes(4))
    bed.kernel.sas[key] = dataclasses.replace(bed.kernel.sas[key], replay=used)
    with pytest.raises(OepyError, match="used up"):
        await bed.datapath.install(
            dataclasses.replace(no_esn, remote=Endpoint(ip_address("192.0.2.9"), 4500))
        )
    assert key not in bed.kernel.sas


async def test_expiries_are_told_once_for_the_pair(bed: Bed) -> None:
    """Both SAs reach a limit of time at once; hard comes after soft, and others' SAs are nothing to us."""
    await bed.datapath.install(FIRST)
    inbound, outbound = bed.kernel.sas.values()
    foreign = dataclasses.replace(inbound, spi=0x7777)
    bed.events.send(v.Expire(foreign, True), v.Expire(inbound, False), v.Expire(outbound, False))
    await asyncio.sleep(0.01)
    assert bed.told == [DatapathEvent("soft-expire", 0x1001)]
    bed.events.send(v.Expire(outbound, True), v.Expire(inbound, True))
    await asyncio.sleep(0.01)
    assert bed.told[1:] == [DatapathEvent("hard-expire", 0x1001)]


async def test_lost_events_are_made_up_for(bed: Bed) -> None:
    """The socket's buffer was full: whoever is over a limit, or gone, is found by looking."""
    await bed.datapath.install(dataclasses.replace(FIRST, lifetime=Lifetime(soft_packets=5)))
    await bed.datapath.install(SECOND)
    key = (ip_address("192.0.2.2"), 0x2001, v.ESP)
    bed.kernel.sas[key] = dataclasses.replace(bed.kernel.sas[key], usage=v.Usage(0, 6, 2**40))
    del bed.kernel.sas[ip_address("192.0.2.1"), 0x1002, v.ESP]
    bed.events.send(lost=True)
    await asyncio.sleep(0.01)
    assert bed.told == [DatapathEvent("soft-expire", 0x1001), DatapathEvent("hard-expire", 0x1002)]
    assert (await bed.datapath.statistics())["events_lost"] == 1


async def test_packets_without_an_sa_are_told(bed: Bed) -> None:
    """Our policy at the end asks; others' acquires are theirs."""
    asking = next(policy for policy in bed.kernel.policies.values() if policy.direction is OUT)
    wanted = v.Selector(ip_network("192.0.2.5/32"), ip_network("198.51.100.5/32"), 6)
    foreign = dataclasses.replace(asking, templates=(dataclasses.replace(asking.templates[0], reqid=9),))
    ends = ip_address("192.0.2.5"), ip_address("198.51.100.5")
    bed.events.send(*(v.Acquire(*ends, v.ESP, wanted, policy, 1) for policy in (foreign, asking)))
    await asyncio.sleep(0.01)
    assert bed.told == [DatapathEvent("no-sa", peer=ends[1], source=ends[0])]


async def test_counters_and_when_they_changed(bed: Bed) -> None:
    """A look that sees more packets is the time of the last one."""
    await bed.datapath.install(FIRST)
    key = (ip_address("192.0.2.1"), 0x1001, v.ESP)
    bed.kernel.sas[key] = dataclasses.replace(
        bed.kernel.sas[key], usage=v.Usage(840, 10), replayed=1, out_of_window=2, integrity_failed=4
    )
    (first,) = await bed.datapath.counters()
    assert (first.bytes_in, first.packets_in, first.replayed, first.integrity_failures) == (840, 10, 3, 4)
    assert (first.last_in, first.last_out) == (100.0, 0.0)
    bed.now = 110.0
    (second,) = await bed.datapath.counters([0x1001, 0x4242])
    assert second.last_in == 100.0


async def test_a_pair_of_another_key_does_not_replace_one(bed: Bed) -> None:
    """The SPI alone is not enough to be the same pair."""
    await bed.datapath.install(FIRST)
    with pytest.raises(OepyError, match="in use"):
        await bed.datapath.install(dataclasses.replace(FIRST, keys_in=keys_of(FIRST.suite, 9)))


async def test_transport_mode_is_bare_and_its_sa_has_the_selector() -> None:
    """Through the device the packet would come to it again. The kernel lets in by transport mode what no policy
    forbids, so the SA's own selector must."""
    bed = Bed()
    await bed.start()
    pair = dataclasses.replace(FIRST, mode="transport", remote_ts=(selector(THERE, 6, 80),), encap=False)
    await bed.datapath.install(pair)
    inbound = bed.kernel.sas[ip_address("192.0.2.1"), 0x1001, v.ESP]
    assert inbound.selector.source_port == (80, 0xFFFF)
    assert (inbound.if_id, inbound.mode) == (0, v.Mode.TRANSPORT)
    assert all(policy.if_id == 0 and policy.mark is None for policy in bed.own.values())
    several = dataclasses.replace(
        SECOND, mode="transport", remote_ts=(selector(THERE, 6), selector(THERE, 17))
    )
    with pytest.raises(OepyError, match="several"):
        await bed.datapath.install(several)
    await bed.datapath.stop()
    assert not bed.kernel.policies


async def test_by_mark_the_outward_policies_have_it(no_device: list[str]) -> None:
    """Where there are no XFRM interfaces; and no device is made."""
    bed = Bed(scheme=BY_MARK)
    await bed.start()
    await bed.datapath.install(FIRST)
    out, inward = bed.kernel.policy(OUT, THERE), bed.kernel.policy(IN, HERE)
    assert out is not None
    assert inward is not None
    assert (out.mark, out.if_id) == (Mark(0x10000000, 0x30000000), 0)
    assert (inward.mark, inward.if_id) == (None, 0)
    await bed.datapath.stop()
    assert no_device == ["tear_down"]  # of an earlier run that had one


async def test_a_start_that_fails_leaves_nothing(no_device: list[str]) -> None:
    """And may be tried again."""
    bed = Bed()
    bed.kernel.refusing[p.MSG_NEWPOLICY] = errno.EPERM
    with pytest.raises(OepyError, match="run as root"):
        await bed.datapath.start(bed.told.append)
    assert bed.kernel.closed
    assert no_device == ["make", "set_up", "remove", "tear_down"]


def bad(**changes: object) -> SaPair:
    return dataclasses.replace(FIRST, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (bad(mode="beet"), "tunnel or transport"),
        (bad(protocol="ipcomp"), "esp or ah"),
        (bad(protocol="ah", suite=EspSuite("", "sha256")), "NAT"),
        (bad(suite=EspSuite("aes128")), "no integrity"),
        (bad(suite=EspSuite("des", "sha256")), "'des'"),
        (bad(keys_in=dataclasses.replace(FIRST.keys_in, encryption=Secret(b"x" * 19))), "20 bytes"),
        (bad(replay_window=4097), "4096"),
        (bad(remote=Endpoint(ip_address("2001:db8::1"), 4500)), "two families"),
        (bad(remote_ts=(selector("2001:db8::/64"),)), "no packet"),
    ],
)
async def test_what_the_kernel_has_not_is_refused_before_it_is_asked(
    bed: Bed, pair: SaPair, words: str
) -> None:
    """With the mend, and nothing half done."""
    with pytest.raises(OepyError, match=words):
        await bed.datapath.install(pair)
    assert not bed.kernel.asked


def test_without_esn_the_sequence_numbers_are_a_limit() -> None:
    """RFC 4303 §3.3.3: they must not cycle."""
    from oepy.datapath.xfrm.plan import limits_of

    limits = limits_of(Lifetime(soft_seconds=10.2), esn=False)
    assert (limits.soft_packets, limits.hard_packets, limits.soft_seconds) == (0xE0000000, 0xFFFFFFFF, 11)
    assert limits_of(Lifetime(), esn=True) == v.Limits()


def test_a_bypass_is_the_kernels_structure() -> None:
    """For the socket option IP_XFRM_POLICY: 168 bytes, no template."""
    everything = v.Selector(v.ANY_NETWORK, v.ANY_NETWORK)
    assert len(requests.policy_info(v.Policy(IN, everything))) == 168
    assert BY_DEVICE.if_id == XFRM_IF_ID
