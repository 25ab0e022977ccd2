"""The whole path against somebody else's IKE and ESP: oepy's daemon on one host, strongSwan's charon with its
ESP on the other (kernel-libipsec; in the second kernel both use the kernel's), keys in signed DNS, packets counted
on the wire."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from oepy.control import protocol
from oepy.keys import HostKey, public_pem
from oepy.lab import demo
from oepy.lab.capture import Capture
from oepy.lab.nameserver import ExtraHost
from oepy.lab.network import HOSTS, HostPlan, LabHost, LabNetwork
from oepy.lab.probe import Pinger
from tests.interop.charon import KERNEL_ESP, Charon, charon

pytestmark = [pytest.mark.root, pytest.mark.interop, pytest.mark.any_kernel]

SWAN = HostPlan("swan", "198.18.0.60", "2001:2::60", False, "none")
ALPHA = HOSTS[0]
CONF = f"""
connections {{
  oe {{
    version = 2
    local_addrs = 198.18.0.60
    remote_addrs = 198.18.0.10
    encap = {"no" if KERNEL_ESP else "yes"}
    local {{
      auth = pubkey
      id = 198.18.0.60
      pubkeys = own.pem
    }}
    remote {{
      auth = pubkey
      id = 198.18.0.10
      pubkeys = peer.pem
    }}
    children {{
      host {{
        local_ts = 198.18.0.60
        remote_ts = 198.18.0.10
        mode = tunnel
      }}
    }}
  }}
}}
"""


@pytest.fixture(scope="module", params=["ed25519", "ecdsa-p256", "rsa-3072"])
def ground(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LabNetwork, Charon, Capture]]:
    directory = tmp_path_factory.mktemp("swan")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    key, own = HostKey.generate(request.param), HostKey.generate(request.param)
    addresses = ip_address(SWAN.v4), ip_address(SWAN.v6)
    record = ExtraHost("swan.oe.example", addresses[0], addresses[1], key.public)
    with LabNetwork(
        directory / "lab", hosts=(ALPHA, SWAN), extra_dns=[record], host_keys={"swan": key, "alpha": own}
    ) as network:
        network.build()
        network.start_daemons()
        swan = network.hosts["swan"]
        with charon(swan.namespace.name, directory / "charon") as daemon:
            files = {
                "private/own.pem": key.to_pem(),
                "pubkey/own.pem": public_pem(key.public).encode(),
                "pubkey/peer.pem": public_pem(own.public).encode(),
            }
            daemon.load(CONF, files)
            with network.capture(directory / "wire.pcap") as capture:
                yield network, daemon, capture


def pings(host: LabHost, address: str, count: int) -> int:
    got = 0
    with host.namespace.entered(), Pinger(address) as pinger:
        for sequence in range(count):
            pinger.send(sequence)
            got += pinger.receive(5.0) is not None
    return got


def only_esp(capture: Capture, since: float) -> bool:
    packets = [packet for packet in capture.packets() if packet.time >= since]
    seen = demo.between(packets, ALPHA.v4, SWAN.v4)
    return seen["clear"] == 0 and seen["esp"] > 0


def test_the_first_ping_reaches_strongswan_through_esp(ground: tuple[LabNetwork, Charon, Capture]) -> None:
    """oepy starts: trap, DNS, IKE with charon, ESP; the first ping is answered and nothing is in the clear."""
    network, daemon, capture = ground
    since = time.time()
    assert pings(network.hosts["alpha"], SWAN.v4, 5) == 5, daemon.tail()
    assert only_esp(capture, since)
    (sa,) = network.hosts["alpha"].client.get(protocol.SAS)
    assert sa["authenticated"] == "dns"
    assert "INSTALLED, TUNNEL" in daemon.sas()
    assert pings(network.hosts["swan"], ALPHA.v4, 5) == 5
    assert only_esp(capture, since)


def test_strongswan_starts_and_pings_through(ground: tuple[LabNetwork, Charon, Capture]) -> None:
    """charon starts, with oepy as responder that looks its key up in DNS; both sides ping through ESP."""
    network, daemon, capture = ground
    alpha = network.hosts["alpha"]
    daemon.swanctl("--terminate", "--ike", "oe")  # else charon would use that IKE SA
    since = time.time()
    daemon.swanctl("--initiate", "--child", "host", "--timeout", "30")
    assert pings(network.hosts["swan"], ALPHA.v4, 5) == 5, daemon.tail()
    assert pings(alpha, SWAN.v4, 5) == 5
    assert only_esp(capture, since)
    begun = [event for event in alpha.client.get(protocol.EVENTS) if event["event"] == "ike-established"]
    assert not begun[-1]["initiator"]


def test_the_tunnel_survives_rekeying_by_both(ground: tuple[LabNetwork, Charon, Capture]) -> None:
    """charon rekeys the CHILD SA and the IKE SA while pings run: none is lost, none is in the clear."""
    network, daemon, capture = ground
    alpha = network.hosts["alpha"]
    since = time.time()
    for what in (("--child", "host"), ("--ike", "oe")):
        daemon.swanctl("--rekey", *what)
        assert pings(alpha, SWAN.v4, 5) == 5, daemon.tail()
    assert only_esp(capture, since)
    assert len(alpha.client.get(protocol.SAS)) == 1
