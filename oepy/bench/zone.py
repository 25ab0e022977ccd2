"""How many hosts a second `oepy zone generate` takes, in how much memory, beside BIND's reading of the result.

Each host has one address and an Ed25519 key of its own, so that nothing can be kept from one host to the next: an
address record and a key record forward, a PTR and a key record reverse. One forward zone, and a reverse zone for
each 65,536 hosts. A round is one run of oepy in a process of its own and then one `named-checkzone -i local` for
each file (without the lookups of name servers outside of the zone, which would measure the network).
"""

from __future__ import annotations

import base64
import hashlib
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from oepy.errors import OepyError

SIZES = (10_000, 100_000, 1_000_000)
MAX_HOSTS = 10_000_000
FLATNESS = 0.2
MEMORY_GOAL = 200e6  # bytes
_ZONE_BITS = 16
_FIRST_V4 = int(IPv4Address("10.0.0.0"))
_FIRST_V6 = int(IPv6Address("2001:db8::"))


@dataclass(frozen=True, slots=True)
class Row:
    """One size. Times in seconds, medians of the rounds; `peak` is oepy's resident memory at its highest, in
    bytes."""

    hosts: int
    zones: int
    bytes: int
    seconds: float
    cpu: float
    peak: int
    bind_seconds: float
    bind_cpu: float

    @property
    def rate(self) -> float:
        return self.hosts / self.seconds

    @property
    def ratio(self) -> float:
        """Of oepy's CPU time to BIND's."""
        return self.cpu / self.bind_cpu


@dataclass(frozen=True, slots=True)
class Result:
    rows: tuple[Row, ...]

    @property
    def flat(self) -> bool:
        peaks = [row.peak for row in self.rows]
        return max(peaks) <= min(peaks) * (1 + FLATNESS)

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "rate": row.rate, "ratio": row.ratio} for row in self.rows]
        return {"rows": rows, "flat": self.flat}


def run(
    hosts: int, rounds: int, *, ipv6: bool, shuffled: bool, on_progress: Callable[[int, int], None]
) -> Result:
    """Up to that many hosts. `shuffled`: neighbours in the inventory are in different zones. Raises OepyError."""
    if shutil.which("named-checkzone") is None:
        raise OepyError("named-checkzone is not there", "install bind9-utils")
    sizes = [size for size in SIZES if size < hosts] + [hosts]
    rows = []
    with tempfile.TemporaryDirectory(prefix="oepy-bench-zone-") as directory:
        for done, size in enumerate(sizes):
            on_progress(done, len(sizes))
            rows.append(_measure(Path(directory), size, rounds, ipv6=ipv6, shuffled=shuffled))
        on_progress(len(sizes), len(sizes))
    return Result(tuple(rows))


def _measure(directory: Path, hosts: int, rounds: int, *, ipv6: bool, shuffled: bool) -> Row:
    inventory, out = directory / "hosts.csv", directory / "out"
    zones = write_inventory(inventory, hosts, ipv6=ipv6, shuffled=shuffled)
    made, read = [], []
    for _ in range(rounds):
        made.append(_generate(inventory, out))
        read.append(_read(out, zones))
    row = Row(
        hosts=hosts,
        zones=len(zones),
        bytes=sum(path.stat().st_size for path in out.iterdir()),
        seconds=statistics.median(one["seconds"] for one in made),
        cpu=statistics.median(one["cpu"] for one in made),
        peak=int(max(one["peak"] for one in made)),
        bind_seconds=statistics.median(seconds for seconds, _ in read),
        bind_cpu=statistics.median(cpu for _, cpu in read),
    )
    shutil.rmtree(out)
    return row


def write_inventory(path: Path, hosts: int, *, ipv6: bool, shuffled: bool) -> list[str]:
    """A CSV of that many hosts; the names of its zones."""
    count = (hosts - 1 >> _ZONE_BITS) + 1
    if ipv6:
        reverse = [_reverse_v6(index) for index in range(count)]
    else:
        reverse = [f"{index & 255}.{10 + (index >> 8)}.in-addr.arpa" for index in range(count)]
    zones = ["bench.example", *reverse]
    with path.open("w", encoding="ascii") as stream:
        stream.write("name,addresses,keys,zones,name_servers\n")
        head = f"{' '.join(zones)},ns1.bench.example 192.0.2.53"
        for index in _order(hosts, shuffled):
            address = (
                IPv6Address(_FIRST_V6 + (index >> 16 << 64) + index)
                if ipv6
                else IPv4Address(_FIRST_V4 + index)
            )
            key = base64.b64encode(hashlib.sha256(b"%d" % index).digest()).decode("ascii")
            stream.write(f"h{index:07}.bench.example,{address},4 {key},{head}\n")
            head = ","
    return zones


def _reverse_v6(index: int) -> str:
    address = IPv6Address(_FIRST_V6 + (index << 64))
    return address.reverse_pointer[32:]  # what is left of the /64


def _order(hosts: int, shuffled: bool) -> Iterator[int]:
    """Shuffled by zones: the first of each, the second of each, ..."""
    if not shuffled:
        yield from range(hosts)
        return
    size = 1 << _ZONE_BITS
    for low in range(min(size, hosts)):
        yield from range(low, hosts, size)


def _generate(inventory: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "oepy.bench.zone", str(inventory), str(out)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise OepyError(f"oepy zone generate failed: {done.stderr.strip()[-500:]}")
    return {**json.loads(done.stdout), "seconds": seconds}


def _read(out: Path, zones: list[str]) -> tuple[float, float]:
    """Seconds and CPU seconds of BIND's reading of all files."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    for zone in zones:
        command = ["named-checkzone", "-i", "local", zone, str(out / f"db.{zone}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OepyError(f"BIND refuses {zone}: {done.stdout.strip()[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.monotonic() - started, cpu


def _child(inventory: Path, out: Path) -> None:
    """What is measured. The peak is the kernel's VmHWM: ru_maxrss would count what this process was before its
    exec, a copy of its parent."""
    from oepy.dns.inventory import Inventory
    from oepy.dns.zonefile import generate

    generate(Inventory(inventory), out, 1)
    used = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "peak": peak}))


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
