"""The kernel's datapath in the second kernel: what happens to SAs and packets over time.

a (198.18.0.1, 2001:2::1) ── wire ── b (198.18.0.2, 2001:2::2), SAs given by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import socket
import time
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_address, ip_network

import pytest
import pytest_asyncio

from oepy.datapath.esp.sa import EspPair
from oepy.datapath.xfrm.datapath import SEQUENCE_LEAP
from oepy.errors import OepyError
from oepy.interfaces import DatapathEvent
from oepy.lab.namespaces import Namespace
from oepy.model import Endpoint, EspSuite, Lifetime, Verdict
from oepy.xfrm import answers, requests
from oepy.xfrm import values as v
from oepy.xfrm.algorithms import transforms
from oepy.xfrm.socket import XfrmSocket, read
from tests.fakes.datapath import esp_of, ipv4_packet, keys_of, mirrored, pairs, selector
from tests.kernel.xfrm_harness import (
    SECRET,
    Host,
    arrives,
    both_ways,
    bound,
    join,
    kernel_policy,
    pair_of,
    part,
    spis,
    talkers,
    tap,
    two_hosts,
)
from tests.net.harness import A4, A6, B4, B6, TrapIn, Wired, pinged, until, wired

pytestmark = [pytest.mark.kernel, pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]

Hosts = tuple[Host, Host]


@pytest.fixture(scope="module")
def net() -> Iterator[Wired]:
    with wired() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts(net: Wired) -> AsyncIterator[Hosts]:
    async with two_hosts(net) as both:
        yield both


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _forgotten(hosts: Hosts) -> AsyncIterator[None]:
    """What a test that fails has left is not the next one's trouble."""
    yield
    for one in hosts:
        for spi in list(one.datapath._pairs):
            await one.datapath.remove(spi)
        one.events.clear()


async def test_first_packets_are_held_and_come_out_protected(hosts: Hosts, net: Wired) -> None:
    """Trap and tunnel together: pings in both families with nothing installed wait, and none is in the clear.
    What is decrypted can be seen on oe0."""
    a, b = hosts
    four = pair_of()
    six = dataclasses.replace(
        pair_of(), local_ts=(selector(f"{A6}/128"),), remote_ts=(selector(f"{B6}/128"),)
    )
    for pair in (four, six):
        await join(a, b, pair)
    traps = [TrapIn(one.namespace, Verdict.PRIVATE) for one in hosts]
    for trap in traps:
        trap.start(kernel_policy())
    try:
        with tap(net.b) as wire, tap(net.b, "oe0") as inside:
            assert await pinged(net.a, B4, count=3, within=2.0) == 3
            assert await pinged(net.a, B6, count=3, within=2.0) == 3
            assert await pinged(net.b, A4, count=2, size=20_000, within=2.0) == 2  # in fragments
            assert wire.kinds() == {"esp"}
            assert len([data for data in inside.frames() if data[:1] in (b"\x45", b"\x60")]) >= 12
    finally:
        for trap in traps:
            trap.stop(guard=False)
        for pair in (four, six):
            await part(a, b, pair)


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
    await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, (address, 8000)), 5)
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(bytes(size))
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 40)
    writer.close()
    server.close()
    return int(answer)


@pytest.mark.parametrize("encap", [False, True], ids=["plain", "udp"])
async def test_large_transfers_go_through(hosts: Hosts, net: Wired, encap: bool) -> None:
    """Two megabytes over TCP in each family: MTU, MSS and segmentation offload fit."""
    a, b = hosts
    four = dataclasses.replace(pair_of(), encap=encap)
    six = dataclasses.replace(
        pair_of(), encap=encap, local_ts=(selector(f"{A6}/128"),), remote_ts=(selector(f"{B6}/128"),)
    )
    for pair in (four, six):
        await join(a, b, pair)
    traps = [TrapIn(one.namespace, Verdict.PRIVATE) for one in hosts]
    for trap in traps:
        trap.start(kernel_policy())
    try:
        with tap(net.b) as wire:
            for address in (B4, B6):
                began = time.monotonic()
                assert await _transfer(a, b, address, 2_000_000) == 2_000_000
                print(f"{address}: {2 / (time.monotonic() - began):.2f} MB/s")
            assert wire.kinds() == {"esp"}
            longest = max(len(data) for data in wire.raw)
            assert longest <= 1514
    finally:
        for trap in traps:
            trap.stop(guard=False)


async def test_marked_packets_without_an_sa_go_nowhere_and_are_told(hosts: Hosts, net: Wired) -> None:
    """Not before, not after an SA; the kernel tells who asked for whom."""
    a, b = hosts
    with talkers(net.a, net.b) as (one, other), tap(net.b) as wire:
        assert not await arrives(one, other, SECRET, within=0.3)
        await until(lambda: "no-sa" in a.kinds())
        assert (a.events[0].source, a.events[0].peer) == (ip_address(A4), ip_address(B4))
        pair = pair_of()
        await join(a, b, pair)
        assert await both_ways(one, other)
        await part(a, b, pair)
        assert not await arrives(one, other, SECRET, within=0.3)
        assert wire.kinds() == {"esp"}
        assert (await a.datapath.statistics())["no_sa"] > 0


async def test_packets_outside_of_the_selectors_are_dropped(hosts: Hosts, net: Wired) -> None:
    """Authentic, but of an address or a port that the SA must not carry (RFC 4301 §5.2)."""
    a, b = hosts
    pair = pair_of(remote_ts=(selector(f"{B4}/32", 17, 7001),))
    wide = dataclasses.replace(pair, remote_ts=(selector(f"{B4}/32"),))
    await b.datapath.install(mirrored(pair))
    await a.datapath.install(wide)  # a sends what b did not agree to
    with talkers(net.a, net.b) as (one, other), talkers(net.a, net.b, 7002) as (bad, refused):
        assert await both_ways(one, other)
        assert not await arrives(bad, refused, SECRET, within=0.3)
    assert (await b.datapath.statistics())["selector_mismatches"] >= 1
    await part(a, b, pair)


async def test_a_rekey_loses_no_packet(hosts: Hosts, net: Wired) -> None:
    """Twenty rekeys in the order in which IKE does them, under traffic both ways: every datagram arrives."""
    a, b = hosts
    current = pair_of()
    await join(a, b, current)
    got: dict[int, set[int]] = {0: set(), 1: set()}
    with talkers(net.a, net.b) as ends:
        sent = 0

        async def traffic() -> None:
            nonlocal sent
            while True:
                for sender, to in ((0, B4), (1, A4)):
                    ends[sender].sendto(sent.to_bytes(4, "big"), (to, 7001))
                sent += 1
                await asyncio.sleep(0.004)
                read()

        def read() -> None:
            for index, sock in enumerate(ends):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        got[index].add(int.from_bytes(sock.recv(100), "big"))

        with tap(net.b) as wire:
            running = asyncio.ensure_future(traffic())
            for _ in range(20):
                fresh = pair_of()
                await b.datapath.install(mirrored(fresh), outbound=False)
                await asyncio.sleep(0.02)
                await a.datapath.install(fresh)
                await asyncio.sleep(0.02)
                await b.datapath.install(mirrored(fresh), outbound=True)
                await asyncio.sleep(0.02)
                await part(a, b, current)
                current = fresh
                await asyncio.sleep(0.02)
            running.cancel()
            await asyncio.sleep(0.2)
            read()
            assert wire.kinds() == {"esp"}
    assert sent > 100
    assert got == {0: set(range(sent)), 1: set(range(sent))}
    await part(a, b, current)


@pytest.mark.parametrize(
    "lifetime",
    [
        Lifetime(soft_seconds=1, hard_seconds=4),
        Lifetime(soft_packets=3, hard_packets=6),
        Lifetime(soft_bytes=200, hard_bytes=500),
    ],
    ids=["time", "packets", "bytes"],
)
async def test_limits(hosts: Hosts, net: Wired, lifetime: Lifetime) -> None:
    """Soft is told once and packets go on; hard ends it, and nothing goes in the clear."""
    a, b = hosts
    pair = pair_of(lifetime=lifetime)
    await b.datapath.install(mirrored(dataclasses.replace(pair, lifetime=Lifetime())))
    await a.datapath.install(pair)
    with talkers(net.a, net.b) as (one, other), tap(net.b) as wire:
        deadline = time.monotonic() + 8
        while "hard-expire" not in a.kinds() and time.monotonic() < deadline:
            passed = await arrives(one, other, SECRET, within=0.2)
            assert passed or "hard-expire" in a.kinds()
        assert a.kinds() == ["soft-expire", "hard-expire"]
        assert [event.spi for event in a.events] == [pair.spi_in] * 2
        assert not await arrives(one, other, SECRET, within=0.2)
        assert wire.kinds() == {"esp"}
    await part(a, b, pair)


def inject(namespace: Namespace, packet: bytes) -> None:
    """ESP made by ourselves, as IP protocol 50 from a to b."""
    with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_RAW, 50) as raw:
        raw.setsockopt(socket.SOL_SOCKET, 36, 0x20000000)
        raw.sendto(packet, (B4, 0))


@pytest.mark.parametrize("suite", [EspSuite("aes256gcm16"), EspSuite("aes128", "sha256")], ids=str)
async def test_replay_window_of_4096_and_esn(hosts: Hosts, net: Wired, suite: EspSuite) -> None:
    """Packets that the userland ESP has made, with sequence numbers of our choice around 2^32: 4,095 behind the
    newest is good once, 4,096 behind is not, and the high bits are inferred (RFC 4303 A2)."""
    _, b = hosts
    spi = next(spis)
    pair, other = pairs(A4, B4, spis=(spi, spi + 1), suite=suite)
    keyed = dataclasses.replace(other, encap=False, replay_window=4096)
    await b.datapath.install(keyed)
    sender = EspPair(dataclasses.replace(pair, encap=False), 0.0)
    with bound(net.b, B4, 7009) as receiver:

        async def sent(sequence: int) -> bool:
            sender._sequence = sequence - 1
            inject(net.a, esp_of(sender, _datagram(b"%d" % sequence)))
            await asyncio.sleep(0.02)
            with contextlib.suppress(BlockingIOError):
                return receiver.recv(100) == b"%d" % sequence
            return False

        assert await sent(1)
        assert not await sent(1)
        top = 1 << 32
        for sequence in range(1 << 30, top, 1 << 30):  # each less than half of the space ahead
            assert await sent(sequence)
        assert await sent(top + 5000)
        assert await sent(top + 5000 - 4095)
        assert not await sent(top + 5000 - 4095)
        assert not await sent(top + 5000 - 4096)
        assert await sent(top + 5001)
        assert await sent(top + 4999)
    (counters,) = await b.datapath.counters([keyed.spi_in])
    # Below the window means "of the next 2^32" to ESN, and so a wrong ICV
    assert (counters.replayed, counters.integrity_failures) == (2, 1)
    await b.datapath.remove(keyed.spi_in)


def _datagram(payload: bytes) -> bytes:
    """UDP from a to b, port 7009, with the header's checksum and none of UDP's."""
    body = (8 + len(payload)).to_bytes(2, "big") + bytes(2) + payload
    packet = bytearray(ipv4_packet(A4, B4, body, ports=(7009, 7009)))
    words = sum(int.from_bytes(packet[at : at + 2], "big") for at in range(0, 20, 2))
    words = (words & 0xFFFF) + (words >> 16)
    packet[10:12] = (~((words & 0xFFFF) + (words >> 16)) & 0xFFFF).to_bytes(2, "big")
    return bytes(packet)


async def test_forged_packets_are_counted(hosts: Hosts, net: Wired) -> None:
    """A changed byte: the ICV does not fit."""
    _, b = hosts
    spi = next(spis)
    pair, other = pairs(A4, B4, spis=(spi, spi + 1))
    await b.datapath.install(dataclasses.replace(other, encap=False))
    sealed = bytearray(esp_of(EspPair(dataclasses.replace(pair, encap=False), 0.0), ipv4_packet(A4, B4)))
    sealed[-1] ^= 1
    inject(net.a, bytes(sealed))
    inject(net.a, (0x7777).to_bytes(4, "big") + bytes(sealed[4:]))
    await asyncio.sleep(0.05)
    (counters,) = await b.datapath.counters()
    assert (counters.integrity_failures, counters.packets_in) == (1, 0)
    assert (await b.datapath.statistics())["unknown_spi"] >= 1
    await b.datapath.remove(other.spi_in)


async def test_a_moved_peer_is_followed(hosts: Hosts, net: Wired) -> None:
    """b has another address from now on: a's SA goes there, its sequence numbers leap, its replay window
    stays, and no packet is in the clear."""
    a, b = hosts
    new = "198.18.0.99"
    net.b.address("eth0", f"{new}/24")
    pair = pair_of()
    await join(a, b, pair)
    with talkers(net.a, net.b) as (one, other), tap(net.b) as wire:
        for _ in range(5):
            assert await both_ways(one, other)
        moved = dataclasses.replace(pair, remote=Endpoint(ip_address(new), 4500))
        await a.datapath.install(moved)
        text = a.ip(
            "xfrm", "state", "get", "src", A4, "dst", new, "proto", "esp", "spi", f"{pair.spi_out:#x}"
        )
        assert f"oseq {SEQUENCE_LEAP + 5:#x}" in text
        # The same SA at b under its new address
        inbound = mirrored(pair)
        await b.datapath.remove(inbound.spi_in)
        await b.datapath.install(dataclasses.replace(inbound, local=Endpoint(ip_address(new), 4500)))
        assert await arrives(one, other, SECRET)
        assert wire.kinds() == {"esp"}
        assert {str(packet.destination) for packet in wire.packets()} == {A4, B4, new}
        (counters,) = await a.datapath.counters()
        assert (counters.packets_in, counters.packets_out) == (5, 6)
        # b, begun anew with the old keys, repeats its sequence numbers: a has not forgotten them
        assert not await arrives(other, one, SECRET, within=0.3)
    await part(a, b, pair)
    net.b.ip("address", "delete", f"{new}/24", "dev", "eth0")


async def test_our_own_end_moves(hosts: Hosts, net: Wired) -> None:
    """a has another address from now on: its inbound SA is there, with what it had received, and its outbound one
    leaps; traffic goes on both ways, and no packet is in the clear. ESP goes into UDP by the same way."""
    a, b = hosts
    new = "198.18.0.98"
    net.a.address("eth0", f"{new}/24")
    pair = pair_of()
    await join(a, b, pair)
    with talkers(net.a, net.b) as (one, other), tap(net.b) as wire:
        for _ in range(5):
            assert await both_ways(one, other)
        for number, encap in enumerate((False, True), 1):
            ours = Endpoint(ip_address(new), 4500)
            await a.datapath.install(dataclasses.replace(pair, local=ours, encap=encap))
            theirs = dataclasses.replace(mirrored(pair), remote=ours, encap=encap)
            await b.datapath.install(theirs)
            text = a.ip(
                "xfrm", "state", "get", "src", B4, "dst", new, "proto", "esp", "spi", f"{pair.spi_in:#x}"
            )
            received = 5 if number == 1 else SEQUENCE_LEAP + 6
            assert f"seq {received:#x}" in text, text
            assert ("encap" in text) is encap
            assert await both_ways(one, other)
        assert wire.kinds() == {"esp"}
        (counters,) = await a.datapath.counters()
        assert (counters.packets_in, counters.packets_out) == (7, 7)
    await part(a, b, pair)
    net.a.ip("address", "delete", f"{new}/24", "dev", "eth0")


async def test_a_nats_new_port_is_followed(hosts: Hosts, net: Wired) -> None:
    """ESP in UDP: the outbound SA goes to the port that IKE has learned."""
    a, b = hosts
    pair = dataclasses.replace(pair_of(), encap=True)
    await join(a, b, pair)
    with talkers(net.a, net.b) as (one, other), tap(net.b) as wire:
        assert await both_ways(one, other)
        await a.datapath.install(dataclasses.replace(pair, remote=Endpoint(ip_address(B4), 1024)))
        await arrives(one, other, SECRET, within=0.1)
        assert wire.packets()[-1].destination_port == 1024 or any(
            packet.destination_port == 1024 for packet in wire.packets()
        )
    await part(a, b, pair)


async def test_migrate_moves_a_policy_and_its_sa(hosts: Hosts) -> None:
    """XFRM_MSG_MIGRATE by our codec: `ip xfrm` shows the new addresses and the same sequence number."""
    a, _ = hosts
    pair = pair_of()
    await a.datapath.install(pair)
    with a.namespace.entered():
        kernel = XfrmSocket()
    old, new = ip_address(B4), ip_address("198.18.0.77")
    frames = [read(frame) for frame in kernel.dump(requests.dump_policies())]
    (policy,) = [
        found
        for found in frames
        if isinstance(found, v.Policy) and found.templates and found.templates[0].spi == pair.spi_out
    ]
    here = ip_address(A4)
    move = v.Move(here, old, here, new, reqid=policy.templates[0].reqid)
    assert kernel.carry_out([requests.migrate(v.Migrate(policy.id, (move,)))]) == [None]
    shown = a.ip("xfrm", "policy", "show", "dir", "out") + a.ip(
        "xfrm", "state", "list", "src", A4, "dst", str(new)
    )
    assert f"tmpl src {A4} dst {new}" in shown
    assert f"spi 0x{pair.spi_out:08x}" in shown
    assert kernel.carry_out([requests.delete_sa(v.SaId(new, pair.spi_out))]) == [None]
    kernel.close()
    await a.datapath.remove(pair.spi_in)


async def test_the_kernel_allocates_an_spi(net: Wired) -> None:
    """ALLOCSPI makes a larval SA with a free SPI of the range; UPDSA fills it."""
    with net.a.entered():
        kernel = XfrmSocket()
    larval = v.Sa(ip_address(B4), ip_address(A4), 0, reqid=77, flags=v.SaFlag.AF_UNSPEC)
    taken = []
    for _ in range(3):
        (frame,) = kernel.ask([requests.allocate_spi(larval, 0x300, 0x3FF)])
        assert frame is not None
        found = answers.parse(frame)
        assert isinstance(found, v.Sa)
        taken.append(found.spi)
    assert len(set(taken)) == 3
    assert all(0x300 <= spi <= 0x3FF for spi in taken)
    suite = EspSuite("aes256gcm16")
    aead = transforms("esp", suite, keys_of(suite, 5)).aead
    filled = dataclasses.replace(larval, spi=taken[1], aead=aead)
    assert kernel.carry_out([requests.update_sa(filled)]) == [None]
    shown = net.a.run(
        "ip", "xfrm", "state", "get", "src", B4, "dst", A4, "proto", "esp", "spi", hex(taken[1])
    ).stdout
    assert "rfc4106(gcm(aes)) 0x0505" in shown
    answer = kernel.ask([requests.sad_info()])[0]
    assert answer is not None
    count = answers.parse(answer)
    assert isinstance(count, v.SadInfo)
    assert count.count >= 3
    kernel.carry_out([requests.delete_sa(v.SaId(ip_address(A4), spi)) for spi in taken])
    kernel.close()


async def test_an_spi_in_use_is_refused_by_its_name(hosts: Hosts) -> None:
    """Somebody else's SA to the same address: our install says so and leaves theirs."""
    a, _ = hosts
    pair = pair_of()
    state = f"ip xfrm state add src {B4} dst {A4} proto esp spi {pair.spi_in:#x} reqid 7 mode tunnel"
    a.namespace.run(*state.split(), "aead", "rfc4106(gcm(aes))", "0x" + "77" * 20, "128")
    with pytest.raises(OepyError, match=f"{pair.spi_in:#010x} to {A4}: there is one already"):
        await a.datapath.install(pair)
    shown = a.ip("xfrm", "state")
    assert f"spi 0x{pair.spi_in:08x}" in shown
    assert f"spi 0x{pair.spi_out:08x}" not in shown
    a.namespace.run(*f"ip xfrm state delete src {B4} dst {A4} proto esp spi {pair.spi_in:#x}".split())


async def test_ike_passes_where_every_policy_forbids_it(hosts: Hosts, net: Wired) -> None:
    """A host's own policies block all: our IKE sockets are exempt in both directions and families."""
    a, b = hosts
    for one in hosts:
        for direction in ("in", "out"):
            for everything in ("0.0.0.0/0", "::/0"):
                rule = f"ip xfrm policy add src {everything} dst {everything} proto udp dir {direction}"
                one.namespace.run(*rule.split(), "action", "block")
    try:
        for index, (here, there) in enumerate(((A4, B4), (A6, B6))):
            ends = Endpoint(ip_address(here), 500), Endpoint(ip_address(there), 500)
            assert a.sockets.send(b"hello", *ends)
            await asyncio.sleep(0.05)
            found = b.sockets.receive(b.sockets.ike[index])
            assert found is not None
            assert found.data == b"hello"
    finally:
        for one in hosts:
            for direction in ("in", "out"):
                for everything in ("0.0.0.0/0", "::/0"):
                    rule = (
                        f"ip xfrm policy delete src {everything} dst {everything} proto udp dir {direction}"
                    )
                    one.namespace.run(*rule.split())


async def test_many_sas_are_counted_by_one_dump(hosts: Hosts) -> None:
    """Beyond DUMP_FROM the counters come by a dump, and are the same."""
    a, _ = hosts
    several = [
        dataclasses.replace(pair_of(), remote_ts=(selector(str(network)),))
        for network in itertools.islice(ip_network("10.20.0.0/16").subnets(new_prefix=32), 300)
    ]
    for pair in several:
        await a.datapath.install(pair)
    assert {found.spi_in for found in await a.datapath.counters()} == {pair.spi_in for pair in several}
    for pair in several:
        await a.datapath.remove(pair.spi_in)
    assert await a.datapath.counters() == []
    events: list[DatapathEvent] = a.events
    assert not events
