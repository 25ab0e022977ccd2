"""What configured connections cost: the start of a daemon that has so many, its memory, and one connection more.

A daemon in a namespace of its own, with the userland datapath and `start_action: trap`, so that each connection is
in the trap's ruleset. Each is a file that the configuration includes. First all are added to a daemon that has
none, by one `connection load`. Then a daemon starts with all of them, and one more is added, ten times.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from oepy.bench.processes import START_SECONDS, await_daemon, cpu_seconds, resident_bytes
from oepy.control import protocol
from oepy.control.client import ControlClient
from oepy.errors import OepyError
from oepy.lab.namespaces import Lab, Namespace

SIZES = (10, 1_000, 10_000)
MAX_CONNECTIONS = 20_000
ADDED = 10
_PEERS, _NETWORKS = int(IPv4Address("198.18.0.0")), int(IPv4Address("10.0.0.0"))


@dataclass(frozen=True, slots=True)
class Row:
    """Times in seconds: `all_at_once` for all of them, added to a daemon that has none; `start` until one that has
    them answers and traps; `add` the median of one connection more, and `add_cpu` what of it is the daemon's CPU
    time; `floor` the CPU time of looking which files there are and whether they have changed, and nothing else.
    `memory` is the daemon's resident memory in bytes."""

    connections: int
    all_at_once: float
    start: float
    add: float
    add_cpu: float
    floor: float
    memory: int


@dataclass(frozen=True, slots=True)
class Result:
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        first, last = self.rows[0], self.rows[-1]
        added = max(last.connections - first.connections, 1)
        return {
            "rows": [
                asdict(row) | {"milliseconds_each": round(1000 * row.all_at_once / row.connections, 3)}
                for row in self.rows
            ],
            "bytes_a_connection": round((last.memory - first.memory) / added),
            "milliseconds_a_connection_at_start": round(1000 * (last.start - first.start) / added, 3),
        }


def run(sizes: Sequence[int], on_progress: Callable[[int, int], None]) -> Result:
    """Raises OepyError."""
    rows = []
    with Lab() as lab, tempfile.TemporaryDirectory() as directory:
        for number, size in enumerate(sizes):
            namespace = lab.namespace(f"peers{number}")
            namespace.address("lo", "192.0.2.10/32")
            place = Path(directory) / str(size)
            place.mkdir()
            rows.append(_measure(namespace, place, size))
            on_progress(number + 1, len(sizes))
    return Result(tuple(rows))


def _measure(namespace: Namespace, place: Path, size: int) -> Row:
    secret = place / "psk"
    secret.touch(mode=0o600)
    secret.write_text("of the bench\n")
    (place / "oepy.yaml").write_text(_MAIN.format(place=place))
    with _running(namespace, place) as (client, _):
        (place / "conf.d").mkdir()
        for number in range(size):
            _write(place, number)
        begun = time.monotonic()
        _load(client, size)
        all_at_once = time.monotonic() - begun
    begun = time.monotonic()
    with _running(namespace, place) as (client, pid):
        start = time.monotonic() - begun
        times, cpu = [], []
        for more in range(ADDED):
            _write(place, size + more)
            begun, spent = time.monotonic(), cpu_seconds(pid)
            _load(client, size + more + 1)
            times.append(time.monotonic() - begun)
            cpu.append(cpu_seconds(pid) - spent)
        add, add_cpu = statistics.median(times), statistics.median(cpu)
        floor = statistics.median(_look_at_all(place / "conf.d") for _ in range(ADDED))
        return Row(size, all_at_once, start, add, add_cpu, floor, resident_bytes(pid))


def _look_at_all(directory: Path) -> float:
    """The CPU time of it."""
    begun = time.process_time()
    for name in os.listdir(directory):
        os.stat(f"{directory}/{name}")
    return time.process_time() - begun


@contextlib.contextmanager
def _running(namespace: Namespace, place: Path) -> Iterator[tuple[ControlClient, int]]:
    """The daemon, ready, and its process ID."""
    client = ControlClient(place / "oepy.sock")
    with (place / "log").open("wb") as log:
        process = namespace.popen(
            *[sys.executable, "-m", "oepy", "-c", str(place / "oepy.yaml"), "run"], stdout=log, stderr=log
        )
        try:
            await_daemon(client, process, place / "log")
            yield client, process.pid
        finally:
            process.terminate()
            process.wait(60)


_MAIN = """\
identity: {{key: {place}/host.key}}
dns: {{resolvers: [192.0.2.10]}}
control: {{socket: {place}/oepy.sock}}
datapath: tun
policy: {{default: clear}}
secrets: [{{type: ike, secret_file: {place}/psk}}]
include: [conf.d/*.yaml]
"""
_CONNECTION = """\
connections:
  c{number}:
    remote_addrs: [{peer}]
    local: {{auth: psk, id: a.example}}
    remote: {{auth: psk, id: p{number}.example}}
    children: {{net: {{local_ts: [192.0.2.10/32], remote_ts: [{network}/32], start_action: trap}}}}
"""


def _write(place: Path, number: int) -> None:
    peer, network = IPv4Address(_PEERS + number), IPv4Address(_NETWORKS + number)
    text = _CONNECTION.format(number=number, peer=peer, network=network)
    (place / "conf.d" / f"c{number}.yaml").write_text(text)


def _load(client: ControlClient, expected: int) -> None:
    body = {"operation": "load", "name": "", "timeout": START_SECONDS}
    told = client.post(protocol.CONNECTIONS, body, timeout=START_SECONDS)
    if told["connections"] != expected:
        raise OepyError(f"{told['connections']} connections are loaded, not {expected}")
