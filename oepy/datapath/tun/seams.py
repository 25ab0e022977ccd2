"""What the forwarder stands between: a device that gives and takes IP packets, and an outer UDP socket.

tests/fakes has an in-memory twin of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from oepy.model import Endpoint
from oepy.udp import Ancillary, source_ancillary


class PacketDevice(Protocol):
    def read(self) -> bytes | None:
        """The next IP packet from the host, None for none now."""

    def write(self, packet: bytes) -> bool:
        """Hand an IP packet to the host. False where the host refuses it."""


@dataclass(frozen=True, slots=True)
class Route:
    """How to reach a peer's endpoint from ours, prepared once for each SA."""

    version: int
    ancillary: Ancillary
    address: tuple[str, int]

    @classmethod
    def between(cls, local: Endpoint, remote: Endpoint) -> Route:
        return cls(
            remote.address.version, source_ancillary(local.address), (str(remote.address), remote.port)
        )


# Data, ancillary data and socket address, as recvmsg gives them: only IKE needs them decoded.
Received = tuple[memoryview, Ancillary, tuple[Any, ...]]


class OuterSocket(Protocol):
    @property
    def port(self) -> int: ...

    def receive(self) -> Received | None:
        """The next datagram, None for none now. Its data are valid until the next call."""

    def send(self, data: bytes, route: Route) -> bool:
        """False where the kernel did not take it."""
