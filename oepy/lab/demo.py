"""The demonstration: a page fetched for every pair of hosts, judged by a capture on the wire."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from oepy.cli.show import explain_lines
from oepy.control import protocol
from oepy.lab.capture import Capture, Packet
from oepy.lab.network import DOMAIN, LabHost, LabNetwork

SOURCES = ("alpha", "gamma")
EXPECTED = {
    ("alpha", "beta"): "private",
    ("alpha", "gamma"): "clear",
    ("alpha", "legacy"): "clear",
    ("alpha", "impostor"): "blocked",
    ("alpha", "unsigned"): "clear",
    ("alpha", "broken"): "blocked",
    ("gamma", "alpha"): "private",
    ("gamma", "beta"): "private",
    ("gamma", "legacy"): "clear",
    ("gamma", "impostor"): "blocked",
    ("gamma", "unsigned"): "clear",
    ("gamma", "broken"): "blocked",
}
# The kernel's own trap catches replies too: gamma, asked in the clear, finds alpha's key before it answers
UPGRADED = "upgraded"
EXPECTED_OF_ACQUIRE = {**EXPECTED, ("alpha", "gamma"): UPGRADED}
MAX_FIRST_PACKETS = 2  # of both connections, before the tunnel is there
BLOCKED_SECONDS = 2.0  # how long a fetch that should be blocked is given
FETCH_SECONDS = 15.0
PRIVATE_SECONDS = 30.0


@dataclass
class Fetch:
    ok: bool
    first_byte: float | None  # seconds from the first SYN, name lookup not counted
    error: str


@dataclass
class Row:
    """One pair over one family, as expected and as seen."""

    source: str
    destination: str
    version: int
    expected: str
    seen: str = ""
    clear_packets: int = 0
    esp_packets: int = 0
    ike_packets: int = 0
    syn_retransmissions: int = 0
    first_packet_delivered: bool | None = None
    cold_seconds: float | None = None
    warm_seconds: float | None = None
    dns_seconds: float | None = None
    ike_seconds: float | None = None
    explain: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def as_expected(self) -> bool:
        return not self.problems


def fetch(host: LabHost, target: LabHost, version: int, limit: float) -> Fetch:
    """One page by curl, by name, over the given IP version."""
    done = subprocess.run(
        host.command(
            *["curl", f"-{version}", "-s", "-o", "/dev/null", "-w", "%{json}"],
            *["--max-time", str(limit), f"http://{target.plan.name}.{DOMAIN}/"],
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=limit + 20,
    )
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:
        return Fetch(False, None, done.stderr.strip() or f"curl ended with {done.returncode}")
    ok = report["http_code"] == 200
    first_byte = report["time_starttransfer"] - report["time_namelookup"] if ok else None
    return Fetch(ok, first_byte, report.get("errormsg") or "")


def _syn_retransmissions(host: LabHost) -> int:
    """The kernel's own count of SYNs sent twice (TCPSynRetrans)."""
    lines = host.namespace.run("cat", "/proc/net/netstat").stdout.splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        if names.startswith("TcpExt:"):
            return int(values.split()[names.split().index("TCPSynRetrans")])
    raise AssertionError("no TcpExt line in /proc/net/netstat")


def between(packets: list[Packet], one: str, other: str) -> Counter[str]:
    """Packets by kind that have these two addresses."""
    pair = {ip_address(one), ip_address(other)}
    return Counter(packet.kind for packet in packets if {packet.source, packet.destination} == pair)


def clear_between(packets: list[Packet], one: str, other: str) -> list[Packet]:
    pair = {ip_address(one), ip_address(other)}
    return [p for p in packets if p.kind == "clear" and {p.source, p.destination} == pair]


def describe_packet(packet: Packet) -> str:
    ports = f" {packet.source_port} → {packet.destination_port}" if packet.source_port else ""
    return f"{packet.source} → {packet.destination}, protocol {packet.protocol}{ports}"


def run_row(network: LabNetwork, capture: Capture, source: str, destination: str, version: int) -> Row:
    expected = EXPECTED_OF_ACQUIRE if network.trap_of(source) == "acquire" else EXPECTED
    row = Row(source, destination, version, expected[source, destination])
    host, target = network.hosts[source], network.hosts[destination]
    started = time.time()
    retransmitted = _syn_retransmissions(host)
    limit = BLOCKED_SECONDS if row.expected == "blocked" else FETCH_SECONDS
    cold = fetch(host, target, version, limit)
    row.syn_retransmissions = _syn_retransmissions(host) - retransmitted
    row.cold_seconds = cold.first_byte
    if cold.ok:
        row.first_packet_delivered = row.syn_retransmissions == 0
        row.warm_seconds = fetch(host, target, version, limit).first_byte
    story = host.client.get(protocol.EXPLAIN, destination=target.address(version))
    row.explain = f"{story['disposition']}: {story['reason']}"
    waited = story.get("waited") or {}
    row.dns_seconds, row.ike_seconds = waited.get("dns_seconds"), waited.get("ike_seconds")
    packets = [packet for packet in capture.packets() if packet.time >= started]
    seen = between(packets, host.address(version), target.address(version))
    row.clear_packets, row.esp_packets, row.ike_packets = seen["clear"], seen["esp"], seen["ike"]
    row.seen = _judge(cold, seen)
    row.problems = list(_problems(row, story["disposition"]))
    return row


def _judge(cold: Fetch, seen: Counter[str]) -> str:
    """What happened, by the page and the capture alone."""
    if cold.ok:
        if seen["esp"] and seen["clear"]:
            return UPGRADED
        return "private" if seen["esp"] else "clear"
    return "blocked" if not seen["clear"] else "lost"


def _problems(row: Row, disposition: str) -> Iterator[str]:
    if row.seen != row.expected:
        yield f"expected {row.expected}, seen {row.seen}"
    if disposition != ("private" if row.expected == UPGRADED else row.expected):
        yield f"explain says {disposition}"
    if row.expected == "private" and row.clear_packets:
        yield f"{row.clear_packets} packets in the clear"
    if row.expected == "clear" and row.esp_packets:
        yield f"{row.esp_packets} ESP packets"
    if row.expected == UPGRADED and row.clear_packets > MAX_FIRST_PACKETS:
        yield f"{row.clear_packets} packets in the clear before the tunnel"
    if row.expected != "blocked" and not row.first_packet_delivered:
        yield f"the first packet was lost ({row.syn_retransmissions} SYNs sent twice)"


@dataclass
class PrivateResult:
    """alpha holds beta `private` while beta's daemon is stopped and alpha's own is killed and restarted."""

    seconds: float
    sent: int
    clear_packets: int
    answers: int
    recovered: bool
    steps: list[str]

    @property
    def as_expected(self) -> bool:
        return self.sent > 0 and self.clear_packets == 0 and self.answers == 0 and self.recovered


@contextmanager
def _pinging(host: LabHost, target: LabHost) -> Iterator[list[subprocess.Popen[Any]]]:
    """TCP attempts and pings to the target, all the time, on both families."""
    running = []
    for version in (4, 6):
        running.append(
            host.namespace.popen(
                *["python3", "-c", _KNOCK, target.address(version), str(version)],
                stdout=subprocess.PIPE,
            )
        )
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()


# Sends a UDP datagram and starts a TCP connection five times a second; counts what was sent and answered.
_KNOCK = """
import signal, socket, sys, time
address, version = sys.argv[1], sys.argv[2]
family = socket.AF_INET6 if version == "6" else socket.AF_INET
going = True
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, stop)
sent = answers = 0
while going:
    udp = socket.socket(family, socket.SOCK_DGRAM)
    tcp = socket.socket(family, socket.SOCK_STREAM)
    tcp.settimeout(0.2)
    try:
        udp.sendto(b"must not leak", (address, 9999))
        sent += 1
    except OSError:
        pass
    try:
        tcp.connect((address, 80))
        answers += 1
    except OSError:
        pass
    sent += 1
    udp.close()
    tcp.close()
print(sent, answers)
"""


def run_private(
    network: LabNetwork, capture: Capture, seconds: float, say: Callable[[str], None]
) -> PrivateResult:
    """The leak test of `make demo`: nothing in the clear, whatever happens to either daemon."""
    alpha, beta = network.hosts["alpha"], network.hosts["beta"]
    steps: list[str] = []
    started = time.time()

    def step(text: str) -> None:
        steps.append(f"{time.time() - started:5.1f} s  {text}")
        say(steps[-1])

    beta.stop_daemon()
    alpha.policy = {"groups": {"private": [f"{beta.plan.v4}/32", f"{beta.plan.v6}/128"]}}
    alpha.reload_daemon()
    step("beta's daemon is stopped; alpha's group for beta is now `private`")
    since = time.time()
    with _pinging(alpha, beta) as knockers:
        _wait_until(since + seconds / 3)
        alpha.kill_daemon()
        step("alpha's daemon is killed (SIGKILL)")
        _wait_until(since + seconds * 2 / 3)
        alpha.start_daemon()
        alpha.await_daemon()
        step("alpha's daemon runs again")
        _wait_until(since + seconds)
        for process in knockers:
            process.terminate()
        counts = [process.communicate(timeout=10)[0].split() for process in knockers]
    until = time.time()
    packets = [packet for packet in capture.packets() if since <= packet.time <= until]
    leaked = [packet for v in (4, 6) for packet in clear_between(packets, alpha.address(v), beta.address(v))]
    for packet in leaked[:10]:
        step(f"IN THE CLEAR at {packet.time - started:.3f} s: {describe_packet(packet)}")
    clear = len(leaked)
    sent, answers = sum(int(c[0]) for c in counts), sum(int(c[1]) for c in counts)
    step(f"{sent} packets and connections tried, {answers} answered, {clear} packets in the clear")
    beta.start_daemon()
    beta.await_daemon()
    for version in (4, 6):
        alpha.client.post(protocol.FLUSH, {"destination": beta.address(version)})
    recovered = all(fetch(alpha, beta, version, FETCH_SECONDS).ok for version in (4, 6))
    step("beta's daemon is back: " + ("private again" if recovered else "STILL BLOCKED"))
    return PrivateResult(until - since, sent, clear, answers, recovered, steps)


def _wait_until(when: float) -> None:
    time.sleep(max(0.0, when - time.time()))


def run_demo(
    network: LabNetwork,
    capture: Capture,
    *,
    on_row: Callable[[Row], None],
    say: Callable[[str], None],
    seconds: float = PRIVATE_SECONDS,
) -> tuple[list[Row], PrivateResult]:
    rows = []
    for source in SOURCES:
        for (from_host, destination), _expected in EXPECTED.items():
            if from_host != source:
                continue
            for version in (4, 6):
                row = run_row(network, capture, source, destination, version)
                rows.append(row)
                on_row(row)
    say("\nwhy, in full, for one of them (oepy explain):")
    for line in story(network.hosts["alpha"], network.hosts["impostor"].plan.v4):
        say("  " + line)
    say(f"\nleak test, {seconds:.0f} s:")
    return rows, run_private(network, capture, seconds, say)


def report(rows: list[Row], private: PrivateResult, seconds: float) -> dict[str, Any]:
    return {
        "as_expected": all(row.as_expected for row in rows) and private.as_expected,
        "seconds": round(seconds, 3),
        "rows": [{**asdict(row), "as_expected": row.as_expected} for row in rows],
        "private": {**asdict(private), "as_expected": private.as_expected},
    }


def story(host: LabHost, address: str) -> list[str]:
    """`oepy explain` for people."""
    return explain_lines(host.client.get(protocol.EXPLAIN, destination=address))


def save_report(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
