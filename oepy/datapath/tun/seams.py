"""What the forwarder stands between: a device that gives and takes IP packets, and an outer UDP socket.

tests/fakes has an in-memory twin of each.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from oepy.datapath.esp.inner import Bytes
from oepy.datapath.esp.offload import Offload
from oepy.model import MARK_OWN, Endpoint, Mark
from oepy.udp import Ancillary, source_ancillary

_INT = struct.Struct("=I")


class PacketDevice(Protocol):
    coalesces: bool  # whether it takes super-packets

    def read(self) -> tuple[memoryview, Offload] | None:
        """The next IP packet from the host, None for none now. It may be changed in place, and is valid until
        the next call. `Offload` says what is still to be done with it."""

    def offload(self, wanted: bool) -> None:
        """Whether `read` gives super-packets and unfinished checksums from now on, where the host can."""

    def write(self, parts: Sequence[Bytes], header: bytes) -> bool:
        """Hand an IP packet, in pieces, to the host; `header` is a packed Offload. False where it refuses."""


class MarkedDevices(Protocol):
    """A device for each mark of connections: none tells the mark of a packet, but which device it came by does."""

    def open(self, mark: Mark) -> PacketDevice:
        """From which packets with the mark can be read. Raises OepyError."""

    def close(self, mark: Mark) -> None:
        """No pair has this mark any more. What is read meanwhile does no harm."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Route:
    """How to reach a peer's endpoint from ours. Packets with the same Route object go out together."""

    version: int
    ancillary: Ancillary
    address: tuple[str, int]
    takes_segments: bool = True  # until the kernel refuses to cut datagrams for it

    @classmethod
    def between(cls, local: Endpoint, remote: Endpoint, mark: Mark | None = None, dscp: int = 0) -> Route:
        """`mark` is given to what is sent, beside the socket's own bits; `dscp` as in the outer header, shifted."""
        ancillary = source_ancillary(local.address)
        if mark is not None:
            value = _INT.pack(MARK_OWN | mark.value)
            ancillary = [*ancillary, (socket.SOL_SOCKET, socket.SO_MARK, value)]
        if dscp and remote.address.version == 4:
            ancillary = [*ancillary, (socket.IPPROTO_IP, socket.IP_TOS, _INT.pack(dscp))]
        elif dscp:
            ancillary = [*ancillary, (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _INT.pack(dscp))]
        return cls(remote.address.version, ancillary, (str(remote.address), remote.port))


# Data, ancillary data and socket address, as recvmsg gives them (only IKE needs them decoded), and the length
# of each of the datagrams that the data are made of; the last may be shorter.
Received = tuple[memoryview, Ancillary, tuple[Any, ...], int]


class OuterSocket(Protocol):
    @property
    def port(self) -> int: ...

    def receive(self) -> Received | None:
        """The next datagrams of one sender, None for none now. Data are valid until the next call."""

    def send(self, data: memoryview, route: Route, segment: int) -> int:
        """As datagrams of `segment` bytes, the last perhaps shorter. How many of them were lost."""
