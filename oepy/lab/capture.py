"""A packet capture over AF_PACKET, in a process of its own inside a namespace, and a reader for its files.

The file is pcap with nanosecond times (magic 0xa1b23c4d), link type Ethernet, so tcpdump and tshark read it.
Each frame is there once: on one device both directions are taken (a frame passes it once); on the ports of a
bridge only what comes in (see `Wire`), for every frame enters the segment at one port.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from oepy.errors import OepyError, ParseError
from oepy.model import IKE_PORT, NAT_T_PORT, IpAddress
from oepy.wire import Reader

if TYPE_CHECKING:
    from oepy.lab.namespaces import Namespace

MAX_FRAMES = 2_000_000
MAX_BYTES = 512 << 20  # of the file
SNAPLEN = 65_600  # a GSO frame of 64 KiB with its Ethernet header
READY_SECONDS = 60.0  # an emulated CPU that starts eight web servers meanwhile is slow

_ETH_P_ALL = 3
_ETH_P_IP = 0x0800
_ETH_P_ARP = 0x0806
_ETH_P_IPV6 = 0x86DD
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_SO_TIMESTAMPNS = 35
_SO_RCVBUFFORCE = 33
_PACKET_OUTGOING = 4
_BUFFER = 32 << 20
_MAGIC_NS = 0xA1B23C4D
_FILE_HEADER = struct.Struct("=IHHiIII")
_FRAME_HEADER = struct.Struct("=IIII")


# -- writing ---------------------------------------------------------------------------------------------


class _Recorder:
    def __init__(self, devices: Sequence[str], incoming_only: bool, out: BinaryIO) -> None:
        self.frames = 0
        self.bytes = 0
        self.unrecorded = 0  # beyond the bounds
        self._incoming_only = incoming_only
        self._out = out
        out.write(_FILE_HEADER.pack(_MAGIC_NS, 2, 4, 0, 0, SNAPLEN, 1))
        out.flush()
        self.sockets = [self._open(device) for device in devices]

    @staticmethod
    def _open(device: str) -> socket.socket:
        # protocol 0 until bound, so that no frame of another device gets in
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.bind((device, _ETH_P_ALL))
        sock.setblocking(False)
        return sock

    def drain(self, sock: socket.socket) -> None:
        while True:
            try:
                data, ancillary, _, address = sock.recvmsg(SNAPLEN, 64)
            except BlockingIOError:
                return
            if self._incoming_only and address[2] == _PACKET_OUTGOING:
                continue
            self._record(data, ancillary)

    def _record(self, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
        if self.frames >= MAX_FRAMES or self.bytes + len(data) > MAX_BYTES:
            self.unrecorded += 1
            return
        seconds, nanoseconds = next(
            (struct.unpack("@qq", value[:16]) for _, kind, value in ancillary if kind == _SO_TIMESTAMPNS),
            (0, 0),
        )
        self._out.write(_FRAME_HEADER.pack(seconds, nanoseconds, len(data), len(data)))
        self._out.write(data)
        self.frames += 1
        self.bytes += len(data) + _FRAME_HEADER.size

    def result(self) -> dict[str, int]:
        dropped = sum(
            struct.unpack("=II", sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
            for sock in self.sockets
        )
        return {"frames": self.frames, "bytes": self.bytes, "unrecorded": self.unrecorded, "dropped": dropped}


def _serve(devices: Sequence[str], incoming_only: bool, path: str) -> dict[str, int]:
    """Capture until SIGTERM, SIGINT or the end of stdin; a line on stdin asks for a flush."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with open(path, "wb", buffering=1 << 20) as out:
        recorder = _Recorder(devices, incoming_only, out)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        poll = select.poll()
        descriptors = [sock.fileno() for sock in recorder.sockets]
        for descriptor in (*descriptors, wake_read, 0):
            poll.register(descriptor, select.POLLIN)
        ended = False
        while not ended:
            ready = {descriptor for descriptor, _ in poll.poll()}
            for sock in recorder.sockets:
                recorder.drain(sock)
            if wake_read in ready:
                ended = True
            if 0 in ready:
                asked = os.read(0, 4096)
                ended = ended or not asked
                for _ in range(asked.count(b"\n")):
                    out.flush()
                    sys.stdout.write("flushed\n")
                    sys.stdout.flush()
        for sock in recorder.sockets:
            recorder.drain(sock)
        result = recorder.result()
    _sort_by_time(Path(path))
    return result


def _sort_by_time(path: Path) -> None:
    """Several sockets are read in turn, so a request may stand behind its response: readers that follow a
    protocol want the order of the wire."""
    frames = list(read_pcap(path))
    times = [frame.nanoseconds for frame in frames]
    if times == sorted(times):
        return
    with path.open("wb") as out:
        out.write(_FILE_HEADER.pack(_MAGIC_NS, 2, 4, 0, 0, SNAPLEN, 1))
        for frame in sorted(frames, key=lambda frame: frame.nanoseconds):
            seconds, nanoseconds = divmod(frame.nanoseconds, 1_000_000_000)
            size = len(frame.data)
            out.write(_FRAME_HEADER.pack(seconds, nanoseconds, size, size) + frame.data)


class Capture:
    """A running capture in a namespace. Use as a context manager, or `stop()` it.

    `devices` of the namespace; with `incoming_only` frames that leave through them are left out.
    """

    def __init__(
        self,
        namespace: Namespace,
        devices: str | Sequence[str],
        path: str | Path,
        *,
        incoming_only: bool = False,
    ) -> None:
        self.path = Path(path)
        names = [devices] if isinstance(devices, str) else list(devices)
        self._process: subprocess.Popen[Any] = namespace.popen(
            *[sys.executable, "-m", "oepy.lab.capture", "--write", str(self.path)],
            *(["--incoming"] if incoming_only else []),
            *names,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.result: dict[str, int] = {}
        self._expect("ready")

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        if not select.select([self._process.stdout], [], [], READY_SECONDS)[0]:
            self._process.kill()
            raise OepyError("the capture process does not answer", f"expected {word!r} within seconds")
        line = self._process.stdout.readline()
        if line.strip() != word:
            raise OepyError("the capture did not start", self._process.stderr.read()[-1000:].strip())

    def flush(self) -> None:
        """Everything that was on the wire before this call is in the file after it."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._expect("flushed")

    def stop(self) -> dict[str, int]:
        """End it. Returns frames, bytes, unrecorded (beyond our bounds) and dropped (by the kernel)."""
        if not self.result:
            out, err = self._process.communicate(timeout=READY_SECONDS)
            if self._process.returncode:
                raise OepyError("the capture failed", err[-1000:].strip())
            self.result = json.loads(out)
        return self.result

    def frames(self) -> list[Frame]:
        """All frames until now, in the order of their times."""
        if not self.result:
            self.flush()
        return sorted(read_pcap(self.path), key=lambda frame: frame.nanoseconds)

    def packets(self) -> list[Packet]:
        """All IP packets until now."""
        return [packet for frame in self.frames() if (packet := frame.packet()) is not None]

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()


# -- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Packet:
    """An IP packet on the wire. `kind` is one of `esp` (protocol 50, or in UDP 4500), `ah`, `ike` (UDP 500,
    or with the non-ESP marker on 4500, or an ICMP error that quotes such a packet), `keepalive` (RFC 3948
    §2.3), `nd` (ICMPv6 133–137), `multicast` and `clear` (everything else). Ports are 0 where there are
    none, as in a later fragment."""

    time: float  # seconds since the epoch
    source: IpAddress
    destination: IpAddress
    protocol: int
    source_port: int
    destination_port: int
    kind: str
    payload: bytes  # after the IP header (and the UDP header where there is one)
    fragment: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """One Ethernet frame. `nanoseconds` since the epoch."""

    nanoseconds: int
    data: bytes

    @property
    def ethertype(self) -> int:
        return int.from_bytes(self.data[12:14], "big")

    def packet(self) -> Packet | None:
        """The IP packet inside; None for ARP and other protocols. Raises ParseError where IP is broken."""
        reader = Reader(self.data, 14) if len(self.data) >= 14 else Reader(b"")
        if self.ethertype == _ETH_P_IP:
            return _packet4(reader, self.nanoseconds / 1e9)
        if self.ethertype == _ETH_P_IPV6:
            return _packet6(reader, self.nanoseconds / 1e9)
        return None


def _packet4(reader: Reader, time: float) -> Packet:
    first = reader.pull_u8()
    reader.pull_bytes(1)
    total = reader.pull_u16()
    reader.pull_bytes(2)
    offset = reader.pull_u16() & 0x3FFF  # more-fragments bit and offset
    reader.pull_bytes(1)
    protocol = reader.pull_u8()
    reader.pull_bytes(2)
    source, destination = ip_address(reader.pull_bytes(4)), ip_address(reader.pull_bytes(4))
    reader.pull_bytes((first & 15) * 4 - 20)
    body = reader.pull_reader(min(reader.remaining, max(0, total - (first & 15) * 4)))
    return _transport(body, time, (source, destination), protocol, offset)


def _packet6(reader: Reader, time: float) -> Packet:
    reader.pull_bytes(4)
    length = reader.pull_u16()
    protocol = reader.pull_u8()
    reader.pull_u8()
    source, destination = ip_address(reader.pull_bytes(16)), ip_address(reader.pull_bytes(16))
    body = reader.pull_reader(min(reader.remaining, length) if length else reader.remaining)
    offset = 0
    if protocol == 44:
        protocol = body.pull_u8()
        body.pull_u8()
        offset = body.pull_u16() & 0xFFF9
        body.pull_u32()
    return _transport(body, time, (source, destination), protocol, offset)


def _transport(
    body: Reader, time: float, pair: tuple[IpAddress, IpAddress], protocol: int, offset: int
) -> Packet:
    source, destination = pair
    ports = (0, 0)
    later = offset & 0x1FFF != 0 if source.version == 4 else offset & 0xFFF8 != 0
    if protocol in (6, 17) and not later and body.remaining >= 8:
        ports = body.pull_u16(), body.pull_u16()
        if protocol == 17:
            body.pull_u32()
    payload = body.pull_rest()
    kind = _kind(protocol, ports, payload, destination)
    return Packet(time, source, destination, protocol, *ports, kind, payload, offset != 0)


def _kind(protocol: int, ports: tuple[int, int], payload: bytes, destination: IpAddress) -> str:
    if protocol in (50, 51):
        return "esp" if protocol == 50 else "ah"
    if protocol == 17 and NAT_T_PORT in ports:
        if payload == b"\xff":
            return "keepalive"
        return "ike" if payload[:4] == bytes(4) else "esp"
    if protocol == 17 and IKE_PORT in ports:
        return "ike"
    if protocol == 58 and payload and 133 <= payload[0] <= 137:
        return "nd"
    if _is_error_about_ike(protocol, payload):
        return "ike"
    return "multicast" if destination.is_multicast else "clear"


def _is_error_about_ike(protocol: int, payload: bytes) -> bool:
    """An ICMP error (a closed port 500, say) quotes the packet that caused it: RFC 792, RFC 4443 §2.4."""
    if protocol == 1 and payload[:1] in (b"\x03", b"\x0b") and len(payload) >= 36:
        quoted = payload[8:]
        upper = (quoted[0] & 15) * 4
        protocol_quoted = quoted[9]
    elif protocol == 58 and payload[:1] in (b"\x01", b"\x02", b"\x03", b"\x04") and len(payload) >= 56:
        quoted, upper = payload[8:], 40
        protocol_quoted = quoted[6]
    else:
        return False
    ports = struct.unpack_from("!HH", quoted, upper) if len(quoted) >= upper + 4 else (0, 0)
    return protocol_quoted == 17 and not {IKE_PORT, NAT_T_PORT}.isdisjoint(ports)


def read_pcap(path: str | Path) -> Iterator[Frame]:
    """The frames of a file written by `Capture`; a frame cut off by a running capture ends the reading.
    Raises ParseError for another format."""
    with open(path, "rb") as file:
        header = file.read(_FILE_HEADER.size)
        if len(header) < _FILE_HEADER.size or _FILE_HEADER.unpack(header)[0] != _MAGIC_NS:
            raise ParseError(f"{path} is no pcap file with nanosecond times in this machine's byte order")
        while len(head := file.read(_FRAME_HEADER.size)) == _FRAME_HEADER.size:
            seconds, nanoseconds, captured, _ = _FRAME_HEADER.unpack(head)
            data = file.read(captured)
            if len(data) < captured:
                return
            yield Frame(seconds * 1_000_000_000 + nanoseconds, data)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="oepy.lab.capture")
    parser.add_argument("--write", required=True, metavar="FILE")
    parser.add_argument("--incoming", action="store_true")
    parser.add_argument("devices", nargs="+")
    arguments = parser.parse_args()
    print(json.dumps(_serve(arguments.devices, arguments.incoming, arguments.write)))


if __name__ == "__main__":
    _main()
