"""Opportunistic encryption by certificates, with real packets: nobody publishes a key, the client has nothing.

SERVER has a certificate that names its address, NAMED one for its name alone, STRANGER one of another CA; LEGACY
knows nothing of IKE.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from oepy.control import protocol
from oepy.keys import HostKey
from oepy.lab import demo
from oepy.lab.capture import Capture
from oepy.lab.network import HostPlan, LabHost, LabNetwork
from oepy.lab.probe import ping
from tests.fakes.certificates import DNS, IP, Holder, pem

pytestmark = [pytest.mark.root, pytest.mark.any_kernel]

CLIENT = HostPlan("alpha", "198.18.0.10", "2001:2::10", True, "none")
SERVER = HostPlan("beta", "198.18.0.20", "2001:2::20", True, "none")
NAMED = HostPlan("gamma", "198.18.0.30", "2001:2::30", True, "none")
LEGACY = HostPlan("legacy", "198.18.0.40", "2001:2::40", False, "none")
STRANGER = HostPlan("impostor", "198.18.0.50", "2001:2::50", True, "none")
HOSTS = (CLIENT, SERVER, NAMED, LEGACY, STRANGER)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabNetwork]:
    directory = tmp_path_factory.mktemp("vouched")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    now = datetime.datetime.now(datetime.UTC)
    root, other = Holder("Root of the test", moment=now), Holder("Another root", moment=now)
    of_server = [DNS("beta.oe.example"), *(IP(ip_address(text)) for text in (SERVER.v4, SERVER.v6))]
    holders = {
        "beta": Holder("beta", root, ca=False, alternatives=of_server, moment=now),
        "gamma": Holder("gamma", root, ca=False, alternatives=[DNS("gamma.oe.example")], moment=now),
        "impostor": Holder(
            "impostor", other, ca=False, alternatives=[IP(ip_address(STRANGER.v4))], moment=now
        ),
    }
    keys = {name: HostKey(holder.key) for name, holder in holders.items()}
    (directory / "root.pem").write_bytes(pem(root))
    with LabNetwork(directory / "run", hosts=HOSTS, host_keys=keys) as lab:
        lab.build()
        for name, holder in holders.items():
            host = lab.hosts[name]
            certificate = host.directory / "own.pem"
            certificate.write_bytes(pem(holder))
            host.certs = (str(certificate),)
            host.identity = None if name == "impostor" else f"{name}.oe.example"
        lab.hosts["alpha"].policy = policy(directory, private=[SERVER.v4, SERVER.v6])
        lab.start_daemons()
        yield lab


def policy(directory: Path, private: list[str]) -> dict[str, object]:
    return {
        "groups": {"private": private},
        "certificates": {
            "cacerts": [str(directory / "root.pem")],
            "peers": ["198.18.0.0/24", "2001:2::/64"],
        },
    }


@pytest.fixture
def wire(network: LabNetwork, tmp_path: Path) -> Iterator[Capture]:
    with network.capture(tmp_path / "wire.pcap") as capture:
        yield capture


def pings(host: LabHost, address: str) -> int:
    """How many of three are answered."""
    return 3 - ping(host.namespace, address, count=3, timeout=5.0).count(None)


def explained(host: LabHost, address: str) -> dict[str, object]:
    command = [sys.executable, "-m", "oepy", "-c", str(host.config_file), "explain", "--json", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(done.stdout))


def of_client(network: LabNetwork, peer: str) -> list[str]:
    sas = network.hosts["alpha"].client.get(protocol.SAS)
    return [sa["authenticated"] for sa in sas if sa["peer"] == peer]


@pytest.mark.parametrize("version", [4, 6])
def test_a_certificate_for_the_address_satisfies_private(
    network: LabNetwork, wire: Capture, version: int
) -> None:
    """The first ping of all is answered, nothing is in the clear, and `explain` says by what."""
    alpha, address = network.hosts["alpha"], SERVER.v4 if version == 4 else SERVER.v6
    since = time.time()
    assert pings(alpha, address) == 3, alpha.log_end()
    seen = demo.between(
        [packet for packet in wire.packets() if packet.time >= since],
        *((CLIENT.v4, SERVER.v4) if version == 4 else (CLIENT.v6, SERVER.v6)),
    )
    assert seen["clear"] == 0
    assert seen["esp"] > 0
    assert of_client(network, address) == ["x509"]
    story = explained(alpha, address)
    assert (story["disposition"], story["group"]) == ("private", "private")
    (theirs,) = [
        sa for sa in network.hosts["beta"].client.get(protocol.SAS) if sa["peer"] == alpha.address(version)
    ]
    assert theirs["authenticated"] == "null"


def test_a_certificate_for_the_name_protects_what_would_be_in_the_clear(
    network: LabNetwork, wire: Capture
) -> None:
    """The name leads to the address in signed zones."""
    alpha = network.hosts["alpha"]
    assert pings(alpha, NAMED.v4) == 3, alpha.log_end()
    seen = demo.between(list(wire.packets()), CLIENT.v4, NAMED.v4)
    assert seen["clear"] == 0
    assert of_client(network, NAMED.v4) == ["name"]


@pytest.mark.parametrize("peer", [LEGACY, STRANGER], ids=lambda plan: plan.name)
def test_without_a_good_certificate_it_is_as_before(network: LabNetwork, peer: HostPlan) -> None:
    """In the clear after seconds, with a reason. (Whoever was refused has a tunnel until it hears of that: its
    first reply may go there.)"""
    alpha = network.hosts["alpha"]
    assert pings(alpha, peer.v4) >= (3 if peer is LEGACY else 2), alpha.log_end()
    assert of_client(network, peer.v4) == []
    story = explained(alpha, peer.v4)
    assert story["disposition"] == "clear"
    assert "no certificate could be proven" in str(story["reason"])


def test_a_reload_takes_the_trust_back(network: LabNetwork) -> None:
    """Without the section the tunnels by certificate go, and `private` stays shut."""
    alpha = network.hosts["alpha"]
    kept = alpha.policy
    alpha.policy = {"groups": {"private": [SERVER.v4, SERVER.v6]}}
    alpha.reload_daemon()
    try:
        assert pings(alpha, SERVER.v4) == 0
        assert of_client(network, SERVER.v4) == []
        assert explained(alpha, SERVER.v4)["disposition"] == "blocked"
    finally:
        alpha.policy = kept
        alpha.reload_daemon()
    assert pings(alpha, SERVER.v4) == 3, alpha.log_end()
