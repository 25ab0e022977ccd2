"""How many SA pairs a second a datapath takes, and what one costs in memory, with few and with many there.

For each datapath and number there is a process of its own in a namespace of its own, filled beforehand with that
many pairs. In turns each installs a block of new pairs and removes them again, so that all sizes see the same
machine at the same time. A pair is both SAs and their policies: what one tunnel of opportunistic encryption needs.

The kernel's share of memory is what less is available in the whole machine, so take it from a quiet one; it is
known only where the pairs are in the kernel.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from oepy.bench.processes import resident_bytes
from oepy.datapath.tun.datapath import TunDatapath
from oepy.datapath.xfrm.datapath import XfrmDatapath
from oepy.datapath.xfrm.plan import BY_DEVICE, BY_MARK
from oepy.datapath.xfrm.probe import probe
from oepy.errors import OepyError
from oepy.interfaces import Datapath
from oepy.lab.namespaces import Lab, Namespace
from oepy.model import (
    Authenticated,
    Endpoint,
    EspSuite,
    Lifetime,
    PeerIdentity,
    SaKeys,
    SaPair,
    Secret,
    TrafficSelector,
)
from oepy.udp import open_ike_sockets

SIZES = (10, 1_000, 10_000)
FLATNESS = 0.2
_BLOCK = 100  # pairs of one turn
_LOCAL = IPv4Address("198.18.0.1")
_FIRST_PEER = int(IPv4Address("20.0.0.0"))
_ANSWER_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Row:
    """One datapath with `size` pairs. `rate` in pairs installed a second; memory in bytes a pair, None where
    there are too few pairs to tell."""

    datapath: str
    size: int
    rate: float
    removed: float
    process_bytes: float | None
    kernel_bytes: float | None


@dataclass(frozen=True, slots=True)
class Result:
    rows: tuple[Row, ...]

    def ratio(self, datapath: str) -> float:
        """The slowest rate of a datapath's sizes by its fastest."""
        rates = [row.rate for row in self.rows if row.datapath == datapath]
        return min(rates) / max(rates)

    @property
    def datapaths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.datapath for row in self.rows))

    @property
    def flat(self) -> bool:
        return all(self.ratio(name) >= 1 - FLATNESS for name in self.datapaths)

    def as_dict(self) -> dict[str, Any]:
        ratios = {name: self.ratio(name) for name in self.datapaths}
        return {"rows": [asdict(row) for row in self.rows], "ratios": ratios, "flat": self.flat}


def run(turns: int, on_progress: Callable[[int, int], None]) -> Result:
    """Of the userland datapath, and of the kernel's where it has ESP. Raises OepyError."""
    names = ["tun"] if probe().missing is not None else ["tun", "xfrm"]
    with Lab() as lab:
        hosts: list[_Host] = []
        try:
            for name in names:
                hosts += [_Host(lab.namespace(f"{name}{size}"), name, size) for size in SIZES]
            for number in range(turns):
                for host in hosts:
                    host.turn()
                on_progress(number + 1, turns)
            return Result(tuple(host.row() for host in hosts))
        finally:
            for host in hosts:
                host.end()


def _pair(number: int) -> SaPair:
    peer = IPv4Address(_FIRST_PEER + number)
    keys = SaKeys(Secret(number.to_bytes(36, "big")))
    return SaPair(
        spi_in=0x1000 + number,
        spi_out=0x1000 + number,
        local=Endpoint(_LOCAL, 4500),
        remote=Endpoint(peer, 4500),
        suite=EspSuite("aes256gcm16"),
        keys_in=keys,
        keys_out=keys,
        local_ts=(TrafficSelector.of(_LOCAL),),
        remote_ts=(TrafficSelector.of(peer),),
        authenticated=Authenticated.DNS,
        peer=PeerIdentity.address(peer),
        lifetime=Lifetime(soft_seconds=3000, hard_seconds=3600),
    )


class _Host:
    """The parent's side of one process."""

    def __init__(self, namespace: Namespace, datapath: str, size: int) -> None:
        self._datapath, self._size = datapath, size
        namespace.address("lo", f"{_LOCAL}/32")
        self._process = namespace.popen(
            *[sys.executable, "-m", "oepy.bench.sa", datapath],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._installed: list[float] = []
        self._removed: list[float] = []
        self._memory = self._ask("fill", size)

    def _ask(self, command: str, number: int) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command} {number}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise OepyError(f"the datapath {self._datapath} with {self._size} pairs ended", "run it alone")
        answer: dict[str, float] = json.loads(line)
        return answer

    def turn(self) -> None:
        answer = self._ask("block", _BLOCK)
        self._installed.append(answer["install"])
        self._removed.append(answer["remove"])

    def row(self) -> Row:
        many = self._size >= 1000
        in_kernel = many and self._datapath == "xfrm"
        return Row(
            self._datapath,
            self._size,
            _BLOCK / statistics.median(self._installed),
            _BLOCK / statistics.median(self._removed),
            self._memory["process"] / self._size if many else None,
            self._memory["kernel"] / self._size if in_kernel else None,
        )

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(_ANSWER_SECONDS)


# ---- the process in the namespace ---------------------------------------------------------------------------


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OepyError("/proc/meminfo says nothing of MemAvailable")


def _open(name: str) -> Datapath:
    if name == "tun":
        return TunDatapath(open_ike_sockets().nat_t, lambda *_: None)
    scheme = BY_MARK if probe().interface.error is not None else BY_DEVICE
    return XfrmDatapath(scheme=scheme)


def _memory_of(datapath: Datapath) -> int:
    """Resident bytes of this process, and of the datapath's own where it has one."""
    other = getattr(datapath, "process_id", None)
    return resident_bytes(os.getpid()) + (resident_bytes(other) if other else 0)


async def _serve(datapath: Datapath) -> None:
    await datapath.start(lambda _: None)
    loop = asyncio.get_running_loop()
    filled = 0
    try:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command, number = line.split()
            count = int(number)
            if command == "fill":
                before = _memory_of(datapath), _available()
                for index in range(count):
                    await datapath.install(_pair(index))
                filled = count
                own = _memory_of(datapath) - before[0]
                answer = {"process": float(own), "kernel": float(max(0, before[1] - _available() - own))}
            else:
                pairs = [_pair(filled + index) for index in range(count)]
                begun = time.perf_counter()
                for pair in pairs:
                    await datapath.install(pair)
                middle = time.perf_counter()
                for pair in pairs:
                    await datapath.remove(pair.spi_in)
                answer = {"install": middle - begun, "remove": time.perf_counter() - middle}
            print(json.dumps(answer), flush=True)
    finally:
        await datapath.stop()


if __name__ == "__main__":
    asyncio.run(_serve(_open(sys.argv[1])))
