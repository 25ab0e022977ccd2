"""Names that lead to an address: what is learned, what a claim is, and that a false one gains nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import dns.message
import dns.rcode
import dns.rrset
import pytest

from oepy.config import parse
from oepy.daemon.doctor import judge_relay
from oepy.dns.claims import NamedKeySource
from oepy.dns.names import MAX_ADDRESSES, MAX_LIFE, MAX_NAMES, MIN_LIFE, LearnedNames
from oepy.dns.peers import DnsKeySource
from oepy.dns.relay import Relay
from oepy.errors import ConfigError, OepyError
from oepy.model import Absent, Bogus, Insecure, KeyAnswer, Secure
from oepy.resolvers import Resolver
from tests.fakes.resolver import Authority, FakeResolver, plain
from tests.fakes.signed_tree import NOW, SignedTree, name
from tests.unit.test_peers import EC, ED, PEER, by_algorithm, ipseckey

HOST = "www.example"


@pytest.fixture
def tree() -> SignedTree:
    tree = SignedTree()
    tree.add("2.0.192.in-addr.arpa.").add("1", "PTR", "router.example.")
    example = tree.add("example.")
    example.add("www", "A", str(PEER))
    example.add_rdata("www", ipseckey(ED))
    tree.add("unsigned.example.", signed=False).add("www", "A", str(PEER))
    tree.zones[name("unsigned.example.")].add_rdata("www", ipseckey(EC))
    return tree


async def ask(tree: SignedTree, *names: str, trusted: str = "") -> KeyAnswer:
    validator = tree.validator()
    zones = [name(trusted)] if trusted else []
    source = NamedKeySource(DnsKeySource(validator, by_algorithm), validator, zones)
    return await source.peer_keys(PEER, names)


# ---- what a claim is --------------------------------------------------------------------------------------


async def test_a_secure_name_that_leads_to_the_address_is_a_claim(tree: SignedTree) -> None:
    """The answer stays what the reverse zone says; the key comes along with the address as its gateway."""
    answer = await ask(tree, HOST)
    assert isinstance(answer, Absent)
    (claim,) = answer.claims
    assert (claim.key, claim.gateways, claim.owner) == (ED, (PEER,), "www.example.")
    assert any("leads to" in note for note in answer.notes)


async def test_without_names_nothing_is_claimed(tree: SignedTree) -> None:
    """Only names that this host asked for count."""
    assert (await ask(tree)).claims == ()


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("www.unsigned.example", "not signed"),
        ("elsewhere.example", "does not lead to"),
        ("gateway.example", "does not lead to"),
        ("nokey.example", "no key record"),
        ("missing.example", ""),
        ("." * 300, "no domain name"),
    ],
)
async def test_what_is_no_claim(tree: SignedTree, host: str, why: str) -> None:
    """Unsigned, leading elsewhere, to another gateway, without a key, absent, or no name at all."""
    example = tree.zones[name("example.")]
    example.add("elsewhere", "A", "198.51.100.9")
    example.add_rdata("elsewhere", ipseckey(ED, PEER))
    example.add("gateway", "A", "198.51.100.9")
    example.add_rdata("gateway", ipseckey(ED))
    example.add("nokey", "A", str(PEER))
    answer = await ask(tree, host)
    assert answer.claims == ()
    assert why == "" or any(why in note for note in answer.notes), answer.notes


async def test_a_gateway_beside_the_address_is_no_claim(tree: SignedTree) -> None:
    """A name may speak for its own address alone, never send its traffic to somebody else."""
    example = tree.zones[name("example.")]
    example.add("far", "A", str(PEER))
    example.add_rdata("far", ipseckey(ED, ip_address("198.51.100.7")))
    answer = await ask(tree, "far.example")
    assert answer.claims == ()
    assert any("another gateway" in note for note in answer.notes)


async def test_the_addresss_own_records_come_first(tree: SignedTree) -> None:
    """A key in the reverse zone, or a bogus answer there, settles it whatever names say."""
    tree.zones[name("2.0.192.in-addr.arpa.")].add_rdata("10", ipseckey(EC))
    answer = await ask(tree, HOST, trusted="example.")
    assert isinstance(answer, Secure)
    assert [key.key for key in answer.keys] == [EC]
    assert answer.claims == ()


async def test_a_bogus_reverse_zone_is_not_mended_by_a_name(tree: SignedTree) -> None:
    """Else whoever breaks the reverse answers could choose the key."""
    reverse = tree.zones[name("2.0.192.in-addr.arpa.")]
    reverse.add_rdata("10", ipseckey(EC))
    reverse.expiration = NOW - 1800
    answer = await ask(tree, HOST, trusted="example.")
    assert isinstance(answer, Bogus)
    assert answer.claims == ()


async def test_trusted_zones_speak_for_their_addresses(tree: SignedTree) -> None:
    """Names below a zone that the configuration trusts are as good as reverse records; others stay claims."""
    answer = await ask(tree, HOST, trusted="example.")
    assert isinstance(answer, Secure)
    assert (answer.owner, [key.key for key in answer.keys]) == ("www.example.", [ED])
    assert isinstance(await ask(tree, HOST, trusted="other.example."), Absent)


async def test_an_unsigned_reverse_zone_takes_claims_too(tree: SignedTree) -> None:
    """The usual case: the provider's reverse zone is unsigned."""
    tree.add("2.0.192.in-addr.arpa.", signed=False).add("1", "PTR", "router.example.")
    answer = await ask(tree, HOST)
    assert isinstance(answer, Insecure)
    assert [claim.key for claim in answer.claims] == [ED]


# ---- what is remembered -----------------------------------------------------------------------------------


def test_names_are_bounded_and_forgotten() -> None:
    """The newest names of an address, the newest addresses, each for its time."""
    names = LearnedNames()
    for number in range(MAX_NAMES + 3):
        names.learn(PEER, f"n{number}.example.", 0, 0.0)
    known = names.of(PEER, 1.0)
    assert len(known) == MAX_NAMES
    assert known[0] == f"n{MAX_NAMES + 2}.example."
    assert names.of(PEER, MIN_LIFE) == ()
    names.learn(PEER, "long.example.", 1e9, 0.0)
    assert names.of(PEER, MAX_LIFE - 1) == ("long.example.",)
    for number in range(MAX_ADDRESSES):
        names.learn(IPv4Address(number), "x.example.", 300, 0.0)
    assert len(names) == MAX_ADDRESSES
    assert names.of(PEER, 1.0) == ()


# ---- the relay --------------------------------------------------------------------------------------------


class FakeUpstream(asyncio.DatagramProtocol):
    """Answers every A question with PEER, from a port of its own on loopback, over UDP and TCP."""

    def __init__(self) -> None:
        self.identifiers: set[int] = set()
        self.silent = self.truncate = self.forge = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def answer(self, wire: bytes, *, over_tcp: bool = False) -> bytes:
        query = dns.message.from_wire(wire)
        self.identifiers.add(query.id)
        reply = dns.message.make_response(query)
        question = query.question[0]
        if question.rdtype == 1:
            reply.answer.append(dns.rrset.from_text(question.name, 300, "IN", "A", str(PEER)))
        if self.truncate and not over_tcp:
            reply.flags |= 0x0200
            reply.answer.clear()
        return reply.to_wire()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if self.forge:
            wrong = bytearray(self.answer(data))
            wrong[0] ^= 1
            self.transport.sendto(bytes(wrong), addr)  # type: ignore[attr-defined]
        if not self.silent:
            self.transport.sendto(self.answer(data), addr)  # type: ignore[attr-defined]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(2), "big")
        answer = self.answer(await reader.readexactly(length), over_tcp=True)
        writer.write(len(answer).to_bytes(2, "big") + answer)
        await writer.drain()
        writer.close()


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.asynccontextmanager
async def relaying(resolver: FakeUpstream) -> AsyncIterator[tuple[Relay, int, list[tuple[object, ...]]]]:
    loop = asyncio.get_running_loop()
    upstream, port = free_port(), free_port()
    transport, _ = await loop.create_datagram_endpoint(lambda: resolver, ("127.0.0.1", upstream))
    server = await asyncio.start_server(resolver.serve, "127.0.0.1", upstream)
    learned: list[tuple[object, ...]] = []
    here = ip_address("127.0.0.1")
    relay = Relay(here, port, [Resolver(here, upstream)], 0, lambda *what: learned.append(what))
    await relay.start()
    try:
        yield relay, port, learned
    finally:
        await relay.stop()
        server.close()
        transport.close()


async def dig(port: int, query: dns.message.Message, *, over_tcp: bool = False) -> dns.message.Message:
    import dns.asyncquery

    ask_with = dns.asyncquery.tcp if over_tcp else dns.asyncquery.udp
    return await ask_with(query, "127.0.0.1", port=port, timeout=8)


@pytest.mark.parametrize("over_tcp", [False, True])
async def test_the_relay_passes_on_and_learns(over_tcp: bool) -> None:
    """The program gets its answer with its own identifier; the resolver sees another; the address is learned."""
    resolver = FakeUpstream()
    async with relaying(resolver) as (_, port, learned):
        query = dns.message.make_query("www.example.", "A", id=4711)
        reply = await dig(port, query, over_tcp=over_tcp)
        assert reply.id == 4711
        assert reply.answer[0][0].address == str(PEER)
        assert learned == [("www.example.", (PEER,), 300)]
        assert resolver.identifiers != {4711}


async def test_other_types_pass_and_teach_nothing() -> None:
    async with relaying(FakeUpstream()) as (_, port, learned):
        reply = await dig(port, dns.message.make_query("www.example.", "MX"))
        assert reply.rcode() == dns.rcode.NOERROR
        assert learned == []


async def test_truncated_answers_are_asked_again_by_the_program() -> None:
    """The relay passes the TC bit on, and serves the TCP question that follows."""
    resolver = FakeUpstream()
    resolver.truncate = True
    async with relaying(resolver) as (_, port, learned):
        query = dns.message.make_query("www.example.", "A")
        assert (await dig(port, query)).flags & 0x0200
        assert learned == []
        assert (await dig(port, query, over_tcp=True)).answer


async def test_forged_answers_are_passed_over() -> None:
    """A wrong identifier is not the resolver's."""
    resolver = FakeUpstream()
    resolver.forge = True
    async with relaying(resolver) as (_, port, learned):
        assert (await dig(port, dns.message.make_query("www.example.", "A"))).answer
        assert len(learned) == 1


async def test_a_silent_resolver_ends_in_servfail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oepy.dns.relay.TRY_SECONDS", (0.05, 0.05))
    resolver = FakeUpstream()
    resolver.silent = True
    async with relaying(resolver) as (relay, port, _):
        reply = await dig(port, dns.message.make_query("www.example.", "A"))
        assert reply.rcode() == dns.rcode.SERVFAIL
        assert relay.counters["failed"] == 1


async def test_garbage_costs_a_counter() -> None:
    """Short datagrams, answers instead of questions, a TCP length without a query behind it."""
    async with relaying(FakeUpstream()) as (relay, port, _):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for garbage in (b"", b"x", bytes(12), bytes(2) + b"\x80" + bytes(40)):
                sock.sendto(garbage, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x00\x04abcd")
        assert await reader.read() == b""
        writer.close()
        reply = await dig(port, dns.message.make_query("www.example.", "A"))
        assert reply.answer
        assert relay.counters["malformed"] == 5


async def test_the_relay_asks_resolvers_with_names_over_tls(tmp_path: Path) -> None:
    """Nothing leaves in the clear; what does not fit into the program's datagram comes over TCP."""
    authority = Authority(tmp_path)
    context, _ = authority.server("dns.example")
    learned: list[tuple[object, ...]] = []

    def large(query: dns.message.Message) -> tuple[float, dns.message.Message]:
        _, reply = plain(query)
        text = " ".join(f'"{"x" * 200}"' for _ in range(5))
        reply.additional.append(dns.rrset.from_text("large.example.", 300, "IN", "TXT", text))
        return 0.0, reply

    async with FakeResolver(stream=large, tls=context) as server:
        here, port = ip_address("127.0.0.1"), free_port()
        relay = Relay(
            *(here, port, [server.at("dns.example")], 0, lambda *what: learned.append(what)),
            tls_bundle=str(authority.bundle),
        )
        await relay.start()
        try:
            query = dns.message.make_query("www.example.", "A", id=4711)
            assert (await dig(port, query)).flags & 0x0200
            assert (await dig(port, query, over_tcp=True)).answer
            roomy = dns.message.make_query("www.example.", "A", use_edns=0, payload=1400)
            assert (await dig(port, roomy)).answer
        finally:
            await relay.stop()
    assert learned == [("www.example.", (ip_address("192.0.2.1"),), 300)] * 3
    assert (server.names("udp"), server.connections) == ([], 1)


async def test_an_address_in_use_is_told() -> None:
    here = ip_address("127.0.0.1")
    async with relaying(FakeUpstream()) as (_, port, _):
        with pytest.raises(OepyError, match=rf"127\.0\.0\.1@{port}"):
            await Relay(here, port, [Resolver(here)], 0, lambda *_: None).start()


# ---- configuration and doctor -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("dns: {relay: 192.0.2.1, resolvers: [192.0.2.53]}", "127.0.0.54"),
        ("dns: {relay: 127.0.0.54@x, resolvers: [192.0.2.53]}", "127.0.0.54@53"),
        ("dns: {relay: 127.0.0.54, resolvers: [127.0.0.54]}", "it asks itself"),
        ("dns: {relay: here, resolvers: [192.0.2.53]}", "no IP address"),
        ("dns: {trusted_names: [a..b], resolvers: [192.0.2.53]}", "no zone"),
    ],
)
def test_mistakes_are_refused_with_the_mend(text: str, mend: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    (problem,) = caught.value.problems
    assert problem.startswith("line 1: dns.")
    assert mend in problem


def test_the_relays_place() -> None:
    assert parse("dns: {resolvers: [192.0.2.53]}").relay is None
    config = parse("dns: {relay: '::1@5353', resolvers: [192.0.2.53], trusted_names: [corp.example]}")
    assert config.relay == (ip_address("::1"), 5353)
    assert config.trusted_names == ("corp.example.",)


def test_doctor_sees_whether_programs_use_the_relay() -> None:
    place, other = ip_address("127.0.0.54"), ip_address("192.0.2.53")
    assert list(judge_relay(None, [other])) == []
    assert [finding.verdict for finding in judge_relay((place, 53), (place, other))] == ["good"]
    (finding,) = judge_relay((place, 53), (other, place))
    assert "nameserver 127.0.0.54" in finding.mend
    (finding,) = judge_relay((place, 5353), (place,))
    assert finding.verdict == "warning"
