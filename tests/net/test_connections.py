"""Conventional connections between two gateways with subnets behind. The topology is that of
test_datapath_gateway."""

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
from tests.net.harness import A4, B4, listen_udp, received
from tests.net.test_datapath_gateway import L4, R4, R6, _network
from tests.net.test_manual_gateway import _pretend

pytestmark = pytest.mark.root
NETWORKS = (("10.1.0.0/24", "10.2.0.0/24"), ("2001:2:1::/64", "2001:2:2::/64"))


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[list[Namespace], list[Namespace]]]:
    with Lab() as lab:
        yield _network(lab)


@pytest.fixture
def gateways(network: tuple[list[Namespace], list[Namespace]], tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    made = [Host(namespace, tmp_path / namespace.label) for namespace in network[1]]
    for host in made:
        secret = host.directory / "psk"
        secret.touch(mode=0o600)
        secret.write_text("a secret of two gateways\n")
    try:
        yield made[0], made[1]
    finally:
        for host in made:
            host.stop()


def section(number: int, start: str, **child: Any) -> dict[str, Any]:
    """The configuration of the left (0) or right (1) gateway."""
    here, there = (A4, B4) if number == 0 else (B4, A4)
    own, peer = (f"{name}.example" for name in (("left", "right") if number == 0 else ("right", "left")))
    ours, theirs = zip(*(pair if number == 0 else pair[::-1] for pair in NETWORKS), strict=True)
    subnets = {"local_ts": list(ours), "remote_ts": list(theirs), "start_action": start, **child}
    return {
        "connections": {
            "sites": {
                "local_addrs": [here],
                "remote_addrs": [there],
                "local": {"auth": "psk", "id": own},
                "remote": {"auth": "psk", "id": peer},
                "children": {"net": subnets},
            }
        },
        "secrets": [{"type": "ike", "id": [own, peer], "secret_file": "psk"}],
    }


def test_the_first_forwarded_packet_brings_the_subnets_together(
    network: tuple[list[Namespace], list[Namespace]], gateways: tuple[Host, Host], tmp_path: Path
) -> None:
    """start_action trap: the first ping from subnet to subnet is held and arrives, both families go by ESP. What
    pretends in the clear to be from the other subnet is dropped. Down: nothing leaks, the next packet begins again.
    A load without the connection ends it, and the clear passes."""
    (left, right), _ = network
    for number, host in enumerate(gateways):
        host.begin({}, **section(number, "trap"))
    ready(*gateways)
    assert [row["state"] for row in gateways[0].json("connection", "list")] == ["trapped"]
    with Capture(gateways[1].namespace, ["wan"], tmp_path / "wan.pcap") as capture:
        assert None not in ping(left, R4, count=3, timeout=5), gateways[0].log()
        assert None not in ping(left, R6, count=3)
        capture.flush()
        assert kinds(capture) == {"ike", "esp"}
    (sa,) = gateways[0].json("sas")
    assert (sa["authenticated"], sa["connection"]) == ("psk", "sites/net")
    told = gateways[0].json("explain", R4)
    assert (told["disposition"], told["prefix"]) == ("private", "sites/net")
    listener = listen_udp(right, R4, 7001)
    _pretend(gateways[0].namespace, L4, R4, 7001)
    time.sleep(0.3)
    assert received(listener) == []
    listener.close()

    assert gateways[0].oepy("connection", "down", "sites").returncode == 0
    assert gateways[0].json("sas") == []
    with Capture(gateways[1].namespace, ["wan"], tmp_path / "again.pcap") as capture:
        assert None not in ping(left, R4, count=2, timeout=5), gateways[0].log()
        gateways[1].stop()
        ping(left, R4, count=3, timeout=0.3)
        capture.flush()
        assert kinds(capture) <= {"ike", "esp"}

    for host in gateways:
        host.write({})
    assert gateways[0].oepy("connection", "load").returncode == 0
    assert gateways[0].json("connection", "list") == []


def test_commands_and_mistakes(gateways: tuple[Host, Host]) -> None:
    """`connection up` of one that only waits says so by its exit status; a load with mistakes changes nothing."""
    for number, host in enumerate(gateways):
        host.begin({}, **section(number, "none"))
    ready(*gateways)
    left = gateways[0]
    up = left.oepy("connection", "up", "sites/net")
    assert up.returncode == 0, up.stderr + left.log()
    before = left.json("sas")[0]["spi_in"]
    wrong = section(0, "sideways")
    left.write({}, **wrong)
    load = left.oepy("connection", "load")
    assert load.returncode == 2
    assert "start_action" in load.stderr
    assert left.json("sas")[0]["spi_in"] == before
    assert left.oepy("connection", "up", "nobody").returncode == 1
    assert left.oepy("connection", "down", "net").returncode == 0
    gateways[1].stop()
    up = left.oepy("connection", "up", "net", "--timeout", "0.5")
    assert up.returncode == 1
    assert "connecting" in up.stdout
