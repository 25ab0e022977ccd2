"""Whole daemons in the second kernel: alpha with the kernel's ESP, beta with the userland one, keys in DNS."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from oepy.control import protocol
from oepy.lab import demo
from oepy.lab.capture import Capture
from oepy.lab.network import HOSTS, LabHost, LabNetwork

# The demonstration has the same path between two kernels (make demo-kernel); daemons start slowly in there
pytestmark = [pytest.mark.kernel, pytest.mark.root, pytest.mark.long, pytest.mark.timeout(400)]

DATAPATHS = {"alpha": "auto", "beta": "tun", "gamma": "xfrm"}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabNetwork]:
    directory = tmp_path_factory.mktemp("lab")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    plans = tuple(plan for plan in HOSTS if plan.name in DATAPATHS)
    with LabNetwork(directory / "run", hosts=plans) as lab:
        lab.build()
        for name, host in lab.hosts.items():
            host.datapath = DATAPATHS[name]
        lab.start_daemons()
        yield lab


@pytest.fixture(scope="module")
def capture(network: LabNetwork) -> Iterator[Capture]:
    with network.capture(network.directory / "wire.pcap") as running:
        yield running


def oepy(host: LabHost, *argv: str) -> subprocess.CompletedProcess[str]:
    """One command of a user on that host."""
    return host.namespace.run(
        sys.executable, "-m", "oepy", "-c", str(host.config_file), *argv, check=False, timeout=120
    )


def esp_ports(capture: Capture, one: str, other: str) -> set[tuple[int, int]]:
    """Of ESP between two hosts: (4500, 4500) in UDP, (0, 0) plain."""
    return {
        (packet.source_port, packet.destination_port)
        for packet in capture.packets()
        if packet.kind == "esp" and {str(packet.source), str(packet.destination)} == {one, other}
    }


def test_each_host_has_the_datapath_of_its_configuration(network: LabNetwork) -> None:
    """`auto` finds the kernel's by trying, and says so; doctor as well."""
    found = {name: host.client.get(protocol.STATUS) for name, host in network.hosts.items()}
    assert {name: status["datapath"] for name, status in found.items()} == {
        "alpha": "xfrm",
        "beta": "tun",
        "gamma": "xfrm",
    }
    assert found["alpha"]["datapath_mode"] == "interface"
    assert "work" in found["alpha"]["datapath_reason"]
    told = json.loads(oepy(network.hosts["alpha"], "doctor", "--json").stdout)
    verdicts = {item["subject"]: item["verdict"] for item in told}
    for subject in ("ESP over IPv4", "ESP over IPv6", "XFRM interface", "datapath"):
        assert verdicts[subject] == "good", told


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("source", "destination", "ports"),
    [("alpha", "beta", (4500, 4500)), ("gamma", "beta", (4500, 4500)), ("gamma", "alpha", (0, 0))],
)
def test_first_packets_go_protected(
    network: LabNetwork,
    capture: Capture,
    source: str,
    destination: str,
    ports: tuple[int, int],
    version: int,
) -> None:
    """None lost, none in the clear. Between two kernels ESP is plain; the userland one wants it in UDP."""
    row = demo.run_row(network, capture, source, destination, version)
    assert (row.seen, row.clear_packets, row.problems) == ("private", 0, [])
    hosts = network.hosts[source], network.hosts[destination]
    assert esp_ports(capture, hosts[0].address(version), hosts[1].address(version)) == {ports}


def test_the_kernel_counts_for_the_sas_command(network: LabNetwork) -> None:
    """Bytes and packets of each SA, as `ip -s xfrm state` would show them."""
    listed = json.loads(oepy(network.hosts["alpha"], "sas", "--json").stdout)
    assert len(listed) == 4
    assert all(sa["packets_in"] > 0 and sa["packets_out"] > 0 for sa in listed)


def test_nothing_is_left_after_a_stop(network: LabNetwork) -> None:
    """No SA, policy, device, rule or table."""
    alpha = network.hosts["alpha"]
    alpha.stop_daemon()
    words = "ip xfrm state; ip xfrm policy; ip rule; ip -6 rule; ip link; nft list tables"
    left = alpha.namespace.run("sh", "-c", words).stdout
    for word in ("aead", "0x4545", "0x6f0", "17733", "oe0", "table inet oepy"):
        assert word not in left, left
