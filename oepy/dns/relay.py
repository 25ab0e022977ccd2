"""A DNS relay on loopback: passes the host's questions on to the resolvers, as they are, and looks at the answers.

It is no cache and changes nothing but the identifier. What it learns (name, addresses, TTL) is told before the
answer goes to the program that asked, so that keys are looked for while that program opens its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from ipaddress import ip_address
from typing import Any

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA

from oepy.dns.message import Question, parse_reply
from oepy.dns.sockets import open_socket
from oepy.dns.streams import StreamPool, tls_context
from oepy.errors import OepyError, ParseError
from oepy.model import IpAddress
from oepy.resolvers import Resolver

MAX_QUERY = 4096
MAX_RUNNING = 512  # questions under way; more get no answer, and programs ask again
MAX_CONNECTIONS = 64
MAX_ADDRESSES = 16  # of one answer that are learned
READS_PER_WAKEUP = 64
TRY_SECONDS = (1.0, 2.0, 2.0)  # each resolver in turn
TCP_SECONDS = 5.0
IDLE_SECONDS = 10.0  # RFC 7766 §6.2.3
_HEADER = 12
_ADDRESSES = frozenset((int(dns.rdatatype.A), int(dns.rdatatype.AAAA)))

OnAnswer = Callable[[str, tuple[IpAddress, ...], int], None]


class Relay:
    """`on_answer(name, addresses, ttl)` is called for each good answer with addresses; TTL in seconds."""

    def __init__(
        self,
        listen: IpAddress,
        port: int,
        resolvers: Sequence[Resolver],
        mark: int,
        on_answer: OnAnswer,
        *,
        tls_bundle: str | None = None,
    ) -> None:
        self._listen, self._port = listen, port
        self._resolvers = tuple(resolvers)
        self._mark = mark
        self._on_answer = on_answer
        self._tasks: set[asyncio.Task[None]] = set()
        self._preferred = 0
        self._connections = 0
        self.counters: Counter[str] = Counter()
        self._streams = {
            resolver: StreamPool(
                resolver,
                tls_context(resolver, tls_bundle) if resolver.is_tls else None,
                lambda resolver=resolver: open_socket(resolver.address, socket.SOCK_STREAM, mark),  # type: ignore[misc]
                lambda: secrets.randbits(16),
            )
            for resolver in self._resolvers
        }

    async def start(self) -> None:
        """Raises OepyError where the address cannot be taken."""
        place = (str(self._listen), self._port)
        try:
            self._udp = open_socket(self._listen, socket.SOCK_DGRAM, self._mark)
            self._udp.bind(place)
            self._tcp = await asyncio.start_server(self._serve_connection, *place, limit=1 << 16)
        except OSError as error:
            self._udp.close()
            raise OepyError(
                f"the DNS relay cannot listen at {self._listen}@{self._port}: {error.strerror}",
                "give `dns.relay` another loopback address, such as 127.0.0.54, or set it to null",
            ) from None
        asyncio.get_running_loop().add_reader(self._udp.fileno(), self._readable)

    async def stop(self) -> None:
        if not hasattr(self, "_tcp"):
            return
        asyncio.get_running_loop().remove_reader(self._udp.fileno())
        self._udp.close()
        self._tcp.close()
        for stream in self._streams.values():
            stream.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    # ------------------------------------------------------------ programs of this host

    def _readable(self) -> None:
        for _ in range(READS_PER_WAKEUP):
            try:
                query, client = self._udp.recvfrom(MAX_QUERY)
            except (BlockingIOError, ConnectionRefusedError):
                return
            if not _is_query(query):
                self.counters["malformed"] += 1
            elif len(self._tasks) >= MAX_RUNNING:
                self.counters["overload"] += 1
            else:
                self._spawn(self._serve_datagram(query, client))

    async def _serve_datagram(self, query: bytes, client: Any) -> None:
        answer = await self._answer(query, over_tcp=False)
        with contextlib.suppress(OSError):
            self._udp.sendto(answer, client)

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections > MAX_CONNECTIONS:
                self.counters["overload"] += 1
                return
            while True:
                async with asyncio.timeout(IDLE_SECONDS):
                    length = int.from_bytes(await reader.readexactly(2), "big")
                    query = await reader.readexactly(length)
                if length > MAX_QUERY or not _is_query(query):
                    self.counters["malformed"] += 1
                    return
                answer = await self._answer(query, over_tcp=True)
                writer.write(len(answer).to_bytes(2, "big") + answer)
                async with asyncio.timeout(IDLE_SECONDS):
                    await writer.drain()
        except (asyncio.IncompleteReadError, TimeoutError, OSError):
            return
        finally:
            self._connections -= 1
            writer.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------ resolvers

    async def _answer(self, query: bytes, *, over_tcp: bool) -> bytes:
        """The resolver's answer with the program's identifier; SERVFAIL where none comes."""
        self.counters["questions"] += 1
        for turn, seconds in enumerate(TRY_SECONDS):
            index = (self._preferred + turn) % len(self._resolvers)
            identifier = secrets.token_bytes(2)  # and a port of the kernel's choice: RFC 5452
            asked = identifier + query[2:]
            resolver = self._resolvers[index]
            by_stream = over_tcp or resolver.is_tls
            try:
                async with asyncio.timeout(TCP_SECONDS if by_stream else seconds):
                    reply = await (self._ask_stream if by_stream else self._ask_udp)(resolver, asked)
            except (TimeoutError, OSError, ParseError):
                continue
            self._preferred = index
            self._learn(asked, reply)
            if resolver.is_tls and not over_tcp and len(reply) > _room_for(query):
                return _truncated(query, reply)
            return query[:2] + reply[2:]
        self.counters["failed"] += 1
        return _servfail(query)

    async def _ask_stream(self, resolver: Resolver, asked: bytes) -> bytes:
        def read(wire: bytes, identifier: int) -> bytes:
            if not _answers(wire, identifier.to_bytes(2, "big") + asked[2:]):
                raise ParseError("another question was answered")
            return asked[:2] + wire[2:]

        pool = self._streams[resolver]
        reply: bytes = await pool.exchange(lambda number: number.to_bytes(2, "big") + asked[2:], read)
        return reply

    async def _ask_udp(self, resolver: Resolver, asked: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        with open_socket(resolver.address, socket.SOCK_DGRAM, self._mark) as channel:
            channel.connect((str(resolver.address), resolver.port))
            await loop.sock_sendall(channel, asked)
            while True:
                reply = await loop.sock_recv(channel, 65_535)
                if _answers(reply, asked):
                    return reply

    def _learn(self, asked: bytes, reply: bytes) -> None:
        """Never lets an odd answer disturb the program that asked for it."""
        try:
            name, length = dns.name.from_wire(asked, _HEADER)
            rdtype = int.from_bytes(asked[_HEADER + length : _HEADER + length + 2], "big")
            if rdtype not in _ADDRESSES:
                return
            parsed = parse_reply(reply, Question(name, rdtype), int.from_bytes(asked[:2], "big"))
        except (dns.exception.DNSException, ParseError, ValueError):
            self.counters["unreadable"] += 1
            return
        if parsed.rcode != dns.rcode.NOERROR:
            return
        found = [rrset for rrset in parsed.answer if rrset.type == rdtype]
        addresses = tuple(
            ip_address(rdata.address)
            for rrset in found
            for rdata in rrset.rdatas
            if isinstance(rdata, dns.rdtypes.IN.A.A | dns.rdtypes.IN.AAAA.AAAA)
        )[:MAX_ADDRESSES]
        if addresses:
            self.counters["learned"] += 1
            self._on_answer(str(name), addresses, min(rrset.ttl for rrset in parsed.answer))


def _is_query(query: bytes) -> bool:
    """A header with QR clear and one question."""
    return len(query) > _HEADER + 4 and not query[2] & 0x80 and query[4:6] == b"\0\1"


def _answers(reply: bytes, asked: bytes) -> bool:
    """The identifier and the question (whatever the case of its letters) are those asked."""
    end = _question_end(asked)
    return (
        len(reply) >= end
        and reply[:2] == asked[:2]
        and bool(reply[2] & 0x80)
        and reply[_HEADER:end].lower() == asked[_HEADER:end].lower()
    )


def _question_end(query: bytes) -> int:
    try:
        _, length = dns.name.from_wire(query, _HEADER)
    except dns.exception.DNSException:
        return len(query)
    return _HEADER + length + 4


def _room_for(query: bytes) -> int:
    """Octets that the asking program takes over UDP (RFC 6891 §6.2.3)."""
    try:
        return max(512, dns.message.from_wire(query).payload)
    except (dns.exception.DNSException, ValueError):
        return 512


def _truncated(query: bytes, reply: bytes) -> bytes:
    """Header and question alone, with TC: the program asks again over TCP."""
    end = _question_end(query)
    return query[:2] + bytes((reply[2] | 0x02, reply[3])) + b"\0\1" + bytes(6) + query[_HEADER:end]


def _servfail(query: bytes) -> bytes:
    """RFC 1035 §4.1.1: QR, the question's opcode and RD, RA, RCODE 2."""
    flags = bytes((0x80 | query[2] & 0x79, 0x82))
    return query[:2] + flags + b"\0\1" + bytes(6) + query[_HEADER : _question_end(query)]


__all__ = ["Relay"]
