"""strongSwan's charon publishes no key, and has a certificate: opportunistic encryption takes it, both begin.
(charon has no AUTH NULL: it knows oepy's key, which stands in the DNS too.)"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from oepy.control import protocol
from oepy.keys import HostKey, public_pem
from oepy.lab import demo
from oepy.lab.capture import Capture
from oepy.lab.network import HOSTS, LabNetwork
from oepy.lab.probe import ping
from tests.fakes.certificates import IP, Holder, pem
from tests.interop.charon import KERNEL_ESP, Charon, charon

pytestmark = [pytest.mark.root, pytest.mark.interop]

ALPHA = HOSTS[0]
SWAN = replace(HOSTS[2], daemon=False)
CONF = f"""
connections {{
  oe {{
    version = 2
    local_addrs = {SWAN.v4}
    remote_addrs = {ALPHA.v4}
    encap = {"no" if KERNEL_ESP else "yes"}
    local {{
      auth = pubkey
      id = {SWAN.v4}
      certs = own.pem
    }}
    remote {{
      auth = pubkey
      id = {ALPHA.v4}
      pubkeys = peer.pem
    }}
    children {{
      host {{
        local_ts = {SWAN.v4}
        remote_ts = {ALPHA.v4}
      }}
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LabNetwork, Charon, Capture]]:
    directory = tmp_path_factory.mktemp("vouched")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    now = datetime.datetime.now(datetime.UTC)
    root = Holder("Root of the test", moment=now)
    holder = Holder("swan", root, ca=False, alternatives=[IP(ip_address(SWAN.v4))], moment=now)
    key = HostKey.generate("ecdsa-p256")
    (directory / "root.pem").write_bytes(pem(root))
    with LabNetwork(directory / "lab", hosts=(ALPHA, SWAN), host_keys={ALPHA.name: key}) as network:
        network.build()
        network.hosts[ALPHA.name].policy = {
            "groups": {"private": [SWAN.v4]},
            "certificates": {"cacerts": [str(directory / "root.pem")], "peers": [f"{SWAN.v4}/32"]},
        }
        network.start_daemons()
        with charon(network.hosts[SWAN.name].namespace.name, directory / "charon") as daemon:
            files = {
                "private/own.pem": HostKey(holder.key).to_pem(),
                "x509/own.pem": pem(holder),
                "x509ca/root.pem": pem(root),
                "pubkey/peer.pem": public_pem(key.public).encode(),
            }
            daemon.load(CONF, files)
            with network.capture(directory / "wire.pcap") as capture:
                yield network, daemon, capture


def check(ground: tuple[LabNetwork, Charon, Capture], since: float) -> None:
    """Pings both ways, through ESP alone, and by what it is authenticated."""
    network, daemon, capture = ground
    for one, other in ((ALPHA, SWAN), (SWAN, ALPHA)):
        lost = ping(network.hosts[one.name].namespace, other.v4, count=3, timeout=5.0).count(None)
        assert not lost, daemon.tail()
    seen = demo.between([p for p in capture.packets() if p.time >= since], ALPHA.v4, SWAN.v4)
    assert seen["clear"] == 0
    assert seen["esp"] > 0
    (sa,) = network.hosts[ALPHA.name].client.get(protocol.SAS)
    assert sa["authenticated"] == "x509"


def oepy_began(network: LabNetwork) -> bool:
    events = network.hosts[ALPHA.name].client.get(protocol.EVENTS)
    return bool([event for event in events if event["event"] == "ike-established"][-1]["initiator"])


def test_oepy_asks_strongswan_for_its_certificate(ground: tuple[LabNetwork, Charon, Capture]) -> None:
    """The group is `private`: not one ping is lost."""
    check(ground, time.time())
    assert oepy_began(ground[0])
    assert "INSTALLED, TUNNEL" in ground[1].sas()


def test_strongswan_begins_and_shows_its_certificate(ground: tuple[LabNetwork, Charon, Capture]) -> None:
    network, daemon, _ = ground
    daemon.swanctl("--terminate", "--ike", "oe")
    since = time.time()
    daemon.swanctl("--initiate", "--child", "host", "--timeout", "30")
    check(ground, since)
    assert not oepy_began(network)
