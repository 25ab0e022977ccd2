"""Two hosts on a wire, a trap or a datapath inside of one, and small senders."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network

from oepy.interfaces import PolicyRule, TrapPolicy
from oepy.lab.namespaces import Lab, Namespace, Wire
from oepy.lab.probe import ping
from oepy.model import Flow, IpAddress, PolicyGroup, Verdict
from oepy.trap import NfqueueTrap

GROUP = PolicyGroup
START_SECONDS = 60  # an emulated machine, with a sender that never stops beside it, takes twenty
PATIENCE = 15.0  # with what is bound to come, however busy the machine is
A4, B4, A6, B6 = "198.18.0.1", "198.18.0.2", "2001:2::1", "2001:2::2"


def rule(group: PolicyGroup, network: str, protocol: int = 0, port: int = 0) -> PolicyRule:
    return PolicyRule(group, ip_network(network), protocol, port)


def policy(
    *rules: PolicyRule, default: PolicyGroup = GROUP.PRIVATE_OR_CLEAR, resolvers: tuple[str, ...] = ()
) -> TrapPolicy:
    return TrapPolicy(rules, default, tuple(ip_address(text) for text in resolvers))


@dataclasses.dataclass
class Wired:
    """Hosts `a` and `b` (addresses A4, A6, B4, B6) on one wire."""

    lab: Lab
    wire: Wire
    a: Namespace
    b: Namespace


@contextlib.contextmanager
def wired() -> Iterator[Wired]:
    with Lab() as lab:
        wire = lab.wire()
        a, b = lab.namespace("a"), lab.namespace("b")
        wire.attach(a, addresses=[f"{A4}/24", f"{A6}/64"])
        wire.attach(b, addresses=[f"{B4}/24", f"{B6}/64"])
        yield Wired(lab, wire, a, b)


class TrapIn:
    """A running trap in a namespace; remembers what it was asked, and may answer at once."""

    def __init__(self, namespace: Namespace, answer: Verdict | None = None) -> None:
        self.namespace = namespace
        self.trap = NfqueueTrap()
        self.asked: list[tuple[PolicyGroup, Flow]] = []
        self.answer = answer

    def start(self, chosen: TrapPolicy) -> None:
        with self.namespace.entered():
            self.trap.start(chosen, self._on_trapped)

    def _on_trapped(self, group: PolicyGroup, flow: Flow) -> None:
        self.asked.append((group, flow))
        if self.answer is not None:
            self.trap.decide(group, flow.destination, self.answer, 60)

    def reload(self, chosen: TrapPolicy) -> None:
        with self.namespace.entered():
            self.trap.reload(chosen)

    def stop(self, *, guard: bool) -> None:
        with self.namespace.entered():
            self.trap.stop(guard=guard)

    def decide(self, group: PolicyGroup, address: str, verdict: Verdict, lifetime: float | None = 60) -> None:
        self.trap.decide(group, ip_address(address), verdict, lifetime)


@contextlib.contextmanager
def trapping(namespace: Namespace, chosen: TrapPolicy, answer: Verdict | None = None) -> Iterator[TrapIn]:
    inside = TrapIn(namespace, answer)
    inside.start(chosen)
    try:
        yield inside
    finally:
        inside.stop(guard=False)


def cut_here(namespace: Namespace, device: str) -> None:
    """Let the kernel cut batches of datagrams before they reach this device, as any real card would at last:
    a capture behind it shows the packets of a real wire."""
    namespace.run("ethtool", "-K", device, "tx-udp-segmentation", "off")


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for it, with the loop running; it may be a coroutine's result. Fails where it does not come true."""
    deadline = time.monotonic() + seconds
    while not (await found if inspect.isawaitable(found := condition()) else found):
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


async def pinged(
    namespace: Namespace, address: str, *, count: int = 1, size: int = 56, within: float = PATIENCE
) -> int:
    """How many of the echoes are answered, while the loop runs on. Where none is to be, `within` says how long is
    enough; each that is answered takes no longer than it takes."""
    results = await asyncio.to_thread(ping, namespace, address, count=count, size=size, timeout=within)
    return sum(result is not None for result in results)


def udp(
    namespace: Namespace, address: str, port: int = 0, mark: int = 0, source: str = "", source_port: int = 0
) -> socket.socket:
    """A UDP socket in `namespace`, connected to `address` where a port is given, else bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with namespace.entered():
        sock = socket.socket(family, socket.SOCK_DGRAM)
    if mark:
        sock.setsockopt(socket.SOL_SOCKET, 36, mark)
    if source or source_port:
        sock.bind((source, source_port))
    sock.settimeout(1.0)
    if port:
        sock.connect((address, port))
    return sock


def listen_udp(namespace: Namespace, address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with namespace.entered():
        sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((address, port))
    sock.setblocking(False)
    return sock


def received(sock: socket.socket) -> list[bytes]:
    """Everything that has arrived."""
    found = []
    while True:
        try:
            found.append(sock.recv(65535))
        except BlockingIOError:
            return found


async def arrived(sock: socket.socket, count: int) -> list[bytes]:
    """Everything that has arrived as soon as there are so many datagrams, or after all patience."""
    found = received(sock)
    deadline = time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
        found += received(sock)
    return found


def address(text: str) -> IpAddress:
    return ip_address(text)


class Holder:
    """A trap in a process of its own inside of a namespace (tests/net/holder.py), which can be killed."""

    def __init__(self, namespace: Namespace, **chosen: object) -> None:
        self.process = namespace.popen(
            *[sys.executable, "-m", "tests.net.holder", json.dumps(chosen)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._said = b""
        self.line("ready")

    def line(self, expected: str) -> None:
        assert self.process.stdout is not None
        source = self.process.stdout.fileno()
        while b"\n" not in self._said:  # several lines may come at once
            assert select.select([source], [], [], START_SECONDS)[0], f"no {expected!r}"
            data = os.read(source, 4096)
            assert data, f"no {expected!r}, but its end"
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        assert line.decode() == expected

    def ask(self, command: str) -> None:
        """`stop`, `guard`, or `restart`; returns when it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        self.line("done")

    def kill(self) -> None:
        """kill -9, and wait until the kernel has cleaned up behind it."""
        self.process.kill()
        self.process.wait(10)
