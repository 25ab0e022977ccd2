"""A signed tree as a recursive resolver on loopback, UDP and TCP, for validators of any make."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from types import TracebackType

import dns.exception
import dns.flags
import dns.message

from oepy.dns.message import Question
from tests.fakes.signed_tree import SignedTree

HOST = "127.0.0.1"
UDP_MOST = 1232


class Responder:
    """Serves `tree`, which may be exchanged between questions. A context manager; `port` is its port."""

    def __init__(self) -> None:
        self.tree: SignedTree | None = None
        self._made: dict[tuple[bytes, int], bytes | None] = {}
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind((HOST, 0))
        self.port: int = self._udp.getsockname()[1]
        self._tcp = socket.create_server((HOST, self.port))
        self._wake, self._stop = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def serve(self, tree: SignedTree) -> None:
        self.tree, self._made = tree, {}

    def __enter__(self) -> Responder:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.send(b"x")
        self._thread.join(10)
        for channel in (self._udp, self._tcp, self._wake, self._stop):
            channel.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as waiting:
            for channel in (self._udp, self._tcp, self._wake):
                waiting.register(channel, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in waiting.select()}
                if self._wake in ready:
                    return
                if self._udp in ready:
                    data, peer = self._udp.recvfrom(4096)
                    wire = self._reply(data)
                    if wire is not None:
                        self._udp.sendto(wire if len(wire) <= UDP_MOST else _truncated(wire), peer)
                if self._tcp in ready:
                    stream, _ = self._tcp.accept()
                    threading.Thread(target=self._serve_stream, args=(stream,), daemon=True).start()

    def _serve_stream(self, stream: socket.socket) -> None:
        with stream, stream.makefile("rb") as reader:
            stream.settimeout(5)
            try:
                while head := reader.read(2):
                    wire = self._reply(reader.read(int.from_bytes(head, "big")))
                    if wire is None:
                        return
                    stream.sendall(struct.pack("!H", len(wire)) + wire)
            except (OSError, dns.exception.DNSException):
                return

    def _reply(self, data: bytes) -> bytes | None:
        query = dns.message.from_wire(data)
        tree = self.tree
        if tree is None or not query.question:
            return None
        asked = query.question[0]
        key = (asked.name.to_wire() or b"", int(asked.rdtype))
        if key not in self._made:
            query.use_edns(0, dns.flags.DO, UDP_MOST)
            reply = tree.answer(Question(asked.name, int(asked.rdtype)), query)
            if reply is not None:
                reply.flags |= dns.flags.RA
            self._made[key] = None if reply is None else reply.to_wire(max_size=65535)
        wire = self._made[key]
        if wire is None:
            return None
        flags = struct.unpack_from("!H", wire, 2)[0] & ~dns.flags.CD
        return data[:2] + struct.pack("!H", flags | int(query.flags) & dns.flags.CD) + wire[4:]


def _truncated(wire: bytes) -> bytes:
    """The head and the question only, with TC."""
    end = 12
    while wire[end]:
        end += wire[end] + 1
    flags = struct.unpack_from("!H", wire, 2)[0] | dns.flags.TC
    return wire[:2] + struct.pack("!HHHHH", flags, 1, 0, 0, 0) + wire[12 : end + 5]
