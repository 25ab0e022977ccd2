"""The kernel's datapath in the second kernel: whole hosts, and what a run leaves to the next.

a (198.18.0.1, 2001:2::1) ── wire ── b (198.18.0.2, 2001:2::2), SAs given by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from oepy.datapath import TunDatapath
from oepy.datapath.xfrm.datapath import XfrmDatapath
from oepy.datapath.xfrm.plan import BY_MARK
from oepy.model import EspSuite, Verdict
from oepy.udp import open_ike_sockets
from tests.fakes.datapath import SUITES, keys_of, mirrored, selector
from tests.kernel.xfrm_harness import (
    SECRET,
    Host,
    arrives,
    both_ways,
    host,
    join,
    kernel_policy,
    pair_of,
    part,
    talkers,
    tap,
    two_hosts,
)
from tests.net.harness import A4, B4, TrapIn, Wired, pinged, until, wired

pytestmark = [pytest.mark.kernel, pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]

Mixed = tuple[Host, TunDatapath, Wired]


@pytest.fixture(scope="module")
def net() -> Iterator[Wired]:
    with wired() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mixed() -> AsyncIterator[Mixed]:
    with wired() as net:
        with net.b.entered():
            sockets = open_ike_sockets()
        userland = TunDatapath(sockets.nat_t, lambda *_: None)
        async with host(net.a) as a:
            with net.b.entered():
                await userland.start(lambda _: None)
            yield a, userland, net
            await userland.stop()
        sockets.close()


async def test_a_crash_stays_closed_and_a_new_run_cleans_up(net: Wired) -> None:
    """kill -9 leaves the SAs: traffic stays protected. The next run removes them, and only them; until it has
    new ones, nothing passes. At no time anything in the clear."""
    async with two_hosts(net) as (a, b):
        pair = pair_of()
        await join(a, b, pair)
        with talkers(net.a, net.b) as (one, other), tap(net.b) as wire:
            assert await both_ways(one, other)
            crashed = a.datapath
            assert crashed._kernel is not None
            assert crashed._events is not None
            # What the kernel does for a process that is gone
            asyncio.get_running_loop().remove_reader(crashed._events.fileno())
            crashed._events.close()
            crashed._kernel.close()
            crashed._kernel = None
            assert await both_ways(one, other)
            a.datapath = XfrmDatapath(a.sockets.ike, a.sockets.nat_t)
            await a.start()
            shown = a.ip("xfrm", "state") + a.ip("xfrm", "policy")
            assert f"0x{pair.spi_out:08x}" not in shown
            assert not await arrives(one, other, SECRET, within=0.3)
            fresh = pair_of()
            await b.datapath.remove(pair.spi_out)
            await join(a, b, fresh)
            assert await both_ways(one, other)
            assert wire.kinds() == {"esp"}


async def test_a_gateway_forwards_for_its_networks(net: Wired) -> None:
    """Two networks on a's side, one on b's, hosts behind each; the trap on the gateways marks."""
    with contextlib.ExitStack() as stack:
        left, right = net.lab.namespace("left"), net.lab.namespace("right")
        for inner, gateway, address, route in (
            (left, net.a, "10.1.0.", "10.2.0.0/24"),
            (right, net.b, "10.2.0.", "10.1.0.0/24"),
        ):
            net.lab.veth(inner, gateway, "eth0", "lan0")
            stack.callback(gateway.ip, "link", "delete", "lan0")
            inner.address("eth0", f"{address}2/24")
            gateway.address("lan0", f"{address}1/24")
            inner.ip("route", "add", "default", "via", f"{address}1")
            gateway.sysctl("net.ipv4.ip_forward", 1)
            gateway.ip("route", "add", route, "via", B4 if gateway is net.a else A4)
            stack.callback(gateway.ip, "route", "delete", route)
        async with two_hosts(net) as (a, b):
            pair = pair_of(
                local_ts=(selector("10.1.0.0/24"), selector("10.9.0.0/24")),
                remote_ts=(selector("10.2.0.0/24"),),
            )
            await join(a, b, pair)
            traps = [TrapIn(one.namespace, Verdict.PRIVATE) for one in (a, b)]
            for trap in traps:
                trap.start(kernel_policy())
            try:
                with tap(net.b) as wire:
                    assert await pinged(left, "10.2.0.2", count=3, within=2.0) == 3
                    assert await pinged(right, "10.1.0.2", count=3, within=2.0) == 3
                    assert wire.kinds() == {"esp"}
            finally:
                for trap in traps:
                    trap.stop(guard=False)
                await part(a, b, pair)


async def test_by_the_mark_where_there_is_no_xfrm_interface(net: Wired) -> None:
    """No device, no routes: the policies know the mark, the trap knows packets that IPsec has decrypted.
    Captured on the wire: what b has decrypted shows up on b's eth0 a second time."""
    async with two_hosts(net, BY_MARK) as (a, b):
        traps = [TrapIn(one.namespace, Verdict.PRIVATE) for one in (a, b)]
        for trap in traps:
            trap.start(kernel_policy(device=None))
        try:
            with tap(net.wire.namespace, net.wire.ports[1]) as wire:
                assert await pinged(net.a, B4, count=2, within=0.3) == 0
                await until(lambda: "no-sa" in a.kinds())
                pair = pair_of()
                await join(a, b, pair)
                assert await pinged(net.a, B4, count=3, within=2.0) == 3
                assert await pinged(net.b, A4, count=3, within=2.0) == 3
                await part(a, b, pair)
                assert await pinged(net.a, B4, count=2, within=0.3) == 0
                assert wire.kinds() == {"esp"}
        finally:
            for trap in traps:
                trap.stop(guard=False)


async def test_others_entries_stay(net: Wired) -> None:
    """SAs and policies by `ip xfrm`, with and without if_id, through our start, life and stop."""
    inside = net.lab.namespace("others")
    state = "ip xfrm state add src 10.0.0.1 dst 10.0.0.2 proto esp spi 0x55 reqid 7 mode tunnel"
    key = ("aead", "rfc4106(gcm(aes))", "0x" + "77" * 20, "128")
    inside.run(*state.split(), *key)
    inside.run(*state.replace("0x55", "0x56").split(), *key, "if_id", "9")
    for extra in ("", " if_id 9"):
        policy = f"ip xfrm policy add src 10.0.0.0/24 dst 10.0.1.0/24 dir out{extra}"
        inside.run(*policy.split(), *["tmpl", "proto", "esp", "reqid", "7", "mode", "tunnel"])

    def listed() -> str:
        return inside.run("sh", "-c", "ip xfrm state | grep -v anti-replay; ip xfrm policy").stdout

    before = listed()
    async with host(inside) as made:
        await made.datapath.install(pair_of())
        assert listed() != before
    assert set(before.splitlines()) <= set(listed().splitlines())
    assert "0x6f" not in listed()


@pytest.mark.parametrize("suite", SUITES, ids=str)
async def test_kernel_and_userland_esp_understand_each_other(mixed: Mixed, suite: EspSuite) -> None:
    """a with the kernel's ESP, b with ours: every algorithm that both have, in UDP, as IKE would set it up."""
    a, userland, net = mixed
    pair = dataclasses.replace(pair_of(suite=suite), encap=True)
    pair = dataclasses.replace(pair, keys_in=keys_of(suite, 1), keys_out=keys_of(suite, 3))
    await userland.install(mirrored(pair))
    await a.datapath.install(pair)
    with talkers(net.a, net.b) as (one, other), tap(net.b) as wire:
        for size in (1, 100, 1362):
            assert await both_ways(one, other, bytes(size))
        assert wire.kinds() == {"esp"}
    (ours,), (theirs,) = await a.datapath.counters(), await userland.counters()
    assert (ours.packets_in, ours.packets_out) == (theirs.packets_out, theirs.packets_in) == (3, 3)
    await a.datapath.remove(pair.spi_in)
    await userland.remove(pair.spi_out)
