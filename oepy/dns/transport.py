"""Asking resolvers: UDP with a random identifier and port for each question, TCP where it is truncated, or TLS.

The room has sockets here, in `streams`, `relay` and `primary` only. A question ends within `TOTAL_SECONDS`,
whatever the resolvers do. One that does not answer soon is not given up: the next is asked beside it, the first
reply counts.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import dns.name
import dns.rcode
import dns.rdatatype

from oepy.dns.health import Health
from oepy.dns.message import Question, Reply, build_query, parse_reply
from oepy.dns.slots import Slots, Ticket, neighbourhood
from oepy.dns.sockets import open_socket
from oepy.dns.streams import StreamPool, tls_context
from oepy.errors import ConfigError, ParseError
from oepy.resolvers import Resolver, ResolverState, check_all

# How long a try is waited for before the next begins beside it. It is another resolver's turn then.
TRY_SECONDS = (0.4, 0.8, 1.6, 3.2)
TOTAL_SECONDS = 6.0
TCP_SECONDS = 4.0  # for one question over TCP or TLS, connecting included
PROBE_SECONDS = 1.0
MAX_RESOLVERS = 8
MAX_OPEN = 256  # questions on their way at once; further ones wait within their own time
MAX_NEAR_MISSES = 20  # datagrams with wrong identifiers: somebody guesses, so the question goes over TCP
_TRY_ANOTHER = frozenset({dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.NOTIMP, dns.rcode.FORMERR})
PROBE = Question(dns.name.root, int(dns.rdatatype.NS))  # every resolver has the answer to it


@dataclass(frozen=True, slots=True)
class NoReply:
    """No usable answer to a question; `reason` says from whom and why. `given_up`: the lookup that asked was
    cancelled, and whoever needs the answer has to ask again."""

    question: Question
    reason: str
    given_up: bool = False


class Transport(Protocol):
    """What the validator asks. Never raises for what the network or the resolver does."""

    async def ask(self, question: Question) -> Reply | NoReply: ...

    def states(self) -> tuple[ResolverState, ...]:
        """How the resolvers do; inside the event loop."""


class StubTransport:
    """Recursive resolvers over UDP, TCP and TLS. `mark` is the SO_MARK of all sockets, 0 for none; `tls_bundle`
    a file of certificates that sign those of resolvers with names, None for the system's. Raises ConfigError."""

    def __init__(
        self,
        resolvers: Sequence[Resolver],
        mark: int = 0,
        *,
        tls_bundle: str | None = None,
        random16: Callable[[], int] = lambda: secrets.randbits(16),
    ) -> None:
        if not resolvers:
            raise ConfigError("dns.resolvers", ["no resolver is known: name one"])
        try:
            check_all(resolvers)
        except ValueError as error:
            raise ConfigError("dns.resolvers", [str(error)]) from None
        self.mark = mark
        self.random16 = random16
        self.servers = tuple(_Server(self, each, tls_bundle) for each in resolvers[:MAX_RESOLVERS])
        self._slots = Slots(MAX_OPEN)
        self._probes: set[asyncio.Task[None]] = set()

    async def ask(self, question: Question) -> Reply | NoReply:
        """The first useful reply of any resolver."""
        exchange = _Exchange(question, self._in_order())
        try:
            return await exchange.run(self._slots)
        finally:
            exchange.close()

    def states(self) -> tuple[ResolverState, ...]:
        """In the order of the configuration. Called inside the event loop."""
        now = asyncio.get_running_loop().time()
        return tuple(server.health.state(now) for server in self.servers)

    def close(self) -> None:
        """End connections and probes; inside the event loop."""
        for probe in self._probes:
            probe.cancel()
        for server in self.servers:
            server.streams.close()

    def _in_order(self) -> list[_Server]:
        """As configured, those with trouble last. Those are probed now and then, at nobody's cost."""
        if len(self.servers) == 1:
            return [self.servers[0]]
        now = asyncio.get_running_loop().time()
        for server in self.servers:
            if server.health.wants_probe(now) and not server.is_probed:
                probe = asyncio.ensure_future(self._probe(server))
                self._probes.add(probe)
                probe.add_done_callback(self._probes.discard)
        return sorted(self.servers, key=lambda server: not server.health.is_good)

    async def _probe(self, server: _Server) -> None:
        server.is_probed = True
        exchange = _Exchange(PROBE, [server])
        reason = f"no answer within {PROBE_SECONDS:g} s"
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                reply = await exchange.run(Slots(1))
            if isinstance(reply, Reply) and reply.rcode not in _TRY_ANOTHER:
                return
            reason = reply.rcode_text if isinstance(reply, Reply) else reply.reason
        except TimeoutError:
            pass
        finally:
            exchange.close()
            server.is_probed = False
        server.health.probe_failed(asyncio.get_running_loop().time(), reason.removeprefix(f"{server}: "))


class _Server:
    """One resolver, with its health and its connections."""

    def __init__(self, owner: StubTransport, resolver: Resolver, tls_bundle: str | None) -> None:
        self._owner = owner
        self.resolver = resolver
        self.health = Health(str(resolver))
        self.is_probed = False
        context = None
        if resolver.is_tls:
            try:
                context = tls_context(resolver, tls_bundle)
            except OSError as error:
                problem = f"{tls_bundle}: {error.strerror or error}; give a PEM file of certificates"
                raise ConfigError("dns.tls_cert_bundle", [problem]) from None
        self.streams = StreamPool(resolver, context, lambda: self.socket(socket.SOCK_STREAM), owner.random16)

    def __str__(self) -> str:
        return str(self.resolver)

    def identifier(self) -> int:
        return self._owner.random16()

    def socket(self, kind: socket.SocketKind) -> socket.socket:
        return open_socket(self.resolver.address, kind, self._owner.mark)

    async def over_stream(self, question: Question) -> Reply:
        async with asyncio.timeout(TCP_SECONDS):
            return await self.streams.ask(question)


@dataclass(eq=False, slots=True)
class _Try:
    """A question with one resolver: over a datagram socket, a stream, or first the one and then the other."""

    server: _Server
    sent: float
    channel: socket.socket | None = None
    query: bytes = b""
    near_misses: int = 0
    stream: asyncio.Task[Reply] | None = None
    refusal: str = ""  # why this resolver has no answer, once it said so


_Result = Reply | Exception


@dataclass(eq=False, slots=True)
class _Exchange:
    """One question from its first datagram to its end. `servers` in the order of the tries."""

    question: Question
    servers: list[_Server]
    _tries: dict[_Server, _Try] = field(default_factory=dict)
    _results: deque[tuple[_Try, _Result]] = field(default_factory=deque)
    _wake: asyncio.Future[None] | None = None
    _evicted: bool = False
    _last: Reply | None = None
    _reasons: dict[str, None] = field(default_factory=dict)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    async def run(self, slots: Slots) -> Reply | NoReply:
        end = self._loop.time() + TOTAL_SECONDS
        ticket = Ticket(neighbourhood(self.question), self._woken, self._evict)
        try:
            while patience := slots.enter(ticket, now := self._loop.time()):
                if now >= end:
                    return NoReply(self.question, "too many questions at once")
                await self._wait(min(patience, end - now))
            return await self._tries_in_turn(end)
        finally:
            slots.leave(ticket, self._loop.time())

    async def _tries_in_turn(self, end: float) -> Reply | NoReply:
        for turn, patience in enumerate(TRY_SECONDS):
            server = self._next_server(turn)
            if server is None:
                break  # each said no: silence may pass, a refusal will not within seconds
            current = self._send(server)
            until = min(self._loop.time() + patience, end)
            while not current.refusal:
                reply = await self._first_useful(until)
                if reply is not None:
                    return reply
                if self._evicted:
                    return NoReply(self.question, "gave way to other zones' questions, as it took long")
                if self._loop.time() >= until:
                    self._reasons.setdefault(f"{server}: no answer")
                    server.health.was_silent(until, current.sent)
                    break
        return self._last or NoReply(self.question, "; ".join(self._reasons))

    def _next_server(self, turn: int) -> _Server | None:
        """The next in turn that has not refused."""
        for step in range(len(self.servers)):
            server = self.servers[(turn + step) % len(self.servers)]
            if server not in self._tries or not self._tries[server].refusal:
                return server
        return None

    async def _first_useful(self, until: float) -> Reply | None:
        """A reply that ends the exchange; None at `until`, or where somebody said no."""
        if not self._results:
            await self._wait(until - self._loop.time())
        while self._results:
            attempt, result = self._results.popleft()
            health = attempt.server.health
            now = self._loop.time()
            if isinstance(result, Reply) and result.rcode not in _TRY_ANOTHER:
                health.replied(now, now - attempt.sent)
                for other in self._tries.values():
                    if other.refusal:  # somebody else knew: is it the zone, or the resolver?
                        other.server.health.failed(now, other.refusal)
                return result
            if isinstance(result, Reply):
                self._last, attempt.refusal = result, result.rcode_text
            else:
                attempt.refusal = _describe(result)
                health.failed(now, attempt.refusal)
            self._reasons[f"{attempt.server}: {attempt.refusal}"] = None
        return None

    async def _wait(self, seconds: float) -> None:
        """Until something happens, or the time is over."""
        self._wake = self._loop.create_future()
        timer = self._loop.call_later(max(seconds, 0.0), self._woken)
        try:
            await self._wake
        finally:
            timer.cancel()
            self._wake = None

    def _woken(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _evict(self) -> None:
        self._evicted = True
        self._woken()

    def _happened(self, attempt: _Try, result: _Result) -> None:
        self._results.append((attempt, result))
        self._woken()

    # ---- sending -----------------------------------------------------------------------------------------

    def _send(self, server: _Server) -> _Try:
        attempt = self._tries.get(server)
        if attempt is None:
            server.health.questions += 1
            attempt = self._tries[server] = _Try(server, self._loop.time())
            try:
                if server.resolver.is_tls:
                    self._start_stream(attempt)
                else:
                    self._open(attempt)
            except OSError as error:
                self._happened(attempt, error)
        elif (
            attempt.channel is not None
        ):  # the same datagram: a second socket would ease guessing (RFC 5452 §4.5)
            self._send_datagram(attempt)
        return attempt

    def _open(self, attempt: _Try) -> None:
        """A connected socket takes datagrams of this resolver only, and the kernel picks a random port."""
        resolver = attempt.server.resolver
        identifier = attempt.server.identifier()
        attempt.channel = attempt.server.socket(socket.SOCK_DGRAM)
        attempt.channel.connect((str(resolver.address), resolver.port))
        attempt.query = build_query(self.question, identifier)
        self._send_datagram(attempt)
        self._loop.add_reader(attempt.channel.fileno(), self._readable, attempt, identifier)

    def _send_datagram(self, attempt: _Try) -> None:
        assert attempt.channel is not None
        try:
            attempt.channel.send(attempt.query)
        except BlockingIOError:
            pass  # as if lost on the way
        except OSError as error:
            self._happened(attempt, error)

    def _readable(self, attempt: _Try, identifier: int) -> None:
        assert attempt.channel is not None
        try:
            wire = attempt.channel.recv(65535)
        except BlockingIOError:
            return
        except OSError as error:
            self._end_datagrams(attempt)
            self._happened(attempt, error)
            return
        if wire[:2] != attempt.query[:2]:  # a forged or late datagram: the true one may still come
            attempt.near_misses += 1
            if attempt.near_misses >= MAX_NEAR_MISSES:
                self._end_datagrams(attempt)
                self._start_stream(attempt)
            return
        self._end_datagrams(attempt)
        try:
            reply = parse_reply(wire, self.question, identifier)
        except ParseError as error:
            self._happened(attempt, error)
            return
        if reply.truncated:
            self._start_stream(attempt)
        else:
            self._happened(attempt, reply)

    def _start_stream(self, attempt: _Try) -> None:
        def done(task: asyncio.Task[Reply]) -> None:
            if task.cancelled():
                return
            error = task.exception()
            if isinstance(error, OSError | ParseError):  # TimeoutError is an OSError
                self._happened(attempt, error)
            elif error is not None:
                raise error
            else:
                self._happened(attempt, task.result())

        attempt.stream = asyncio.ensure_future(attempt.server.over_stream(self.question))
        attempt.stream.add_done_callback(done)

    # ---- the end -----------------------------------------------------------------------------------------

    def _end_datagrams(self, attempt: _Try) -> None:
        if attempt.channel is not None:
            self._loop.remove_reader(attempt.channel.fileno())
            attempt.channel.close()
            attempt.channel = None

    def close(self) -> None:
        for attempt in self._tries.values():
            self._end_datagrams(attempt)
            if attempt.stream is not None:
                attempt.stream.cancel()


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: the certificate does not prove the server ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
