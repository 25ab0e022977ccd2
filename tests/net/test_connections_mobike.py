"""MOBIKE with real links: a road warrior with two of them, a gateway that both lead to.

[warrior eth0 198.18.6.2] ── [wan0 198.18.6.1 gateway, lo 198.18.8.1 | 10.1.0.1] ── [inside 10.1.0.2]
[        eth1 198.18.7.2] ── [wan1 198.18.7.1                                  ]
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oepy.lab.capture import Capture
from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import Pinger
from tests.net.daemon_host import Host, kinds, two_with_a_secret

pytestmark = pytest.mark.root

GATE, INSIDE = "198.18.8.1", "10.1.0.2"
LINKS = (("eth0", "wan0", "198.18.6", 100), ("eth1", "wan1", "198.18.7", 200))
SECRETS = [{"type": "ike", "id": ["gate.example", "one.road.example"], "secret_file": "psk"}]


def lay_out(lab: Lab) -> tuple[Namespace, Namespace, Namespace]:
    warrior, gate, inside = (lab.namespace(name) for name in ("warrior", "gate", "inside"))
    for ours, theirs, net, _ in LINKS:
        lab.veth(warrior, gate, ours, theirs)
        warrior.address(ours, f"{net}.2/24")
        gate.address(theirs, f"{net}.1/24")
    lab.veth(gate, inside, "lan", "eth0")
    gate.address("lan", "10.1.0.1/24")
    gate.address("lo", f"{GATE}/32")
    inside.address("eth0", f"{INSIDE}/24")
    inside.ip("route", "add", "default", "via", "10.1.0.1")
    gate.ip("route", "add", "default", "via", "198.18.6.2")
    gate.sysctl("net.ipv4.ip_forward", "1")
    return warrior, gate, inside


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    with Lab() as lab:
        yield lay_out(lab)


@pytest.fixture
def hosts(network: tuple[Namespace, Namespace, Namespace], tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_with_a_secret(*network[:2], tmp_path) as made:
        yield made


def gate_section() -> dict[str, Any]:
    road = {
        "local_addrs": [GATE],
        "local": {"auth": "psk", "id": "gate.example"},
        "remote": {"auth": "psk", "id": "one.road.example"},
        "pools": ["four"],
        "children": {"net": {"local_ts": ["10.1.0.0/16"]}},
    }
    return {"connections": {"road": road}, "secrets": SECRETS, "pools": {"four": {"addrs": "10.9.0.0/24"}}}


def client_section() -> dict[str, Any]:
    home = {
        "remote_addrs": [GATE],
        "local": {"auth": "psk", "id": "one.road.example"},
        "remote": {"auth": "psk", "id": "gate.example"},
        "vips": ["0.0.0.0"],
        "children": {"net": {"remote_ts": ["10.1.0.0/16"], "start_action": "start"}},
    }
    return {"connections": {"home": home}, "secrets": SECRETS}


def routes(warrior: Namespace) -> None:
    """As a network manager leaves them: both links lead to the gateway, the first is preferred."""
    for ours, _, net, metric in LINKS:
        warrior.ip("route", "replace", f"{GATE}/32", "via", f"{net}.1", "metric", str(metric), "dev", ours)


class Stream:
    """Echoes from `namespace`, ten a second, until it is closed; then `lost` is how many got no reply."""

    def __init__(self, namespace: Namespace, target: str, source: str) -> None:
        with namespace.entered():
            self._pinger = Pinger(target, source=source)
        self._sent = 0
        self._seen: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                self._pinger.send(self._sent)
            self._sent += 1
            until = time.monotonic() + 0.1
            while (left := until - time.monotonic()) > 0:
                self._listen(left)
        until = time.monotonic() + 3.0
        while len(self._seen) < self._sent and (left := until - time.monotonic()) > 0:
            self._listen(left)

    def _listen(self, seconds: float) -> None:
        answer = self._pinger.receive(seconds)
        if answer is not None:
            self._seen.add(answer)

    def goes_on(self) -> None:
        """Wait for some more answers."""
        enough = len(self._seen) + 5
        wait_for(lambda: len(self._seen) >= enough, lambda: f"{self._sent} echoes, {len(self._seen)} answers")

    def close(self) -> int:
        self._ended.set()
        self._thread.join()
        self._pinger.close()
        assert self._sent
        return self._sent - len(self._seen)


def wait_for(condition: Any, what: Any, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def test_traffic_goes_on_over_another_link(
    network: tuple[Namespace, Namespace, Namespace], hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """The link in use goes down: within a second or two the same SAs go by the other, with the inner address that
    the warrior has; it comes back: they go back, and no ping is lost by that. The wire sees IKE and ESP alone."""
    travel(network, hosts, tmp_path, {}, 1.0)


def travel(
    network: tuple[Namespace, Namespace, Namespace],
    hosts: tuple[Host, Host],
    directory: Path,
    more: dict[str, Any],
    pace: float,
) -> None:
    """`more`: of both configurations; `pace`: how much slower than this machine everything is."""
    warrior, gate, _ = network
    client, server = hosts
    routes(warrior)
    server.start({}, **gate_section(), **more)
    client.start({}, **client_section(), **more)
    up = client.oepy("connection", "up", "home")
    assert up.returncode == 0, up.stdout + up.stderr + client.log() + server.log()
    (before,) = client.json("sas")
    assert before["local"] == "198.18.6.2:4500"

    def at(address: str) -> bool:
        (ours,), (theirs,) = client.json("sas"), server.json("sas")
        return bool(ours["local"] == f"{address}:4500" and theirs["remote"] == f"{address}:4500")

    with Capture(gate, ["wan0", "wan1"], directory / "wan.pcap") as capture:
        pings = Stream(warrior, INSIDE, "10.9.0.1")
        pings.goes_on()
        warrior.ip("link", "set", "eth0", "down")
        wait_for(lambda: at("198.18.7.2"), lambda: client.log() + server.log(), 15 * pace)
        pings.goes_on()
        assert pings.close() <= 20 * pace, client.log() + server.log()

        pings = Stream(warrior, INSIDE, "10.9.0.1")
        pings.goes_on()
        warrior.ip("link", "set", "eth0", "up")
        routes(warrior)
        wait_for(lambda: at("198.18.6.2"), lambda: client.log() + server.log(), 15 * pace)
        pings.goes_on()
        # The kernel receives at its new place at once, the peer hears of that a little later
        assert pings.close() <= (0 if pace == 1.0 else 10), client.log() + server.log()
        capture.flush()
        assert kinds(capture) <= {"ike", "esp", "arp", "icmp-error"}
    (after,) = client.json("sas")
    assert (after["spi_in"], after["spi_out"]) == (before["spi_in"], before["spi_out"])
    assert "connection-down" not in client.events()
    assert server.events().count("connection-up") == 1
