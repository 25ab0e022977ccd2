"""The trap with real packets: held, released in order, exempted, dropped. Topology of most tests:

a (198.18.0.1, 2001:2::1, trap) ── wire ── b (198.18.0.2, 2001:2::2)
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oepy.errors import MisuseError, OepyError
from oepy.lab.capture import Capture
from oepy.model import MARK_OWN, Direction, Verdict
from oepy.trap import hold
from tests.net.harness import (
    A4,
    A6,
    B4,
    B6,
    GROUP,
    PATIENCE,
    Holder,
    TrapIn,
    Wired,
    address,
    arrived,
    listen_udp,
    pinged,
    policy,
    received,
    rule,
    trapping,
    udp,
    until,
    wired,
)

pytestmark = [pytest.mark.root, pytest.mark.any_kernel]


@pytest.fixture(scope="module")
def net() -> Iterator[Wired]:
    with wired() as made:
        yield made


@pytest.mark.parametrize("destination", [B4, B6])
async def test_a_held_burst_is_released_in_order(net: Wired, destination: str) -> None:
    """Ten datagrams wait, none leaves before the verdict, then all arrive in their order; asked once."""
    listener = listen_udp(net.b, destination, 7000)
    with trapping(net.a, policy()) as trap, listener, udp(net.a, destination, 7000) as sender:
        for number in range(10):
            sender.send(bytes([number]))
        await until(lambda: trap.trap.held().get((GROUP.PRIVATE_OR_CLEAR, address(destination))) == 10)
        await asyncio.sleep(0.05)
        assert received(listener) == []
        assert len(trap.asked) == 1
        group, flow = trap.asked[0]
        assert (group, flow.protocol, flow.destination_port) == (GROUP.PRIVATE_OR_CLEAR, 17, 7000)
        assert (flow.destination, flow.direction) == (address(destination), Direction.OUTPUT)
        trap.decide(group, destination, Verdict.CLEAR)
        assert await arrived(listener, 10) == [bytes([number]) for number in range(10)]
        sender.send(b"last")
        assert await arrived(listener, 1) == [b"last"]
        assert not trap.trap.held()
        assert trap.trap.statistics()["released_clear"] == 10


async def test_a_tcp_connection_waits_for_the_verdict(net: Wired) -> None:
    """A SYN is held and the connection completes without a retransmission (which would take 1 s)."""
    with net.b.entered():
        server = await asyncio.start_server(lambda _, writer: writer.close(), B4, 7001)
    with trapping(net.a, policy()) as trap:
        with net.a.entered():
            client = socket.socket()
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        connecting = asyncio.ensure_future(loop.sock_connect(client, (B4, 7001)))
        await until(lambda: trap.asked)
        begun = loop.time()
        trap.decide(*_of(trap), Verdict.CLEAR)
        await connecting
        assert loop.time() - begun < 0.5
        assert trap.asked[0][1].protocol == 6
        client.close()
    server.close()


def _of(trap: TrapIn) -> tuple[object, str]:
    group, flow = trap.asked[-1]
    return group, str(flow.destination)


async def test_block_drops_what_is_held_and_what_comes_later(net: Wired) -> None:
    """BLOCK drops the held packet and the next, without asking again; CLEAR then replaces it."""
    with trapping(net.a, policy(), Verdict.BLOCK) as trap:
        assert await pinged(net.a, B4, count=2, within=0.2) == 0
        assert len(trap.asked) == 1
        trap.decide(GROUP.PRIVATE_OR_CLEAR, B4, Verdict.CLEAR)
        await asyncio.sleep(0)
        assert await pinged(net.a, B4) == 1
        trap.trap.forget([(GROUP.PRIVATE_OR_CLEAR, address(B4))])
        await asyncio.sleep(0)
        assert await pinged(net.a, B4, within=0.2) == 0
        assert len(trap.asked) == 2


async def test_a_verdict_ends_with_its_lifetime(net: Wired) -> None:
    """After its lifetime a decision is gone, and the next packet asks again; a refresh prolongs it."""
    with trapping(net.a, policy()) as trap:
        trap.decide(GROUP.PRIVATE_OR_CLEAR, B4, Verdict.CLEAR, 0.3)
        refreshed = time.monotonic()
        trap.decide(GROUP.PRIVATE_OR_CLEAR, B4, Verdict.CLEAR, 1.2)
        while not trap.asked:
            assert time.monotonic() < refreshed + PATIENCE
            await pinged(net.a, B4, within=0.1)
        assert time.monotonic() >= refreshed + 1.2
        assert len(trap.asked) == 1


@pytest.mark.parametrize("destination", [B4, B6])
async def test_groups_do_what_they_promise_without_a_verdict(net: Wired, destination: str) -> None:
    """clear and clear-or-private pass unasked, block drops unasked, private asks and holds."""
    for group, passes, asks in (
        (GROUP.CLEAR, 1, 0),
        (GROUP.CLEAR_OR_PRIVATE, 1, 0),
        (GROUP.BLOCK, 0, 0),
        (GROUP.PRIVATE, 0, 1),
    ):
        network = f"{destination}/{32 if '.' in destination else 128}"
        with trapping(net.a, policy(rule(group, network))) as trap:
            assert (await pinged(net.a, destination, within=0.2), len(trap.asked)) == (passes, asks), group


async def test_the_longest_prefix_and_the_port_decide(net: Wired) -> None:
    """block /24, clear /32 inside of it, but one port of that host blocked."""
    chosen = policy(
        rule(GROUP.BLOCK, "198.18.0.0/24"),
        rule(GROUP.CLEAR, f"{B4}/32"),
        rule(GROUP.BLOCK, f"{B4}/32", 17, 7003),
    )
    with (
        listen_udp(net.b, B4, 7002) as open_port,
        listen_udp(net.b, B4, 7003) as shut_port,
        trapping(net.a, chosen),
        udp(net.a, B4, 7002) as one,
        udp(net.a, B4, 7003) as other,
    ):
        one.send(b"x")
        with contextlib.suppress(PermissionError):  # how UDP tells of a local drop
            other.send(b"x")
        assert (await arrived(open_port, 1), received(shut_port)) == ([b"x"], [])
        assert await pinged(net.a, B4) == 1


async def test_what_is_exempt_is_never_asked_for(net: Wired) -> None:
    """Own addresses, loopback, multicast, neighbour discovery, DNS to resolvers and marked packets pass where
    everything is private; other DNS does not."""
    chosen = policy(default=GROUP.PRIVATE, resolvers=(B4, B6))
    net.a.ip("neigh", "flush", "dev", "eth0")
    with trapping(net.a, chosen) as trap, contextlib.ExitStack() as stack:
        for own in ("127.0.0.1", "::1", A4, A6):
            assert await pinged(net.a, own) == 1, own
        for server in (B4, B6):
            listener = stack.enter_context(listen_udp(net.b, server, 53))
            sender = stack.enter_context(udp(net.a, server, 53))
            sender.send(b"question")
            await until(lambda listener=listener: received(listener) == [b"question"])
            listener.sendto(b"answer", sender.getsockname()[:2])
            assert await asyncio.to_thread(sender.recv, 100) == b"answer"
        marked = stack.enter_context(udp(net.a, B4, 7004, mark=MARK_OWN))
        listener = stack.enter_context(listen_udp(net.b, B4, 7004))
        marked.send(b"own")
        await until(lambda: received(listener) == [b"own"])
        multicast = stack.enter_context(udp(net.a, "224.0.0.251"))
        multicast.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(A4))
        multicast.sendto(b"m", ("224.0.0.251", 5353))
        broadcast = stack.enter_context(udp(net.a, "198.18.0.255"))
        broadcast.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        broadcast.sendto(b"b", ("198.18.0.255", 7004))
        assert received(listener) == []  # b listens on its own address, not on the broadcast's
        assert not trap.asked
        assert trap.trap.statistics()["trapped"] == 0
        assert await pinged(net.a, B4, within=0.2) == 0
        assert len(trap.asked) == 1


async def test_inbound_clear_traffic_passes_only_where_it_may(net: Wired) -> None:
    """private-or-clear lets b ping a, and its replies need no verdict; private drops it unheard."""
    with trapping(net.a, policy()) as trap:
        assert await pinged(net.b, A4) == 1
        assert await pinged(net.b, A6) == 1
        assert not trap.asked
    with trapping(net.a, policy(default=GROUP.PRIVATE)) as trap:
        assert await pinged(net.b, A4, within=0.2) == 0
        assert await pinged(net.b, A6, within=0.2) == 0
        assert not trap.asked  # not even a reply was made


@pytest.mark.parametrize("group", [GROUP.PRIVATE, GROUP.BLOCK])
async def test_ike_comes_in_from_prefixes_that_fail_closed(net: Wired, group: object) -> None:
    """From a private or block prefix UDP 500 and 4500 reach us, other ports do not."""
    chosen = policy(default=group)  # type: ignore[arg-type]
    with trapping(net.a, chosen), contextlib.ExitStack() as stack:
        for port, expected in ((500, [b"x"]), (4500, [b"x"]), (7005, [])):
            listener = stack.enter_context(listen_udp(net.a, A4, port))
            stack.enter_context(udp(net.b, A4, port)).send(b"x")
            await asyncio.sleep(0.05)
            assert received(listener) == expected


async def test_replies_of_a_clear_port_come_in_through_a_private_prefix(net: Wired) -> None:
    """With b private but tcp/7006 clear, a connects to it; b's own packets from that port without such a
    connection stay out."""
    with net.b.entered():
        server = await asyncio.start_server(lambda _, writer: writer.close(), B4, 7006)
    chosen = policy(rule(GROUP.PRIVATE, f"{B4}/32"), rule(GROUP.CLEAR, f"{B4}/32", 6, 7006))
    with trapping(net.a, chosen) as trap:
        with net.a.entered():
            client = socket.socket()
            listener = socket.socket()
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.sock_connect(client, (B4, 7006)), 1)
        server.close()
        listener.bind((A4, 7007))
        listener.listen()
        with net.b.entered():
            unasked = socket.socket()
        unasked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        unasked.bind((B4, 7009))
        unasked.setblocking(False)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.sock_connect(unasked, (A4, 7007)), 0.3)
        assert not trap.asked
        for sock in (client, listener, unasked):
            sock.close()


async def test_a_private_verdict_never_leaks_without_a_tunnel(net: Wired) -> None:
    """PRIVATE marks packets; the test's rule drops marked ones on their way, and no clear one comes by."""
    net.a.run(
        "nft",
        "-f",
        "-",
        input="table inet test {\nchain o {\ntype filter hook output priority 10\n"
        "meta mark & 0x30000000 == 0x10000000 counter drop\n}\n}\n",
    )
    try:
        with (
            trapping(net.a, policy(), Verdict.PRIVATE),
            listen_udp(net.b, B4, 7010) as listener,
            udp(net.a, B4, 7010) as sender,
        ):
            for _ in range(5):
                with contextlib.suppress(PermissionError):
                    sender.send(b"secret")
                await asyncio.sleep(0.02)
            assert received(listener) == []
            listing = net.a.run("nft", "list", "table", "inet", "test").stdout
            assert "counter packets 5" in listing
    finally:
        net.a.run("nft", "delete", "table", "inet", "test")


@pytest.mark.parametrize("destination", [B4, B6])
async def test_a_private_verdict_without_its_routing_rule_never_leaves_in_the_clear(
    net: Wired, destination: str, tmp_path: Path
) -> None:
    """No rule leads marked packets anywhere (flushed by another program, or `datapath: none`): dropped."""
    with (
        trapping(net.a, policy(), Verdict.PRIVATE) as trap,
        listen_udp(net.b, destination, 7011) as listener,
        udp(net.a, destination, 7011) as sender,
        Capture(net.b, "eth0", tmp_path / "b.pcap") as capture,
    ):
        for _ in range(5):
            with contextlib.suppress(PermissionError):
                sender.send(b"secret")
            await asyncio.sleep(0.02)
        assert trap.trap.statistics()["released_private"] >= 1
        assert received(listener) == []
        assert [packet for packet in capture.packets() if packet.kind == "clear"] == []


async def test_an_overflowing_destination_keeps_its_first_and_its_last_packet(net: Wired) -> None:
    """Of 200 datagrams the bound's worth is kept: the first ones and the newest; the rest is counted."""
    limit = hold.MAX_PACKETS_PER_DESTINATION
    with (
        trapping(net.a, policy()) as trap,
        listen_udp(net.b, B4, 7011) as listener,
        udp(net.a, B4, 7011) as sender,
    ):
        for number in range(200):
            sender.send(number.to_bytes(2, "big"))
            await asyncio.sleep(0)  # held packets count against the sender's buffer
        await until(lambda: trap.trap.statistics()["trapped"] == 200)
        assert trap.trap.statistics()["dropped_overflow"] == 200 - limit
        trap.decide(GROUP.PRIVATE_OR_CLEAR, B4, Verdict.CLEAR)
        numbers = [int.from_bytes(data, "big") for data in await arrived(listener, limit)]
        assert numbers == [*range(limit - 1), 199]


async def test_a_reload_changes_the_policy_and_keeps_what_is_still_right(net: Wired) -> None:
    """B4 stays decided over a reload; when it becomes private its clear verdict is void, and held ones go."""
    with trapping(net.a, policy(), Verdict.CLEAR) as trap:
        assert await pinged(net.a, B4) == 1
        assert await pinged(net.a, B6) == 1
        trap.reload(policy(rule(GROUP.BLOCK, "198.18.0.9/32"), rule(GROUP.CLEAR, "198.18.0.9/32", 6, 22)))
        assert await pinged(net.a, B4) == 1
        assert len(trap.asked) == 2
        trap.answer = None
        trap.reload(policy(rule(GROUP.PRIVATE, f"{B4}/32")))
        assert trap.trap.statistics()["decided_clear"] == 1
        assert await pinged(net.a, B4, within=0.2) == 0
        assert await pinged(net.a, B6) == 1
        assert trap.asked[-1][0] is GROUP.PRIVATE
        trap.reload(policy())
        assert not trap.trap.held()


async def test_a_reload_without_a_change_loses_no_held_packet(net: Wired) -> None:
    """When only a key changes, say. After a change where something is `private` the kernel drops its queues."""
    chosen = policy(rule(GROUP.PRIVATE, "198.18.0.9/32"))
    with trapping(net.a, chosen) as trap:
        listener = listen_udp(net.b, B4, 7000)
        sender = udp(net.a, B4, 7000)
        sender.send(b"held")
        await until(trap.trap.held)
        trap.reload(policy(rule(GROUP.PRIVATE, "198.18.0.9/32")))
        trap.decide(GROUP.PRIVATE_OR_CLEAR, B4, Verdict.CLEAR)
        assert await arrived(listener, 1) == [b"held"]


async def test_the_private_group_never_takes_a_clear_verdict(net: Wired) -> None:
    """decide(private, CLEAR) is our own mistake and says so."""
    with trapping(net.a, policy(default=GROUP.PRIVATE)) as trap, pytest.raises(MisuseError):
        trap.decide(GROUP.PRIVATE, B4, Verdict.CLEAR)


async def test_one_port_failing_closed_leaves_the_other_traffic_alone(net: Wired) -> None:
    """tcp/udp 7012 of b is private and blocked by verdict; its other traffic is clear by verdict."""
    chosen = policy(rule(GROUP.PRIVATE, f"{B4}/32", 17, 7012))
    with trapping(net.a, chosen) as trap, listen_udp(net.b, B4, 7012) as listener:
        trap.decide(GROUP.PRIVATE, B4, Verdict.BLOCK)
        trap.decide(GROUP.PRIVATE_OR_CLEAR, B4, Verdict.CLEAR)
        await asyncio.sleep(0)
        with udp(net.a, B4, 7012) as sender, contextlib.suppress(PermissionError):
            sender.send(b"x")
        assert await pinged(net.a, B4) == 1
        assert received(listener) == []
        assert not trap.asked


async def test_a_second_trap_in_the_same_namespace_is_refused(net: Wired) -> None:
    """Two daemons on one host: the second says so and leaves the first's rules alone."""
    with trapping(net.a, policy(), Verdict.CLEAR):
        with pytest.raises(OepyError, match="taken"):
            TrapIn(net.a).start(policy())
        assert await pinged(net.a, B4) == 1


async def test_a_removed_table_comes_back(net: Wired) -> None:
    """After `nft flush ruleset` by somebody else the rules and verdicts are there again within seconds."""
    holder = Holder(net.a, rules=[["block", f"{B6}/128"]], answer="clear")
    assert await pinged(net.a, B4) == 1
    assert net.a.run("sh", "-c", "nft flush ruleset; nft list tables").stdout == ""  # wide open
    await until(lambda: "inet oepy" in net.a.run("nft", "list", "tables").stdout)
    assert await pinged(net.a, B6, within=0.2) == 0
    assert await pinged(net.a, B4) == 1
    holder.line(f"asked private-or-clear {B4}")
    holder.ask("stop")


_CLOSED = {"default": "private-or-clear", "rules": [["private", f"{B4}/32"], ["private", f"{B6}/128"]]}


async def test_the_guard_keeps_private_prefixes_shut_both_ways(net: Wired, tmp_path: Path) -> None:
    """After a stop with guard nothing goes to or comes from private prefixes, other hosts are reached; the
    guard is named, goes by command, and by the next start."""
    net.wire.namespace.address("br0", "198.18.0.3/24")
    holder = Holder(net.a, **_CLOSED)
    with Capture(net.b, "eth0", tmp_path / "b.pcap") as capture:
        holder.ask("guard")
        assert await pinged(net.a, B4, count=2, within=0.1) == 0
        assert await pinged(net.a, B6, count=2, within=0.1) == 0
        with udp(net.a, B4, 7020) as sender, contextlib.suppress(PermissionError):
            sender.send(b"secret")
        assert [packet for packet in capture.packets() if packet.source in (address(A4), address(A6))] == []
    assert await pinged(net.b, A4, within=0.2) == 0
    assert await pinged(net.a, "198.18.0.3") == 1
    assert await pinged(net.a, A4) == 1
    assert net.a.run(sys.executable, "-m", "oepy", "guard", "status").stdout.startswith("The guard stands")
    again = Holder(net.a, default="clear")
    assert "oepy_guard" not in net.a.run("nft", "list", "tables").stdout
    assert await pinged(net.a, B4) == 1
    again.ask("stop")
    another = Holder(net.a, **_CLOSED)
    another.ask("guard")
    assert (
        net.a.run(sys.executable, "-m", "oepy", "guard", "remove", "--json").stdout == '{"removed": true}\n'
    )
    assert await pinged(net.a, B4) == 1
    assert net.a.run("nft", "list", "tables").stdout == ""


async def test_after_kill_9_private_stays_shut_and_the_rest_is_clear(net: Wired, tmp_path: Path) -> None:
    """A killed daemon: private is dropped both ways, private-or-clear passes through the bypass; the next
    start takes over without a clear packet to the private host."""
    holder = Holder(net.a, default="private-or-clear", rules=[["private", f"{B4}/32"]])
    holder.kill()
    with Capture(net.b, "eth0", tmp_path / "b.pcap") as capture:
        assert await pinged(net.a, B4, count=2, within=0.1) == 0
        assert await pinged(net.a, B6) == 1
        stop = asyncio.Event()

        async def insist() -> None:
            with udp(net.a, B4, 7021) as sender:
                sender.setblocking(False)
                while not stop.is_set():
                    with contextlib.suppress(PermissionError, BlockingIOError):
                        sender.send(b"secret")
                    await asyncio.sleep(0.001)

        insisting = asyncio.create_task(insist())
        again = await asyncio.to_thread(
            Holder, net.a, default="private-or-clear", rules=[["private", f"{B4}/32"]]
        )
        again.line(f"asked private {B4}")
        await asyncio.to_thread(again.ask, "guard")
        await asyncio.to_thread(again.ask, "restart")
        stop.set()
        await insisting
        again.kill()
        assert [packet for packet in capture.packets() if packet.source == address(A4)] == []
    cleaning = Holder(net.a, default="clear")
    cleaning.ask("stop")
    assert net.a.run("nft", "list", "tables").stdout == ""


async def test_foreign_tables_are_left_alone(net: Wired) -> None:
    """A table of others survives start, reload and stop; one of our name that is not ours is refused."""
    net.a.run("nft", "add", "table", "inet", "foreign")
    with trapping(net.a, policy()) as trap:
        trap.reload(policy())
    assert "foreign" in net.a.run("nft", "list", "tables").stdout
    assert "oepy" not in net.a.run("nft", "list", "tables").stdout
    net.a.run("nft", "add", "table", "inet", "oepy")
    with pytest.raises(OepyError, match="did not make"):
        TrapIn(net.a).start(policy())
    net.a.run("nft", "delete", "table", "inet", "oepy")
    net.a.run("nft", "delete", "table", "inet", "foreign")


_NEVER_STOPS = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((sys.argv[1], 7021))
sock.setblocking(False)
print("sending", flush=True)
while True:
    try:
        sock.send(b"secret")
    except OSError:
        pass
"""


async def test_no_change_of_tables_opens_a_private_prefix(net: Wired, tmp_path: Path) -> None:
    """Ten times each: stop to guard and start again, reload there and back, start over the leftovers of a
    run that was killed; a sender in a tight loop gets nothing through."""
    private = rule(GROUP.PRIVATE, f"{B4}/32")
    one, other = (
        policy(private, rule(GROUP.CLEAR, "10.0.0.0/8")),
        policy(private, rule(GROUP.BLOCK, "10.0.0.0/8")),
    )
    trap = TrapIn(net.a)
    trap.start(one)
    with Capture(net.b, "eth0", tmp_path / "b.pcap") as capture:
        sender = net.a.popen(sys.executable, "-c", _NEVER_STOPS, B4, stdout=subprocess.PIPE)
        assert sender.stdout is not None
        assert sender.stdout.readline() == "sending\n"
        for _ in range(10):
            trap.stop(guard=True)
            await asyncio.sleep(0.002)
            trap.start(one)
            trap.reload(other)
            await asyncio.sleep(0.002)
            trap.reload(one)
            running = trap.trap._running
            assert running is not None
            running.close()  # what kill -9 leaves
            trap.trap._running = None
            trap.start(one)
        leaked = [packet for packet in capture.packets() if packet.source == address(A4)]
        sender.kill()
        sender.wait()
    trap.stop(guard=False)
    assert leaked == []
    assert net.a.run("nft", "list", "tables").stdout == ""


async def test_without_rights_or_nft_the_start_says_so(net: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unprivileged root and a machine without nft get one line with the mend, and no table."""
    code = (
        "import asyncio\nfrom oepy.trap import NfqueueTrap\nfrom tests.net.harness import policy\n"
        "async def main(): NfqueueTrap().start(policy(), print)\nasyncio.run(main())"
    )
    done = net.a.run("setpriv", "--bounding-set=-net_admin", sys.executable, "-c", code, check=False)
    assert "run as root (CAP_NET_ADMIN)" in done.stderr.splitlines()[-1]
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(OepyError, match="install the package nftables"):
        TrapIn(net.a).start(policy())
    monkeypatch.undo()
    assert net.a.run("nft", "list", "tables").stdout == ""


async def test_thousands_of_prefixes_load_quickly(net: Wired) -> None:
    """5,000 prefixes, nested ones too: start and reload take seconds at most, and the right one decides."""
    many = [
        rule(GROUP.PRIVATE if number % 2 else GROUP.CLEAR, f"10.{number // 256}.{number % 256}.0/24")
        for number in range(5000)
    ]
    chosen = policy(*many, rule(GROUP.BLOCK, "10.0.0.0/8"), rule(GROUP.BLOCK, f"{B4}/32"))
    begun = time.monotonic()
    with trapping(net.a, chosen) as trap:
        trap.reload(chosen)
        assert time.monotonic() - begun < 30  # linear; quadratic would take minutes
        assert await pinged(net.a, B4, within=0.2) == 0
        assert not trap.asked


async def test_an_endless_wait_is_cut_off(net: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets that nobody decides are dropped after a while and asked for anew."""
    monkeypatch.setattr(hold, "HOLD_SECONDS", 0.5)
    with trapping(net.a, policy()) as trap:
        assert await pinged(net.a, B4, within=0.1) == 0
        await until(lambda: not trap.trap.held())
        assert trap.trap.statistics()["dropped_overdue"] == 1
        assert await pinged(net.a, B4, within=0.1) == 0
        assert len(trap.asked) == 2
