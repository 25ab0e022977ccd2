"""A thin transport for one IkeEndpoint: UDP sockets on 500 and 4500 in a namespace, and the real clock."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import pyroute2.netns

from oepy.ike.events import Question
from oepy.model import NAT_T_PORT, Endpoint
from tests.sim.ike_net import Host

_MARKER = bytes(4)


class Driver:
    def __init__(self, host: Host, namespace: str, addresses: list[str]) -> None:
        self.host = host
        self._sockets: dict[Endpoint, socket.socket] = {}
        self.esp = 0
        pyroute2.netns.pushns(namespace)
        try:
            for text in addresses:
                address = ip_address(text)
                for port in (500, 4500):
                    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
                    sock = socket.socket(family, socket.SOCK_DGRAM)
                    sock.setblocking(False)
                    sock.bind((text, port))
                    self._sockets[Endpoint(address, port)] = sock
        finally:
            pyroute2.netns.popns()

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()

    def flush(self) -> None:
        again = True
        while again:
            again = False
            for event in self.host.ike.events():
                if isinstance(event, Question):
                    self.host.ike.answer(event.token, self.host.reply(event), time.monotonic())
                    again = True
                else:
                    self.host.note(event, time.monotonic())
        for datagram in self.host.ike.datagrams():
            marker = _MARKER if datagram.local.port == NAT_T_PORT else b""
            target = (str(datagram.remote.address), datagram.remote.port)
            self._sockets[datagram.local].sendto(marker + datagram.data, target)

    def pump(self, until: Callable[[], object], timeout: float = 10.0) -> bool:
        """Run until the condition holds; whether it did in time."""
        end = time.monotonic() + timeout
        by_fd = {sock: local for local, sock in self._sockets.items()}
        self.flush()
        while not until():
            now = time.monotonic()
            if now >= end:
                return False
            timer = self.host.ike.next_timer()
            pause = min(0.2, end - now, *([max(0.0, timer - now)] if timer is not None else []))
            readable, _, _ = select.select(list(by_fd), [], [], pause)
            for sock in readable:
                data, (text, port, *_) = sock.recvfrom(65535)
                self._take(data, by_fd[sock], Endpoint(ip_address(text), port))
            self.host.ike.handle_timer(time.monotonic())
            self.flush()
        return True

    def _take(self, data: bytes, local: Endpoint, remote: Endpoint) -> None:
        if local.port == NAT_T_PORT and data != b"\xff":
            if data[:4] != _MARKER:
                self.esp += 1
                return
            data = data[4:]
        self.host.ike.receive(data, local, remote, time.monotonic())


@contextmanager
def driver(host: Host, namespace: str, addresses: list[str]) -> Iterator[Driver]:
    made = Driver(host, namespace, addresses)
    try:
        yield made
    finally:
        made.close()
