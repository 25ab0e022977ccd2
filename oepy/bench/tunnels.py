"""Tunnels to compare: each joins two namespaces of its own, with ESP or WireGuard in userland between them.

[left: 198.18.0.1, inside 10.77.0.1] ── veth ── [right: 198.18.0.2, inside 10.78.0.0/16]
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from oepy.bench.processes import cpu_seconds
from oepy.datapath import TunDatapath
from oepy.errors import OepyError
from oepy.lab import charon
from oepy.lab.namespaces import Lab, Namespace
from oepy.model import (
    Authenticated,
    Endpoint,
    EspSuite,
    PeerIdentity,
    SaKeys,
    SaPair,
    Secret,
    TrafficSelector,
)
from oepy.udp import UdpSocket, open_socket

LEFT, RIGHT = "198.18.0.1", "198.18.0.2"
INNER_LEFT = "10.77.0.1"
INNER_RIGHT = ip_network("10.78.0.0/16")
SUITE = EspSuite("aes128gcm16", esn=False)
_KEY_BYTES = 20
_START_SECONDS = 15.0


def inner_right(number: int = 0) -> str:
    """The address behind the tunnel with this number."""
    return str(INNER_RIGHT[number + 1])


@dataclass
class Ground:
    """Two namespaces on a cable, with the inner addresses on their loopbacks."""

    left: Namespace
    right: Namespace
    processes: list[int] = field(default_factory=list)  # those that move packets

    @classmethod
    def make(cls, lab: Lab, label: str) -> Ground:
        left, right = lab.namespace(f"{label}l"), lab.namespace(f"{label}r")
        lab.veth(left, right)
        left.address("eth0", f"{LEFT}/24")
        right.address("eth0", f"{RIGHT}/24")
        left.address("lo", f"{INNER_LEFT}/32")
        right.address("lo", f"{inner_right()}/{INNER_RIGHT.prefixlen}")  # on lo, all of the prefix is local
        return cls(left, right)

    def lead(self, device: str) -> None:
        """Send what is for the other inner side into the tunnel."""
        self.left.ip("route", "add", str(INNER_RIGHT), "dev", device, "src", INNER_LEFT)
        self.right.ip("route", "add", f"{INNER_LEFT}/32", "dev", device, "src", inner_right())

    def cpu_seconds(self) -> float:
        """User and system time of the processes that move packets, so far."""
        return sum(map(cpu_seconds, self.processes))


# -- oepy ------------------------------------------------------------------------------------------------


def _pair(number: int, aggregation: bool) -> SaPair:
    """As the left side sees it: our one inner address, the other's inner address of this number."""
    return SaPair(
        spi_in=0x10000 + number,
        spi_out=0x50000 + number,
        local=Endpoint(ip_address(LEFT), 4500),
        remote=Endpoint(ip_address(RIGHT), 4500),
        suite=SUITE,
        keys_in=SaKeys(Secret(secrets.token_bytes(_KEY_BYTES))),
        keys_out=SaKeys(Secret(secrets.token_bytes(_KEY_BYTES))),
        local_ts=(TrafficSelector.of(ip_address(INNER_LEFT)),),
        remote_ts=(TrafficSelector.of(ip_address(inner_right(number))),),
        authenticated=Authenticated.MANUAL,
        peer=PeerIdentity.null(),
        aggregation=aggregation,
        super_packets=aggregation,
    )


def _mirrored(pair: SaPair) -> SaPair:
    return SaPair(
        spi_in=pair.spi_out,
        spi_out=pair.spi_in,
        local=pair.remote,
        remote=pair.local,
        suite=pair.suite,
        keys_in=pair.keys_out,
        keys_out=pair.keys_in,
        local_ts=pair.remote_ts,
        remote_ts=pair.local_ts,
        authenticated=pair.authenticated,
        peer=pair.peer,
        aggregation=pair.aggregation,
        super_packets=pair.super_packets,
    )


@contextlib.asynccontextmanager
async def oepy(lab: Lab, label: str, *, sas: int = 1, aggregation: bool = False) -> AsyncIterator[Ground]:
    """Two datapath processes with so many SA pairs, each to an inner address of its own."""
    ground = Ground.make(lab, label)
    datapaths: list[TunDatapath] = []
    sockets: list[UdpSocket] = []
    try:
        for namespace in (ground.left, ground.right):
            with namespace.entered():
                sockets.append(open_socket(4, 4500))
                datapath = TunDatapath(sockets[-1:], lambda *_: None)
                datapaths.append(datapath)
                await datapath.start(lambda _: None)
            assert datapath.process_id is not None
            ground.processes.append(datapath.process_id)
        for number in range(sas):
            pair = _pair(number, aggregation)
            await datapaths[0].install(pair)
            await datapaths[1].install(_mirrored(pair))
        ground.lead("oe0")
        yield ground
    finally:
        for datapath in datapaths:
            await datapath.stop()
        for sock in sockets:
            sock.close()


# -- strongSwan ------------------------------------------------------------------------------------------

# OpenSSL's AES-GCM, which oepy uses too: strongSwan's own is ten times slower
_CHARON = charon.Options(
    "random nonce openssl kdf vici kernel-libipsec kernel-netlink socket-default",
    plugin_settings="    kernel-libipsec { load = 20 }",
)
_SWANCTL_CONF = """
connections {{
  bench {{
    version = 2
    local_addrs = {here}
    remote_addrs = {there}
    encap = yes
    proposals = aes128gcm16-prfsha256-x25519
    local {{ auth = psk
      id = {here} }}
    remote {{ auth = psk
      id = {there} }}
    children {{
      net {{
        local_ts = {local_ts}
        remote_ts = {remote_ts}
        esp_proposals = aes128gcm16-noesn
      }}
    }}
  }}
}}
secrets {{ ike-bench {{ secret = {secret} }} }}
"""


@contextlib.asynccontextmanager
async def strongswan(lab: Lab, label: str, directory: Path) -> AsyncIterator[Ground]:
    """Two charons whose ESP is the plugin kernel-libipsec's, over TUN and UDP."""
    ground = Ground.make(lab, label)
    secret = secrets.token_hex(16)
    right = str(INNER_RIGHT)
    sides = ((ground.left, LEFT, RIGHT, f"{INNER_LEFT}/32", right), (ground.right, RIGHT, LEFT, right, ""))
    with contextlib.ExitStack() as running:
        daemons = []
        for namespace, here, there, local_ts, remote_ts in sides:
            place = directory / f"{label}-{namespace.label}"
            daemon = running.enter_context(charon.charon(namespace.name, place, _CHARON))
            ground.processes.append(daemon.pid)
            daemon.load(
                _SWANCTL_CONF.format(
                    here=here,
                    there=there,
                    local_ts=local_ts,
                    remote_ts=remote_ts or f"{INNER_LEFT}/32",
                    secret=secret,
                )
            )
            daemons.append(daemon)
        daemons[0].swanctl("--initiate", "--child", "net", "--timeout", "10")
        yield ground


# -- wireguard-go ----------------------------------------------------------------------------------------


def wireguard_is_missing() -> str:
    return "" if shutil.which("wireguard-go") else "wireguard-go (Debian package of that name)"


def _wireguard_ask(device: str, request: str) -> None:
    """The userspace API: lines `key=value`, answered by `errno=0`."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5.0)
        sock.connect(f"/var/run/wireguard/{device}.sock")
        sock.sendall(request.encode() + b"\n")
        answer = sock.recv(4096).decode()
    if "errno=0" not in answer:
        raise OepyError(f"wireguard-go refuses its configuration: {answer.strip()}")


@contextlib.asynccontextmanager
async def wireguard(lab: Lab, label: str) -> AsyncIterator[Ground]:
    ground = Ground.make(lab, label)
    keys = [X25519PrivateKey.generate() for _ in range(2)]
    devices = [f"wg{os.getpid():x}{side}" for side in "lr"]
    sides = ((ground.left, RIGHT, str(INNER_RIGHT)), (ground.right, LEFT, f"{INNER_LEFT}/32"))
    for number, (namespace, there, inside) in enumerate(sides):
        process = namespace.popen(
            *["wireguard-go", "--foreground", devices[number]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ground.processes.append(process.pid)
        path = Path(f"/var/run/wireguard/{devices[number]}.sock")
        _await(path.exists, "wireguard-go does not start")
        private = keys[number].private_bytes_raw().hex()
        public = keys[1 - number].public_key().public_bytes_raw().hex()
        peer = f"public_key={public}\nendpoint={there}:51820\nallowed_ip={inside}\n"
        _wireguard_ask(devices[number], f"set=1\nprivate_key={private}\nlisten_port=51820\n{peer}")
        namespace.ip("link", "set", devices[number], "up")
    # The left one has the route by name of its own device, and so has the right one
    ground.left.ip("route", "add", str(INNER_RIGHT), "dev", devices[0], "src", INNER_LEFT)
    ground.right.ip("route", "add", f"{INNER_LEFT}/32", "dev", devices[1], "src", inner_right())
    yield ground


def _await(condition: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise OepyError(failure, f"it had {_START_SECONDS:.0f} s")
        time.sleep(0.05)


__all__ = [
    "Ground",
    "inner_right",
    "oepy",
    "strongswan",
    "wireguard",
    "wireguard_is_missing",
]
