"""In-memory twins of the datapath's seams, and SA pairs for both ends of a tunnel."""

from __future__ import annotations

import dataclasses
from collections import deque
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

from oepy.datapath.tun.seams import Received, Route
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

KEY_LENGTHS = {
    "aes128gcm16": 20,
    "aes192gcm16": 28,
    "aes256gcm16": 36,
    "chacha20poly1305": 36,
    "aes128": 16,
    "aes192": 24,
    "aes256": 32,
    "aes128ctr": 20,
    "aes192ctr": 28,
    "aes256ctr": 36,
    "null": 0,
    "": 0,
}
GCM = EspSuite("aes128gcm16")
UNLIMITED = Lifetime()
MAC_LENGTHS = {"": 0, "sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}
SUITES = [
    *(
        EspSuite(name, "", esn)
        for name in ("aes128gcm16", "aes256gcm16", "chacha20poly1305")
        for esn in (True, False)
    ),
    EspSuite("aes192gcm16"),
    *(EspSuite("aes256", mac, esn) for mac in ("sha256", "sha384", "sha512") for esn in (True, False)),
    EspSuite("aes128", "sha256"),
    EspSuite("null", "sha256"),
]


def keys_of(suite: EspSuite, filler: int) -> SaKeys:
    return SaKeys(
        Secret(bytes([filler]) * KEY_LENGTHS[suite.encryption]),
        Secret(bytes([filler + 1]) * MAC_LENGTHS[suite.integrity]),
    )


def selector(text: str, protocol: int = 0, port: int | None = None) -> TrafficSelector:
    return TrafficSelector.of(ip_network(text), protocol, port)


def pairs(
    local: str = "192.0.2.1",
    remote: str = "192.0.2.2",
    *,
    suite: EspSuite = GCM,
    inner: tuple[str, str] | None = None,
    lifetime: Lifetime = UNLIMITED,
    spis: tuple[int, int] = (0x1001, 0x2002),
    replay_window: int = 1024,
    selectors: tuple[TrafficSelector, TrafficSelector] | None = None,
) -> tuple[SaPair, SaPair]:
    """The same tunnel as its two ends see it. `inner` are the protected networks; default: the endpoints."""
    networks = inner or (local, remote)
    here, there = selectors or (selector(networks[0]), selector(networks[1]))
    one = SaPair(
        spi_in=spis[0],
        spi_out=spis[1],
        local=Endpoint(ip_address(local), 4500),
        remote=Endpoint(ip_address(remote), 4500),
        suite=suite,
        keys_in=keys_of(suite, 1),
        keys_out=keys_of(suite, 3),
        local_ts=(here,),
        remote_ts=(there,),
        authenticated=Authenticated.MANUAL,
        peer=PeerIdentity.null(),
        replay_window=replay_window,
        lifetime=lifetime,
    )
    return one, mirrored(one)


def mirrored(pair: SaPair) -> SaPair:
    return dataclasses.replace(
        pair,
        spi_in=pair.spi_out,
        spi_out=pair.spi_in,
        local=pair.remote,
        remote=pair.local,
        keys_in=pair.keys_out,
        keys_out=pair.keys_in,
        local_ts=pair.remote_ts,
        remote_ts=pair.local_ts,
    )


def ipv4_packet(
    source: str,
    destination: str,
    payload: bytes = b"payload",
    protocol: int = 17,
    ports: tuple[int, int] = (1, 2),
) -> bytes:
    body = ports[0].to_bytes(2, "big") + ports[1].to_bytes(2, "big") + payload
    head = bytes((0x45, 0)) + (20 + len(body)).to_bytes(2, "big") + bytes(4) + bytes((64, protocol, 0, 0))
    return head + ip_address(source).packed + ip_address(destination).packed + body


def ipv6_packet(
    source: str,
    destination: str,
    payload: bytes = b"payload",
    protocol: int = 17,
    ports: tuple[int, int] = (1, 2),
) -> bytes:
    body = ports[0].to_bytes(2, "big") + ports[1].to_bytes(2, "big") + payload
    head = bytes((0x60, 0, 0, 0)) + len(body).to_bytes(2, "big") + bytes((protocol, 64))
    return head + ip_address(source).packed + ip_address(destination).packed + body


class MemoryDevice:
    """`incoming` are packets of the host for the tunnel, `written` what came out of the tunnel."""

    def __init__(self) -> None:
        self.incoming: deque[bytes] = deque()
        self.written: list[bytes] = []
        self.refuses = False

    def read(self) -> bytes | None:
        return self.incoming.popleft() if self.incoming else None

    def write(self, packet: bytes) -> bool:
        if self.refuses:
            return False
        self.written.append(packet)
        return True


class MemorySocket:
    """`sent` are datagrams with their route; `deliver` puts one in to be received."""

    port = 4500

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Route]] = []
        self.refuses = False
        self._incoming: deque[Received] = deque()

    def deliver(self, data: bytes, source: str = "192.0.2.2", to: str = "192.0.2.1") -> None:
        info = bytes(4) + bytes(4) + IPv4Address(to).packed
        ancillary: list[tuple[int, int, bytes]] = [(0, 8, info)]
        address: tuple[Any, ...] = (source, 4500)
        self._incoming.append((memoryview(data), ancillary, address))

    def receive(self) -> Received | None:
        return self._incoming.popleft() if self._incoming else None

    def send(self, data: bytes, route: Route) -> bool:
        if self.refuses:
            return False
        self.sent.append((data, route))
        return True
