"""Keys of connections' children with real packets: two hosts on a wire, each with an address behind it on `lo`."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oepy.daemon.datapaths import userland_confuses
from oepy.lab.capture import Capture
from oepy.lab.probe import Pinger, echoes, ping
from oepy.model import MAX_USERLAND_MARKS
from tests.fakes.connections import between, good
from tests.net.daemon_host import Host, kinds, ready, two_with_a_secret
from tests.net.harness import A4, B4, listen_udp, udp, wired

pytestmark = pytest.mark.root
NEAR, FAR = "10.1.0.1", "10.2.3.4"
IDS = ("a.example", "b.example")
Children = dict[str, dict[str, Any]]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with wired() as net, two_with_a_secret(net.a, net.b, tmp_path) as made:
        for host, own, other, via in ((made[0], NEAR, FAR, B4), (made[1], FAR, NEAR, A4)):
            host.namespace.address("lo", f"{own}/32")
            host.namespace.ip("route", "add", f"{other}/32", "via", via, "src", own)
        yield made


def section(number: int, children: Children, **connection: Any) -> dict[str, Any]:
    """Of host 0 or 1, where `children` are as host 0 has them."""
    ends = (A4, B4)
    if number:
        children = {
            name: {**child, "local_ts": child["remote_ts"], "remote_ts": child["local_ts"]}
            for name, child in children.items()
        }
    pair = {
        "local_addrs": [ends[number]],
        "remote_addrs": [ends[1 - number]],
        "local": {"auth": "psk", "id": IDS[number]},
        "remote": {"auth": "psk", "id": IDS[1 - number]},
        "children": children,
        **connection,
    }
    secrets = [{"type": "ike", "id": list(IDS), "secret_file": "psk"}]
    return {"connections": {"pair": pair}, "secrets": secrets}


def sent(host: Host) -> dict[str, int]:
    """Packets by child."""
    return {sa["connection"]: sa["packets_out"] for sa in host.json("sas")}


def bring_up(hosts: tuple[Host, Host]) -> None:
    up = hosts[0].oepy("connection", "up", "pair")
    assert up.returncode == 0, up.stdout + up.stderr + hosts[0].log() + hosts[1].log()


def the_lower_priority_wins(hosts: tuple[Host, Host], datapath: str) -> None:
    """Of two children that are up the wide one with a priority has the traffic, and `explain` says so; without one
    the narrow one: a load brings it to trap and datapath."""
    for first, winner in ((1, "pair/wide"), (0, "pair/narrow")):
        children: Children = {
            "narrow": {"local_ts": [f"{NEAR}/32"], "remote_ts": ["10.2.3.0/24"]},
            "wide": {"local_ts": ["10.1.0.0/16"], "remote_ts": ["10.2.0.0/15"], "priority": first},
        }
        for number, host in enumerate(hosts):
            change = host.begin if first else host.reload
            change({}, **section(number, children), datapath=datapath)
        ready(*hosts)
        bring_up(hosts)
        assert None not in ping(hosts[0].namespace, FAR, count=3, timeout=15), hosts[0].log()
        counts = sent(hosts[0])
        assert counts.keys() == {"pair/narrow", "pair/wide"}
        assert counts[winner] >= 3
        assert sum(counts.values()) == counts[winner]
        assert hosts[0].json("explain", FAR)["prefix"] == winner
        listed = [row["connection"] for row in hosts[0].json("policies") if row["group"] == "connection"]
        assert listed[0] == winner


def test_the_lower_priority_wins(hosts: tuple[Host, Host]) -> None:
    """With userland ESP."""
    the_lower_priority_wins(hosts, "tun")


INSIDE = 0xB9  # DSCP EF and ECT(1), of the packet inside
Copies = tuple[dict[str, Any], dict[str, Any], int, bool, int]


def what_is_copied(hosts: tuple[Host, Host], tmp_path: Path, datapath: str, cases: list[Copies]) -> None:
    """Of a packet with DSCP, ECN and DF. Each case: the keys of both ends, what is outside (TOS, DF), the TOS that
    arrives. A load with other keys reaches the SAs."""
    one, other = hosts
    child = {"local_ts": [f"{NEAR}/32"], "remote_ts": [f"{FAR}/32"]}
    for place, (ours, theirs, outside, df, arrives) in enumerate(cases):
        for number, (host, keys) in enumerate(zip(hosts, (ours, theirs), strict=True)):
            children: Children = {"net": {**child, **keys}}
            change = host.reload if place else host.begin
            change({}, **section(number, children), datapath=datapath)
        ready(*hosts)
        bring_up(hosts)
        listener = listen_udp(other.namespace, FAR, 7200)
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        listener.setblocking(True)
        listener.settimeout(15)
        sender = udp(one.namespace, FAR, 7200, source=NEAR)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, INSIDE)
        sender.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO: with DF
        with Capture(other.namespace, ["eth0"], tmp_path / f"{place}.pcap") as capture, listener, sender:
            sender.send(b"marked")
            _, ancillary, _, _ = listener.recvmsg(100, socket.CMSG_SPACE(1))
            capture.flush()
            (frame,) = [
                frame.data
                for frame in capture.frames()
                if (packet := frame.packet()) and packet.kind == "esp" and str(packet.source) == A4
            ]
        assert (frame[15], bool(frame[20] & 0x40)) == (outside, df), (ours, one.log())
        assert [value[0] for _, _, value in ancillary] == [arrives], (theirs, other.log())


def test_what_is_copied_between_the_headers(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """With userland ESP DSCP, where it is to be."""
    cases: list[Copies] = [
        ({}, {}, 0, False, INSIDE),
        ({"copy_dscp": "out"}, {"copy_dscp": "out"}, 0xB8, False, INSIDE),
    ]
    what_is_copied(hosts, tmp_path, "tun", cases)


COLOURS = {"red": 0x11, "blue": 0x22}
SECOND = "198.18.0.3"  # of the second host, where the connection `blue` ends


def coloured(number: int, marks: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Two connections with the same selectors, to two addresses of the other host."""
    connections = {}
    for name, there in (("red", B4), ("blue", SECOND)):
        child = {"local_ts": [f"{NEAR}/32"], "remote_ts": [f"{FAR}/32"], **marks[name]}
        made = section(number, {"net": child})["connections"]["pair"]
        made["local_addrs" if number else "remote_addrs"] = [there]
        connections[name] = made
    return {**section(number, {}), "connections": connections, **more}


def marked_ping(host: Host, mark: int, count: int = 3, timeout: float = 15) -> list[float | None]:
    with host.namespace.entered(), Pinger(FAR, source=NEAR) as pinger:
        pinger.socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        return echoes(pinger, count, timeout)


def test_two_connections_side_by_side_by_their_marks(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """With the same selectors: each packet goes by the tunnel of its mark, and whichever traps holds its first.
    What has no mark, or one whose tunnel is down, is its group's, which is `private`: nothing leaves in the clear.
    Another mark reaches the datapath by a reload, rules that somebody flushed come back, ESP packets have the mark
    that they are to have, and nothing is left in the end."""
    one, other = hosts
    other.namespace.address("eth0", f"{SECOND}/24")
    chain = "type filter hook postrouting priority 0; meta mark 0x20000007 counter"
    one.namespace.run("nft", "-f", "-", input=f"table ip seen {{\nchain post {{\n{chain}\n}}\n}}\n")
    marks: dict[str, dict[str, Any]] = {
        name: {"mark_out": f"{mark:#x}/0xff", "start_action": "trap" if name == "red" else "none"}
        for name, mark in COLOURS.items()
    }
    marks["blue"]["set_mark_out"] = 7
    private = {"policy": {"default": "clear", "groups": {"private": [f"{FAR}/32"]}}}
    other.begin({}, **coloured(1, {"red": {}, "blue": {}}))
    one.begin({}, **coloured(0, marks, **private))
    ready(*hosts)
    with Capture(other.namespace, ["eth0"], tmp_path / "wire.pcap") as capture:
        assert None not in marked_ping(one, 0x4411), one.log() + other.log()
        assert sent(one) == {"red/net": 3}
        assert marked_ping(one, 0, 2, 0.5) == [None, None]
        assert marked_ping(one, 0x22, 2, 0.5) == [None, None]
        assert one.oepy("connection", "up", "blue").returncode == 0, one.log() + other.log()
        assert None not in marked_ping(one, 0x22), one.log() + other.log()
        assert sent(one) == {"red/net": 3, "blue/net": 3}
        counted = one.namespace.run("nft", "list", "table", "ip", "seen").stdout
        assert "counter packets 3 " in counted
        for rule in one.namespace.run("ip", "-4", "rule", "list").stdout.splitlines():
            if rule.startswith(("1772:", "1773:")):
                one.namespace.ip("rule", "del", "priority", rule.partition(":")[0])
        deadline = time.monotonic() + 30
        while None in marked_ping(one, 0x11, 1, 0.5):
            assert time.monotonic() < deadline, one.log()
        marks["blue"]["mark_out"] = "0x33/0xff"
        one.reload({}, **coloured(0, marks, **private))
        assert one.oepy("connection", "up", "blue").returncode == 0, one.log() + other.log()
        assert None not in marked_ping(one, 0x33), one.log() + other.log()
        assert None not in marked_ping(one, 0x11), one.log() + other.log()
        assert marked_ping(one, 0x22, 2, 0.5) == [None, None]
        other.stop()
        one.oepy("connection", "down", "red")
        assert marked_ping(one, 0x11, 2, 0.5) == [None, None]
        capture.flush()
        assert kinds(capture) == {"ike", "esp"}
    one.stop()
    assert "0x10000011" not in one.namespace.run("ip", "rule", "list").stdout
    assert "oe0" not in one.namespace.run("ip", "link", "show").stdout


def test_marks_that_userland_would_confuse_are_refused() -> None:
    """Two masks by which a packet has both marks, more marks than there are devices, no room for their names."""

    def problems(device: str, *marks: str) -> list[str]:
        children = {
            f"c{number}": {"remote_ts": [f"10.{number}.0.0/16"], "mark_out": mark}
            for number, mark in enumerate(marks)
        }
        text = between(A4, B4, own="a.example", peer="b.example", children=children)
        many = good(text, {"psk": b"a secret of two hosts"})
        return list(userland_confuses(many, device))

    assert problems("oe0", "1/0xf", "1/0xf", "2/0xf", "0x11/0xff") == [
        f"site/c{number}: a packet may have its mark_out {mark} and that of site/c{other}, {others}: "
        "with the datapath tun, take one mask for all"
        for number, mark, other, others in ((0, "0x1/0xf", 3, "0x11/0xff"), (3, "0x11/0xff", 0, "0x1/0xf"))
    ]
    most = [str(number) for number in range(MAX_USERLAND_MARKS)]
    assert problems("a2345678901", *most) == []
    assert "oe0.m31" not in str(problems("oe0", *most))
    assert "no room" in str(problems("a23456789012", "1"))


def test_what_userland_lacks_is_refused_at_load(hosts: tuple[Host, Host]) -> None:
    """By name and child; what was loaded before stays as it is."""
    child = {"local_ts": [f"{NEAR}/32"], "remote_ts": [f"{FAR}/32"]}
    for number, host in enumerate(hosts):
        host.begin({}, **section(number, {"net": child}))
    ready(*hosts)
    bring_up(hosts)
    (before,) = hosts[0].json("sas")
    hosts[0].write({}, **section(0, {"net": {**child, "mark_in": 7}}))
    load = hosts[0].oepy("connection", "load")
    assert load.returncode == 2
    assert "pair/net: mark_in is the kernel's" in load.stderr
    assert hosts[0].json("sas")[0]["spi_in"] == before["spi_in"]
