"""Names that lead to an address, with real packets: hosts whose reverse zone holds no key, BIND, the relay."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address

import dns.message
import dns.query
import pytest

from oepy.control import protocol
from oepy.keys import HostKey
from oepy.lab import demo
from oepy.lab.capture import Capture
from oepy.lab.network import HostPlan, LabHost, LabNetwork
from oepy.lab.probe import Pinger

pytestmark = pytest.mark.root

RELAY = "127.0.0.54"
CLEAR_V4 = "198.18.0.40"
HOSTS = (
    HostPlan("alpha", "198.18.0.10", "2001:2::10", True, "none"),
    HostPlan("beta", "198.18.0.20", "2001:2::20", True, "own"),
    HostPlan("gamma", "198.18.0.30", "2001:2::30", True, "none"),
    HostPlan("legacy", CLEAR_V4, "2001:2::40", False, "none"),
)


def at_name(owner: str, key: HostKey) -> str:
    return (
        f"{owner} IN IPSECKEY 10 0 {int(key.public.algorithm)} . {base64.b64encode(key.public.data).decode()}"
    )


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabNetwork]:
    """alpha and gamma publish at their names only; evil's names lead to the addresses of others."""
    directory = tmp_path_factory.mktemp("names")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    keys = {name: HostKey.generate("ed25519") for name in ("alpha", "gamma", "evil")}
    names = [at_name("alpha", keys["alpha"]), at_name("gamma", keys["gamma"])]
    for name, address in (("evil-legacy", CLEAR_V4), ("evil-beta", "198.18.0.20")):
        names += [f"{name} IN A {address}", at_name(name, keys["evil"])]
    with LabNetwork(directory / "run", hosts=HOSTS, host_keys=keys, odd_records={"oe.example": names}) as lab:
        lab.build()
        for name in ("alpha", "gamma"):
            lab.hosts[name].identity = f"{name}.oe.example"
        lab.hosts["alpha"].dns = {"relay": RELAY}
        lab.start_daemons()
        yield lab


@pytest.fixture(scope="module")
def capture(network: LabNetwork) -> Iterator[Capture]:
    with network.capture(network.directory / "wire.pcap") as running:
        yield running


def resolve(host: LabHost, name: str, kind: str = "A") -> list[str]:
    """What a program of this host does first."""
    query = dns.message.make_query(name, kind)
    with host.namespace.entered():
        reply = dns.query.udp(query, RELAY, timeout=5)
    return [rdata.address for rrset in reply.answer for rdata in rrset]


def ping(host: LabHost, address: str, seconds: float = 6.0) -> bool:
    with host.namespace.entered(), Pinger(address) as pinger:
        pinger.send(1)
        return pinger.receive(seconds) is not None


def explain(host: LabHost, destination: str) -> dict[str, object]:
    command = [sys.executable, "-m", "oepy", "-c", str(host.config_file), "explain", destination, "--json"]
    result: subprocess.CompletedProcess[str] = host.namespace.run(*command)
    story = json.loads(result.stdout)
    assert isinstance(story, dict)
    return story


def anew(host: LabHost, **policy: object) -> None:
    host.stop_daemon()
    host.policy = dict(policy)
    host.start_daemon()
    host.await_daemon()


@pytest.mark.parametrize("kind", ["A", "AAAA"])
def test_the_first_packet_is_protected_by_the_key_at_the_name(
    network: LabNetwork, capture: Capture, kind: str
) -> None:
    """Neither host has a reverse record. The lookup and IKE begin with the program's DNS question."""
    alpha, gamma = network.hosts["alpha"], network.hosts["gamma"]
    since = time.time()
    address = gamma.plan.v4 if kind == "A" else gamma.plan.v6
    assert resolve(alpha, "gamma.oe.example", kind) == [address]
    deadline = time.monotonic() + 5
    while explain(alpha, address)["disposition"] != "private" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ping(alpha, address)
    story = explain(alpha, address)
    assert story["disposition"] == "private"
    assert story["authenticated"] == "name"
    notes = story["dns"]["notes"]  # type: ignore[index]
    assert any("gamma.oe.example. leads to" in note for note in notes)
    own = alpha.plan.v4 if kind == "A" else alpha.plan.v6
    packets = [packet for packet in capture.packets() if packet.time >= since]
    assert demo.clear_between(packets, own, address) == []


def test_a_false_name_leaves_everything_as_it_was(network: LabNetwork) -> None:
    """A stranger's name for a host without oepy: in the clear as before, after three seconds at most."""
    alpha = network.hosts["alpha"]
    assert resolve(alpha, "evil-legacy.oe.example") == [CLEAR_V4]
    begun = time.monotonic()
    assert ping(alpha, CLEAR_V4)
    assert time.monotonic() - begun < 5
    story = explain(alpha, CLEAR_V4)
    assert (story["disposition"], story["group"]) == ("clear", "private-or-clear")
    assert "no name that leads here could be proven" in str(story["reason"])


def test_the_peers_own_record_counts_and_not_the_strangers_name(network: LabNetwork) -> None:
    """beta has a reverse record."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    assert resolve(alpha, "evil-beta.oe.example") == [beta.plan.v4]
    assert ping(alpha, beta.plan.v4)
    story = explain(alpha, beta.plan.v4)
    assert (story["disposition"], story["authenticated"]) == ("private", "dns")


def test_private_needs_a_zone_that_is_trusted(network: LabNetwork, capture: Capture) -> None:
    """A name alone does not make `private` speak; below `dns.trusted_names` it does."""
    alpha, gamma = network.hosts["alpha"], network.hosts["gamma"]
    since = time.time()
    groups = {"groups": {"private": [f"{gamma.plan.v4}/32"]}}
    anew(alpha, **groups)
    resolve(alpha, "gamma.oe.example")
    assert not ping(alpha, gamma.plan.v4, 2.0)
    assert explain(alpha, gamma.plan.v4)["disposition"] == "blocked"
    alpha.dns = {"relay": RELAY, "trusted_names": ["oe.example"]}
    anew(alpha, **groups)
    resolve(alpha, "gamma.oe.example")
    assert ping(alpha, gamma.plan.v4)
    story = explain(alpha, gamma.plan.v4)
    assert (story["disposition"], story["authenticated"]) == ("private", "dns")
    packets = [packet for packet in capture.packets() if packet.time >= since]
    assert demo.clear_between(packets, alpha.plan.v4, gamma.plan.v4) == []


def test_the_relay_is_for_this_host_alone(network: LabNetwork) -> None:
    """It listens on loopback, and a resolver that asks itself is refused by the configuration."""
    alpha = network.hosts["alpha"]
    listening = alpha.namespace.run("ss", "-lnuH").stdout
    assert ip_address(RELAY).is_loopback
    assert f"{RELAY}:53" in listening
    assert f"{alpha.plan.v4}:53" not in listening
    relay = alpha.client.get(protocol.STATUS)["relay"]
    assert relay["listens"] == f"{RELAY}@53"
    assert relay["addresses_known"] == relay["counts"]["learned"] == 1
