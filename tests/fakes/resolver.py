"""A resolver on loopback that a test makes slow, deaf or wrong: UDP, TCP and TLS on one address and port."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import dns.flags
import dns.message
import dns.rrset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from oepy.resolvers import Resolver

Answer = Callable[[dns.message.Message], tuple[float, dns.message.Message | None]]


def plain(query: dns.message.Message) -> tuple[float, dns.message.Message | None]:
    """One A record at once."""
    reply = dns.message.make_response(query)
    reply.answer.append(dns.rrset.from_text(query.question[0].name, 300, "IN", "A", "192.0.2.1"))
    return 0.0, reply


def truncated(query: dns.message.Message) -> tuple[float, dns.message.Message | None]:
    reply = dns.message.make_response(query)
    reply.flags |= dns.flags.TC
    return 0.0, reply


def deaf(query: dns.message.Message) -> tuple[float, dns.message.Message | None]:
    return 0.0, None


@dataclass
class FakeResolver:
    """An async context manager. `udp` and `stream` say after how many seconds which reply goes out; `in_order`
    makes a stream answer one question after the other; `hang_up_after` closes a stream after so many replies."""

    udp: Answer = plain
    stream: Answer = plain
    host: str = "127.0.0.1"
    port: int = 0
    tls: ssl.SSLContext | None = None
    in_order: bool = False
    hang_up_after: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)  # transport and name
    queries: list[bytes] = field(default_factory=list)  # as they came over streams
    connections: int = 0
    open_connections: int = 0

    async def __aenter__(self) -> FakeResolver:
        loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, self.host, self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        resolver = self

        class Datagrams(asyncio.DatagramProtocol):
            def connection_made(self, transport):
                self.link = transport

            def datagram_received(self, data, address):
                query = dns.message.from_wire(data)
                resolver.asked.append(("udp", str(query.question[0].name)))
                delay, reply = resolver.udp(query)
                if reply is not None:
                    loop.call_later(delay, self.link.sendto, reply.to_wire(), address)

        self._link, _ = await loop.create_datagram_endpoint(Datagrams, (self.host, self.port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._link.close()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.sleep(0)

    def names(self, kind: str = "udp") -> list[str]:
        return [name for transport, name in self.asked if transport == kind]

    def at(self, name: str = "", pins: tuple[bytes, ...] = ()) -> Resolver:
        return Resolver(ip_address(self.host), self.port, name, pins)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(task := asyncio.current_task())
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        self.open_connections += 1
        sent = 0

        async def answer(data: bytes) -> None:
            query = dns.message.from_wire(data)
            self.asked.append(("stream", str(query.question[0].name)))
            delay, reply = self.stream(query)
            await asyncio.sleep(delay)
            if reply is not None:
                wire = reply.to_wire(max_size=65535)
                writer.write(len(wire).to_bytes(2, "big") + wire)

        try:
            while True:
                data = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
                self.queries.append(data)
                if self.in_order:
                    await answer(data)
                else:
                    answering = asyncio.ensure_future(answer(data))
                    self._tasks.add(answering)
                    answering.add_done_callback(self._tasks.discard)
                sent += 1
                if sent == self.hang_up_after:
                    await asyncio.sleep(0.02)
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open_connections -= 1
            writer.close()


@dataclass
class Authority:
    """A certificate authority of the test's own, in a directory."""

    directory: Path

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "oepy test authority")])
        self._certificate = self._sign(name, name, self._key, None, 1)
        self.bundle = self.directory / "authority.pem"
        self.bundle.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def _sign(self, issuer, subject, key, host, days) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .issuer_name(issuer)
            .subject_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
        )
        if host is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, host: str, days: int = 1) -> tuple[Path, Path, bytes]:
        """Files of certificate and key, and the pin of the key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        certificate = self._sign(self._certificate.subject, subject, key, host, days)
        files = self.directory / f"{host}.pem", self.directory / f"{host}.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        info = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return *files, hashlib.sha256(info).digest()

    def server(self, host: str, days: int = 1) -> tuple[ssl.SSLContext, bytes]:
        """What a server needs, and the pin."""
        certificate, key, pin = self.issue(host, days)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context, pin
