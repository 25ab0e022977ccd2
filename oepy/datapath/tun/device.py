"""The TUN device and the outer sockets: the real ends of the seams."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence

from oepy.datapath.esp import offload
from oepy.datapath.esp.inner import Bytes
from oepy.datapath.esp.offload import Offload
from oepy.datapath.tun.seams import Received, Route
from oepy.errors import OepyError
from oepy.udp import ANCILLARY_SPACE, MAX_DATAGRAM

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # linux/if_tun.h
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04
_TUN_F_USO4, _TUN_F_USO6 = 0x20, 0x40  # since Linux 6.2
# From the best to what every kernel knows; tried in this order
_OFFLOADS = (
    _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 | _TUN_F_USO4 | _TUN_F_USO6,
    _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6,
)
_IFREQ = struct.Struct("16sH22x")
_READ_SIZE = offload.SIZE + 65_536
# The kernel's word for a packet that it does not like
_REFUSED = frozenset((errno.EINVAL, errno.EIO, errno.ENOBUFS, errno.EAGAIN, errno.EPERM, errno.ENOMEM))

# linux/udp.h
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_SIZE = struct.Struct("=i")
_SEGMENT = struct.Struct("=H")
_CANNOT_CUT = frozenset(
    (errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT, errno.EPROTONOSUPPORT)
)
_ANCILLARY = ANCILLARY_SPACE + socket.CMSG_SPACE(_SIZE.size)


class TunDevice:
    """A TUN device of the calling thread's namespace; it goes when it is closed. With super-packets and
    unfinished checksums where the kernel has them."""

    def __init__(self, name: str) -> None:
        """Raises OepyError with the mend."""
        try:
            self._descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise OepyError(
                f"/dev/net/tun: {error.strerror}", "load the module tun (modprobe tun)"
            ) from error
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        try:
            fcntl.ioctl(self._descriptor, _TUNSETIFF, _IFREQ.pack(name.encode("ascii"), flags))
        except OSError as error:
            os.close(self._descriptor)
            mend = f"another program has a device {name}: stop it, or choose another name"
            if error.errno == errno.EPERM:
                mend = "run as root (CAP_NET_ADMIN)"
            raise OepyError(f"cannot make the TUN device {name} ({error.strerror})", mend) from error
        self.name = name
        self.coalesces = True  # with IFF_VNET_HDR every kernel takes them
        self._offloads = False
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self._buffers = [self._buffer]

    def offload(self, wanted: bool) -> None:
        """Without it the kernel cuts and sums up, which is faster than to do that here. An old kernel refuses:
        then it goes on doing so."""
        if wanted == self._offloads:
            return
        self._offloads = wanted
        for flags in _OFFLOADS if wanted else (0,):
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._descriptor, _TUNSETOFFLOAD, flags)
                return

    def fileno(self) -> int:
        return self._descriptor

    def read(self) -> tuple[memoryview, Offload] | None:
        try:
            length = os.readv(self._descriptor, self._buffers)
        except BlockingIOError:
            return None
        buffer = self._buffer
        return buffer[offload.SIZE : length], offload.parse(buffer)

    def write(self, parts: Sequence[Bytes], header: bytes) -> bool:
        try:
            os.writev(self._descriptor, (header, *parts))
        except OSError as error:
            if error.errno in _REFUSED:
                return False
            raise
        return True

    def close(self) -> None:
        os.close(self._descriptor)


class OuterUdp:
    """An inherited NAT-T socket, of which this process is the only reader."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self.version = 4 if self._socket.family == socket.AF_INET else 6
        self.port: int = self._socket.getsockname()[1]
        self._view = memoryview(bytearray(MAX_DATAGRAM))
        self._buffers = [self._view]
        with contextlib.suppress(OSError):  # before Linux 5.0: one datagram at a time
            self._socket.setsockopt(_SOL_UDP, _UDP_GRO, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> Received | None:
        try:
            length, ancillary, _, address = self._socket.recvmsg_into(self._buffers, _ANCILLARY)
        except OSError:
            # EAGAIN, or an ICMP error to something sent earlier, which this call has taken off the socket
            return None
        segment = length
        for level, kind, value in ancillary:
            if level == _SOL_UDP and kind == _UDP_GRO:
                segment = _SIZE.unpack(value)[0] or length
        return self._view[:length], ancillary, address, segment

    def send(self, data: memoryview, route: Route, segment: int) -> int:
        if len(data) > segment and route.takes_segments:
            ancillary = [*route.ancillary, (_SOL_UDP, _UDP_SEGMENT, _SEGMENT.pack(segment))]
            try:
                self._socket.sendmsg((data,), ancillary, 0, route.address)
            except OSError as error:
                if error.errno not in _CANNOT_CUT:
                    return -(-len(data) // segment)
                # An old kernel, a device without checksums, or a path that is too narrow for whole datagrams
                route.takes_segments = False
            else:
                return 0
        lost = 0
        for start in range(0, len(data), segment):
            try:
                self._socket.sendmsg((data[start : start + segment],), route.ancillary, 0, route.address)
            except OSError:
                # Whatever the reason, the packet is lost as on any hop; the caller counts it
                lost += 1
        return lost
