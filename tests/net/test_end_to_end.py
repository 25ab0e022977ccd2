"""The whole path with real packets: the lab's hosts, real BIND, daemons, and a capture on the wire."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oepy.control import protocol
from oepy.lab import demo
from oepy.lab.capture import Capture
from oepy.lab.network import LabHost, LabNetwork
from oepy.lab.probe import Pinger

pytestmark = pytest.mark.root

MALFORMED = "198.18.0.70"
ODD_RECORDS = {"18.198.in-addr.arpa": ["70.0 IN IPSECKEY 10 0 2 . AAAA"]}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabNetwork]:
    directory = tmp_path_factory.mktemp("lab")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    with LabNetwork(directory / "run", odd_records=ODD_RECORDS) as lab:
        lab.build()
        lab.start_daemons()
        yield lab


@pytest.fixture(scope="module")
def capture(network: LabNetwork) -> Iterator[Capture]:
    with network.capture(network.directory / "wire.pcap") as running:
        yield running


def oepy(host: LabHost, *argv: str) -> subprocess.CompletedProcess[str]:
    """One command of a user on that host."""
    return host.namespace.run(
        sys.executable, "-m", "oepy", "-c", str(host.config_file), *argv, check=False, timeout=60
    )


def fresh(*hosts: LabHost) -> None:
    """The hosts with their default policy, nothing decided and no tunnel."""
    for host in hosts:
        host.stop_daemon()
    for host in hosts:
        host.policy = {}
        host.start_daemon()
    for host in hosts:
        host.await_daemon()


BLOCKED = 1.0  # seconds without an answer, where none is to come


def ping(host: LabHost, address: str, count: int = 1, within: float = 15.0) -> int:
    """How many of `count` echoes came back; each is sent once."""
    got = 0
    with host.namespace.entered(), Pinger(address) as pinger:
        for sequence in range(count):
            with contextlib.suppress(PermissionError):  # a drop on the way out is told to the sender
                pinger.send(sequence)
                got += pinger.receive(within) is not None
    return got


def traces(host: LabHost) -> dict[str, str]:
    """What of ours is in the kernel of this host."""
    run = host.namespace.run
    return {
        "tables": " ".join(
            line for line in run("nft", "list", "tables").stdout.splitlines() if "oepy" in line
        ),
        "rules": " ".join(
            line
            for version in ("-4", "-6")
            for line in run("ip", version, "rule").stdout.splitlines()
            if "17733" in line
        ),
        "routes": "".join(
            run("ip", version, "route", "show", "table", "17733", check=False).stdout
            for version in ("-4", "-6")
        ),
        "device": run("ip", "link", "show", "oe0", check=False).stdout,
    }


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("source", "destination"), list(demo.EXPECTED))
def test_every_pair_of_the_demo(
    network: LabNetwork, capture: Capture, source: str, destination: str, version: int
) -> None:
    """Expected and seen agree by the capture, and the first packet itself is delivered."""
    row = demo.run_row(network, capture, source, destination, version)
    assert row.problems == []
    assert row.seen == row.expected


def test_private_never_leaks_whatever_happens_to_the_daemons(network: LabNetwork, capture: Capture) -> None:
    """beta's daemon stopped, alpha's killed and restarted: nothing in the clear, and private again after."""
    result = demo.run_private(network, capture, 9.0, lambda _: None)
    assert result.clear_packets == 0, result.steps
    assert result.as_expected, result.steps
    fresh(network.hosts["alpha"], network.hosts["beta"])


def test_the_status_and_the_sas_are_as_promised(network: LabNetwork) -> None:
    """`status`, `sas`, `peers`, `policies` and `explain` have the promised keys; exit status 0."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    assert oepy(alpha, "initiate", beta.plan.v4).returncode == 0
    assert ping(alpha, beta.plan.v4, 3) == 3
    (sa,) = json.loads(oepy(alpha, "sas", "--json").stdout)
    assert {
        "spi_in",
        "spi_out",
        "peer",
        "mode",
        "protocol",
        "encap",
        "algorithm",
        "local_ts",
        "remote_ts",
    } <= set(sa)
    assert (sa["authenticated"], sa["packets_out"], sa["packets_in"]) == ("dns", 3, 3)
    story = json.loads(oepy(alpha, "explain", beta.plan.v4, "--json").stdout)
    assert story["disposition"] == "private"
    assert story["dns"]["keys"][0]["record"] == "IPSECKEY"
    assert {"group", "prefix", "state", "reason", "ike", "sa", "since", "expires_in"} <= set(story)
    assert "private" in oepy(alpha, "peers").stdout
    assert json.loads(oepy(alpha, "policies", "--json").stdout)[-1]["group"] == "private-or-clear"
    assert oepy(alpha, "status").returncode == 0
    events = json.loads(oepy(alpha, "events", "--json").stdout)
    assert [
        event["event"] for event in events if event["event"] in ("trapped", "lookup", "negotiate", "private")
    ]


def test_a_malformed_key_record_blocks_and_is_named(network: LabNetwork, capture: Capture) -> None:
    """RFC 4322: deny even when permissive; `explain` says which record and why."""
    alpha = network.hosts["alpha"]
    since = time.time()
    assert ping(alpha, MALFORMED, within=2 * BLOCKED) == 0
    story = json.loads(oepy(alpha, "explain", MALFORMED, "--json").stdout)
    assert story["disposition"] == "blocked"
    assert "70.0.18.198.in-addr.arpa" in story["reason"]
    assert "IPSECKEY" in story["reason"]
    packets = [packet for packet in capture.packets() if packet.time >= since]
    assert demo.clear_between(packets, alpha.plan.v4, MALFORMED) == []


def test_a_silent_resolver_ends_in_the_tables_row(network: LabNetwork) -> None:
    """BIND is stopped: private-or-clear goes on in the clear after the bounded wait, `private` is blocked."""
    alpha, legacy, beta = (network.hosts[name] for name in ("alpha", "legacy", "beta"))
    alpha.policy = {"groups": {"private": [f"{beta.plan.v6}/128"]}}
    alpha.reload_daemon()
    alpha.client.post(protocol.FLUSH, {"destination": None, "dns": "all"})
    assert network.dns.pid is not None
    os.kill(network.dns.pid, signal.SIGSTOP)
    try:
        with alpha.namespace.entered(), Pinger(legacy.plan.v4) as pinger:
            pinger.send(1)
            assert pinger.receive(20.0) == 1
        assert ping(alpha, beta.plan.v6, within=BLOCKED) == 0
        stories = [alpha.client.get(protocol.EXPLAIN, destination=a) for a in (legacy.plan.v4, beta.plan.v6)]
        deadline = time.monotonic() + 20
        while stories[1]["disposition"] == "held" and time.monotonic() < deadline:
            time.sleep(0.2)
            stories[1] = alpha.client.get(protocol.EXPLAIN, destination=beta.plan.v6)
    finally:
        os.kill(network.dns.pid, signal.SIGCONT)
    assert [story["disposition"] for story in stories] == ["clear", "blocked"]
    assert all("DNS is silent" in story["reason"] for story in stories)
    fresh(alpha)


def test_terminate_takes_both_ends_down_and_the_next_packet_brings_it_back(network: LabNetwork) -> None:
    """A Delete ends both SAs; the trap is back, so the next first packet is held and delivered."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    ping(alpha, beta.plan.v4)
    assert oepy(alpha, "terminate", beta.plan.v4).returncode == 0
    deadline = time.monotonic() + 3
    while beta.client.get(protocol.SAS) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert beta.client.get(protocol.SAS) == []
    assert ping(alpha, beta.plan.v4) == 1
    assert oepy(alpha, "terminate", beta.plan.v6).returncode == 1


def test_the_first_packets_of_a_burst_are_all_delivered(network: LabNetwork) -> None:
    """Twenty datagrams sent before the tunnel is there arrive, every one."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    alpha.client.post(protocol.TERMINATE, {"destination": beta.plan.v6})
    with beta.namespace.entered():
        receiver = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with alpha.namespace.entered():
        sender = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.bind(("::", 7777))
        receiver.settimeout(5)
        for number in range(20):
            sender.sendto(bytes([number]), (beta.plan.v6, 7777))
        assert sorted(receiver.recv(100)[0] for _ in range(20)) == list(range(20))


def test_a_host_with_two_addresses_is_private_from_both(network: LabNetwork, capture: Capture) -> None:
    """The tunnel of one source address does not swallow the other's packets: it gets a tunnel of its own, and with
    the userland datapath its first packet waits for it."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    assert ping(alpha, beta.plan.v4) == 1
    alpha.namespace.address("eth0", "198.18.0.11/15")
    since = time.time()
    with alpha.namespace.entered(), Pinger(beta.plan.v4, source="198.18.0.11") as pinger:
        pinger.send(1)
        first = pinger.receive(3.0)
        assert first == 1 or alpha.client.get(protocol.STATUS)["datapath"] == "xfrm"
        pinger.send(2)
        assert pinger.receive(3.0) == 2
    packets = [packet for packet in capture.packets() if packet.time >= since]
    assert demo.clear_between(packets, "198.18.0.11", beta.plan.v4) == []
    alpha.namespace.ip("address", "del", "198.18.0.11/15", "dev", "eth0")


def test_large_transfers_go_through(network: LabNetwork) -> None:
    """A megabyte over TCP, both families: MTU and MSS of the tunnel fit."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    content = os.urandom(1_000_000)
    (beta.directory / "www" / "large").write_bytes(content)
    for version in (4, 6):
        address = beta.address(version) if version == 4 else f"[{beta.address(version)}]"
        target = alpha.directory / f"large{version}"
        done = subprocess.run(
            alpha.command("curl", "-s", "--max-time", "20", "-o", str(target), f"http://{address}/large"),
            check=False,
            timeout=40,
        )
        assert done.returncode == 0
        assert target.read_bytes() == content


def test_random_datagrams_on_the_ike_ports_cost_a_counter_and_nothing_else(network: LabNetwork) -> None:
    """Noise on 500 and 4500 neither stops the daemon nor makes sessions or SAs, and peers are served after."""
    alpha, beta, legacy = (network.hosts[name] for name in ("alpha", "beta", "legacy"))
    fresh(alpha, beta)
    dice = random.Random(7)
    with legacy.namespace.entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        for number in range(2000):
            size = dice.choice([0, 1, 3, 4, 27, 28, 40, 200, 1400])
            data = dice.randbytes(size)
            if number % 3 == 0:  # a plausible header in front of noise
                data = (
                    dice.randbytes(16) + bytes([33, 0x20, 34, 8]) + bytes(4) + size.to_bytes(4, "big") + data
                )
            sender.sendto(data, (beta.plan.v4, 500))
            sender.sendto(bytes(4) + data if number % 2 else data, (beta.plan.v4, 4500))
    status = beta.client.get(protocol.STATUS)
    assert status["sas"] == 0
    assert status["counts"]["ike"].get("malformed", 0) > 100
    assert status["counts"]["ike"]["sessions"] <= status["counts"]["ike"]["half_open"] + 1
    assert not [event for event in status["alerts"] if event["event"] == "internal-error"]
    assert ping(alpha, beta.plan.v4) == 1


def test_a_killed_daemon_leaves_private_shut_and_the_next_start_clears_only_its_own(
    network: LabNetwork,
) -> None:
    """kill -9, a foreign table and rule beside ours, restart: ours are new, theirs are untouched."""
    alpha, beta, legacy = (network.hosts[name] for name in ("alpha", "beta", "legacy"))
    fresh(alpha, beta)
    alpha.policy = {"groups": {"private": [f"{beta.plan.v4}/32", f"{legacy.plan.v4}/32"]}}
    alpha.reload_daemon()
    run = alpha.namespace.run
    run("nft", "add", "table", "inet", "foreign")
    run("ip", "rule", "add", "fwmark", "0x77", "lookup", "77", "priority", "7777")
    assert ping(alpha, beta.plan.v4) == 1
    # The kernel's SAs outlive the daemon, and go on protecting; those of the userland datapath end with it
    outlives = alpha.client.get(protocol.STATUS)["datapath"] == "xfrm"
    alpha.kill_daemon()
    assert ping(alpha, beta.plan.v4, within=15.0 if outlives else BLOCKED) == int(outlives)
    assert ping(alpha, legacy.plan.v4, within=BLOCKED) == 0
    alpha.start_daemon()
    alpha.await_daemon()
    assert ping(alpha, beta.plan.v4) == 1
    assert len(beta.client.get(protocol.SAS)) == 1
    assert "foreign" in run("nft", "list", "tables").stdout
    assert "0x77" in run("ip", "rule").stdout
    run("nft", "delete", "table", "inet", "foreign")
    run("ip", "rule", "del", "priority", "7777")


def test_a_clean_stop_removes_everything_but_the_guard(network: LabNetwork) -> None:
    """With a private prefix the guard stays and blocks; `oepy guard remove` lifts it; without, nothing stays."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    alpha.policy = {"groups": {"private": [f"{beta.plan.v4}/32"]}}
    alpha.reload_daemon()
    alpha.stop_daemon()
    left = traces(alpha)
    assert left["tables"] == "table inet oepy_guard"
    assert (left["rules"], left["routes"], left["device"]) == ("", "", "")
    assert ping(alpha, beta.plan.v4, within=BLOCKED) == 0
    assert ping(alpha, beta.plan.v6) == 1
    assert oepy(alpha, "guard", "remove").returncode == 0
    assert traces(alpha)["tables"] == ""
    assert ping(alpha, beta.plan.v4) == 1
    fresh(alpha)
    alpha.stop_daemon()
    assert "".join(traces(alpha).values()) == ""
    assert not (alpha.directory / "oepy.sock").exists()
    fresh(alpha)


def test_a_reload_with_mistakes_changes_nothing(network: LabNetwork) -> None:
    """SIGHUP with a broken file: the mistakes are alerts, tunnels and policy stay."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    assert ping(alpha, beta.plan.v4) == 1
    before = alpha.client.get(protocol.POLICIES)
    good = alpha.config_file.read_text()
    alpha.config_file.write_text(good.replace("resolvers", "resolverz"))
    os.kill(alpha.daemon_pid(), 1)
    deadline = time.monotonic() + 5
    while not [e for e in alpha.client.get(protocol.EVENTS) if e["event"] == "reload-refused"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert alpha.client.get(protocol.POLICIES) == before
    assert len(alpha.client.get(protocol.SAS)) == 1
    done = oepy(alpha, "run", "--check")
    assert done.returncode == 2
    assert "did you mean 'resolvers'" in done.stderr
    alpha.config_file.write_text(good)


def test_a_second_daemon_is_refused(network: LabNetwork) -> None:
    """The lock of the first one holds, and it says so; the first goes on."""
    alpha = network.hosts["alpha"]
    done = oepy(alpha, "run")
    assert done.returncode == 1
    assert "another oepy holds" in done.stderr
    assert alpha.client.get(protocol.STATUS)["ready"]


def test_files_are_for_root_only(network: LabNetwork) -> None:
    """Control socket and host key are 0600."""
    alpha = network.hosts["alpha"]
    for name in ("oepy.sock", "host.key"):
        assert stat.S_IMODE((alpha.directory / name).stat().st_mode) == 0o600


def test_commands_without_a_daemon(network: LabNetwork, tmp_path: Path) -> None:
    """Exit status 3 and the mend; `explain` says what would happen instead."""
    alpha, beta, broken = (network.hosts[name] for name in ("alpha", "beta", "broken"))
    alpha.stop_daemon()
    done = oepy(alpha, "status")
    assert done.returncode == 3
    assert "oepy run" in done.stderr
    story = json.loads(oepy(alpha, "explain", beta.plan.v4, "--json").stdout)
    assert story["state"] == "new"
    assert "IKE is negotiated" in story["next"]
    assert "is blocked" in json.loads(oepy(alpha, "explain", broken.plan.v4, "--json").stdout)["next"]
    assert json.loads(oepy(alpha, "doctor", "--json").stdout)
    fresh(alpha)


def test_the_datapath_process_may_die(network: LabNetwork, capture: Capture) -> None:
    """Its end closes all tunnels without a leak; it is started again and the next packet goes through."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    alpha.policy = {"groups": {"private": [f"{beta.plan.v4}/32"]}}
    alpha.reload_daemon()
    assert ping(alpha, beta.plan.v4) == 1
    since = time.time()
    children = Path(f"/proc/{alpha.daemon_pid()}/task/{alpha.daemon_pid()}/children").read_text().split()
    (datapath,) = [pid for pid in children if b"oepy.datapath" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(datapath), 9)
    ping(alpha, beta.plan.v4, within=BLOCKED)
    deadline = time.monotonic() + 30
    while ping(alpha, beta.plan.v4, within=BLOCKED) == 0:
        assert time.monotonic() < deadline, alpha.log_end()
    packets = [packet for packet in capture.packets() if packet.time >= since]
    assert demo.clear_between(packets, alpha.plan.v4, beta.plan.v4) == []
    fresh(alpha, beta)
