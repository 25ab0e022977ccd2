"""Two hosts that are `private` to each other talk all the time, while everything goes wrong that can.

        alpha ───────── wire (captured) ───────── beta         numbered datagrams, 50 a second each way

Every round does one of: kill -9 of a daemon at a random moment and its restart, rekey, a Delete from the peer, the
peer's silence (its link is down), an address removed and put back. Nothing may be in the clear on the wire, ever;
and what is sent while nothing is going wrong arrives.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from oepy.control import protocol
from oepy.lab.network import HostPlan, LabHost, LabNetwork

pytestmark = [pytest.mark.root, pytest.mark.any_kernel, pytest.mark.timeout(1500)]

CALM_SECONDS = 1.0  # of undisturbed traffic at the end of a round, all of which must arrive
RECOVERY_SECONDS = 90.0
EDGE = 0.3  # seconds at the ends of a calm that are not judged
ALPHA = HostPlan("alpha", "198.18.0.10", "2001:2::10", True, "own")
BETA = HostPlan("beta", "198.18.0.20", "2001:2::20", True, "own")

# Sends a numbered datagram every 20 ms, and writes down what it receives: (time, number) each
_TALKER = """
import json, select, signal, socket, sys, time
own, peer, path = sys.argv[1:]
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", 7000))
going = True
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, stop)
sent, received, following = [], [], time.time()
while going:
    left = following - time.time()
    if left <= 0:
        try:
            sock.sendto(len(sent).to_bytes(4, "big"), (peer, 7000))
        except OSError:
            pass
        sent.append(time.time())
        following = max(following + 0.02, time.time() - 0.1)
        continue
    if select.select([sock], [], [], left)[0]:
        try:
            data, _ = sock.recvfrom(100)
        except OSError:  # an ICMP error
            continue
        received.append(int.from_bytes(data, "big"))
        with open(path + ".last", "w") as last:
            last.write(str(time.time()))
with open(path, "w") as out:
    json.dump({"sent": sent, "received": received}, out)
"""


@dataclass
class Talk:
    """What one side has sent, and what the other has got of it."""

    sent: list[float]
    received: set[int]

    def lost_between(self, start: float, end: float) -> list[int]:
        return [n for n, at in enumerate(self.sent) if start <= at <= end and n not in self.received]


@dataclass
class Storm:
    network: LabNetwork
    chance: random.Random
    calms: list[tuple[float, float, str]] = field(default_factory=list)

    @property
    def hosts(self) -> tuple[LabHost, LabHost]:
        return self.network.hosts["alpha"], self.network.hosts["beta"]

    def either(self) -> tuple[LabHost, LabHost]:
        one, other = self.hosts
        return (one, other) if self.chance.random() < 0.5 else (other, one)

    def kill(self) -> None:
        host, _ = self.either()
        time.sleep(self.chance.random())
        host.kill_daemon()
        time.sleep(self.chance.random() * 2)
        host.start_daemon()
        host.await_daemon()

    def rekey(self) -> None:
        host, peer = self.either()
        assert host.client.post(protocol.REKEY, {"destination": peer.plan.v4})["rekeyed"]

    def delete(self) -> None:
        host, peer = self.either()
        host.client.post(protocol.TERMINATE, {"destination": peer.plan.v4})

    def silence(self) -> None:
        host, _ = self.either()
        host.namespace.ip("link", "set", "eth0", "down")
        time.sleep(1 + self.chance.random() * 2)
        host.namespace.ip("link", "set", "eth0", "up")
        host.namespace.address("eth0", f"{host.plan.v6}/48")  # a device that goes down forgets it

    def readdress(self) -> None:
        host, _ = self.either()
        host.namespace.ip("address", "del", f"{host.plan.v4}/15", "dev", "eth0")
        time.sleep(0.5 + self.chance.random())
        host.namespace.address("eth0", f"{host.plan.v4}/15")

    def recover(self, what: str, logs: tuple[Path, Path]) -> None:
        """Until both sides hear each other again, and then a calm."""
        since, deadline = time.time(), time.time() + RECOVERY_SECONDS
        while not all(_last(log) > since for log in logs):
            assert time.time() < deadline, f"no traffic again {RECOVERY_SECONDS:.0f} s after: {what}"
            time.sleep(0.02)
        start = time.time()
        time.sleep(CALM_SECONDS)
        self.calms.append((start, time.time(), what))


def _last(log: Path) -> float:
    try:
        return float(log.with_name(log.name + ".last").read_text() or 0)
    except FileNotFoundError:
        return 0.0


@pytest.fixture
def network(tmp_path: Path) -> Iterator[LabNetwork]:
    tmp_path.chmod(0o755)
    with LabNetwork(tmp_path / "lab", hosts=(ALPHA, BETA)) as made:
        (tmp_path / "lab").mkdir()
        (tmp_path / "lab").chmod(0o755)
        made.build()
        yield made


@pytest.mark.parametrize("rounds", [10, pytest.param(20, marks=pytest.mark.long)])
def test_nothing_private_is_ever_in_the_clear(network: LabNetwork, tmp_path: Path, rounds: int) -> None:
    """Rounds of crashes, rekeys, Deletes, silence, moving addresses: none in the clear, none lost in a calm."""
    seed = random.randrange(2**32)
    storm = Storm(network, random.Random(seed))
    for host, peer in (storm.hosts, storm.hosts[::-1]):
        host.policy = {"groups": {"private": [f"{peer.plan.v4}/32", f"{peer.plan.v6}/128"]}}
    network.start_daemons()
    logs = (tmp_path / "alpha.talk", tmp_path / "beta.talk")
    kinds: list[Callable[[], None]] = [storm.kill, storm.rekey, storm.delete, storm.silence, storm.readdress]
    with network.capture(tmp_path / "leak.pcap") as capture:
        talkers = [
            host.namespace.popen(sys.executable, "-c", _TALKER, host.plan.v4, peer.plan.v4, str(log))
            for host, peer, log in ((*storm.hosts, logs[0]), (*storm.hosts[::-1], logs[1]))
        ]
        storm.recover("the start", logs)
        order = [kinds[number % len(kinds)] for number in range(rounds)]
        storm.chance.shuffle(order)
        for disturb in order:
            disturb()
            storm.recover(disturb.__name__, logs)
        time.sleep(1)
        talks = _end(talkers, logs)
        packets = list(capture.packets())
    pair = {ip_address(ALPHA.v4), ip_address(BETA.v4)}
    between = [packet for packet in packets if {packet.source, packet.destination} == pair]
    leaked = [packet for packet in between if packet.kind == "clear"]
    assert leaked == [], f"seed {seed}: {leaked[:5]}"
    assert sum(packet.kind == "esp" for packet in between) > 500, "no ESP on the wire: the test saw nothing"
    for start, end, what in storm.calms:
        for name, talk in talks.items():
            lost = talk.lost_between(start + EDGE, end - EDGE)
            assert lost == [], f"seed {seed}: {name} lost {len(lost)} packets in the calm after: {what}"


def _end(talkers: list[subprocess.Popen[str]], logs: tuple[Path, Path]) -> dict[str, Talk]:
    for process in talkers:
        process.terminate()
        process.wait(10)
    alpha, beta = (json.loads(log.read_text()) for log in logs)
    return {
        "alpha": Talk(alpha["sent"], set(beta["received"])),
        "beta": Talk(beta["sent"], set(alpha["received"])),
    }
