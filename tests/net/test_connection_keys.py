"""Keys of connections' children with real packets: two hosts on a wire, each with an address behind it on `lo`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oepy.lab.probe import ping
from tests.net.daemon_host import Host
from tests.net.harness import A4, B4, wired

pytestmark = pytest.mark.root
NEAR, FAR = "10.1.0.1", "10.2.3.4"
IDS = ("a.example", "b.example")
Children = dict[str, dict[str, Any]]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with wired() as net:
        made = Host(net.a, tmp_path / "a"), Host(net.b, tmp_path / "b")
        for host, own, other, via in ((made[0], NEAR, FAR, B4), (made[1], FAR, NEAR, A4)):
            host.namespace.address("lo", f"{own}/32")
            host.namespace.ip("route", "add", f"{other}/32", "via", via, "src", own)
            (host.directory / "psk").touch(mode=0o600)
            (host.directory / "psk").write_text("a secret of two hosts\n")
        try:
            yield made
        finally:
            for host in made:
                host.stop()


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
            change = host.start if first else host.reload
            change({}, **section(number, children), datapath=datapath)
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


def test_what_userland_lacks_is_refused_at_load(hosts: tuple[Host, Host]) -> None:
    """By name and child; what was loaded before stays as it is."""
    child = {"local_ts": [f"{NEAR}/32"], "remote_ts": [f"{FAR}/32"]}
    for number, host in enumerate(hosts):
        host.start({}, **section(number, {"net": child}))
    bring_up(hosts)
    (before,) = hosts[0].json("sas")
    hosts[0].write({}, **section(0, {"net": {**child, "mark_out": 7}}))
    load = hosts[0].oepy("connection", "load")
    assert load.returncode == 2
    assert "pair/net: mark_out is the kernel's" in load.stderr
    assert hosts[0].json("sas")[0]["spi_in"] == before["spi_in"]
