"""How long the first packet to a cold destination waits: from its sending to the first reply.

One host ("farm") has many addresses, each with a key record of its own, so that each is a cold destination: a
lookup, an IKE negotiation, an SA pair. alpha pings each of them once, never again, so a lost first packet shows
as a lost ping. Rounds, interleaved for each destination:

- cold DNS: alpha's validator has forgotten everything, the chain is walked from the root
- chain known: the zone's keys are in the cache, the destination's record is not
- warm DNS: the record is in the cache too (the destination's tunnel was taken down)

beside the floor in the same run: a ping through the tunnel that is already there, and one in the clear.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from oepy.control import protocol
from oepy.keys import HostKey
from oepy.lab.nameserver import ExtraHost
from oepy.lab.network import HostPlan, LabHost, LabNetwork
from oepy.lab.probe import Pinger

FARM = HostPlan("farm", "198.19.0.1", "2001:2:0:9::1", True, "none")
ALPHA = HostPlan("alpha", "198.18.0.10", "2001:2::10", True, "own")
LEGACY = HostPlan("legacy", "198.18.0.40", "2001:2::40", False, "none")
REPLY_SECONDS = 10.0
KINDS = ("cold", "chain", "warm")


@dataclass
class Sample:
    total: float | None  # seconds from the first packet to its reply; None: lost
    dns: float | None
    ike: float | None
    questions: int


@dataclass
class Result:
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    tunnel: list[float] = field(default_factory=list)
    clear: list[float] = field(default_factory=list)


def _ping(host: LabHost, address: str) -> float | None:
    """One echo, sent once."""
    with host.namespace.entered(), Pinger(address) as pinger:
        started = time.perf_counter()
        pinger.send(1)
        if pinger.receive(REPLY_SECONDS) is None:
            return None
        return time.perf_counter() - started


def _sample(alpha: LabHost, address: str) -> Sample:
    total = _ping(alpha, address)
    story = alpha.client.get(protocol.EXPLAIN, destination=address)
    waited = story.get("waited") or {}
    questions = story["dns"]["questions"] if story.get("dns") else 0
    if story["disposition"] != "private":
        return Sample(None, waited.get("dns_seconds"), waited.get("ike_seconds"), questions)
    return Sample(total, waited.get("dns_seconds"), waited.get("ike_seconds"), questions)


def _take_down(alpha: LabHost, farm: LabHost, address: str) -> None:
    alpha.client.post(protocol.TERMINATE, {"destination": address})
    deadline = time.monotonic() + 5
    while any(
        sa["local"].startswith(f"{address}:") or f"[{address}]" in sa["local"]
        for sa in farm.client.get(protocol.SAS)
    ):
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)


def destinations(count: int) -> list[tuple[IPv4Address, IPv6Address]]:
    v4, v6 = int(IPv4Address("198.19.1.1")), int(IPv6Address("2001:2:0:9::1:1"))
    return [(IPv4Address(v4 + index), IPv6Address(v6 + index)) for index in range(count)]


def run(count: int, version: int, on_progress: Callable[[int], None]) -> Result:
    """`count` destinations of one family. Raises OepyError where the lab cannot be built."""
    key = HostKey.generate("ed25519")
    addresses = destinations(count)
    hosts = [
        ExtraHost(f"farm{index}.oe.example", v4, v6, key.public) for index, (v4, v6) in enumerate(addresses)
    ]
    result = Result()
    with tempfile.TemporaryDirectory(prefix="oepy-bench-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        plans = (ALPHA, LEGACY, FARM)
        with LabNetwork(directory, hosts=plans, extra_dns=hosts, host_keys={"farm": key}) as network:
            network.build()
            alpha, farm, legacy = (network.hosts[plan] for plan in ("alpha", "farm", "legacy"))
            for v4, v6 in addresses:
                farm.namespace.address("eth0", f"{v4}/15", f"{v6}/48")
            network.start_daemons()
            for index, pair in enumerate(addresses):
                address = str(pair[0] if version == 4 else pair[1])
                _measure(result, alpha, farm, address)
                if (floor := _ping(alpha, legacy.address(version))) is not None and index:
                    result.clear.append(floor)
                on_progress(index + 1)
    return result


def _measure(result: Result, alpha: LabHost, farm: LabHost, address: str) -> None:
    """One destination, in all three states of the cache."""
    for kind in KINDS:
        if kind != "warm":
            what = "all" if kind == "cold" else address
            alpha.client.post(protocol.FLUSH, {"destination": address, "dns": what})
        result.samples[kind].append(_sample(alpha, address))
        if (through := _ping(alpha, address)) is not None:
            result.tunnel.append(through)
        _take_down(alpha, farm, address)


def quantile(values: list[float], part: float) -> float | None:
    """The smallest value that at least `part` of the values do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(part * 1000) * len(ordered) // 1000) - 1))]


def summary(result: Result) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind, samples in result.samples.items():
        totals = [sample.total for sample in samples if sample.total is not None]
        rest = [
            sample.total - (sample.dns or 0) - (sample.ike or 0)
            for sample in samples
            if sample.total is not None
        ]
        rows[kind] = {
            "destinations": len(samples),
            "lost": sum(sample.total is None for sample in samples),
            "p50": quantile(totals, 0.5),
            "p99": quantile(totals, 0.99),
            "dns_p50": quantile([s.dns for s in samples if s.dns is not None], 0.5),
            "ike_p50": quantile([s.ike for s in samples if s.ike is not None], 0.5),
            "rest_p50": quantile(rest, 0.5),
            "questions": statistics.fmean(sample.questions for sample in samples) if samples else 0,
        }
    rows["tunnel"] = {"p50": quantile(result.tunnel, 0.5), "p99": quantile(result.tunnel, 0.99)}
    rows["clear"] = {"p50": quantile(result.clear, 0.5), "p99": quantile(result.clear, 0.99)}
    return rows
