"""What an attacker between us and the resolver, or one with a zone of its own, might try with DNSSEC."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdatatype
import dns.rrset
import pytest

from oepy.dns import limits, transport
from oepy.dns.denial import Denial, Proof
from oepy.dns.limits import Budget
from oepy.dns.message import Question, Reply, RRset, Signature, parse_reply
from oepy.dns.peers import DnsKeySource
from oepy.dns.records import IpsecKey, build_ipseckey
from oepy.dns.signatures import STRICT, SignatureFailure, usable_keys, verify
from oepy.dns.transport import NoReply, StubTransport
from oepy.dns.validator import Outcome
from oepy.dns.zonemap import reverse_name
from oepy.errors import ParseError
from oepy.keys import HostKey
from oepy.model import Bogus, Secure, Security
from oepy.resolvers import Resolver
from tests.fakes.signed_tree import NOW, SignedTree, Zone, name, standard_tree
from tests.unit.test_dns_transport import LOCALHOST, QUESTION, Server, reply_to

A, TXT, NSEC, SOA = (int(dns.rdatatype.from_text(kind)) for kind in ("A", "TXT", "NSEC", "SOA"))
RRSIG, IPSECKEY = int(dns.rdatatype.RRSIG), int(dns.rdatatype.IPSECKEY)
CPU_GOAL = 0.4  # seconds on a busy machine; some 0.1 on a quiet one


async def look(tree: SignedTree, owner: str, kind: str = "A") -> Outcome:
    return await tree.validator().lookup(name(owner), int(dns.rdatatype.from_text(kind)))


# ---- stripped keys ---------------------------------------------------------------------------------------

PEER = ip_address("192.0.2.10")
ED = HostKey.generate("ed25519").public


def _peer_tree(nsec3: bool) -> tuple[SignedTree, Zone]:
    tree = SignedTree()
    zone = tree.add("2.0.192.in-addr.arpa.", nsec3=(0, b"", False) if nsec3 else None)
    zone.add("1", "PTR", "router.example.")
    wire = build_ipseckey(IpsecKey(10, int(ED.algorithm), None, ED.data))
    zone.add_rdata("10", dns.rdata.GenericRdata(1, IPSECKEY, wire))
    tree.add("3.0.192.in-addr.arpa.", signed=False).add("1", "PTR", "router.example.")
    return tree, zone


def _nothing(tree, zone, reply):
    reply.answer = []


def _only_signature(tree, zone, reply):
    reply.answer = [rrset for rrset in reply.answer if rrset.rdtype == RRSIG]


def _unsigned_nodata(tree, zone, reply):
    reply.answer, reply.authority = [], [zone.rrset(zone.origin, SOA)]


def _signed_soa_nodata(tree, zone, reply):
    reply.answer = []
    tree._put(reply.authority, zone, zone.rrset(zone.origin, SOA))


def _denial_of_another_name(tree, zone, reply):
    _signed_soa_nodata(tree, zone, reply)
    reply.authority += zone.denial(name("1.2.0.192.in-addr.arpa."))


def _nxdomain_by_neighbours(tree, zone, reply):
    _signed_soa_nodata(tree, zone, reply)
    reply.set_rcode(dns.rcode.NXDOMAIN)
    reply.authority += zone.denial(name("9.2.0.192.in-addr.arpa."), name("*.2.0.192.in-addr.arpa."))


def _its_own_denial(tree, zone, reply):
    _signed_soa_nodata(tree, zone, reply)
    reply.authority += zone.denial(name("10.2.0.192.in-addr.arpa."))


def _unsigned_alias(tree, zone, reply):
    owner = str(reverse_name(PEER))
    reply.answer = [dns.rrset.from_text(owner, 300, "IN", "CNAME", "1.3.0.192.in-addr.arpa.")]


def _unsigned_neighbours_proof(tree, zone, reply):
    arpa = tree.zone_of(name("in-addr.arpa."))
    reply.answer, reply.authority = [], []
    tree._put(reply.authority, arpa, arpa.rrset(arpa.origin, SOA))
    reply.authority += arpa.denial(name("3.0.192.in-addr.arpa."))


def _other_key(tree, zone, reply):
    for rrset in reply.answer:
        if rrset.rdtype == IPSECKEY:
            other = HostKey.generate("ed25519").public
            wire = build_ipseckey(IpsecKey(10, int(other.algorithm), None, other.data))
            rrset.clear()
            rrset.add(dns.rdata.GenericRdata(1, IPSECKEY, wire), 300)


STRIPPINGS = [
    _nothing,
    _only_signature,
    _unsigned_nodata,
    _signed_soa_nodata,
    _denial_of_another_name,
    _nxdomain_by_neighbours,
    _its_own_denial,
    _unsigned_alias,
    _unsigned_neighbours_proof,
    _other_key,
]


@pytest.mark.parametrize("nsec3", [False, True])
@pytest.mark.parametrize("strip", STRIPPINGS)
async def test_a_stripped_ipseckey_is_bogus_and_never_absent(strip, nsec3):
    """Absent would let the peer in by AUTH NULL, or the traffic out in the clear."""
    tree, zone = _peer_tree(nsec3)
    assert isinstance(await DnsKeySource(tree.validator(), lambda keys: None).peer_keys(PEER), Secure)

    def lie(question, reply):
        if question.type == IPSECKEY:
            strip(tree, zone, reply)
        return reply

    tree.lies.append(lie)
    answer = await DnsKeySource(tree.validator(), lambda keys: None).peer_keys(PEER)
    assert isinstance(answer, Bogus), answer


# ---- denial ----------------------------------------------------------------------------------------------


async def test_a_denial_that_is_a_wildcard_expansion_denies_nothing():
    """A zone's `*` has an NSEC too; under another owner name its signature still holds, and it must not count
    as that name's NSEC."""
    tree = standard_tree()
    zone = tree.zones[name("example.")]
    victim = name("sub.x.wild.example.")
    wildcard = zone.denial(name("*.wild.example."))

    def lie(question, reply):
        if question == Question(victim, TXT):
            reply.answer, reply.authority = [], []
            tree._put(reply.authority, zone, zone.rrset(zone.origin, SOA))
            for rrset in wildcard:
                moved = dns.rrset.from_rdata_list(victim, rrset.ttl, list(rrset))
                reply.authority.append(moved)
        return reply

    assert (await look(tree, str(victim), "TXT")).status is Security.SECURE
    tree.lies.append(lie)
    outcome = await look(tree, str(victim), "TXT")
    assert outcome.status is Security.BOGUS
    assert "does not prove" in outcome.reason


async def test_records_that_nobody_asked_for_are_not_kept():
    """A second name's forged data beside a true answer is not what a later lookup gets."""
    tree = standard_tree()

    def lie(question, reply):
        if question.name == name("www.example."):
            reply.answer.append(dns.rrset.from_text("www.child.example.", 300, "IN", "A", "203.0.113.66"))
            reply.additional.append(dns.rrset.from_text("www.three.", 300, "IN", "A", "203.0.113.66"))
        return reply

    tree.lies.append(lie)
    validator = tree.validator()
    assert (await validator.lookup(name("www.example."), A)).status is Security.SECURE
    for owner, address in (("www.child.example.", "192.0.2.10"), ("www.three.", "192.0.2.1")):
        outcome = await validator.lookup(name(owner), A)
        assert (outcome.status, str(outcome.rdatas[0])) == (Security.SECURE, address)


async def test_a_lie_about_one_zone_leaves_no_insecure_zone_behind():
    """After a failed downgrade the same validator finds the zone signed: nothing of the lie was cached."""
    tree = standard_tree()

    def lie(question, reply):
        if question.name.is_subdomain(name("child.example.")):
            reply.answer = [rrset for rrset in reply.answer if rrset.rdtype != RRSIG]
            if question.type == dns.rdatatype.DS:
                reply.answer = []
        return reply

    tree.lies.append(lie)
    validator = tree.validator()
    assert (await validator.lookup(name("www.child.example."), A)).status is Security.BOGUS
    tree.lies.clear()
    assert (await validator.lookup(name("www.child.example."), A)).status is Security.SECURE
    assert (await validator.lookup(name("www.unsigned.example."), A)).status is Security.INSECURE
    assert (await validator.lookup(name("www.child.example."), A)).status is Security.SECURE


async def test_names_differ_in_more_than_case():
    """The cache, the chain and the comparison with the question take upper and lower case as one."""
    tree = standard_tree()
    validator = tree.validator()
    first = await validator.lookup(name("WWW.Child.EXAMPLE."), A)
    assert first.status is Security.SECURE
    asked = len(tree.asked)
    second = await validator.lookup(name("www.cHILD.example."), A)
    assert (second.status, second.questions, len(tree.asked)) == (Security.SECURE, 0, asked)


# ---- work ------------------------------------------------------------------------------------------------


def _wire(kind: int, count: int, rdata: bytes) -> bytes:
    """A reply with `count` records of names of 120 labels."""
    owner = QUESTION.name.to_wire() or b""
    wire = struct.pack("!HHHHHH", 7, 0x8180, 1, count, 0, 0) + owner + struct.pack("!HH", QUESTION.type, 1)
    for number in range(count):
        body = rdata + number.to_bytes(20, "big") if kind == SOA else rdata
        wire += b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 300 + number, len(body)) + body
    return wire


LONG = b"\x01a" * 120 + b"\0"


@pytest.mark.parametrize(
    ("kind", "count", "rdata"),
    [
        (2, 250, LONG),
        (SOA, 120, LONG + LONG),
        (NSEC, 240, LONG + b"\0\1\x40"),
        (5, 250, LONG),
        (2, 5000, b"\0"),
    ],
)
def test_a_reply_full_of_long_names_costs_little(kind, count, rdata):
    """The library needs milliseconds for a name of 120 labels, and a reply could hold hundreds (64 KB)."""
    wire = _wire(kind, count, rdata)
    assert len(wire) < 65536
    start = time.process_time()
    with contextlib.suppress(ParseError):
        parse_reply(wire, QUESTION, 7)
    assert time.process_time() - start < CPU_GOAL


def test_pointers_into_a_long_name_cost_little():
    """9 KB with 240 records, whose names are all made from one by compression."""
    wire = _wire(2, 1, LONG)
    start = len(wire) - len(LONG)
    wire = wire[:6] + struct.pack("!H", 241) + wire[8:]
    for number in range(240):
        owner, data = (0xC000 | start + 2 * (offset % 110) for offset in (number, number // 110))
        body = struct.pack("!HH", data, data + 2) + number.to_bytes(20, "big")
        wire += struct.pack("!HHHIH", owner, SOA, 1, 300, len(body)) + body
    begin = time.process_time()
    with pytest.raises(ParseError, match="names"):
        parse_reply(wire, QUESTION, 7)
    assert time.process_time() - begin < CPU_GOAL


def _fat(question: Question, reply: dns.message.Message) -> dns.message.Message:
    """No signature on the answer, and 230 records that nobody asked for with every reply."""
    if question.type == A:
        reply.answer = [rrset for rrset in reply.answer if rrset.rdtype != RRSIG]
    texts = [f'"{number} {"x" * 80}"' for number in range(230)]
    reply.authority.append(dns.rrset.from_text_list("x.example.", 300, "IN", "TXT", texts))
    return reply


@pytest.mark.parametrize("fat", [False, True])
async def test_a_walk_over_dear_replies_ends_within_its_budget(fat):
    """Eighty questions, each with a reply as dear as the attacker can make it: bogus before that."""
    tree = SignedTree()
    tree.add("example.").add("a." * 70 + "www", "A", "192.0.2.1")
    tree.lies.append(_fat if fat else _without_answer_signature)
    outcome = await look(tree, "a." * 70 + "www.example.")
    assert outcome.status is Security.BOGUS
    assert f"more than {limits.MAX_EFFORT} records" in outcome.reason
    assert len(tree.asked) < (20 if fat else 80)


def _without_answer_signature(question: Question, reply: dns.message.Message) -> dns.message.Message:
    if question.type == A:
        reply.answer = [rrset for rrset in reply.answer if rrset.rdtype != RRSIG]
    return reply


def test_a_large_set_with_many_false_signatures_costs_little():
    """The canonical form of the records is made once and not once a signature."""
    zone = Zone(name("example."))
    zone.add("www", "A", "192.0.2.1")
    good = zone.sign(zone.rrset(name("www.example."), A))[0]
    rdatas = tuple(dns.rdata.from_text("IN", "NSEC", f"a{n}.{'b.' * 110}example. A") for n in range(40))
    signatures = tuple(
        Signature.of(good.replace(type_covered=NSEC, signature=bytes([n]) * 64)) for n in range(16)
    )
    start = time.process_time()
    with pytest.raises(SignatureFailure):
        verify(
            RRset(name("www.example."), NSEC, 300, rdatas, signatures),
            zone.origin,
            usable_keys([zone.dnskey], STRICT),
            NOW,
            Budget(),
        )
    assert time.process_time() - start < CPU_GOAL


def test_nsec3_with_the_most_work_allowed_costs_little():
    """CVE-2023-50868: 120 labels, 50 iterations, the longest salt."""
    rdata = dns.rdata.from_text("IN", "NSEC3", f"1 0 50 {'ab' * 255} 2t7b4g4vsa5smi47k61mv5bv1a22bojr A")
    denial = Denial(name("example."), [(name("0" * 32 + ".example."), rdata)], Budget())
    start = time.process_time()
    assert denial.no_name(name("a." * 115 + "example.")) is Proof.NONE
    assert time.process_time() - start < CPU_GOAL


# ---- TCP -------------------------------------------------------------------------------------------------


def _truncated(data):
    reply = reply_to(data)
    reply.flags |= dns.flags.TC
    return [reply.to_wire()]


async def _over_tcp(answer) -> Reply | NoReply:
    """UDP says TC; `answer(query, writer)` writes what it likes and the stream is closed."""

    async def stream(reader, writer):
        length = int.from_bytes(await reader.readexactly(2), "big")
        await answer(await reader.readexactly(length), writer)
        writer.close()

    async with Server(_truncated, lambda data: []) as port:
        tcp = await asyncio.start_server(stream, "127.0.0.2", port)
        udp_host = ip_address("127.0.0.2")
        loop = asyncio.get_running_loop()

        class Datagrams(asyncio.DatagramProtocol):
            def connection_made(self, link):
                self.link = link

            def datagram_received(self, data, address):
                self.link.sendto(_truncated(data)[0], address)

        link, _ = await loop.create_datagram_endpoint(Datagrams, ("127.0.0.2", port))
        try:
            return await StubTransport([Resolver(udp_host, port)]).ask(QUESTION)
        finally:
            link.close()
            tcp.close()
            await tcp.wait_closed()


@pytest.mark.parametrize("stream", [b"", b"\0", b"\0\0", b"\0\1x", b"\0\x0cshort", b"\xff\xff" + b"x" * 100])
async def test_a_bad_tcp_stream_is_no_reply(stream, monkeypatch):
    """Closed at once, half a length, length 0, less than the length says: told, within the time allowed."""
    monkeypatch.setattr(transport, "TCP_SECONDS", 0.5)

    async def answer(_, writer):
        writer.write(stream)
        await writer.drain()

    start = time.monotonic()
    reply = await _over_tcp(answer)
    assert isinstance(reply, NoReply)
    assert str(LOCALHOST)[:6] in reply.reason
    assert time.monotonic() - start < 5


async def test_a_tcp_reply_in_single_bytes_is_put_together():
    """A stream has no message boundaries."""

    async def answer(query, writer):
        wire = reply_to(query, 3).to_wire()
        for byte in len(wire).to_bytes(2, "big") + wire:
            writer.write(bytes((byte,)))
            await writer.drain()

    reply = await _over_tcp(answer)
    assert isinstance(reply, Reply)
    assert len(reply.answer[0].rdatas) == 3
