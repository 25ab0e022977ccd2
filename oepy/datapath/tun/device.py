"""The TUN device and the outer sockets: the real ends of the seams."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from oepy.datapath.tun.seams import Received, Route
from oepy.errors import OepyError
from oepy.udp import ANCILLARY_SPACE, MAX_DATAGRAM

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_IFREQ = struct.Struct("16sH22x")
_READ_SIZE = 65_536
# The kernel's word for a packet that it does not like
_REFUSED = frozenset((errno.EINVAL, errno.EIO, errno.ENOBUFS, errno.EAGAIN, errno.EPERM))


class TunDevice:
    """A TUN device of the calling thread's namespace; it goes when it is closed."""

    def __init__(self, name: str) -> None:
        """Raises OepyError with the mend."""
        try:
            self._descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise OepyError(
                f"/dev/net/tun: {error.strerror}", "load the module tun (modprobe tun)"
            ) from error
        try:
            fcntl.ioctl(
                self._descriptor, _TUNSETIFF, _IFREQ.pack(name.encode("ascii"), _IFF_TUN | _IFF_NO_PI)
            )
        except OSError as error:
            os.close(self._descriptor)
            mend = f"another program has a device {name}: stop it, or choose another name"
            if error.errno == errno.EPERM:
                mend = "run as root (CAP_NET_ADMIN)"
            raise OepyError(f"cannot make the TUN device {name} ({error.strerror})", mend) from error
        self.name = name

    def fileno(self) -> int:
        return self._descriptor

    def read(self) -> bytes | None:
        try:
            return os.read(self._descriptor, _READ_SIZE)
        except BlockingIOError:
            return None

    def write(self, packet: bytes) -> bool:
        try:
            os.write(self._descriptor, packet)
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
        self._buffer = bytearray(MAX_DATAGRAM)
        self._view = memoryview(self._buffer)
        self._buffers = [self._buffer]

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> Received | None:
        try:
            length, ancillary, _, address = self._socket.recvmsg_into(self._buffers, ANCILLARY_SPACE)
        except OSError:
            # EAGAIN, or an ICMP error to something sent earlier, which this call has taken off the socket
            return None
        return self._view[:length], ancillary, address

    def send(self, data: bytes, route: Route) -> bool:
        try:
            self._socket.sendmsg((data,), route.ancillary, 0, route.address)
        except OSError:
            # Whatever the reason, the packet is lost as on any hop; the caller counts it
            return False
        return True
