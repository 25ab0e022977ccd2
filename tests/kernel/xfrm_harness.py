"""Two hosts with the kernel's datapath, a wiretap between them, and small senders."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from oepy.datapath.routes import TUNNEL_MTU
from oepy.datapath.xfrm import datapath as module
from oepy.datapath.xfrm.datapath import XfrmDatapath
from oepy.datapath.xfrm.plan import BY_DEVICE, Scheme
from oepy.interfaces import DatapathEvent, TrapPolicy
from oepy.lab.capture import Frame, Packet
from oepy.lab.namespaces import Namespace
from oepy.model import MARK_PRIVATE, SaPair
from oepy.udp import IkeSockets, open_ike_sockets
from tests.fakes.datapath import mirrored, pairs
from tests.net.harness import A4, B4, Wired, policy

_ETH_P_ALL = 3
spis = itertools.count(0x1000, 0x10)  # of pairs
SECRET = b"nobody on the wire may read this"


@dataclass
class Host:
    namespace: Namespace
    sockets: IkeSockets
    datapath: XfrmDatapath
    events: list[DatapathEvent] = field(default_factory=list)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    async def start(self) -> None:
        with self.namespace.entered():
            await self.datapath.start(self.events.append)

    async def stop(self) -> None:
        with self.namespace.entered():
            await self.datapath.stop()

    def ip(self, *words: str) -> str:
        return self.namespace.run("ip", *words).stdout


@contextlib.asynccontextmanager
async def host(namespace: Namespace, scheme: Scheme = BY_DEVICE) -> AsyncIterator[Host]:
    module.ROUTES_SECONDS = 1e6  # it would look in our own namespace
    with namespace.entered():
        sockets = open_ike_sockets()
    made = Host(namespace, sockets, XfrmDatapath(sockets.ike, sockets.nat_t, scheme=scheme))
    try:
        await made.start()
        yield made
    finally:
        await made.stop()
        sockets.close()
    left = namespace.run(
        "sh", "-c", "ip rule; ip -6 rule; ip route show table 17733; ip link; ip xfrm policy"
    ).stdout
    # SAs of SPI 0 wait for the answer to an ACQUIRE, and go by themselves
    states = namespace.run("ip", "xfrm", "state").stdout.split("\nsrc ")
    left += "".join(state for state in states if "spi 0x00000000" not in state)
    for word in ("17733", "oe0", "0x4545", "0x6f0"):
        assert word not in left, left


@contextlib.asynccontextmanager
async def two_hosts(net: Wired, scheme: Scheme = BY_DEVICE) -> AsyncIterator[tuple[Host, Host]]:
    async with host(net.a, scheme) as a, host(net.b, scheme) as b:
        yield a, b


def kernel_policy(device: str | None = "oe0") -> TrapPolicy:
    return dataclasses.replace(policy(), tunnel_device=device, kernel_ipsec=True, clamp_mtu=TUNNEL_MTU)


async def join(a: Host, b: Host, pair: SaPair) -> None:
    await b.datapath.install(mirrored(pair))
    await a.datapath.install(pair)


async def part(a: Host, b: Host, pair: SaPair) -> None:
    await a.datapath.remove(pair.spi_in)
    await b.datapath.remove(pair.spi_out)


class Tap:
    """Everything that passes a device, from now on."""

    def __init__(self, namespace: Namespace, device: str = "eth0") -> None:
        with namespace.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            self._socket.bind((device, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)
        self._socket.setblocking(False)
        self.raw: list[bytes] = []

    def frames(self) -> list[bytes]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.raw.append(self._socket.recv(65535))
        return self.raw

    def packets(self) -> list[Packet]:
        """IP packets, neighbour discovery and multicast aside."""
        found = [Frame(0, data).packet() for data in self.frames()]
        return [packet for packet in found if packet is not None and packet.kind not in ("nd", "multicast")]

    def kinds(self) -> set[str]:
        return {packet.kind for packet in self.packets()}

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def tap(namespace: Namespace, device: str = "eth0") -> Iterator[Tap]:
    made = Tap(namespace, device)
    try:
        yield made
    finally:
        made.close()


def bound(namespace: Namespace, address: str, port: int, mark: int = MARK_PRIVATE) -> socket.socket:
    """A UDP socket whose packets go through the tunnel."""
    with namespace.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    if mark:
        sock.setsockopt(socket.SOL_SOCKET, 36, mark)
    sock.bind((address, port))
    sock.setblocking(False)
    return sock


async def arrives(sender: socket.socket, receiver: socket.socket, data: bytes, within: float = 2.0) -> bool:
    """Whether one datagram from `sender` comes to `receiver`, sent once."""
    with contextlib.suppress(BlockingIOError):
        while True:
            receiver.recv(65535)
    with contextlib.suppress(OSError):
        sender.sendto(data, receiver.getsockname()[:2])
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            if receiver.recv(65535) == data:
                return True
        await asyncio.sleep(0.002)
    return False


async def both_ways(one: socket.socket, other: socket.socket, data: bytes = SECRET) -> bool:
    return await arrives(one, other, data) and await arrives(other, one, data)


def pair_of(**changes: object) -> SaPair:
    """A tunnel of its own SPIs between a and b, plain ESP."""
    spi = next(spis)
    pair, _ = pairs(A4, B4, spis=(spi, spi + 1))
    return dataclasses.replace(pair, encap=False, **changes)  # type: ignore[arg-type]


@contextlib.contextmanager
def talkers(
    one: Namespace, other: Namespace, port: int = 7001
) -> Iterator[tuple[socket.socket, socket.socket]]:
    made = bound(one, A4, port), bound(other, B4, port)
    try:
        yield made
    finally:
        for sock in made:
            sock.close()
