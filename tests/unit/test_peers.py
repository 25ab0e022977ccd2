"""DnsKeySource: which of the five classes, with which keys in which order, against the tree in memory."""

from __future__ import annotations

import base64
from ipaddress import ip_address

import dns.name
import dns.rdata
import dns.rdatatype
import pytest

from oepy.daemon.doctor import judge_resolver
from oepy.dns import peers, records
from oepy.dns.peers import DnsKeySource
from oepy.dns.records import IpsecKey, OeText
from oepy.dns.zonefile import reverse_name
from oepy.keys import HostKey
from oepy.model import Absent, Bogus, GatewayType, Insecure, KeyAnswer, Secure, Unreachable
from tests.fakes.signed_tree import SignedTree, Zone, name

ED = HostKey.generate("ed25519").public
EC = HostKey.generate("ecdsa-p256").public
RSA = HostKey.generate("rsa-2048").public
PEER = ip_address("192.0.2.10")
OWNER = str(reverse_name(PEER))


def ipseckey(key, gateway=None, precedence=10):
    wire = records.build_ipseckey(IpsecKey(precedence, int(key.algorithm), gateway, key.data))
    return raw(wire)


def raw(wire: bytes) -> dns.rdata.Rdata:
    return dns.rdata.GenericRdata(1, 45, wire)


def text(gateway, key=RSA, precedence=10):
    strings = records.build_oe_text(OeText(precedence, gateway, key))
    return dns.rdata.from_text("IN", "TXT", records.text_rdata(strings))


@pytest.fixture
def tree() -> SignedTree:
    tree = SignedTree()
    tree.add("2.0.192.in-addr.arpa.").add("1", "PTR", "router.example.")
    tree.add("3.0.192.in-addr.arpa.", signed=False).add("1", "PTR", "router.example.")
    example = tree.add("example.")
    example.add("gw", "A", "198.51.100.1")
    example.add("gw", "AAAA", "2001:db8::1")
    tree.add("unsigned.example.", signed=False).add("gw", "A", "198.51.100.2")
    return tree


def reverse(tree: SignedTree) -> Zone:
    return tree.zones[name("2.0.192.in-addr.arpa.")]


def by_algorithm(keys) -> None:
    """A shuffle that a test can foresee."""
    keys.sort(key=lambda key: -key.key.algorithm)


async def ask(tree: SignedTree, subject=PEER, shuffle=by_algorithm) -> KeyAnswer:
    return await DnsKeySource(tree.validator(), shuffle).peer_keys(subject)


async def test_a_key_with_every_form_of_gateway(tree):
    """None, IPv4, IPv6 and a name: each becomes addresses to negotiate with."""
    gateways = {
        None: (PEER,),
        ip_address("198.51.100.7"): (ip_address("198.51.100.7"),),
        ip_address("2001:db8::7"): (ip_address("2001:db8::7"),),
        name("gw.example."): (ip_address("198.51.100.1"), ip_address("2001:db8::1")),
    }
    for gateway in gateways:
        reverse(tree).add_rdata("10", ipseckey(ED, gateway))
    answer = await ask(tree)
    assert isinstance(answer, Secure)
    assert {key.gateways for key in answer.keys} == set(gateways.values())
    assert {key.gateway_text for key in answer.keys} == {".", "198.51.100.7", "2001:db8::7", "gw.example."}
    assert {key.gateway_type for key in answer.keys} == set(GatewayType)
    assert (answer.owner, answer.notes) == (OWNER, ())


async def test_lower_precedence_first_and_ties_in_the_given_random_order(tree):
    """RFC 4025 §2.2; the order of ties comes from the injected shuffle."""
    for precedence, key in ((20, ED), (5, EC), (20, RSA)):
        reverse(tree).add_rdata("10", ipseckey(key, None, precedence))
    answer = await ask(tree)
    assert isinstance(answer, Secure)
    assert [key.precedence for key in answer.keys] == [5, 20, 20]
    assert [key.key for key in answer.keys] == [EC, ED, RSA]
    answer = await ask(tree, shuffle=lambda keys: keys.sort(key=lambda key: key.key.algorithm))
    assert [key.key for key in answer.keys] == [EC, RSA, ED]


@pytest.mark.parametrize(
    "wire", ["0a0004", "0a0104c0", "0a0002010300", "0a000420", "0a01047f000001" + "00" * 32]
)
async def test_malformed_records_never_lose_the_good_ones(tree, wire):
    """One odd record beside a good one is a note; alone it makes the answer bogus and is named."""
    reverse(tree).add_rdata("10", raw(bytes.fromhex(wire)))
    alone = await ask(tree)
    assert isinstance(alone, Bogus)
    assert "IPSECKEY record 1" in alone.reason
    assert OWNER in alone.reason
    reverse(tree).add_rdata("10", ipseckey(ED))
    beside = await ask(tree)
    assert isinstance(beside, Secure)
    assert len(beside.notes) == 1


@pytest.mark.parametrize("wire", ["0a000001", "0a000101", "0a006301", "0a0404" + "00" * 32])
async def test_records_that_are_not_for_us_leave_the_peer_without_a_key(tree, wire):
    """Algorithm 0, DSA, unknown algorithms and gateway types: absent, saying why."""
    reverse(tree).add_rdata("10", raw(bytes.fromhex(wire)))
    answer = await ask(tree)
    assert isinstance(answer, Absent)
    assert "IPSECKEY record 1" in answer.reason


async def test_absent_with_its_ttl(tree):
    """No record, by NODATA and by NXDOMAIN: absent for the negative TTL."""
    reverse(tree).add("10", "PTR", "host.example.")
    for subject in (PEER, "192.0.2.11"):
        answer = await ask(tree, subject)
        assert isinstance(answer, Absent)
        assert answer.ttl == 120


async def test_txt_counts_only_where_there_is_no_ipseckey(tree):
    """The TXT's key is used where IPSECKEY is proven absent, and not looked at beside one."""
    reverse(tree).add_rdata("10", text(PEER))
    answer = await ask(tree)
    assert isinstance(answer, Secure)
    (key,) = answer.keys
    assert (key.record, key.key, key.gateways, key.gateway_text) == ("TXT", RSA, (PEER,), "192.0.2.10")
    reverse(tree).add_rdata("10", ipseckey(ED))
    answer = await ask(tree)
    assert isinstance(answer, Secure)
    assert [key.record for key in answer.keys] == ["IPSECKEY"]


async def test_a_txt_with_a_name_is_never_initiated_to(tree):
    """`@fqdn` only authorises an initiator: the key comes without gateway addresses."""
    reverse(tree).add_rdata("10", text(name("roadwarrior.example.")))
    answer = await ask(tree)
    assert isinstance(answer, Secure)
    assert (answer.keys[0].gateways, answer.keys[0].gateway_text) == ((), "@roadwarrior.example.")


async def test_a_txt_without_key_takes_it_from_the_gateway(tree):
    """The key stands at the gateway's reverse name (RFC 4322 §5.2)."""
    reverse(tree).add_rdata("10", text(ip_address("192.0.2.53"), key=None))
    answer = await ask(tree)
    assert isinstance(answer, Absent)
    assert "no key in it" in answer.reason
    reverse(tree).add_rdata("53", ipseckey(EC))
    answer = await ask(tree)
    assert isinstance(answer, Secure)
    assert (answer.keys[0].key, answer.keys[0].gateways) == (EC, (ip_address("192.0.2.53"),))


async def test_other_txt_records_are_ignored_and_near_misses_noted(tree):
    """SPF is nobody's key; X-IPsec-Gateway is told to its owner; a malformed X-IPsec-Server is bogus."""
    reverse(tree).add("10", "TXT", '"v=spf1 -all"')
    assert isinstance(await ask(tree), Absent)
    reverse(tree).add("10", "TXT", '"X-IPsec-Gateway(10)=192.0.2.1 AQ=="')
    answer = await ask(tree)
    assert isinstance(answer, Absent)
    assert "X-IPsec-Server" in answer.notes[0]
    reverse(tree).add("10", "TXT", '"X-IPsec-Server(10)=0.0.0.0 AQ=="')
    answer = await ask(tree)
    assert isinstance(answer, Bogus)
    assert "TXT record" in answer.reason


async def test_insecure_carries_its_keys(tree):
    """In an unsigned zone the keys come along, for those who chose to use them."""
    tree.zones[name("3.0.192.in-addr.arpa.")].add_rdata("10", ipseckey(ED))
    answer = await ask(tree, "192.0.3.10")
    assert isinstance(answer, Insecure)
    assert [key.key for key in answer.keys] == [ED]
    assert "not signed" in answer.reason
    empty = await ask(tree, "192.0.3.11")
    assert isinstance(empty, Insecure)
    assert empty.keys == ()


async def test_a_gateway_name_in_an_unsigned_zone_makes_the_key_insecure(tree):
    """The weakest link counts, unless a wholly secure key is there too."""
    reverse(tree).add_rdata("10", ipseckey(ED, name("gw.unsigned.example.")))
    answer = await ask(tree)
    assert isinstance(answer, Insecure)
    assert [key.gateways for key in answer.keys] == [(ip_address("198.51.100.2"),)]
    reverse(tree).add_rdata("10", ipseckey(EC))
    answer = await ask(tree)
    assert isinstance(answer, Secure)
    assert [key.key for key in answer.keys] == [EC]
    assert "not secure" in answer.notes[0]


async def test_a_gateway_name_that_fails_says_so(tree):
    """No address: absent. Bogus: bogus. Silence: unreachable."""
    reverse(tree).add_rdata("10", ipseckey(ED, name("nowhere.example.")))
    answer = await ask(tree)
    assert isinstance(answer, Absent)
    assert "nowhere.example." in answer.reason
    reverse(tree).records.clear()
    reverse(tree).__post_init__()
    reverse(tree).add_rdata("10", ipseckey(ED, name("gw.example.")))

    def forge(question, reply):
        if question.name == name("gw.example."):
            reply.answer, reply.authority = [], []
        return reply

    tree.lies.append(forge)
    assert isinstance(await ask(tree), Bogus)
    tree.lies[:] = [lambda question, reply: None if question.name == name("gw.example.") else reply]
    assert isinstance(await ask(tree), Unreachable)


async def test_a_name_subject_resolves_its_own_addresses(tree):
    """By FQDN: the key at the name, the gateway its own addresses."""
    tree.zones[name("example.")].add_rdata("gw", ipseckey(ED))
    answer = await ask(tree, "gw.example")
    assert isinstance(answer, Secure)
    assert set(answer.keys[0].gateways) == {ip_address("198.51.100.1"), ip_address("2001:db8::1")}


async def test_bogus_and_unreachable_pass_through(tree):
    """Stripped signatures are bogus, silence is unreachable, both with a reason."""
    reverse(tree).add_rdata("10", ipseckey(ED))

    def strip(question, reply):
        reply.answer = [rrset for rrset in reply.answer if rrset.rdtype != dns.rdatatype.RRSIG]
        return reply

    tree.lies.append(strip)
    bogus = await ask(tree)
    assert isinstance(bogus, Bogus)
    assert bogus.reason
    tree.lies[:] = [lambda question, reply: None]
    silent = await ask(tree)
    assert isinstance(silent, Unreachable)
    assert "silence" in silent.reason


async def test_rfc2317_delegations_work(tree):
    """A CNAME into a classless zone whose name holds a slash: secure, the owner is the final name."""
    reverse(tree).add("10", "CNAME", r"10.0/26.2.0.192.in-addr.arpa.")
    tree.add("0/26.2.0.192.in-addr.arpa.").add_rdata("10", ipseckey(ED))
    answer = await ask(tree)
    assert isinstance(answer, Secure)
    assert answer.keys[0].owner == "10.0/26.2.0.192.in-addr.arpa."


async def test_many_records_and_gateway_names_are_bounded(tree):
    """A peer with hundreds of records costs a few lookups and gets a few keys."""
    for number in range(60):
        reverse(tree).add_rdata("10", ipseckey(ED, name(f"gw{number}.example."), number))
    answer = await ask(tree)
    assert isinstance(answer, Absent)
    assert len(answer.notes) <= peers.MAX_NOTES
    assert answer.questions < 40


async def test_what_is_no_name_is_absent(tree):
    """An impossible subject gets an answer and no exception."""
    for subject in ("", "a..b", "x" * 300, "\udcff"):
        assert isinstance(await ask(tree, subject), Absent | Unreachable)


async def test_elapsed_and_questions_are_told_and_a_cached_answer_costs_none(tree):
    """The second answer comes without any question."""
    reverse(tree).add_rdata("10", ipseckey(ED))
    source = DnsKeySource(tree.validator(), lambda keys: None)
    first, second = await source.peer_keys(PEER), await source.peer_keys(PEER)
    assert (first.questions > 0, second.questions) == (True, 0)
    assert isinstance(second, Secure)
    assert base64.b64encode(second.keys[0].key.data) == base64.b64encode(ED.data)


async def test_a_resolver_that_strips_dnssec_is_named_by_doctor(tree):
    """By the reason (which `explain` shows) and by another mend than for a broken zone."""
    reverse(tree).add_rdata("10", ipseckey(ED))

    def strip(question, reply):
        for section in (reply.answer, reply.authority):
            section[:] = [rrset for rrset in section if rrset.rdtype != dns.rdatatype.RRSIG]
        return reply

    def forge(question, reply):
        return strip(question, reply) if question.type == 45 else reply

    for lie, stripped in ((strip, True), (forge, False)):
        tree.lies = [lie]
        answer = await ask(tree)
        finding = judge_resolver("192.0.2.53", answer)
        assert isinstance(answer, Bogus)
        assert (finding.verdict, answer.stripped) == ("bad", stripped)
        assert ("the resolver strips DNSSEC" in finding.text) is stripped
        assert ("name a resolver" in finding.mend) is stripped
    tree.lies = []
    assert judge_resolver("192.0.2.53", await ask(tree)).verdict == "good"
