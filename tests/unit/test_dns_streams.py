"""TCP with reuse and pipelining (RFC 7766), and TLS in the strict profile (RFC 7858, RFC 8310)."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.dns import streams, transport
from oepy.dns.message import PADDED_TO, Question, Reply, build_query
from oepy.dns.transport import NoReply, StubTransport
from oepy.errors import ConfigError
from oepy.resolvers import Resolver, parse_resolver
from tests.fakes.resolver import Authority, FakeResolver, deaf, plain, truncated

A = int(dns.rdatatype.A)


def question(owner: str) -> Question:
    return Question(dns.name.from_text(owner), A)


@asynccontextmanager
async def asking(*resolvers: Resolver, bundle=None):
    stub = StubTransport(resolvers, tls_bundle=str(bundle) if bundle else None)
    try:
        yield stub
    finally:
        stub.close()
        await asyncio.sleep(0)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


# ---- TCP -------------------------------------------------------------------------------------------------


async def test_many_truncated_answers_share_one_connection():
    """RFC 7766 §6.2.1: reuse and pipelining; answers out of order find their questions."""

    def by_number(query):
        _, reply = plain(query)
        return (0.05 if "slow" in str(query.question[0].name) else 0.0), reply

    async with FakeResolver(udp=truncated, stream=by_number) as server, asking(server.at()) as stub:
        names = [f"{'slow' if number % 3 == 0 else 'quick'}{number}.example." for number in range(40)]
        replies = await asyncio.gather(*(stub.ask(question(name)) for name in names))
        assert [str(reply.answer[0].name) for reply in replies] == names
        assert server.connections == 1
        assert sorted(server.names("stream")) == sorted(names)


async def test_a_connection_that_the_resolver_has_closed_is_opened_anew():
    """RFC 7766 §6.2.4: what was outstanding is asked again, and no lookup fails of it."""
    async with FakeResolver(udp=truncated, hang_up_after=2) as server, asking(server.at()) as stub:
        for number in range(7):
            assert isinstance(await stub.ask(question(f"{number}.example.")), Reply)
        assert server.connections >= 3


async def test_a_connection_that_never_answers_is_not_tried_for_ever():
    """Closed without a reply, again and again: told."""
    async with (
        FakeResolver(udp=truncated, stream=deaf, hang_up_after=1) as server,
        asking(server.at()) as stub,
    ):
        reply = await stub.ask(question("www.example."))
    assert isinstance(reply, NoReply)
    assert "closed the connection early" in reply.reason
    assert server.connections <= 2


async def test_a_stuck_question_does_not_hold_up_those_behind_it(monkeypatch):
    """A resolver that answers in order gets a second connection, and no more than allowed."""
    monkeypatch.setattr(streams, "STUCK_SECONDS", 0.05)

    def slow_zone(query):
        _, reply = plain(query)
        return (30.0 if "slow" in str(query.question[0].name) else 0.0), reply

    server = FakeResolver(udp=truncated, stream=slow_zone, in_order=True)
    async with server, asking(server.at()) as stub:
        slow = [asyncio.ensure_future(stub.ask(question("a.slow.")))]
        await asyncio.sleep(0.2)
        assert isinstance(await stub.ask(question("www.quick.")), Reply)
        assert not slow[0].done()
        for number in range(8):
            slow.append(asyncio.ensure_future(stub.ask(question(f"{number}.slow."))))
            await asyncio.sleep(0.06)
        assert server.connections <= streams.MAX_STREAMS
        for task in slow:
            task.cancel()


async def test_an_idle_connection_is_closed(monkeypatch):
    """By the client first, as RFC 7766 §6.2.3 wishes."""
    monkeypatch.setattr(streams, "IDLE_SECONDS", 0.05)
    async with FakeResolver(udp=truncated) as server, asking(server.at()) as stub:
        await stub.ask(question("www.example."))
        assert server.open_connections == 1
        await asyncio.sleep(0.2)
        assert server.open_connections == 0
        assert isinstance(await stub.ask(question("www2.example.")), Reply)


async def test_guesses_at_the_identifier_move_the_question_to_tcp():
    """After so many datagrams with wrong identifiers somebody is guessing: a stream cannot be guessed at."""
    sent = []

    def guessing(query):
        for number in range(transport.MAX_NEAR_MISSES):
            wrong = dns.message.make_response(query)
            wrong.id = (query.id + 1 + number) % 65536
            sent.append(wrong)
        return 0.0, sent.pop()

    async with FakeResolver(udp=guessing) as server, asking(server.at()) as stub:
        link = server._link

        class Flood:
            def sendto(self, wire, address):
                for wrong in [*sent]:
                    link.sendto(wrong.to_wire(), address)
                link.sendto(wire, address)

        server._link.get_protocol().link = Flood()
        reply = await stub.ask(question("www.example."))
    assert isinstance(reply, Reply)
    assert server.names("stream") == ["www.example."]


# ---- TLS -------------------------------------------------------------------------------------------------


async def test_a_named_server_is_asked_over_tls_only(authority):
    """One connection, padded queries (RFC 8467), not one datagram."""
    context, _ = authority.server("dns.example")
    async with (
        FakeResolver(tls=context) as server,
        asking(server.at("dns.example"), bundle=authority.bundle) as stub,
    ):
        replies = await asyncio.gather(*(stub.ask(question(f"{'n' * n}.example.")) for n in range(1, 40)))
    assert all(isinstance(reply, Reply) for reply in replies)
    assert (server.connections, server.names("udp")) == (1, [])
    assert {len(query) % PADDED_TO for query in server.queries} == {0}
    assert not dns.message.from_wire(server.queries[0]).flags & dns.flags.AD


@pytest.mark.parametrize(
    ("name", "days", "bundled"),
    [("other.example", 1, True), ("dns.example", -1, True), ("dns.example", 1, False)],
    ids=["another name", "expired", "unknown authority"],
)
async def test_a_server_that_cannot_prove_its_name_learns_no_question(authority, name, days, bundled):
    """The strict profile never falls back (RFC 8310 §5)."""
    context, _ = authority.server(name, days)
    bundle = authority.bundle if bundled else None
    async with FakeResolver(tls=context) as server, asking(server.at("dns.example"), bundle=bundle) as stub:
        reply = await stub.ask(question("www.example."))
    assert isinstance(reply, NoReply)
    assert "TLS: the certificate does not prove the server" in reply.reason
    assert server.asked == []


async def test_a_pin_alone_proves_a_server(authority):
    """RFC 7858 §4.2: whatever the certificate says; another key is refused before any question."""
    context, pin = authority.server("whatever.example", -1)
    async with FakeResolver(tls=context) as server:
        async with asking(server.at(pins=(bytes(32), pin))) as stub:
            assert isinstance(await stub.ask(question("www.example.")), Reply)
        count = len(server.asked)
        async with asking(server.at(pins=(bytes(32),))) as stub:
            reply = await stub.ask(question("www.example."))
    assert isinstance(reply, NoReply)
    assert "none of those pinned" in reply.reason
    assert len(server.asked) == count


async def test_a_name_and_a_pin_must_both_hold(authority):
    """The right name with another key."""
    context, pin = authority.server("dns.example")
    async with FakeResolver(tls=context) as server:
        async with asking(server.at("dns.example", (pin,)), bundle=authority.bundle) as stub:
            assert isinstance(await stub.ask(question("www.example.")), Reply)
        async with asking(server.at("dns.example", (bytes(32),)), bundle=authority.bundle) as stub:
            assert isinstance(await stub.ask(question("www.example.")), NoReply)


async def test_what_is_no_tls_server_is_told(authority):
    """A plain DNS server on the port: the TLS error, not a crash and no question."""
    async with FakeResolver() as server, asking(server.at("dns.example"), bundle=authority.bundle) as stub:
        reply = await stub.ask(question("www.example."))
    assert isinstance(reply, NoReply)
    assert server.asked == []


def test_a_bundle_without_certificates_is_a_mistake(tmp_path):
    """Named at the start, not at the first lookup."""
    (tmp_path / "empty.pem").write_text("nothing\n")
    for bundle in (tmp_path / "empty.pem", tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match="PEM file"):
            StubTransport([parse_resolver("192.0.2.53#dns.example")], tls_bundle=str(bundle))


# ---- how resolvers are written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "port", "name"),
    [
        ("192.0.2.53", 53, ""),
        ("192.0.2.53@5353", 5353, ""),
        ("192.0.2.53@853#dns.example", 853, "dns.example"),
        ("2001:db8::53#DNS.example.", 853, "dns.example"),
        ("2001:db8::53@8853#dns.example", 8853, "dns.example"),
    ],
)
def test_resolvers_are_read_and_written(text, port, name):
    """As in unbound's forward-addr; what is printed reads back as the same."""
    resolver = parse_resolver(text)
    assert (resolver.port, resolver.name, resolver.is_tls) == (port, name, bool(name))
    assert parse_resolver(str(resolver)) == resolver


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("ns.example", "write it like"),
        ("192.0.2.53@0", "1 to 65535"),
        ("192.0.2.53@x", "1 to 65535"),
        ("192.0.2.53@853", "#dns.example"),
        ("192.0.2.53#", "one host name"),
        ("192.0.2.53#a.example#b.example", "one host name"),
        ("192.0.2.53#pin-sha256=AAAA", "44 characters"),
        ("fe80::1%eth0", "write it like"),
    ],
)
def test_mistakes_in_resolvers_name_the_mend(text, mend):
    """Each in one line."""
    with pytest.raises(ValueError, match=mend):
        parse_resolver(text)


@given(
    st.ip_addresses(),
    st.integers(1, 65535),
    st.sampled_from(["", "dns.example", "a_b.x"]),
    st.lists(st.binary(min_size=32, max_size=32), max_size=3),
)
def test_any_resolver_reads_back(address, port, name, pins):
    """Text and value are one."""
    if port == 853 and not name and not pins:
        port = 53
    resolver = Resolver(address, port, name, tuple(pins))
    if getattr(address, "scope_id", None) is None:
        assert parse_resolver(str(resolver)) == resolver


def test_tls_and_plain_resolvers_do_not_mix():
    """Failing over from one to the other would tell the questions to everybody on the way."""
    with pytest.raises(ConfigError, match="some resolvers have TLS"):
        StubTransport([parse_resolver("192.0.2.1#dns.example"), parse_resolver("192.0.2.2")])


@given(st.integers(0, 60))
def test_padding_is_a_multiple_and_stays_a_message(length):
    """RFC 8467 §4.1: queries in blocks of 128."""
    wire = build_query(question("n" * length + "." if length else "."), 1, padded=True)
    assert len(wire) % PADDED_TO == 0
    assert dns.message.from_wire(wire).edns == 0
