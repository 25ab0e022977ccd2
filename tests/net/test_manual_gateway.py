"""Two subnets behind gateways whose daemons are keyed by hand. The topology is that of test_datapath_gateway."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oepy.lab.capture import Capture
from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import ping
from oepy.model import MARK_OWN
from tests.fakes import manual
from tests.net.daemon_host import Host, kinds, ready
from tests.net.harness import A4, B4, listen_udp, received
from tests.net.test_datapath_gateway import L4, R4, R6, _network

pytestmark = pytest.mark.root

NETWORKS = (("10.1.0.0/24", "10.2.0.0/24"), ("2001:2:1::/64", "2001:2:2::/64"))


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[list[Namespace], list[Namespace]]]:
    with Lab() as lab:
        yield _network(lab)


@pytest.fixture
def gateways(network: tuple[list[Namespace], list[Namespace]], tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    made = [Host(namespace, tmp_path / namespace.label) for namespace in network[1]]
    try:
        yield made[0], made[1]
    finally:
        for host in made:
            host.stop()


def test_forwarded_traffic_of_both_families(
    network: tuple[list[Namespace], list[Namespace]], gateways: tuple[Host, Host], tmp_path: Path
) -> None:
    """One pair of SAs carries both families of two subnets. What pretends in the clear to be from the other subnet
    is dropped by the `fwd` policy. Without the SAs nothing passes, and with level `use` the clear does."""
    (left, right), _ = network
    ends = ((A4, B4), (B4, A4))

    def section(number: int, **template: str) -> dict[str, object]:
        here, there = ends[number]
        policies = []
        for near, far in NETWORKS if number == 0 else tuple(pair[::-1] for pair in NETWORKS):
            out, back = manual.policies(here, there, near=near, far=far, template=template)
            policies += [out, back, {**back, "direction": "fwd"}]
        return {"sas": manual.sas(A4, B4), "policies": policies}

    for number, host in enumerate(gateways):
        host.begin(section(number))
    ready(*gateways)
    with Capture(gateways[1].namespace, ["wan"], tmp_path / "wan.pcap") as capture:
        assert None not in ping(left, R4, count=3)
        assert None not in ping(left, R6, count=3)
        capture.flush()
        assert kinds(capture) == {"esp"}
    listener = listen_udp(right, R4, 7001)
    _pretend(gateways[0].namespace, L4, R4, 7001)
    time.sleep(0.3)
    assert received(listener) == []
    assert gateways[0].oepy("sa", "flush").returncode == 0
    assert ping(left, R4, count=2, timeout=0.3) == [None] * 2
    for number, host in enumerate(gateways):
        host.reload(section(number, level="use"))
    assert None not in ping(left, R4, count=1)
    for host in gateways:
        assert host.oepy("sa", "flush").returncode == 0
    with Capture(gateways[1].namespace, ["wan"], tmp_path / "wan2.pcap") as capture:
        assert None not in ping(left, R4, count=2)
        capture.flush()
        assert kinds(capture) == {"clear"}
    _pretend(gateways[0].namespace, L4, R4, 7001)
    listener.settimeout(15)
    assert listener.recv(100) == b"clear"
    listener.close()


def _pretend(gateway: Namespace, source: str, destination: str, port: int) -> None:
    """A UDP packet with the address of the subnet, which the gateway's own rules let pass (own mark)."""
    with gateway.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.setsockopt(socket.IPPROTO_IP, 19, 1)  # IP_TRANSPARENT: from an address that is not ours
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK_OWN)
        sock.bind((source, 0))
        sock.sendto(b"clear", (destination, port))
