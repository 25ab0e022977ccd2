"""Subnets behind two gateways. Topology:

left (10.1.0.2, 2001:2:1::2) ── lgw (trap, datapath) ── rgw (trap, datapath) ── right (10.2.0.2, 2001:2:2::2)
                                198.18.0.1               198.18.0.2
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path

import pytest
import pytest_asyncio

from oepy.datapath import TunDatapath
from oepy.datapath.tun import control
from oepy.lab.capture import Capture, Frame
from oepy.lab.namespaces import Lab, Namespace
from oepy.model import SaPair, Verdict
from oepy.udp import open_ike_sockets
from tests.fakes.datapath import mirrored, pairs, selector
from tests.fakes.network_card import transport_sum
from tests.net.harness import (
    A4,
    B4,
    GROUP,
    PATIENCE,
    Holder,
    TrapIn,
    arrived,
    cut_here,
    listen_udp,
    pinged,
    policy,
    rule,
    udp,
    until,
    wired,
)

pytestmark = pytest.mark.root

L4, R4, L6, R6 = "10.1.0.2", "10.2.0.2", "2001:2:1::2", "2001:2:2::2"


@dataclasses.dataclass
class Site:
    inner: Namespace
    gateway: Namespace
    trap: TrapIn
    datapath: TunDatapath


def _network(lab: Lab) -> tuple[list[Namespace], list[Namespace]]:
    inners = [lab.namespace("left"), lab.namespace("right")]
    gateways = [lab.namespace("lgw"), lab.namespace("rgw")]
    lab.veth(*gateways, "wan", "wan")
    for number, (inner, gateway) in enumerate(zip(inners, gateways, strict=True), 1):
        lab.veth(inner, gateway, "eth0", "lan")
        inner.address("eth0", f"10.{number}.0.2/24", f"2001:2:{number}::2/64")
        gateway.address("lan", f"10.{number}.0.1/24", f"2001:2:{number}::1/64")
        gateway.address("wan", f"198.18.0.{number}/24", f"2001:2::{number}/64")
        inner.ip("route", "add", "default", "via", f"10.{number}.0.1")
        inner.ip("-6", "route", "add", "default", "via", f"2001:2:{number}::1")
        gateway.ip("route", "add", "default", "via", f"198.18.0.{3 - number}")
        gateway.ip("-6", "route", "add", "default", "via", f"2001:2::{3 - number}")
        cut_here(gateway, "wan")
        gateway.run("ethtool", "-K", "lan", "tx", "off")  # what leaves there is whole, checksums and all
        gateway.sysctl("net.ipv4.ip_forward", 1)
        gateway.sysctl("net.ipv6.conf.all.forwarding", 1)
        gateway.sysctl("net.ipv4.conf.all.rp_filter", 1)  # strict where oepy does not say otherwise
    return inners, gateways


DECIDED_SECONDS = 2.0  # a decision of a daemon that is killed lives for so long
_MODES: dict[str, dict[str, bool]] = {
    "plain": {},
    "aggregation": {"aggregation": True},
    "super-packets": {"aggregation": True, "super_packets": True},
}


def _pair(mode: str) -> SaPair:
    one, _ = pairs("198.18.0.1", "198.18.0.2")
    return dataclasses.replace(
        one,
        **_MODES[mode],
        local_ts=(selector("10.1.0.0/24"), selector("2001:2:1::/64")),
        remote_ts=(selector("10.2.0.0/24"), selector("2001:2:2::/64")),
    )


@pytest_asyncio.fixture(params=_MODES)
async def sites(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Site, Site]]:
    with Lab() as lab, contextlib.ExitStack() as stack:
        inners, gateways = _network(lab)
        made: list[Site] = []
        for number, (inner, gateway) in enumerate(zip(inners, gateways, strict=True), 1):
            with gateway.entered():
                sockets = open_ike_sockets()
                stack.callback(sockets.close)
                datapath = TunDatapath(sockets.nat_t, lambda *_: None)
                await datapath.start(lambda _: None)
            trap = TrapIn(gateway, Verdict.PRIVATE)
            other = 3 - number
            trap.start(
                policy(
                    rule(GROUP.PRIVATE, f"10.{other}.0.0/24"),
                    rule(GROUP.PRIVATE, f"2001:2:{other}::/64"),
                    rule(GROUP.CLEAR, f"10.{number}.0.0/24"),
                    rule(GROUP.CLEAR, f"2001:2:{number}::/64"),
                )
            )
            made.append(Site(inner, gateway, trap, datapath))
        await made[0].datapath.install(_pair(request.param))
        await made[1].datapath.install(mirrored(_pair(request.param)))
        yield made[0], made[1]
        for site in made:
            site.trap.stop(guard=False)
            await site.datapath.stop()


async def test_subnets_reach_each_other_through_the_tunnel(sites: tuple[Site, Site], tmp_path: Path) -> None:
    """Forwarded pings of any size and a TCP stream with full-sized segments, IPv4 and IPv6, strict rp_filter
    elsewhere; between the gateways there is only ESP."""
    left, right = sites
    with (
        Capture(left.gateway, "wan", tmp_path / "wan.pcap") as capture,
        Capture(right.inner, "eth0", tmp_path / "right.pcap") as arriving,
    ):
        for target in (R4, R6):
            # IPv6 hosts first have to learn the path's MTU, each from its own gateway: two echoes are lost
            assert await pinged(left.inner, target, count=3, size=1400, within=0.5) >= 1, target
            assert await pinged(left.inner, target, count=2, size=1400) == 2, target
            # The hosts' own cards check nothing here: the receiving kernel sums up each segment
            for client, server, address in ((left, right, target), (right, left, L4 if target == R4 else L6)):
                assert await _stream(client.inner, server.inner, address) == 300_000
            assert await _datagrams(left.inner, right.inner, target) == [bytes([n]) * 1000 for n in range(20)]
        assert [packet for packet in capture.packets() if packet.kind == "clear"] == []
        assert len(capture.packets()) > 300
        checked = [packet for packet in map(_from_left, arriving.frames()) if packet]
        assert len(checked) > 400
        assert {transport_sum(packet) for packet in checked} == {0xFFFF}
    assert (await left.datapath.statistics()).get("no_sa", 0) == 0


def _from_left(frame: Frame) -> bytes:
    """The TCP or UDP packet of the left site's host in this frame, else nothing."""
    packet = frame.data[14:]
    if packet[0] >> 4 == 4 and packet[12:16] == ip_address(L4).packed and packet[9] in (6, 17):
        return packet[: int.from_bytes(packet[2:4], "big")]
    if packet[0] >> 4 == 6 and packet[8:24] == ip_address(L6).packed and packet[6] in (6, 17):
        return packet[: 40 + int.from_bytes(packet[4:6], "big")]
    return b""


async def _datagrams(client: Namespace, server: Namespace, target: str) -> list[bytes]:
    with listen_udp(server, target, 7300) as listener, udp(client, target, 7300) as sender:
        for number in range(20):
            sender.send(bytes([number]) * 1000)
        return await arrived(listener, 20)


async def _stream(client: Namespace, server: Namespace, target: str) -> int:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        total = 0
        while data := await reader.read(1 << 16):
            total += len(data)
        writer.write(str(total).encode())
        writer.close()

    with server.entered():
        listening = await asyncio.start_server(count, target, 8000)
    with client.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET)
    sock.setblocking(False)
    await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, (target, 8000)), PATIENCE)
    # The clamp has lowered the segments on both sides: nothing had to be refused on the way
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= 1390 - (60 if ":" in target else 40)
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(bytes(300_000))
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    listening.close()
    return int(answer)


async def test_a_killed_daemon_never_leaks_what_was_private(tmp_path: Path) -> None:
    """kill -9 of a process with trap and datapath: while its decisions live, marked packets are refused;
    when they have run out, the private-or-clear host is reached in the clear, the private prefix never."""
    with wired() as net:
        pair = pairs(A4, B4)[0]
        holder = Holder(
            net.a,
            answer="private",
            lifetime=DECIDED_SECONDS,
            rules=[["private", "198.18.0.128/25"]],
            pair=control.encode_pair(pair),
        )
        with net.b.entered():
            sockets = open_ike_sockets()
            datapath = TunDatapath(sockets.nat_t, lambda *_: None)
            await datapath.start(lambda _: None)
            trap = TrapIn(net.b, Verdict.PRIVATE)
            trap.start(policy())
        await datapath.install(mirrored(pair))
        net.wire.namespace.address("br0", "198.18.0.200/24")
        with Capture(net.wire.namespace, net.wire.ports, tmp_path / "w.pcap", incoming_only=True) as capture:
            since = time.time()
            assert await pinged(net.a, B4, count=2) == 2
            holder.line(f"asked private-or-clear {B4}")
            holder.kill()
            deadline = time.monotonic() + PATIENCE
            while not (clear := [packet for packet in capture.packets() if packet.kind == "clear"]):
                assert time.monotonic() < deadline
                await pinged(net.a, B4, within=0.05)
                assert await pinged(net.a, "198.18.0.200", within=0.05) == 0
            assert clear[0].time >= since + DECIDED_SECONDS
            assert {str(packet.destination) for packet in clear if str(packet.source) == A4} == {B4}
        trap.stop(guard=False)
        await datapath.stop()
        sockets.close()


async def test_two_stops_in_the_wrong_order_do_not_leak(tmp_path: Path) -> None:
    """The death of the datapath process alone is a failure like any other: told, and shut. SIGTERM, which
    systemd sends to all processes of a service, leaves it to its daemon, which removes its rules."""
    with wired() as net:
        events: list[str] = []
        with net.a.entered():
            sockets = open_ike_sockets()
            datapath = TunDatapath(sockets.nat_t, lambda *_: None)
            await datapath.start(lambda event: events.append(event.kind))
        trap = TrapIn(net.a, Verdict.PRIVATE)
        trap.start(policy())
        process = datapath.process_id
        assert process is not None
        with Capture(net.b, "eth0", tmp_path / "b.pcap") as capture:
            os.kill(process, signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert events == []
            os.kill(process, signal.SIGKILL)
            await until(lambda: events == ["failed"])
            assert await pinged(net.a, B4, count=3, within=0.1) == 0
            assert [packet for packet in capture.packets() if packet.kind == "clear"] == []
        trap.stop(guard=False)
        with net.a.entered():
            await datapath.start(lambda _: None)
        await datapath.stop()
        sockets.close()
        assert "17733" not in net.a.run("ip", "rule").stdout
