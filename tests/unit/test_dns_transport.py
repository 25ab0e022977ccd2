"""Messages and the transport: what goes out, what is believed, how long it waits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.dns import transport
from oepy.dns.build import default_resolvers
from oepy.dns.message import MAX_RECORDS, Question, Reply, build_query, parse_reply
from oepy.dns.transport import NoReply, StubTransport
from oepy.errors import ConfigError, ParseError
from oepy.resolvers import Resolver

QUESTION = Question(dns.name.from_text("www.example."), int(dns.rdatatype.A))
LOCALHOST = ip_address("127.0.0.1")


def reply_to(wire: bytes, answers: int = 1, **changes) -> dns.message.Message:
    reply = dns.message.make_response(dns.message.from_wire(wire))
    for number in range(answers):
        reply.answer.append(dns.rrset.from_text("www.example.", 300, "IN", "A", f"192.0.2.{number % 250}"))
    for key, value in changes.items():
        setattr(reply, key, value)
    return reply


def test_a_query_asks_for_dnssec_and_believes_nobody():
    """RD, CD and DO set, AD clear, EDNS payload 1232."""
    query = dns.message.from_wire(build_query(QUESTION, 4711))
    assert query.id == 4711
    assert query.flags == dns.flags.RD | dns.flags.CD
    assert query.ednsflags & dns.flags.DO
    assert (query.payload, query.edns) == (1232, 0)
    assert str(query.question[0]) == "www.example. IN A"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: setattr(m, "id", 8),
        lambda m: setattr(m, "flags", m.flags & ~dns.flags.QR),
        lambda m: m.question.clear(),
        lambda m: setattr(m.question[0], "name", dns.name.from_text("evil.example.")),
        lambda m: setattr(m.question[0], "rdtype", dns.rdatatype.AAAA),
        lambda m: m.set_opcode(4),
    ],
)
def test_a_reply_to_another_question_is_refused(spoil):
    """Identifier, QR, opcode, question name and type must fit."""
    reply = reply_to(build_query(QUESTION, 7))
    spoil(reply)
    with pytest.raises(ParseError):
        parse_reply(reply.to_wire(), QUESTION, 7)


def test_one_odd_record_does_not_cost_the_others():
    """An A record of three bytes and an IPSECKEY of an unknown kind stay as raw data beside good ones."""
    reply = reply_to(build_query(QUESTION, 7), 2)
    odd = dns.rrset.RRset(dns.name.from_text("www.example."), 1, dns.rdatatype.IPSECKEY)
    odd.add(dns.rdata.GenericRdata(1, dns.rdatatype.IPSECKEY, b"\x0a\x09\x04junk"), 60)
    reply.answer.append(odd)
    short = dns.rrset.RRset(dns.name.from_text("www.example."), 1, dns.rdatatype.A)
    short.add(dns.rdata.GenericRdata(1, dns.rdatatype.A, b"abc"), 60)
    reply.answer.append(short)
    parsed = parse_reply(reply.to_wire(), QUESTION, 7)
    assert [rrset.type for rrset in parsed.answer] == [1, 45]
    assert sorted(rdata.to_wire() for rdata in parsed.answer[0].rdatas) == [
        b"abc",
        b"\xc0\x00\x02\x00",
        b"\xc0\x00\x02\x01",
    ]
    assert parsed.answer[1].rdatas[0].to_wire() == b"\x0a\x09\x04junk"


def test_a_reply_with_too_many_records_is_refused():
    """The number of records is checked before any is read."""
    wire = bytearray(reply_to(build_query(QUESTION, 7)).to_wire())
    wire[6:8] = (MAX_RECORDS + 1).to_bytes(2, "big")
    with pytest.raises(ParseError, match="more than"):
        parse_reply(bytes(wire), QUESTION, 7)


def test_duplicates_count_once_and_a_set_has_its_smallest_ttl():
    """RFC 2181 §5: one RRset has one TTL and no duplicate records."""
    reply = reply_to(build_query(QUESTION, 7), 1)
    again = dns.rrset.from_text("WWW.example.", 5, "IN", "A", "192.0.2.0")
    reply.answer.append(again)
    (rrset,) = parse_reply(reply.to_wire(), QUESTION, 7).answer
    assert (len(rrset.rdatas), rrset.ttl) == (1, 5)


def test_extended_rcodes_are_read():
    """BADVERS and the like carry bits in the OPT record."""
    reply = reply_to(build_query(QUESTION, 7), 0)
    reply.set_rcode(dns.rcode.BADVERS)
    assert parse_reply(reply.to_wire(), QUESTION, 7).rcode_text == "BADVERS"


@given(st.binary(max_size=200), st.integers(0, 60))
def test_any_bytes_are_a_reply_or_a_parse_error(noise, keep):
    """Nothing but ParseError comes out, for noise and for noise behind a good beginning."""
    good = reply_to(build_query(QUESTION, 7)).to_wire()
    for wire in (noise, good[:keep] + noise):
        with contextlib.suppress(ParseError):
            parse_reply(wire, QUESTION, 7)


# ---- over sockets ----------------------------------------------------------------------------------------


class Server:
    """A resolver on localhost for UDP and TCP of one port; `udp` makes the datagrams for a query."""

    def __init__(self, udp, tcp=None) -> None:
        self.udp, self.tcp = udp, tcp
        self.queries: list[tuple[str, int]] = []  # kind and source port

    async def __aenter__(self) -> int:
        loop = asyncio.get_running_loop()
        server = self

        class Datagrams(asyncio.DatagramProtocol):
            def connection_made(self, link):
                self.link = link

            def datagram_received(self, data, address):
                server.queries.append(("udp", address[1]))
                for wire in server.udp(data):
                    self.link.sendto(wire, address)

        async def stream(reader, writer):
            length = int.from_bytes(await reader.readexactly(2), "big")
            data = await reader.readexactly(length)
            server.queries.append(("tcp", 0))
            for wire in server.tcp(data):
                writer.write(len(wire).to_bytes(2, "big") + wire)
            writer.close()

        self._stream = await asyncio.start_server(stream, "127.0.0.1", 0)
        port = self._stream.sockets[0].getsockname()[1]
        self._link, _ = await loop.create_datagram_endpoint(Datagrams, ("127.0.0.1", port))
        return port

    async def __aexit__(self, *_):
        self._link.close()
        self._stream.close()
        await self._stream.wait_closed()


async def ask(port: int, **options) -> Reply | NoReply:
    return await StubTransport([Resolver(LOCALHOST, port)], **options).ask(QUESTION)


async def test_a_truncated_reply_is_asked_again_over_tcp():
    """TC means TCP, whatever else was in the datagram."""

    def truncated(data):
        reply = reply_to(data)
        reply.flags |= dns.flags.TC
        return [reply.to_wire()]

    server = Server(truncated, lambda data: [reply_to(data, 200).to_wire(max_size=65535)])
    async with server as port:
        reply = await ask(port)
    assert isinstance(reply, Reply)
    assert len(reply.answer[0].rdatas) == 200
    assert [kind for kind, _ in server.queries] == ["udp", "tcp"]


async def test_forged_datagrams_are_passed_over():
    """Wrong identifiers and noise before the true reply do no harm."""

    def forged(data):
        wrong = reply_to(data)
        wrong.id ^= 1
        return [b"", b"noise", wrong.to_wire(), reply_to(data, 2).to_wire()]

    async with Server(forged) as port:
        reply = await ask(port)
    assert isinstance(reply, Reply)
    assert len(reply.answer[0].rdatas) == 2


async def test_ports_and_identifiers_are_random():
    """Sixteen questions come from many ports with many identifiers."""
    identifiers = set()

    def note(data):
        identifiers.add(data[:2])
        return [reply_to(data).to_wire()]

    server = Server(note)
    async with server as port:
        for _ in range(16):
            await ask(port)
    assert len({source for _, source in server.queries}) > 12
    assert len(identifiers) > 12


async def test_silence_ends_in_time_and_is_told(monkeypatch):
    """Retries are bounded; the reason names the resolver."""
    monkeypatch.setattr(transport, "TRY_SECONDS", (0.05, 0.05))
    server = Server(lambda data: [])
    async with server as port:
        begun = time.monotonic()
        reply = await ask(port)
    assert isinstance(reply, NoReply)
    assert f"127.0.0.1@{port}: no answer" in reply.reason
    assert time.monotonic() - begun < 1
    assert len(server.queries) == 2


async def test_the_second_resolver_is_asked_when_the_first_fails(monkeypatch):
    """SERVFAIL of one is not the last word while there is another."""

    def failing(data):
        reply = reply_to(data, 0)
        reply.set_rcode(dns.rcode.SERVFAIL)
        return [reply.to_wire()]

    async with Server(failing) as port:
        other = ip_address("127.0.0.2")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as second:
            second.bind((str(other), port))
            second.setblocking(False)

            async def serve():
                loop = asyncio.get_running_loop()
                data, address = await loop.sock_recvfrom(second, 4096)
                await loop.sock_sendto(second, reply_to(data).to_wire(), address)

            task = asyncio.ensure_future(serve())
            reply = await StubTransport([Resolver(LOCALHOST, port), Resolver(other, port)]).ask(QUESTION)
            await task
        assert isinstance(reply, Reply)
        assert reply.rcode == 0
        alone = await ask(port)
    assert isinstance(alone, Reply)
    assert alone.rcode_text == "SERVFAIL"


async def test_a_refused_port_is_told():
    """Nobody listening: the system's word for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    reply = await ask(port)
    assert isinstance(reply, NoReply)
    assert "refused" in reply.reason


def test_resolv_conf(tmp_path):
    """Name servers in order; comments and junk ignored; localhost where there is none."""
    path = tmp_path / "resolv.conf"
    path.write_text("# x\nsearch a\nnameserver 192.0.2.1\nnameserver junk\nnameserver 2001:db8::1\n")
    assert [str(a) for a in default_resolvers(path)] == ["192.0.2.1", "2001:db8::1"]
    assert [str(a) for a in default_resolvers(tmp_path / "none")] == ["127.0.0.1"]
    with pytest.raises(ConfigError):
        StubTransport([])
