"""How many destinations a second trap and engine take through: first packet trapped, decided, released.

Two hosts are made, each a process in a namespace of its own with the real trap and a cable to nowhere that
answers (a static neighbour). One has 100 destinations decided beforehand, the other many. In turns each sends
one UDP datagram to each of a block of new destinations, for which the engine gets "no key published" at once;
a turn ends when all have been released. So both sizes see the same machine at the same time.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from oepy.engine.messages import Decide, Flush, LookupDone, Trapped
from oepy.errors import OepyError
from oepy.lab.namespaces import Lab, Namespace
from oepy.model import Absent, Flow

FEW = 100
FLATNESS = 0.2
_BLOCK = 500  # destinations of one turn
_WINDOW = 32  # sent ahead: below any bound of the trap
_SOURCE = IPv4Address("198.18.0.1")
_FIRST_NEW = int(IPv4Address("198.19.0.0"))
_FIRST_OLD = int(IPv4Address("20.0.0.0"))
_ANSWER_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Result:
    """Rates in destinations a second (medians over the turns); memory in bytes."""

    entries_few: int
    entries_many: int
    rate_few: float
    rate_many: float
    turns: int
    daemon_bytes_per_entry: float
    kernel_bytes_per_entry: float
    fill_rate: float  # entries a second when only decided, in bulk

    @property
    def ratio(self) -> float:
        return self.rate_many / self.rate_few

    @property
    def flat(self) -> bool:
        return self.ratio >= 1 - FLATNESS


def render(result: Result, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({**asdict(result), "ratio": result.ratio, "flat": result.flat})
    return (
        f"destinations a second, trapped, decided and released (median of {result.turns} turns):\n"
        f"  with {result.entries_few:>7,} decided: {result.rate_few:>8,.0f}\n"
        f"  with {result.entries_many:>7,} decided: {result.rate_many:>8,.0f}   "
        f"ratio {result.ratio:.2f} ({'flat' if result.flat else 'NOT flat'} within {FLATNESS:.0%})\n"
        f"memory of one entry: {result.daemon_bytes_per_entry:.0f} bytes in the daemon, "
        f"{result.kernel_bytes_per_entry:.0f} in the kernel\n"
        f"entering in bulk: {result.fill_rate:,.0f} a second"
    )


def run(*, seconds: float, entries: int) -> Result:
    """Raises OepyError without root, or where the trap does not start."""
    with Lab() as lab:
        few, many = _Host(lab.namespace("few")), _Host(lab.namespace("many"))
        try:
            few.ask("fill", FEW)
            kernel_before = _kernel_memory()
            filled = many.ask("fill", entries)
            kernel_after = _kernel_memory()
            rates: dict[_Host, list[float]] = {few: [], many: []}
            for host in (few, many):
                host.ask("turn", _BLOCK)  # warm
            end = time.monotonic() + 2 * seconds
            while time.monotonic() < end or len(rates[many]) < 3:
                # alternating order, so that neither is always first
                for host in (few, many) if len(rates[few]) % 2 else (many, few):
                    rates[host].append(_BLOCK / host.ask("turn", _BLOCK)["seconds"])
        finally:
            few.end()
            many.end()
    return Result(
        entries_few=FEW,
        entries_many=entries,
        rate_few=statistics.median(rates[few]),
        rate_many=statistics.median(rates[many]),
        turns=len(rates[few]),
        daemon_bytes_per_entry=filled["grown"] / entries,
        kernel_bytes_per_entry=max(0, kernel_after - kernel_before) / entries,
        fill_rate=entries / filled["seconds"],
    )


def _kernel_memory() -> int:
    """Slab memory of the whole machine: a set element is a slab object."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            return int(line.split()[1]) * 1024
    return 0


class _Host:
    """A child process in a namespace; takes one command a line, answers one JSON object a line."""

    def __init__(self, namespace: Namespace) -> None:
        namespace.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        for device in ("eth0", "eth1"):
            namespace.ip("link", "set", device, "up")
        namespace.address("eth0", "198.18.0.1/32")
        namespace.ip("neigh", "add", "198.18.0.2", "lladdr", "02:00:00:00:00:02", "dev", "eth0")
        namespace.ip("route", "add", "default", "via", "198.18.0.2", "dev", "eth0", "onlink")
        self._process: subprocess.Popen[Any] = namespace.popen(
            *[sys.executable, "-m", "oepy.bench.trap"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OepyError("a host of the benchmark has ended", "its messages stand above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def ask(self, command: str, count: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command} {count}\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(_ANSWER_SECONDS)


# -- the child -------------------------------------------------------------------------------------------


class _Measured:
    """The trap, the engine and the sender, in one process as the daemon has them. The DNS answers at once."""

    def __init__(self) -> None:
        from oepy.engine import Engine, EngineSettings
        from oepy.interfaces import TrapPolicy
        from oepy.model import PolicyGroup
        from oepy.trap import NfqueueTrap

        self._group = PolicyGroup.PRIVATE_OR_CLEAR
        self._engine = Engine(EngineSettings(lambda _: (self._group, "default")))
        self._trap = NfqueueTrap()
        self._trap.start(TrapPolicy((), self._group, ()), self._on_trapped)
        self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sender.setblocking(False)
        self._next_new = _FIRST_NEW
        self._next_old = _FIRST_OLD
        self._asked = 0
        self._more = asyncio.Event()

    def _on_trapped(self, group: Any, flow: Any) -> None:
        self._take_through(flow)
        self._asked += 1
        self._more.set()

    def _take_through(self, flow: Flow) -> None:
        """What the daemon does for a destination without a key."""
        now = time.monotonic()
        self._engine.handle(Trapped(self._group, flow), now)
        answer = Absent(str(flow.destination), "owner.", 86_400)
        for action in self._engine.handle(LookupDone(flow.destination, answer), now):
            if isinstance(action, Decide):
                self._trap.decide(action.group, action.destination, action.verdict, action.lifetime)

    async def fill(self, count: int) -> dict[str, float]:
        """Decide `count` destinations that nobody sends to."""
        before, begun = _resident(), time.perf_counter()
        for number in range(count):
            self._take_through(Flow(_SOURCE, IPv4Address(self._next_old + number), 17, 9, 9))
            if number % 500 == 499:
                await asyncio.sleep(0)
        self._next_old += count
        await asyncio.sleep(0)
        return {"seconds": time.perf_counter() - begun, "grown": _resident() - before}

    async def turn(self, count: int) -> dict[str, float]:
        """Take `count` new destinations through, _WINDOW of them on their way at any time; then forget them,
        outside of the measured time, so that the number of entries stays what it is."""
        released = self._trap.statistics()["released_clear"]
        goal, sent, begun = self._asked + count, 0, time.perf_counter()
        while self._asked < goal:
            while sent < count and sent - (self._asked - (goal - count)) < _WINDOW:
                self._sender.sendto(b"first", (str(IPv4Address(self._next_new + sent)), 9))
                sent += 1
            self._more.clear()
            await asyncio.wait_for(self._more.wait(), _ANSWER_SECONDS)
        await asyncio.sleep(0)  # the last decisions are flushed
        elapsed = time.perf_counter() - begun
        if self._trap.statistics()["released_clear"] - released != count:
            raise OepyError("the trap lost packets", "this is a mistake in oepy")
        for number in range(count):
            destination = IPv4Address(self._next_new + number)
            self._engine.handle(Flush(destination), time.monotonic())
            self._trap.forget([(self._group, destination)])
        self._next_new += count
        await asyncio.sleep(0)
        return {"seconds": elapsed}

    def stop(self) -> None:
        self._sender.close()
        self._trap.stop(guard=False)


def _resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _child() -> None:
    measured = _Measured()
    print("{}", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command, count = line.split()
        work = measured.fill if command == "fill" else measured.turn
        print(json.dumps(await work(int(count))), flush=True)
    measured.stop()


if __name__ == "__main__":
    asyncio.run(_child())
