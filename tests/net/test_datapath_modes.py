"""Two userland datapaths in every mode: plain, aggregated (RFC 9347), with super-packets, and transport. Topology:

a (198.18.0.1, 2001:2::1, trap, datapath) ── wire ── b (198.18.0.2, 2001:2::2, trap, datapath)
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import os
import random
import socket
from pathlib import Path

import pytest

from oepy.datapath.tun import device
from oepy.lab.capture import Capture
from oepy.model import EspSuite, SaPair
from tests.fakes.datapath import mirrored, pairs
from tests.net import test_datapath
from tests.net.harness import A4, A6, B4, B6, Wired, arrived, listen_udp, pinged, received, udp
from tests.net.test_datapath import Host, clear_packets

pytestmark = pytest.mark.root

net, hosts = test_datapath.net, test_datapath.hosts  # the fixtures

MODES = {
    "plain": {},
    "aggregation": {"aggregation": True},
    "super-packets": {"aggregation": True, "super_packets": True},
    "no-fragments": {"aggregation": True, "fragments": False},
    "transport": {"mode": "transport"},
}
SUITE = EspSuite("aes256gcm16")


def _pair(mode: str, ends: tuple[str, str]) -> SaPair:
    return dataclasses.replace(pairs(*ends, suite=SUITE)[0], **MODES[mode])  # type: ignore[arg-type]


async def _exchange(a: Host, b: Host, address: str, size: int) -> None:
    """`size` random bytes there and the same number back, over TCP, with their hashes compared."""
    there, back = os.urandom(size), os.urandom(size)
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(back)
        got.set_result(await reader.readexactly(size))
        await writer.drain()
        writer.close()

    with b.namespace.entered():
        server = await asyncio.start_server(serve, address, 8001, limit=1 << 22)
    reader, writer = await asyncio.wait_for(_connect(a, address), 3)
    writer.write(there)
    answer = await asyncio.wait_for(reader.readexactly(size), 30)
    await asyncio.wait_for(writer.drain(), 10)
    arrived = await asyncio.wait_for(got, 10)
    writer.close()
    server.close()
    assert hashlib.sha256(answer).digest() == hashlib.sha256(back).digest()
    assert hashlib.sha256(arrived).digest() == hashlib.sha256(there).digest()


async def _connect(a: Host, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    with a.namespace.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (address, 8001))
    return await asyncio.open_connection(sock=sock, limit=1 << 22)


@pytest.mark.parametrize("ends", [(A4, B4), (A6, B6)], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("mode", MODES)
async def test_every_byte_crosses_in_every_mode(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path, mode: str, ends: tuple[str, str]
) -> None:
    """TCP both ways at once, datagrams of many sizes, pings: all as they were sent, only ESP on the wire, and no
    packet above 1500 bytes there."""
    a, b = hosts
    pair = _pair(mode, ends)
    await a.datapath.install(pair)
    await b.datapath.install(mirrored(pair))
    largest = 1300 if mode in ("transport", "no-fragments") else 4000
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "wire.pcap", incoming_only=True) as capture:
        for size in (56, 1200, 2500 if largest > 2500 else 1210):
            assert await pinged(a.namespace, ends[1], count=2, size=size) == 2, size
        await _exchange(a, b, ends[1], 2_000_000)
        random.seed(1)
        payloads = [os.urandom(random.randrange(2, largest)) for _ in range(150)]
        with listen_udp(b.namespace, ends[1], 7200) as listener, udp(a.namespace, ends[1], 7200) as sender:
            got: list[bytes] = []
            for number, payload in enumerate(payloads):
                sender.send(payload)
                if number % 10 == 9:  # no socket's queue is to overflow
                    async with asyncio.timeout(5):
                        while len(got) < number + 1:
                            await asyncio.sleep(0.005)
                            got += received(listener)
        assert got == payloads
        assert clear_packets(capture) == []
        assert max(len(frame.data) for frame in capture.frames()) <= 1514
    for host in hosts:
        (counters,) = await host.datapath.counters()
        assert counters.integrity_failures == counters.replayed == counters.selector_mismatches == 0
        refused = await host.datapath.statistics()
        assert not {"malformed_in", "malformed_out", "too_big"} & refused.keys(), refused


async def test_aggregation_needs_fewer_packets(hosts: tuple[Host, Host]) -> None:
    """Two hundred small datagrams, sent at once: far fewer ESP packets, and each datagram arrives."""
    a, b = hosts
    pair = _pair("aggregation", (A4, B4))
    await a.datapath.install(pair)
    await b.datapath.install(mirrored(pair))
    assert await pinged(a.namespace, B4) == 1  # the trap has decided
    with listen_udp(b.namespace, B4, 7201) as listener, udp(a.namespace, B4, 7201) as sender:
        for number in range(200):
            sender.send(number.to_bytes(2, "big"))
        assert [int.from_bytes(data, "big") for data in await arrived(listener, 200)] == list(range(200))
    (counters,) = await b.datapath.counters()
    assert 0 < counters.packets_in < 150


async def test_a_mode_may_change_with_a_rekey(hosts: tuple[Host, Host]) -> None:
    """From plain to super-packets and back while a stream goes on: nothing is lost, the device follows."""
    a, b = hosts
    spis = [(0x1001, 0x2002), (0x3003, 0x4004), (0x5005, 0x6006), (0x7007, 0x8008)]
    made = [
        dataclasses.replace(pairs(A4, B4, suite=SUITE, spis=spi)[0], **MODES[mode])  # type: ignore[arg-type]
        for spi, mode in zip(spis, ("plain", "super-packets", "plain", "aggregation"), strict=True)
    ]
    await a.datapath.install(made[0])
    await b.datapath.install(mirrored(made[0]))
    moving = asyncio.create_task(_exchange(a, b, B4, 12_000_000))
    for old, new in itertools.pairwise(made):
        await asyncio.sleep(0.05)
        await b.datapath.install(mirrored(new), outbound=False)
        await a.datapath.install(new)
        await b.datapath.install(mirrored(new))
        await asyncio.sleep(0.1)
        await a.datapath.remove(old.spi_in)
        await b.datapath.remove(old.spi_out)
    await moving
    for host in hosts:
        assert (await host.datapath.counters())[0].integrity_failures == 0
        assert (await host.datapath.statistics()).get("malformed_in", 0) == 0


async def test_a_narrow_path_gets_single_datagrams(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """Where the kernel refuses to cut batches (a route with a smaller MTU), packets go out one by one, and as
    fragments: slower, but every byte arrives."""
    a, b = hosts
    for namespace in (a.namespace, b.namespace):
        namespace.ip("route", "change", "198.18.0.0/24", "dev", "eth0", "proto", "kernel", "mtu", "1000")
    try:
        pair = _pair("super-packets", (A4, B4))
        await a.datapath.install(pair)
        await b.datapath.install(mirrored(pair))
        with Capture(net.wire.namespace, net.wire.ports, tmp_path / "w.pcap", incoming_only=True) as capture:
            await _exchange(a, b, B4, 200_000)
            assert max(len(frame.data) for frame in capture.frames()) <= 1014
        assert (await a.datapath.statistics()).get("send_failed", 0) == 0
    finally:
        for namespace in (a.namespace, b.namespace):
            namespace.ip("route", "change", "198.18.0.0/24", "dev", "eth0", "proto", "kernel")


async def test_an_old_kernels_device_works_without_some_offloads(
    net: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TUNSETOFFLOAD refuses is tried in a smaller set, then done without."""
    with net.a.entered():
        tun = device.TunDevice("oetest")
        try:
            monkeypatch.setattr(device, "_OFFLOADS", (0xFFFF, 0x07))
            tun.offload(True)
            features = net.a.run("ethtool", "-k", "oetest").stdout
            assert "tcp-segmentation-offload: on" in features
            tun.offload(False)
            monkeypatch.setattr(device, "_OFFLOADS", (0xFFFF,))
            tun.offload(True)
            features = net.a.run("ethtool", "-k", "oetest").stdout
            assert "tcp-segmentation-offload: off" in features
            assert tun.read() is None
        finally:
            tun.close()
