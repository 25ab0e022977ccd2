"""In-memory twins of the datapath's seams, and SA pairs for both ends of a tunnel."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

from oepy.datapath.esp.inner import Bytes
from oepy.datapath.esp.offload import NONE, Offload, parse
from oepy.datapath.esp.sa import NEXT_HEADER, EspPair
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
from tests.fakes.network_card import cut

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
    EspSuite("aes128ctr", "sha256"),
    EspSuite("aes256ctr", "sha384", False),
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


def esp_of(pair: EspPair, packet: bytes, next_header: int | None = None) -> bytes:
    """The ESP packet that `pair` makes of this payload; by default of this IP packet, in tunnel mode."""
    number = NEXT_HEADER[packet[0] >> 4] if next_header is None else next_header
    sequence, count = pair.reserve(1, len(packet))
    assert count == 1
    plaintext = packet + pair.trailer(len(packet), number)
    buffer = memoryview(bytearray(pair.sealed_length(len(packet))))
    buffer[pair.prefix : pair.prefix + len(plaintext)] = plaintext
    pair.seal(buffer, 0, len(buffer), sequence, 1)
    return bytes(buffer)


def sealed_plaintext(pair: EspPair, plaintext: bytes) -> bytes:
    """Any plaintext, trailer and all, authentic and with the pair's next number."""
    pair._sequence += 1
    icv = pair._around - pair.prefix
    buffer = memoryview(bytearray(pair._around + len(plaintext)))
    buffer[pair.prefix : len(buffer) - icv] = plaintext
    pair.seal(buffer, 0, len(buffer), pair._sequence, 1)
    return bytes(buffer)


class MemoryDevice:
    """`incoming` are packets of the host for the tunnel, plain or with an Offload; `written` what came out of
    the tunnel, as a network card would send it; `crossings` how it came, with its Offload."""

    coalesces = True

    def __init__(self) -> None:
        self.incoming: deque[bytes | tuple[bytes, Offload]] = deque()
        self.written: list[bytes] = []
        self.crossings: list[tuple[bytes, Offload]] = []
        self.refuses = self.offloads = False

    def read(self) -> tuple[memoryview, Offload] | None:
        if not self.incoming:
            return None
        entry = self.incoming.popleft()
        packet, offload = entry if isinstance(entry, tuple) else (entry, NONE)
        return memoryview(bytearray(packet)), offload

    def offload(self, wanted: bool) -> None:
        self.offloads = wanted

    def write(self, parts: Sequence[Bytes], header: bytes) -> bool:
        if self.refuses:
            return False
        packet, offload = b"".join(parts), parse(memoryview(header))
        self.crossings.append((packet, offload))
        self.written += cut(packet, offload)
        return True


class MemorySocket:
    """`sent` are datagrams with their route; `deliver` puts datagrams of one size in to be received."""

    port = 4500

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Route]] = []
        self.calls: list[int] = []  # datagrams of each system call
        self.refuses = False
        self._incoming: deque[Received] = deque()

    def deliver(self, *data: bytes, source: str = "192.0.2.2", to: str = "192.0.2.1") -> None:
        info = bytes(4) + bytes(4) + IPv4Address(to).packed
        ancillary: list[tuple[int, int, bytes]] = [(0, 8, info)]
        address: tuple[Any, ...] = (source, 4500)
        assert all(len(datagram) == len(data[0]) for datagram in data[:-1])
        self._incoming.append((memoryview(b"".join(data)), ancillary, address, len(data[0])))

    def receive(self) -> Received | None:
        return self._incoming.popleft() if self._incoming else None

    def send(self, data: memoryview, route: Route, segment: int) -> int:
        pieces = [bytes(data[start : start + segment]) for start in range(0, len(data), segment)]
        if self.refuses:
            return len(pieces)
        self.calls.append(len(pieces))
        self.sent += [(piece, route) for piece in pieces]
        return 0
