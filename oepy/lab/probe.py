"""Ping from inside of a namespace, without needing a `ping` command on the machine.

`python -m oepy.lab.probe ADDRESS [-c COUNT] [-s SIZE]` prints one line an echo, like the command does.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import struct
import sys
import time
from ipaddress import ip_address

from oepy.lab.namespaces import Namespace

_ECHO = {4: (8, 0), 6: (128, 129)}  # request and reply types: RFC 792, RFC 4443


def _checksum(data: bytes) -> int:
    padded = data + b"\0" * (len(data) & 1)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Pinger:
    """A raw ICMP socket of the calling thread's namespace."""

    def __init__(self, address: str, *, source: str | None = None, size: int = 56) -> None:
        self.address = address
        self.version = ip_address(address).version
        family = socket.AF_INET if self.version == 4 else socket.AF_INET6
        protocol = socket.IPPROTO_ICMP if self.version == 4 else socket.IPPROTO_ICMPV6
        self.socket = socket.socket(family, socket.SOCK_RAW, protocol)
        if source is not None:
            self.socket.bind((source, 0))
        self._identifier = int.from_bytes(os.urandom(2), "big")
        self._payload = bytes(index & 0xFF for index in range(size))

    def send(self, sequence: int) -> None:
        """`size` bytes after the ICMP header. Raises OSError as sendto does (EMSGSIZE, EHOSTUNREACH …)."""
        kind = _ECHO[self.version][0]
        head = struct.pack("!BBHHH", kind, 0, 0, self._identifier, sequence)
        if self.version == 4:  # the kernel fills in ICMPv6's checksum
            checksum = _checksum(head + self._payload)
            head = struct.pack("!BBHHH", kind, 0, checksum, self._identifier, sequence)
        self.socket.sendto(head + self._payload, (self.address, 0))

    def receive(self, timeout: float) -> int | None:
        """The sequence number of the next whole reply to us, None when there is none in time."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self.socket], [], [], left)[0]:
                return None
            data = self.socket.recv(65535)
            if self.version == 4:
                data = data[(data[0] & 15) * 4 :]
            kind, _, _, identifier, sequence = struct.unpack("!BBHHH", data[:8])
            ours = kind == _ECHO[self.version][1] and identifier == self._identifier
            if ours and data[8:] == self._payload:
                return int(sequence)
        return None

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Pinger:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def echoes(pinger: Pinger, count: int, timeout: float) -> list[float | None]:
    """One echo after the other: seconds to the reply, or None for each that got none."""
    results: list[float | None] = []
    for sequence in range(count):
        begun = time.monotonic()
        try:
            pinger.send(sequence)
        except OSError:
            results.append(None)
            continue
        answer = pinger.receive(timeout)
        while answer is not None and answer != sequence:
            answer = pinger.receive(max(0.0, begun + timeout - time.monotonic()))
        results.append(None if answer is None else time.monotonic() - begun)
    return results


def ping(
    namespace: Namespace,
    address: str,
    *,
    count: int = 1,
    size: int = 56,
    timeout: float = 5.0,
    source: str | None = None,
) -> list[float | None]:
    """Ping from `namespace`; blocks the calling thread. Seconds to each reply, None for no reply."""
    with namespace.entered():
        pinger = Pinger(address, source=source, size=size)
    with pinger:
        return echoes(pinger, count, timeout)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="oepy.lab.probe")
    parser.add_argument("address")
    parser.add_argument("-c", "--count", type=int, default=1)
    parser.add_argument("-s", "--size", type=int, default=56)
    parser.add_argument("-W", "--timeout", type=float, default=1.0)
    arguments = parser.parse_args()
    with Pinger(arguments.address, size=arguments.size) as pinger:
        results = echoes(pinger, arguments.count, arguments.timeout)
    for sequence, seconds in enumerate(results):
        text = "no reply" if seconds is None else f"{seconds * 1000:.3f} ms"
        print(f"{arguments.address}: seq={sequence} {text}")
    sys.exit(0 if any(result is not None for result in results) else 1)


if __name__ == "__main__":
    _main()
