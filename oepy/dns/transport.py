"""Asking the resolver: UDP with a random identifier and port for each question, TCP where it is truncated.

The room has sockets here and in `primary` only. A question ends within `TOTAL_SECONDS`, whatever the
resolvers do.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Protocol

import dns.rcode

from oepy.dns.message import Question, Reply, build_query, parse_reply
from oepy.errors import ConfigError, ParseError
from oepy.model import IpAddress

DNS_PORT = 53
# One try with each resolver in turn; the last try may take what is left of the total.
TRY_SECONDS = (0.4, 0.8, 1.6, 3.2)
TOTAL_SECONDS = 6.0
TCP_SECONDS = 4.0
MAX_RESOLVERS = 8
MAX_CONCURRENT = 256  # sockets open at once; further questions wait within their own time
_TRY_ANOTHER = frozenset({dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.NOTIMP, dns.rcode.FORMERR})


@dataclass(frozen=True, slots=True)
class NoReply:
    """No usable answer to a question; `reason` says from whom and why."""

    question: Question
    reason: str


class Transport(Protocol):
    """What the validator asks. Never raises for what the network or the resolver does."""

    async def ask(self, question: Question) -> Reply | NoReply: ...


class UdpTransport:
    """Recursive resolvers over UDP and TCP. `mark` is the SO_MARK of all sockets, 0 for none."""

    def __init__(
        self,
        resolvers: Sequence[IpAddress],
        port: int = DNS_PORT,
        mark: int = 0,
        random16: Callable[[], int] = lambda: secrets.randbits(16),
    ) -> None:
        if not resolvers:
            raise ConfigError("dns.resolvers", ["no resolver is known: name one"])
        self._resolvers = tuple(resolvers)[:MAX_RESOLVERS]
        self._port = port
        self._mark = mark
        self._random16 = random16
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        self._preferred = 0

    async def ask(self, question: Question) -> Reply | NoReply:
        """The first useful reply of any resolver; a failing one is asked again only after the others."""
        reasons: dict[str, None] = {}
        last: Reply | None = None
        try:
            async with asyncio.timeout(TOTAL_SECONDS), self._slots:
                for turn, seconds in enumerate(TRY_SECONDS):
                    index = (self._preferred + turn) % len(self._resolvers)
                    resolver = self._resolvers[index]
                    try:
                        reply = await self._ask_one(resolver, question, seconds)
                    except (TimeoutError, OSError, ParseError) as error:
                        reasons[f"{resolver}: {_describe(error)}"] = None
                        continue
                    if reply.rcode not in _TRY_ANOTHER:
                        self._preferred = index
                        return reply
                    last = reply
                    reasons[f"{resolver}: {reply.rcode_text}"] = None
                    if turn + 1 >= len(self._resolvers):
                        break  # each said no: silence may pass, a refusal will not within seconds
        except TimeoutError:
            reasons[f"no answer within {TOTAL_SECONDS:g} s"] = None
        return last or NoReply(question, "; ".join(reasons))

    async def _ask_one(self, resolver: IpAddress, question: Question, seconds: float) -> Reply:
        async with asyncio.timeout(seconds):
            reply = await self._over_udp(resolver, question)
        if not reply.truncated:
            return reply
        async with asyncio.timeout(TCP_SECONDS):
            return await self._over_tcp(resolver, question)

    async def _over_udp(self, resolver: IpAddress, question: Question) -> Reply:
        loop = asyncio.get_running_loop()
        identifier = self._random16()
        with self._socket(resolver, socket.SOCK_DGRAM) as channel:
            # A connected socket takes datagrams of this resolver only, and the kernel picks a random port.
            channel.connect((str(resolver), self._port))
            await loop.sock_sendall(channel, build_query(question, identifier))
            while True:
                wire = await loop.sock_recv(channel, 65535)
                try:
                    return parse_reply(wire, question, identifier)
                except ParseError:
                    if wire[:2] == identifier.to_bytes(2, "big"):
                        raise
                    # a forged or late datagram: the true one may still come

    async def _over_tcp(self, resolver: IpAddress, question: Question) -> Reply:
        loop = asyncio.get_running_loop()
        identifier = self._random16()
        with self._socket(resolver, socket.SOCK_STREAM) as channel:
            await loop.sock_connect(channel, (str(resolver), self._port))
            query = build_query(question, identifier)
            await loop.sock_sendall(channel, len(query).to_bytes(2, "big") + query)
            length = int.from_bytes(await _receive_exactly(channel, 2), "big")
            reply = parse_reply(await _receive_exactly(channel, length), question, identifier)
        if reply.truncated:
            raise ParseError(f"the reply to {question} is truncated over TCP too")
        return reply

    def _socket(self, resolver: IpAddress, kind: socket.SocketKind) -> socket.socket:
        family = socket.AF_INET6 if isinstance(resolver, IPv6Address) else socket.AF_INET
        channel = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if self._mark:
            try:
                channel.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
            except PermissionError:
                pass  # commands of ordinary users ask unmarked: only the daemon's own trap needs the mark
            except OSError as error:
                channel.close()
                if error.errno != errno.ENOPROTOOPT:
                    raise
        return channel


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)


async def _receive_exactly(channel: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < count:
        piece = await loop.sock_recv(channel, count - len(received))
        if not piece:
            raise ParseError("the resolver closed the connection early")
        received += piece
    return bytes(received)
