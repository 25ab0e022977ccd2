"""Questions over TCP (RFC 7766) and TLS (RFC 7858): connections are kept, and carry many questions at once.

A connection on which questions wait for long gets no new ones while another may be opened, for not every resolver
answers out of order. One that ends with questions on it has them asked once more on a fresh one (RFC 7766 §6.2.4).
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oepy.dns.message import Question, Reply, build_query, parse_reply
from oepy.errors import ParseError
from oepy.resolvers import Resolver

IDLE_SECONDS = 15.0  # resolvers close at 20 to 30: the client should be first (RFC 7766 §6.2.3)
STUCK_SECONDS = 0.5  # a question that waits longer may hold up those behind it
MAX_STREAMS = 4  # connections to one resolver
MAX_PIPELINED = 100
MAX_ABANDONED = 50  # answers that nobody waits for any more; beyond, the connection takes no new questions


class ConnectionLost(ConnectionError):
    """The resolver closed the connection, or broke it, before it had answered."""


class WrongKey(OSError):
    """The server's key is none of those that are pinned."""


def tls_context(resolver: Resolver, bundle: str | None) -> ssl.SSLContext:
    """The strict profile of RFC 8310. With pins alone the certificate's names and issuer say nothing (RFC 7858
    §4.2). `bundle` is a file of trusted certificates, None for the system's. Raises OSError (ssl.SSLError)."""
    context = ssl.create_default_context(cafile=bundle)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not resolver.name:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


Read = Callable[[bytes, int], Any]  # of a message and its identifier what the caller wants; raises ParseError


@dataclass(slots=True)
class _Waiting:
    read: Read
    reply: asyncio.Future[Any]
    sent: float


class Connection(asyncio.Protocol):
    """One stream. All methods run in its event loop."""

    def __init__(self, random16: Callable[[], int], on_close: Callable[[], None]) -> None:
        self._random16 = random16
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._abandoned: set[int] = set()
        self._idle: asyncio.TimerHandle | None = None
        self._link: asyncio.Transport | None = None
        self.waiting: dict[int, _Waiting] = {}
        self.was_used = False

    @property
    def takes_questions(self) -> bool:
        if self._link is None or self._link.is_closing():
            return False
        return len(self.waiting) < MAX_PIPELINED and len(self._abandoned) < MAX_ABANDONED

    @property
    def held(self) -> int:
        """Octets of messages that are not complete yet."""
        return len(self._buffer)

    def oldest(self) -> float:
        """When the longest waiting question was sent; the far future where none waits."""
        return next((waiting.sent for waiting in self.waiting.values()), float("inf"))

    async def exchange(self, build: Callable[[int], bytes], read: Read) -> Any:
        """Raises ConnectionLost, ParseError."""
        assert self._link is not None
        identifier = self._random16()
        while identifier in self.waiting or identifier in self._abandoned:
            identifier = self._random16()
        query = build(identifier)
        waiting = _Waiting(read, self._loop.create_future(), self._loop.time())
        self.waiting[identifier] = waiting
        self._stop_idling()
        self._link.write(len(query).to_bytes(2, "big") + query)
        try:
            return await waiting.reply
        finally:
            if self.waiting.pop(identifier, None) is not None:
                self._abandoned.add(identifier)
            self._idle_if_unused()

    def close(self) -> None:
        self._stop_idling()
        if self._link is not None:
            self._link.abort()

    def _idle_if_unused(self) -> None:
        if not self.waiting and self._idle is None:
            self._idle = self._loop.call_later(IDLE_SECONDS, self.close)

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    # ---- asyncio.Protocol --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._link = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 2:
            end = 2 + int.from_bytes(self._buffer[:2], "big")
            if len(self._buffer) < end:
                return
            wire = bytes(self._buffer[2:end])
            del self._buffer[:end]
            self._take(wire)

    def _take(self, wire: bytes) -> None:
        identifier = int.from_bytes(wire[:2], "big")
        self._abandoned.discard(identifier)
        waiting = self.waiting.pop(identifier, None)
        if waiting is None or waiting.reply.done():
            return
        self.was_used = True
        try:
            waiting.reply.set_result(waiting.read(wire, identifier))
        except ParseError as error:
            waiting.reply.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_idling()
        self._on_close()
        for waiting in self.waiting.values():
            if not waiting.reply.done():
                waiting.reply.set_exception(ConnectionLost("the resolver closed the connection early"))
        self.waiting.clear()
        self._buffer.clear()


class StreamPool:
    """The connections to one resolver. `open_socket` makes a stream socket that does not block; `context` is None
    for TCP without TLS."""

    def __init__(
        self,
        resolver: Resolver,
        context: ssl.SSLContext | None,
        open_socket: Callable[[], socket.socket],
        random16: Callable[[], int],
    ) -> None:
        self._resolver = resolver
        self._context = context
        self._open_socket = open_socket
        self._random16 = random16
        self.connections: list[Connection] = []
        self._opening: asyncio.Task[Connection] | None = None

    async def ask(self, question: Question) -> Reply:
        """Raises as `exchange` does."""

        def read(wire: bytes, identifier: int) -> Reply:
            reply = parse_reply(wire, question, identifier)
            if reply.truncated:
                raise ParseError(f"the reply to {question} is truncated over TCP too")
            return reply

        padded = self._resolver.is_tls
        reply: Reply = await self.exchange(lambda number: build_query(question, number, padded=padded), read)
        return reply

    async def exchange(self, build: Callable[[int], bytes], read: Read) -> Any:
        """What `read` makes of the answer to the message that `build` makes of an identifier. Raises OSError
        (ssl.SSLError, WrongKey and ConnectionLost are some) or ParseError. The caller bounds the time."""
        while True:
            connection = self._choose() or await self._opened()
            again = connection.was_used
            try:
                return await connection.exchange(build, read)
            except ConnectionLost:
                if not again:  # a fresh one that ends will not do better the next time
                    raise

    def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        for connection in tuple(self.connections):
            connection.close()

    def _choose(self) -> Connection | None:
        """None where one should be opened."""
        usable = [each for each in self.connections if each.takes_questions]
        patience = asyncio.get_running_loop().time() - STUCK_SECONDS
        fluent = [each for each in usable if each.oldest() > patience]
        if not fluent and len(self.connections) < MAX_STREAMS:
            return None
        return min(fluent or usable, key=lambda each: len(each.waiting), default=None)

    async def _opened(self) -> Connection:
        """Whoever comes while one is being opened waits for that one."""
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open())
            self._opening.add_done_callback(self._forget_opening)
        return await asyncio.shield(self._opening)

    def _forget_opening(self, task: asyncio.Task[Connection]) -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()  # those who wait were told, or nobody waits any more

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        channel = self._open_socket()
        try:
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(channel, (str(self._resolver.address), self._resolver.port))
            connection = Connection(self._random16, lambda: self._forget(connection))
            link, _ = await loop.create_connection(
                lambda: connection,
                sock=channel,
                ssl=self._context,
                server_hostname=(self._resolver.name or "") if self._context else None,
            )
        except BaseException:
            channel.close()
            raise
        if not _shows_pinned_key(self._resolver, link):
            link.abort()
            raise WrongKey("the server's key is none of those pinned for it")
        self.connections.append(connection)
        return connection

    def _forget(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)


def _shows_pinned_key(resolver: Resolver, link: asyncio.Transport) -> bool:
    if not resolver.pins:
        return True
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    certificate = link.get_extra_info("ssl_object").getpeercert(binary_form=True)
    try:
        key = x509.load_der_x509_certificate(certificate or b"").public_key()
    except ValueError:
        return False
    info = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(info).digest() in resolver.pins
