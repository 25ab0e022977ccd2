"""Opportunistic encryption for whole subnets: two gateways, each for the hosts behind it, whose records name it.

    a1 a2 a3 (198.18.100.0/24) ── alpha ──┬── wire (captured) ──┬── beta ── b1 b2 b3 (198.18.200.0/24)
                                          └── ns (BIND)         └── legacy (no oepy)

a3 and b3 have no records: nobody is their gateway, and they talk in the clear, to whom they like.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from oepy.control import protocol
from oepy.keys import HostKey
from oepy.lab import demo
from oepy.lab.capture import Capture
from oepy.lab.namespaces import Namespace
from oepy.lab.network import HostPlan, LabNetwork
from oepy.lab.probe import ping

pytestmark = pytest.mark.root

HOSTS = (
    HostPlan("alpha", "198.18.0.10", "2001:2::10", True, "own"),
    HostPlan("beta", "198.18.0.20", "2001:2::20", True, "own"),
    HostPlan("legacy", "198.18.0.40", "2001:2::40", False, "none"),
)
NETS = {"alpha": ("198.18.100", "2001:2:0:0:100"), "beta": ("198.18.200", "2001:2:0:0:200")}
V4_ZONE, V6_ZONE = "18.198.in-addr.arpa", "0.0.0.0.2.0.0.0.1.0.0.2.ip6.arpa"


def addresses(gateway: str, number: int) -> tuple[str, str]:
    four, six = NETS[gateway]
    return f"{four}.{number}", f"{six}::{number}"


def of(label: str) -> tuple[str, str]:
    return addresses("alpha" if label[0] == "a" else "beta", 10 + int(label[1]))


def record(client: str, gateway: str, key: HostKey) -> str:
    owner = ip_address(client).reverse_pointer.removesuffix(".arpa") + ".arpa."
    kind = 1 if ip_address(gateway).version == 4 else 2
    data = b64encode(key.public.data).decode()
    return f"{owner} 60 IN IPSECKEY 10 {kind} {int(key.public.algorithm)} {gateway} {data}"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabNetwork]:
    directory = tmp_path_factory.mktemp("subnets")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    keys = {name: HostKey.generate("ed25519") for name in ("alpha", "beta")}
    records: dict[str, list[str]] = {V4_ZONE: [], V6_ZONE: []}
    for plan in HOSTS[:2]:
        for number in (11, 12):
            four, six = addresses(plan.name, number)
            records[V4_ZONE].append(record(four, plan.v4, keys[plan.name]))
            records[V6_ZONE].append(record(six, plan.v6, keys[plan.name]))
    with LabNetwork(directory / "run", hosts=HOSTS, host_keys=keys, odd_records=records) as lab:
        lab.build()
        yield lab


@pytest.fixture(scope="module")
def clients(network: LabNetwork) -> dict[str, Namespace]:
    """a1 and a2 behind alpha, b1 and b2 behind beta; everybody knows the way."""
    made: dict[str, Namespace] = {}
    for name, other in (("alpha", "beta"), ("beta", "alpha")):
        gateway = network.hosts[name].namespace
        gateway.sysctl("net.ipv4.ip_forward", 1)
        gateway.sysctl("net.ipv6.conf.all.forwarding", 1)
        peer, (four, six) = network.hosts[other].plan, NETS[other]
        for host in network.hosts.values():
            if host.plan.name != other:
                host.namespace.ip("route", "add", f"{four}.0/24", "via", peer.v4)
                host.namespace.ip("-6", "route", "add", f"{six}::/80", "via", peer.v6)
        for number in (11, 12, 13):
            label = f"{name[0]}{number - 10}"
            client = network.lab.namespace(label)
            network.lab.veth(client, gateway, "eth0", f"lan{number}")
            own4, own6 = addresses(name, number)
            via4, via6 = addresses(name, 1)
            gateway.address(f"lan{number}", f"{via4}/32", f"{via6}/128")
            gateway.ip("route", "add", f"{own4}/32", "dev", f"lan{number}")
            gateway.ip("-6", "route", "add", f"{own6}/128", "dev", f"lan{number}")
            client.address("eth0", f"{own4}/24", f"{own6}/80")
            client.ip("route", "add", "default", "via", via4)
            client.ip("-6", "route", "add", "default", "via", via6)
            made[label] = client
    network.start_daemons()
    return made


@pytest.fixture(scope="module")
def capture(network: LabNetwork, clients: dict[str, Namespace]) -> Iterator[Capture]:
    with network.capture(network.directory / "wire.pcap") as running:
        yield running


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("source", "target"), [("a1", "b1"), ("b2", "a1"), ("a2", "b2")])
def test_hosts_behind_gateways_are_private_from_their_first_packet(
    network: LabNetwork,
    clients: dict[str, Namespace],
    capture: Capture,
    source: str,
    target: str,
    version: int,
) -> None:
    """Neither host knows of it: the gateways find each other by the records, and nothing crosses in the clear."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    for host in (alpha, beta):
        host.client.post(protocol.FLUSH, {"destination": None, "dns": "all"})
    ends = {label: of(label)[version == 6] for label in (source, target)}
    since = time.time()
    answers = ping(clients[source], ends[target], count=3, timeout=8)
    gateway = alpha if source[0] == "a" else beta
    story = gateway.client.get(protocol.EXPLAIN, destination=ends[target])
    assert None not in answers, story
    assert story["disposition"] == "private", story
    capture.flush()
    packets = [packet for packet in capture.packets() if packet.time >= since]
    assert demo.clear_between(packets, *ends.values()) == []
    assert any(packet.kind == "esp" for packet in packets)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("source", "target"), [("a3", "b1"), ("b3", "a1"), ("a3", "b3"), ("a1", "b3")])
def test_hosts_without_records_talk_in_the_clear_and_spoil_nothing(
    network: LabNetwork,
    clients: dict[str, Namespace],
    capture: Capture,
    source: str,
    target: str,
    version: int,
) -> None:
    """Beside their neighbours' tunnel to the same host, and without one. The first packet is lost where the
    tunnel was there before anybody asked about the sender."""
    for host in (network.hosts["alpha"], network.hosts["beta"]):
        host.client.post(protocol.FLUSH, {"destination": None, "dns": "all"})
    there = of(target)[version == 6]
    neighbour = f"{source[0]}2"
    first = ping(clients[source], there, count=1, timeout=3)
    assert first != [None] or target[1] != "3"
    assert None not in ping(clients[source], there, count=2, timeout=8)
    since = time.time()
    assert None not in ping(clients[neighbour], there, count=2, timeout=8)
    assert None not in ping(clients[source], there, count=2, timeout=8)
    capture.flush()
    packets = [packet for packet in capture.packets() if packet.time >= since]
    seen = demo.clear_between(packets, of(neighbour)[version == 6], there)
    assert bool(seen) is (target[1] == "3"), "a2 and b2 are private with whoever has a record"
    assert demo.clear_between(packets, of(source)[version == 6], there)


def test_the_last_stretch_is_the_gateways_own(network: LabNetwork, clients: dict[str, Namespace]) -> None:
    """beta talks to b1, and lets others do so, without asking itself for a tunnel: at once, and in the clear."""
    beta, legacy = network.hosts["beta"], network.hosts["legacy"]
    beta.client.post(protocol.FLUSH, {"destination": None, "dns": "all"})
    target = addresses("beta", 11)[0]
    assert None not in ping(legacy.namespace, target, count=2, timeout=4)
    assert None not in ping(beta.namespace, target, count=2, timeout=4)
    story = beta.client.get(protocol.EXPLAIN, destination=target)
    assert (story["disposition"], story["reason"][:24]) == ("clear", "this host is its gateway"), story


def test_the_gateways_themselves_and_others_are_as_ever(
    network: LabNetwork, clients: dict[str, Namespace]
) -> None:
    assert None not in ping(network.hosts["alpha"].namespace, "198.18.0.20", count=2, timeout=8)
    assert None not in ping(clients["a1"], "198.18.0.40", count=2, timeout=8)
    story = network.hosts["alpha"].client.get(protocol.EXPLAIN, destination="198.18.0.40")
    assert story["disposition"] == "clear"
