"""A road warrior with an assigned address and a gateway with a subnet behind it.

[warrior 198.18.5.2] ── veth ── [gateway 198.18.5.1 | 10.1.0.1] ── veth ── [inside 10.1.0.2]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oepy.lab.capture import Capture
from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import ping
from tests.net.daemon_host import Host, kinds, two_with_a_secret

pytestmark = pytest.mark.root

WARRIOR, GATE = "198.18.5.2", "198.18.5.1"
INSIDE, INSIDE6 = "10.1.0.2", "2001:2:51::2"


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    with Lab() as lab:
        warrior, gate, inside = (lab.namespace(name) for name in ("warrior", "gate", "inside"))
        lab.veth(warrior, gate, "eth0", "wan")
        lab.veth(gate, inside, "lan", "eth0")
        warrior.address("eth0", f"{WARRIOR}/24")
        gate.address("wan", f"{GATE}/24")
        gate.address("lan", "10.1.0.1/24", "2001:2:51::1/64")
        inside.address("eth0", f"{INSIDE}/24", f"{INSIDE6}/64")
        inside.ip("route", "add", "default", "via", "10.1.0.1")
        inside.ip("-6", "route", "add", "default", "via", "2001:2:51::1")
        warrior.ip("route", "add", "default", "via", GATE)
        # As every gateway has: the kernel takes packets of addresses only that it knows some way to
        gate.ip("route", "add", "default", "via", WARRIOR)
        gate.ip("-6", "route", "add", "default", "dev", "wan")
        gate.sysctl("net.ipv4.ip_forward", "1")
        gate.sysctl("net.ipv6.conf.all.forwarding", "1")
        yield warrior, gate, inside


@pytest.fixture
def hosts(network: tuple[Namespace, Namespace, Namespace], tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_with_a_secret(*network[:2], tmp_path) as made:
        yield made


SECRETS = [{"type": "ike", "id": ["gate.example", "*.road.example"], "secret_file": "psk"}]


def client_section(remote_ts: list[str], **more: Any) -> dict[str, Any]:
    home = {
        "remote_addrs": [GATE],
        "local": {"auth": "psk", "id": "one.road.example"},
        "remote": {"auth": "psk", "id": "gate.example"},
        "vips": ["0.0.0.0", "::"],
        "children": {"net": {"remote_ts": remote_ts, "start_action": "trap|start"}},
        **more,
    }
    return {"connections": {"home": home}, "secrets": SECRETS}


def gate_section() -> dict[str, Any]:
    road = {
        "local_addrs": [GATE],
        "local": {"auth": "psk", "id": "gate.example"},
        "remote": {"auth": "psk", "id": "*.road.example"},
        "pools": ["four", "six"],
        "children": {"net": {"local_ts": ["0.0.0.0/0", "::/0"]}},
    }
    pools = {"four": {"addrs": "10.9.0.0/24"}, "six": {"addrs": "2001:2:59::/120"}}
    return {"connections": {"road": road}, "secrets": SECRETS, "pools": pools}


def addresses(namespace: Namespace) -> set[str]:
    found = json.loads(namespace.run("ip", "-j", "addr", "show", "dev", "oe0", check=False).stdout or "[]")
    return {info["local"] for item in found for info in item.get("addr_info", ())} - {"192.0.0.8"}


def rules(namespace: Namespace) -> str:
    return "".join(namespace.run("ip", family, "rule").stdout for family in ("-4", "-6"))


def wait_for_state(host: Host, state: str) -> None:
    up = host.oepy("connection", "up", "home")
    assert up.returncode == 0, up.stdout + up.stderr + host.log()
    assert {row["state"] for row in host.json("connection", "list")} == {state}


def test_a_warrior_reaches_the_subnet_and_is_reached(
    network: tuple[Namespace, Namespace, Namespace], hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """The assigned addresses are the sources of what goes to the subnet, whoever begins; both families go by ESP.
    With the tunnel down nothing of it leaves, and addresses, routes and rules are gone; also those of a daemon that
    was killed. A restart of both gives the same addresses."""
    warrior, gate, inside = network
    client, server = hosts
    server.start({}, **gate_section())
    client.start({}, **client_section(["10.1.0.0/16", "2001:2:51::/64"]))
    wait_for_state(client, "up")
    assert addresses(warrior) == {"10.9.0.1", "2001:2:59::1"}
    assert "17735" in rules(warrior)
    with Capture(gate, ["wan"], tmp_path / "wan.pcap") as capture:
        assert None not in ping(warrior, INSIDE, count=3, timeout=5), client.log() + server.log()
        assert None not in ping(warrior, INSIDE6, count=3), client.log() + server.log()
        assert None not in ping(inside, "10.9.0.1", count=3), server.log()
        capture.flush()
        assert kinds(capture) == {"ike", "esp"} or kinds(capture) == {"esp"}
    client.kill()
    client.process = None
    client.start({}, **client_section(["10.1.0.0/16", "2001:2:51::/64"]))
    wait_for_state(client, "up")
    assert addresses(warrior) == {"10.9.0.1", "2001:2:59::1"}
    assert None not in ping(warrior, INSIDE, count=2, timeout=5), client.log() + server.log()

    server.kill()
    server.process = None
    server.start({}, **gate_section())
    client.stop()
    assert "17735" not in rules(warrior)
    assert addresses(warrior) == set()
    client.start({}, **client_section(["10.1.0.0/16", "2001:2:51::/64"]))
    wait_for_state(client, "up")
    assert addresses(warrior) == {"10.9.0.1", "2001:2:59::1"}


def test_everything_into_the_tunnel(
    network: tuple[Namespace, Namespace, Namespace], hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """remote_ts 0.0.0.0/0: all goes in, but the daemon's own packets; with trap, nothing else leaves without it."""
    warrior, gate, _ = network
    client, server = hosts
    server.start({}, **gate_section())
    client.start({}, **client_section(["0.0.0.0/0", "::/0"]))
    wait_for_state(client, "up")
    with Capture(gate, ["wan"], tmp_path / "wan.pcap") as capture:
        assert None not in ping(warrior, INSIDE, count=3, timeout=5), client.log() + server.log()
        assert None not in ping(warrior, "10.1.0.1", count=3), client.log() + server.log()
        server.stop()
        ping(warrior, INSIDE, count=3, timeout=0.3)
        capture.flush()
        assert kinds(capture) <= {"ike", "esp"}
