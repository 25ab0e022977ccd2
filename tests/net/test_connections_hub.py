"""A hub for whoever comes, and spokes: real packets from one spoke to the other through it, limits in packets, and
the end of what nobody uses.

    [lan_a 10.11.0.2] ── [a 198.18.10.2] ──┐
                                           [hub 198.18.10.1, 198.18.11.1 | lo 10.20.0.1]
    [lan_b 10.12.0.2] ── [b 198.18.11.2] ──┘
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oepy.lab.capture import Capture
from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import ping
from tests.net.daemon_host import Host, kinds, ready
from tests.net.test_connections_mobike import wait_for

pytestmark = pytest.mark.root

Site = tuple[Namespace, Namespace]  # gateway and a host behind it


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Namespace, Site, Site]]:
    with Lab() as lab:
        hub = lab.namespace("hub")
        hub.address("lo", "10.20.0.1/24")
        sites = []
        for number, name in enumerate("ab"):
            gateway, lan = lab.namespace(name), lab.namespace(f"lan_{name}")
            lab.veth(gateway, hub, "wan", f"wan{number}")
            lab.veth(gateway, lan, "lan", "eth0")
            gateway.address("wan", f"198.18.1{number}.2/24")
            hub.address(f"wan{number}", f"198.18.1{number}.1/24")
            gateway.address("lan", f"10.1{number + 1}.0.1/24")
            lan.address("eth0", f"10.1{number + 1}.0.2/24")
            lan.ip("route", "add", "default", "via", f"10.1{number + 1}.0.1")
            gateway.ip("route", "add", "default", "via", f"198.18.1{number}.1")
            gateway.sysctl("net.ipv4.ip_forward", 1)
            sites.append((gateway, lan))
        hub.ip("route", "add", "default", "via", "198.18.10.2")
        hub.sysctl("net.ipv4.ip_forward", 1)
        yield hub, sites[0], sites[1]


def _hub_section() -> dict[str, Any]:
    branches = {
        "remote_addrs": ["%any"],
        "local": {"auth": "psk", "id": "hub.example"},
        "remote": {"auth": "psk", "id": "*.branch.example"},
        "children": {"net": {"local_ts": ["10.0.0.0/8"], "remote_ts": ["10.11.0.0/16", "10.12.0.0/16"]}},
    }
    secret = {"type": "ike", "id": ["hub.example", "*.branch.example"], "secret_file": "psk"}
    return {"connections": {"branches": branches}, "secrets": [secret]}


def _spoke_section(number: int, child: dict[str, Any]) -> dict[str, Any]:
    other = 23 - number
    hub = {
        "remote_addrs": [f"198.18.{number - 1}.1"],
        "local": {"auth": "psk", "id": f"s{number}.branch.example"},
        "remote": {"auth": "psk", "id": "hub.example"},
        "children": {
            "net": {
                "local_ts": [f"10.{number}.0.0/16"],
                "remote_ts": ["10.20.0.0/16", f"10.{other}.0.0/16"],
                "start_action": "trap",
                **child,
            }
        },
    }
    secret = {"type": "ike", "id": ["hub.example", f"s{number}.branch.example"], "secret_file": "psk"}
    return {"connections": {"hub": hub}, "secrets": [secret]}


def test_spokes_reach_the_hub_and_each_other(network: tuple[Namespace, Site, Site], tmp_path: Path) -> None:
    """First packets bring the tunnels up; from spoke to spoke all goes by the hub, encrypted on both legs. Hundred
    packets later one has been rekeyed by its limit and none is lost; the other ends when nobody uses it, and comes
    up again with the next packet."""
    hub, (gate_a, lan_a), (gate_b, lan_b) = network
    hosts = [Host(namespace, tmp_path / namespace.label) for namespace in (hub, gate_a, gate_b)]
    center, a, b = hosts
    for host in hosts:
        (host.directory / "psk").touch(mode=0o600)
        (host.directory / "psk").write_text("for all branches\n")
    try:
        center.begin({}, **_hub_section())
        a.begin({}, **_spoke_section(11, {"rekey_packets": 40, "life_packets": 4000}))
        b.begin({}, **_spoke_section(12, {"inactivity": "8s"}))
        ready(*hosts)
        with Capture(hub, ["wan0", "wan1"], tmp_path / "wan.pcap") as capture:
            assert None not in ping(lan_b, "10.20.0.1", count=2, timeout=5), b.log() + center.log()
            assert None not in ping(lan_a, "10.12.0.2", count=2, timeout=5), a.log() + center.log()
            assert {sa["peer_id"] for sa in center.json("sas")} == {
                "s11.branch.example",
                "s12.branch.example",
            }
            (before,) = a.json("sas")
            lost = ping(lan_a, "10.12.0.2", count=100, timeout=2).count(None)
            wait_for(lambda: [s["spi_in"] for s in a.json("sas")] != [before["spi_in"]], a.log)
            assert lost == 0, a.log() + center.log()
            assert "connection-down" not in a.events()
            assert None not in ping(lan_b, "10.11.0.2", count=3, timeout=2)

            wait_for(lambda: b.json("sas") == [], b.log)
            assert [row["state"] for row in b.json("connection", "list")] == ["trapped"]
            assert [sa["peer_id"] for sa in center.json("sas")] == ["s11.branch.example"]
            assert None not in ping(lan_b, "10.11.0.2", count=2, timeout=5), b.log() + center.log()
            capture.flush()
            assert kinds(capture) == {"ike", "esp"}
        # What nobody agreed upon does not pass: the hub's own network from an address of neither spoke
        time.sleep(0.1)
        gate_a.ip("address", "add", "10.13.0.1/32", "dev", "lo")
        assert ping(gate_a, "10.12.0.2", count=2, timeout=0.5, source="10.13.0.1") == [None, None]
    finally:
        for host in hosts:
            host.stop()
