"""Two userland datapaths with SAs given by hand. Topology:

a (198.18.0.1, 2001:2::1, trap, datapath) ── wire ── b (198.18.0.2, 2001:2::2, trap, datapath)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest
import pytest_asyncio

from oepy.datapath import TunDatapath
from oepy.errors import MisuseError, OepyError
from oepy.interfaces import DatapathEvent
from oepy.lab.capture import Capture
from oepy.lab.namespaces import Namespace
from oepy.model import Endpoint, EspSuite, Lifetime, SaPair, Verdict
from oepy.udp import Datagram, IkeSockets, open_ike_sockets
from tests.fakes.datapath import mirrored, pairs, selector
from tests.net.harness import (
    A4,
    A6,
    B4,
    B6,
    GROUP,
    PATIENCE,
    TrapIn,
    Wired,
    arrived,
    cut_here,
    listen_udp,
    pinged,
    policy,
    received,
    udp,
    until,
    wired,
)

pytestmark = pytest.mark.root

GCM = EspSuite("aes128gcm16")


@pytest.fixture(scope="module")
def net() -> Iterator[Wired]:
    with wired() as made:
        for namespace in (made.a, made.b):
            cut_here(namespace, "eth0")
        yield made


@dataclass
class Host:
    namespace: Namespace
    sockets: IkeSockets
    datapath: TunDatapath
    trap: TrapIn
    events: list[DatapathEvent] = field(default_factory=list)
    ike: list[tuple[bytes, Endpoint, Endpoint]] = field(default_factory=list)

    async def start(self) -> None:
        with self.namespace.entered():
            await self.datapath.start(self.events.append)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@contextlib.asynccontextmanager
async def _host(namespace: Namespace) -> AsyncIterator[Host]:
    """With everything private at once (the trap answers PRIVATE)."""
    with namespace.entered():
        sockets = open_ike_sockets()
    ike: list[tuple[bytes, Endpoint, Endpoint]] = []
    datapath = TunDatapath(sockets.nat_t, lambda *message: ike.append(message))
    host = Host(namespace, sockets, datapath, TrapIn(namespace, Verdict.PRIVATE), ike=ike)
    await host.start()
    host.trap.start(policy())
    try:
        yield host
    finally:
        host.trap.stop(guard=False)
        await host.datapath.stop()
        sockets.close()
    rules = namespace.run(
        "sh", "-c", "ip rule; ip -6 rule; ip route show table 17733; ip link; nft list tables"
    )
    assert "17733" not in rules.stdout
    assert "oe0" not in rules.stdout
    assert "table" not in rules.stdout


@pytest_asyncio.fixture
async def hosts(net: Wired) -> AsyncIterator[tuple[Host, Host]]:
    async with _host(net.a) as a, _host(net.b) as b:
        yield a, b


async def _join(a: Host, b: Host, pair: SaPair) -> None:
    await a.datapath.install(pair)
    await b.datapath.install(mirrored(pair))


def clear_packets(capture: Capture) -> list[object]:
    """What went in the clear between the hosts, neighbour discovery and multicast aside."""
    return [packet for packet in capture.packets() if packet.kind == "clear"]


async def _transfer(a: Host, b: Host, address: str, size: int) -> int:
    """Send `size` bytes over TCP from a to b, and return what b has counted."""

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        total = 0
        while data := await reader.read(1 << 16):
            total += len(data)
        writer.write(str(total).encode())
        writer.close()

    with b.namespace.entered():
        server = await asyncio.start_server(count, address, 8000)
    with a.namespace.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setblocking(False)
    await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, (address, 8000)), PATIENCE)
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(bytes(size))
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    server.close()
    return int(answer)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [((A4, B4), (A4, B4)), ((A6, B6), (A6, B6)), ((A4, B4), (A6, B6)), ((A6, B6), (A4, B4))],
)
async def test_everything_crosses_as_esp(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path, inner: tuple[str, str], outer: tuple[str, str]
) -> None:
    """The first ping, pings larger than the tunnel, and a TCP stream, in each family inside and outside; on
    the wire there is only UDP-encapsulated ESP, and no packet above 1500 bytes."""
    a, b = hosts
    await _join(a, b, pairs(*outer, inner=inner, suite=GCM)[0])
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "wire.pcap", incoming_only=True) as capture:
        for size in (56, 1400, 4000):
            assert await pinged(a.namespace, inner[1], count=2, size=size) == 2, size
        assert await _transfer(a, b, inner[1], 500_000) == 500_000
        assert clear_packets(capture) == []
        assert Counter(packet.kind for packet in capture.packets())["esp"] > 300
        assert max(len(frame.data) for frame in capture.frames()) <= 1514
    (counters,) = await a.datapath.counters()
    assert counters.packets_out > 300
    assert counters.bytes_out > 500_000
    assert counters.integrity_failures == counters.replayed == counters.selector_mismatches == 0
    assert (await a.datapath.statistics()).get("no_sa", 0) == 0


@pytest.mark.parametrize(
    "suite", [EspSuite("chacha20poly1305"), EspSuite("aes256", "sha512", False)], ids=str
)
async def test_other_suites_cross_too(hosts: tuple[Host, Host], suite: EspSuite) -> None:
    """The AEAD from RFC 7634, and encrypt-then-MAC with the largest overhead."""
    a, b = hosts
    await _join(a, b, pairs(A4, B4, suite=suite)[0])
    assert await pinged(a.namespace, B4, count=2, size=1362) == 2
    assert await _transfer(a, b, B4, 100_000) == 100_000


async def test_a_replayed_datagram_is_dropped(net: Wired, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """The same ESP packets, sent again by b's address, change a counter and nothing else."""
    a, b = hosts
    await _join(a, b, pairs(A4, B4)[0])
    with listen_udp(b.namespace, B4, 7100) as listener, udp(a.namespace, B4, 7100) as sender:
        with Capture(net.b, "eth0", tmp_path / "b.pcap") as capture:
            for number in range(5):
                sender.send(bytes([number]))
            assert len(await arrived(listener, 5)) == 5
            sealed = [
                packet.payload
                for packet in capture.packets()
                if packet.kind == "esp" and packet.source == ip_address(A4)
            ]
        for data in sealed:
            a.sockets.nat_t[0].send(data, ip_address(A4), Endpoint(ip_address(B4), 4500))

        async def are_counted() -> bool:
            (counters,) = await b.datapath.counters()
            return (counters.packets_in, counters.replayed) == (5, 5)

        await until(are_counted)
        assert received(listener) == []


async def test_inner_packets_outside_of_the_selectors_are_dropped(hosts: tuple[Host, Host]) -> None:
    """a sends through a wider SA than b has agreed to: b drops it and says so."""
    a, b = hosts
    wide, _ = pairs(A4, B4, selectors=(selector("0.0.0.0/0"), selector("0.0.0.0/0")))
    await a.datapath.install(wide)
    await b.datapath.install(pairs(A4, B4)[1])
    a.namespace.address("lo", "198.18.9.9/32")
    with (
        listen_udp(b.namespace, B4, 7101) as listener,
        udp(a.namespace, B4, 7101, source="198.18.9.9") as spoofing,
        udp(a.namespace, B4, 7101) as sender,
    ):
        spoofing.send(b"spoofed")
        sender.send(b"true")
        await until(lambda: b.events)
        assert await arrived(listener, 1) == [b"true"]
    a.namespace.ip("address", "del", "198.18.9.9/32", "dev", "lo")
    assert b.kinds() == ["selector-mismatch"]
    assert (await b.datapath.counters())[0].selector_mismatches >= 1


async def test_a_hard_limit_ends_the_sa_and_nothing_leaks(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """Soft and hard expiry by packets are told; afterwards packets are dropped, not sent in the clear."""
    a, b = hosts
    pair = pairs(A4, B4, lifetime=Lifetime(soft_packets=2, hard_packets=4))[0]
    await _join(a, b, pair)
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "wire.pcap", incoming_only=True) as capture:
        assert await pinged(a.namespace, B4, count=6, within=0.2) in (3, 4)
        assert clear_packets(capture) == []
    assert a.kinds()[:2] == ["soft-expire", "hard-expire"]
    assert a.events[0].spi == pair.spi_in
    assert await a.datapath.counters() == []


async def test_a_rekeyed_pair_takes_over_without_a_loss(hosts: tuple[Host, Host]) -> None:
    """New pair received on first, then sent on; the old one is removed; pings go on all the while."""
    a, b = hosts
    old = pairs(A4, B4)[0]
    new = pairs(A4, B4, spis=(0x3003, 0x4004))[0]
    await _join(a, b, old)
    assert await pinged(a.namespace, B4, count=2) == 2
    await b.datapath.install(mirrored(new), outbound=False)
    await a.datapath.install(new)
    assert await pinged(a.namespace, B4, count=2) == 2
    await b.datapath.install(mirrored(new))
    await a.datapath.remove(old.spi_in)
    await b.datapath.remove(old.spi_out)
    assert await pinged(a.namespace, B4, count=2) == 2
    (counters,) = await a.datapath.counters([new.spi_in, 0x9999])
    assert (counters.packets_out, counters.packets_in) == (4, 2)  # the first replies came by the old pair


async def test_a_stream_survives_being_asked_for_again(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """The trap forgets the destination again and again amid a transfer (super-packets are held, too): all
    bytes arrive, and none in the clear."""
    a, b = hosts
    await _join(a, b, pairs(A4, B4)[0])
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "wire.pcap", incoming_only=True) as capture:
        moving = asyncio.create_task(_transfer(a, b, B4, 3_000_000))
        while not moving.done():
            await asyncio.sleep(0.01)
            for host, peer in ((a, B4), (b, A4)):
                host.trap.trap.forget([(GROUP.PRIVATE_OR_CLEAR, ip_address(peer))])
        assert await moving == 3_000_000
        assert clear_packets(capture) == []
    assert len(a.trap.asked) > 3


async def test_ike_on_4500_reaches_the_daemon(hosts: tuple[Host, Host]) -> None:
    """With both endpoints and without the marker, in both families; strangers' ESP is an event."""
    a, b = hosts
    for source, target in ((B4, A4), (B6, A6)):
        ends = Endpoint(ip_address(source), 4500), Endpoint(ip_address(target), 4500)
        assert b.sockets.send(b"ike " + target.encode(), *ends)
        assert b.sockets.keepalive(*ends)
        await until(lambda: a.ike)
        assert a.ike.pop() == (b"ike " + target.encode(), ends[1], ends[0])
    stranger = b.sockets.nat_t[0]
    for _ in range(3):
        stranger.send(b"\x77" * 40, ip_address(B4), Endpoint(ip_address(A4), 4500))
    await until(lambda: a.events)
    assert a.events == [DatapathEvent("unknown-spi", 0x77777777, ip_address(B4))]
    assert (await a.datapath.statistics())["unknown_spi"] == 3


async def test_ike_on_500_has_its_source_chosen(hosts: tuple[Host, Host]) -> None:
    """An answer leaves from the address it is told to, on a host with two."""
    a, b = hosts
    a.namespace.address("eth0", "198.18.0.77/32")
    ends = Endpoint(ip_address("198.18.0.77"), 500), Endpoint(ip_address(B4), 500)
    assert a.sockets.send(b"question", *ends)
    got: list[Datagram | None] = []
    await until(lambda: got.append(b.sockets.receive(b.sockets.ike[0])) or got[-1])
    datagram = got[-1]
    assert datagram is not None
    assert (datagram.data, datagram.remote, datagram.local) == (b"question", *ends)
    a.namespace.ip("address", "del", "198.18.0.77/32", "dev", "eth0")


async def test_a_killed_process_is_told_and_nothing_leaks(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """kill -9: a `failed` event, marked packets are refused and not sent in the clear; a new start works."""
    a, b = hosts
    pair = pairs(A4, B4)[0]
    await _join(a, b, pair)
    assert await pinged(a.namespace, B4) == 1
    process = a.datapath.process_id
    assert process is not None
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "wire.pcap", incoming_only=True) as capture:
        os.kill(process, signal.SIGKILL)
        await until(lambda: "failed" in a.kinds())
        assert await pinged(a.namespace, B4, count=3, within=0.1) == 0
        assert clear_packets(capture) == []
        with pytest.raises(OepyError, match="not running"):
            await a.datapath.install(pair)
        await a.start()
        assert await pinged(a.namespace, B4, within=0.1) == 0
        assert clear_packets(capture) == []
        await a.datapath.install(pairs(A4, B4, spis=(0x5005, 0x6006))[0])
        await b.datapath.install(pairs(A4, B4, spis=(0x5005, 0x6006))[1])
        assert await pinged(a.namespace, B4) == 1


async def test_an_abandoned_process_ends_and_stays_shut(net: Wired) -> None:
    """When its daemon is gone the process ends by itself; the mark's unreachable route stays until the next
    start, which takes it over."""
    with net.a.entered():
        sockets = open_ike_sockets()
        datapath = TunDatapath(sockets.nat_t, lambda *_: None)
        await datapath.start(lambda _: None)
    process = datapath._process
    assert process is not None
    datapath._process = None  # as if nobody were there to care
    datapath._forget()
    await asyncio.wait_for(process.wait(), PATIENCE)
    routes = net.a.run("sh", "-c", "ip rule; ip route show table 17733; ip link").stdout
    assert "unreachable default" in routes
    assert "oe0" not in routes
    with net.a.entered():
        await datapath.start(lambda _: None)
    await datapath.stop()
    sockets.close()
    assert "17733" not in net.a.run("ip", "rule").stdout


async def test_foreign_rules_and_routes_are_left_alone(net: Wired) -> None:
    """Others' rules, also with our priority or our table's number, survive start and stop."""
    net.a.ip("rule", "add", "pref", "1773", "fwmark", "0x7", "lookup", "99")
    net.a.ip("route", "add", "blackhole", "203.0.113.0/24", "table", "17733")
    with net.a.entered():
        sockets = open_ike_sockets()
        datapath = TunDatapath(sockets.nat_t, lambda *_: None)
        await datapath.start(lambda _: None)
        with pytest.raises(MisuseError):
            await datapath.start(lambda _: None)
    await datapath.stop()
    await datapath.stop()
    sockets.close()
    assert "fwmark 0x7 lookup 99" in net.a.run("ip", "rule").stdout
    assert net.a.run("ip", "route", "show", "table", "17733").stdout.strip() == "blackhole 203.0.113.0/24"
    net.a.ip("rule", "del", "pref", "1773")
    net.a.ip("route", "del", "blackhole", "203.0.113.0/24", "table", "17733")


async def test_a_start_that_fails_says_why(net: Wired) -> None:
    """A device name that is taken, and ports that are taken."""
    net.a.ip("link", "add", "oe0", "type", "veth", "peer", "name", "veth9")
    with net.a.entered():
        sockets = open_ike_sockets()
        datapath = TunDatapath(sockets.nat_t, lambda *_: None)
        with pytest.raises(OepyError, match="oe0"):
            await datapath.start(lambda _: None)
        net.a.ip("link", "del", "oe0")
        await datapath.start(lambda _: None)
        with pytest.raises(OepyError, match="UDP port 500 is taken"):
            open_ike_sockets()
    await datapath.stop()
    sockets.close()


async def test_the_process_imports_nothing_from_the_working_directory(
    net: Wired, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may start the daemon in a directory where anybody can write: no module of theirs is run."""
    (tmp_path / "argparse.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')\nraise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    with net.a.entered():
        sockets = open_ike_sockets()
        datapath = TunDatapath(sockets.nat_t, lambda *_: None)
        await datapath.start(lambda _: None)
    await datapath.stop()
    sockets.close()
    assert not (tmp_path / "trapped").exists()


async def test_a_pair_without_udp_encapsulation_is_refused(hosts: tuple[Host, Host]) -> None:
    """This datapath speaks ESP in UDP only: installing a bare ESP pair would be a blackhole."""
    a, _ = hosts
    with pytest.raises(OepyError, match="UDP"):
        await a.datapath.install(dataclasses.replace(pairs(A4, B4)[0], encap=False))


async def test_a_process_that_does_not_answer_is_ended(
    net: Wired, hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hung process would block every decision: it is killed and told of as failed, and may be restarted."""
    a, _ = hosts
    monkeypatch.setattr("oepy.datapath.tun.datapath.ANSWER_SECONDS", 0.3)
    assert a.datapath.process_id is not None
    os.kill(a.datapath.process_id, signal.SIGSTOP)
    with pytest.raises(OepyError, match="answer"):
        await a.datapath.install(pairs(A4, B4)[0])
    await until(lambda: "failed" in a.kinds())
    await a.datapath.remove(0x1000)  # nothing to remove it from: no error
    await a.start()


async def test_a_loop_that_stood_still_is_not_the_processes_fault(
    net: Wired, hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer had come in time, only we were late to read it: nobody is ended for that."""
    a, _ = hosts
    monkeypatch.setattr("oepy.datapath.tun.datapath.ANSWER_SECONDS", 0.2)
    process = a.datapath.process_id
    asking = asyncio.ensure_future(a.datapath.statistics())
    await asyncio.sleep(0)
    time.sleep(0.6)  # noqa: ASYNC251 - that is the point
    assert isinstance(await asking, dict)
    assert a.datapath.process_id == process
    assert a.events == []


@pytest.mark.parametrize(
    "damage",
    [
        ("ip rule del pref 1773", "ip -6 rule del pref 1773"),
        ("ip link set oe0 down",),
        ("ip route flush table 17733", "ip -6 route flush table 17733"),
    ],
    ids=["rules", "device", "routes"],
)
async def test_rules_and_routes_that_others_remove_come_back(
    net: Wired, hosts: tuple[Host, Host], tmp_path: Path, damage: tuple[str, ...]
) -> None:
    """systemd-networkd flushes foreign rules when it starts: nothing leaves in the clear, nobody is locked out."""
    a, b = hosts
    await _join(a, b, pairs(A4, B4)[0])
    assert await pinged(a.namespace, B4) == 1
    with Capture(net.wire.namespace, net.wire.ports, tmp_path / "wire.pcap", incoming_only=True) as capture:
        for command in damage:
            a.namespace.run(*command.split())
        assert await pinged(a.namespace, B4, count=2, within=0.1) == 0

        async def are_mended() -> bool:
            return (await a.datapath.statistics()).get("routes_mended") == 1

        await until(are_mended)
        assert await pinged(a.namespace, B4) == 1
        assert clear_packets(capture) == []


async def test_an_unsupported_pair_is_refused(hosts: tuple[Host, Host]) -> None:
    """The process's reason comes back as an error of install; allocated SPIs are all different."""
    a, _ = hosts
    with pytest.raises(OepyError, match="3des"):
        await a.datapath.install(
            SaPair(**{**_fields(pairs(A4, B4)[0]), "suite": EspSuite("3des", "sha1")})  # type: ignore[arg-type]
        )
    spis = {a.datapath.allocate_spi() for _ in range(100)}
    assert len(spis) == 100
    assert min(spis) >= 256


def _fields(pair: SaPair) -> dict[str, object]:
    return {name: getattr(pair, name) for name in pair.__dataclass_fields__}
