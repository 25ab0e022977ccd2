"""Userland ESP beside its peers: the same traffic through each tunnel, in turns of one and the same run.

Delivered data count, as the receiver saw it. Beside the rate stands what it took of the processes that move the
packets: megabits a second of their CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oepy.bench import tunnels
from oepy.bench.tunnels import INNER_LEFT, Ground, inner_right
from oepy.errors import OepyError
from oepy.lab import charon
from oepy.lab.namespaces import Lab

PEER = "strongswan"  # what ratios are made against
SA_PAYLOAD = 1300
GOALS = {  # measure → tunnel → ratio to PEER
    "tcp": {"oepy": 2.5, "oepy+aggregation": 4.0},
    "udp1300": {"oepy": 1.3},
    "udp64": {"oepy": 1.0},
}
SA_COST = 0.10  # what many SAs may cost against one
_PORT = 7_000
_PATIENCE = 20.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement: bits and packets a second at the receiver, bits for each CPU second."""

    rate: float
    packets: float
    efficiency: float


@dataclass
class Row:
    """All turns of one tunnel at one measure; `median` of each figure."""

    measure: str
    tunnel: str
    turns: list[Turn] = field(default_factory=list)

    def median(self, name: str) -> float:
        return float(statistics.median(getattr(turn, name) for turn in self.turns))


@dataclass
class Result:
    rows: list[Row]
    missing: list[str]  # peers that are not installed

    def row(self, measure: str, tunnel: str) -> Row | None:
        return next((row for row in self.rows if (row.measure, row.tunnel) == (measure, tunnel)), None)

    def ratio(self, row: Row, name: str) -> float | None:
        """To PEER at the same measure; for numbers of SAs, to one SA."""
        many = row.measure.startswith("sas")
        base = self.row("sas1", row.tunnel) if many else self.row(row.measure, PEER)
        return None if base is None else row.median(name) / base.median(name)

    def data(self) -> dict[str, Any]:
        return {
            "missing": self.missing,
            "goals": GOALS,
            "rows": [
                {
                    "measure": row.measure,
                    "tunnel": row.tunnel,
                    "turns": len(row.turns),
                    "mbit_per_second": row.median("rate") / 1e6,
                    "packets_per_second": row.median("packets"),
                    "mbit_per_cpu_second": row.median("efficiency") / 1e6,
                    "rate_ratio": self.ratio(row, "rate"),
                    "cpu_ratio": self.ratio(row, "efficiency"),
                }
                for row in self.rows
            ],
        }


def run(
    *,
    seconds: float,
    rounds: int,
    measures: Sequence[str],
    progress: Progress = lambda done, total: None,
) -> Result:
    """Raises OepyError without root, without strongSwan, or where a tunnel carries nothing."""
    missing = charon.is_missing()
    if missing:
        raise OepyError(f"strongSwan is not installed ({missing})", "run scripts/install-system test")
    return asyncio.run(_run(seconds, rounds, measures, progress))


async def _run(seconds: float, rounds: int, measures: Sequence[str], progress: Progress) -> Result:
    absent = [name for name in [tunnels.wireguard_is_missing()] if name]
    directory = Path(tempfile.mkdtemp(prefix="oepy-bench-"))
    plain = [measure for measure in measures if not measure.startswith("sas")]
    counts = [int(measure[3:]) for measure in measures if measure.startswith("sas")]
    rows: dict[tuple[str, str], Row] = {}
    tunnel_count = 3 + (not absent)
    total = rounds * (len(plain) * tunnel_count + len(counts) * 2)
    done = 0
    with Lab() as lab:
        try:
            async with contextlib.AsyncExitStack() as stack:
                if plain:
                    grounds = await _grounds(stack, lab, directory, wireguard=not absent)
                    for measure in plain:
                        for number in range(rounds):
                            for name in _turned(list(grounds), number):
                                turn = await _measure(grounds[name], measure, seconds)
                                rows.setdefault((measure, name), Row(measure, name)).turns.append(turn)
                                progress(done := done + 1, total)
            async with contextlib.AsyncExitStack() as stack:
                many = {
                    (f"sas{count}", name): await stack.enter_async_context(
                        tunnels.oepy(lab, f"n{count}{'a' * aggregates}", sas=count, aggregation=aggregates)
                    )
                    for count in counts
                    for name, aggregates in (("oepy", False), ("oepy+aggregation", True))
                }
                for number in range(rounds):
                    for measure, name in _turned(list(many), number):
                        turn = await _measure(many[measure, name], measure, seconds)
                        rows.setdefault((measure, name), Row(measure, name)).turns.append(turn)
                        progress(done := done + 1, total)
        finally:
            lab.cleanup()
            shutil.rmtree(directory, ignore_errors=True)
    return Result(list(rows.values()), absent)


async def _grounds(
    stack: contextlib.AsyncExitStack, lab: Lab, directory: Path, *, wireguard: bool
) -> dict[str, Ground]:
    enter = stack.enter_async_context
    grounds = {
        "oepy": await enter(tunnels.oepy(lab, "oe")),
        "oepy+aggregation": await enter(tunnels.oepy(lab, "oea", aggregation=True)),
        PEER: await enter(tunnels.strongswan(lab, "swan", directory)),
    }
    if wireguard:
        grounds["wireguard-go"] = await enter(tunnels.wireguard(lab, "wg"))
    return grounds


def _turned(names: list[Any], number: int) -> list[Any]:
    """So that nobody is always first."""
    start = number % len(names) if names else 0
    return names[start:] + names[:start]


async def _measure(ground: Ground, measure: str, seconds: float) -> Turn:
    """One turn: `tcp`, `udpSIZE`, or `sasCOUNT`."""
    if measure == "tcp":
        job: dict[str, Any] = {"kind": "tcp", "size": 0, "to": [inner_right()]}
    elif measure.startswith("udp"):
        job = {"kind": "udp", "size": int(measure[3:]), "to": [inner_right()]}
    else:
        count = int(measure[3:])
        job = {"kind": "udp", "size": SA_PAYLOAD, "to": [inner_right(number) for number in range(count)]}
    page = os.memfd_create("oepy-bench")
    os.ftruncate(page, os.sysconf("SC_PAGE_SIZE"))
    try:
        return await asyncio.to_thread(
            _turn, ground, job | {"port": _PORT, "page": page, "seconds": seconds, "source": ""}
        )
    finally:
        os.close(page)


def _turn(ground: Ground, job: dict[str, Any]) -> Turn:
    module = [sys.executable, "-m", "oepy.bench.traffic"]
    receiver = ground.right.popen(
        *[*module, "receive", json.dumps(job)], stdout=subprocess.PIPE, pass_fds=[job["page"]]
    )
    assert receiver.stdout is not None
    try:
        if receiver.stdout.readline().strip() != "ready":
            raise OepyError("the benchmark's receiver does not start", "its messages stand above")
        before = ground.cpu_seconds()
        sender = ground.left.popen(
            *[*module, "send", json.dumps(job | {"source": INNER_LEFT})],
            stdout=subprocess.DEVNULL,
            pass_fds=[job["page"]],
        )
        sender.wait(job["seconds"] + _PATIENCE)
        spent = ground.cpu_seconds() - before
        line = receiver.communicate(timeout=_PATIENCE)[0]
        result = json.loads(line) if line.strip() else {"bytes": 0, "packets": 0, "seconds": 1.0}
    finally:
        if receiver.poll() is None:
            receiver.kill()
            receiver.wait()
    if not result["bytes"]:
        raise OepyError("nothing came through a tunnel", f"{ground.left.name}, {job['kind']} {job['size']}")
    bits = result["bytes"] * 8
    return Turn(bits / result["seconds"], result["packets"] / result["seconds"], bits / max(spent, 0.01))
