"""The validator against a resolver in memory that answers truly, or lies."""

from __future__ import annotations

import asyncio

import dns.name
import dns.rdatatype
import pytest

from oepy.dns import limits
from oepy.dns.anchors import TrustAnchors
from oepy.dns.chain import Chain, Verdict, ZoneState
from oepy.dns.limits import Budget, LimitExceeded
from oepy.dns.message import RRset, Signature
from oepy.dns.signatures import STRICT, WITH_SHA1, ZoneKey, usable_keys, verify
from oepy.dns.validator import Outcome, Validator
from oepy.model import Security
from tests.fakes.signed_tree import NOW, SignedTree, Zone, make_ds, make_private, name, standard_tree

A = int(dns.rdatatype.A)
PARENTS = ["example.", "three."]


async def look(tree: SignedTree, owner: str, kind: str = "A", **options: float) -> Outcome:
    return await tree.validator(**options).lookup(name(owner), int(dns.rdatatype.from_text(kind)))


@pytest.mark.parametrize("parent", [*PARENTS, "opt."])
async def test_a_signed_answer_is_secure_and_shows_its_chain(parent):
    """Root, zone, data: secure, with every zone of the chain in order."""
    outcome = await look(standard_tree(), f"www.child.{parent}")
    assert (outcome.status, outcome.reason, outcome.rcode) == (Security.SECURE, "", "NOERROR")
    assert [str(rdata) for rdata in outcome.rdatas] == ["192.0.2.10"]
    assert [entry.zone for entry in outcome.chain] == [".", parent, f"child.{parent}"]
    assert all(entry.status == "secure" and entry.key_tags for entry in outcome.chain)


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize(
    ("owner", "kind", "rcode"),
    [
        ("nothing", "A", "NXDOMAIN"),
        ("a.b.c.nothing", "A", "NXDOMAIN"),
        ("www", "AAAA", "NOERROR"),
        ("empty", "A", "NOERROR"),
        ("gone", "A", "NXDOMAIN"),
        ("new.wild", "AAAA", "NOERROR"),
        ("www", "DS", "NOERROR"),
        ("x.wild", "A", "NOERROR"),
    ],
)
async def test_absence_is_proven_with_nsec_and_nsec3(parent, owner, kind, rcode):
    """NXDOMAIN, NODATA, empty non-terminals and wildcard NODATA are secure absences."""
    outcome = await look(standard_tree(), f"{owner}.{parent}", kind)
    assert (outcome.status, outcome.reason, outcome.rdatas) == (Security.SECURE, "", ())
    assert outcome.rcode == rcode
    assert outcome.ttl == 120


@pytest.mark.parametrize("parent", PARENTS)
async def test_wildcard_answers_are_secure_with_their_proof(parent):
    """A wildcard answer with the next-closer proof is secure."""
    outcome = await look(standard_tree(), f"new.wild.{parent}")
    assert (outcome.status, outcome.reason) == (Security.SECURE, "")
    assert len(outcome.rdatas) == 1


@pytest.mark.parametrize("parent", [*PARENTS, "opt."])
async def test_a_wildcard_answer_without_proof_is_bogus(parent):
    """The denial stripped from a wildcard answer leaves it bogus: the closer name might exist."""
    tree = standard_tree()
    tree.lies.append(lambda question, reply: _without_denial(reply))
    outcome = await look(tree, f"new.wild.{parent}")
    assert outcome.status is Security.BOGUS
    assert "wildcard" in outcome.reason or "*" in outcome.reason
    assert outcome.rdatas == ()


@pytest.mark.parametrize("parent", [*PARENTS, "opt."])
async def test_below_an_unsigned_delegation_answers_are_insecure(parent):
    """Insecure with the reason that names the delegation, for data and for absence."""
    tree = standard_tree()
    for owner in (f"www.unsigned.{parent}", f"nothing.unsigned.{parent}"):
        outcome = await look(tree, owner)
        assert outcome.status is Security.INSECURE, outcome.reason
        assert f"unsigned.{parent}" in outcome.reason
        assert outcome.chain[-1].status == "insecure"


async def test_opt_out_is_never_secure():
    """An absence that rests on an opt-out range is insecure."""
    outcome = await look(standard_tree(), "nothing.opt.")
    assert outcome.status is Security.INSECURE
    assert "opt-out" in outcome.reason


@pytest.mark.parametrize(
    ("owner", "status", "canonical"),
    [
        ("alias.example.", Security.SECURE, "www.example."),
        ("www.dn.example.", Security.SECURE, "www.child.example."),
        ("to-unsigned.example.", Security.INSECURE, "www.unsigned.example."),
        ("to-signed.unsigned.example.", Security.INSECURE, "www.example."),
    ],
)
async def test_an_alias_is_as_secure_as_its_weakest_link(owner, status, canonical):
    """CNAME and DNAME are followed; one insecure link makes the whole insecure."""
    outcome = await look(standard_tree(), owner)
    assert (outcome.status, str(outcome.canonical_name)) == (status, canonical)
    assert len(outcome.rdatas) == 1


async def test_a_cname_that_does_not_follow_from_its_dname_is_bogus():
    """The unsigned CNAME beside a DNAME is derived again and must match."""
    tree = standard_tree()

    def lie(question, reply):
        for rrset in reply.answer:
            if rrset.rdtype == dns.rdatatype.CNAME:
                replace_rdata(rrset, "www.example.")
        return reply

    tree.lies.append(lie)
    outcome = await look(tree, "www.dn.example.")
    assert outcome.status is Security.BOGUS
    assert "DNAME" in outcome.reason


async def test_alias_loops_and_long_chains_end_bogus():
    """A loop and a chain of more links than allowed are refused, within bounds."""
    tree = standard_tree()
    zone = tree.zones[name("example.")]
    zone.add("loop", "CNAME", "loop2.example.")
    zone.add("loop2", "CNAME", "loop.example.")
    for number in range(15):
        zone.add(f"c{number}", "CNAME", f"c{number + 1}.example.")
    zone.add("c15", "A", "192.0.2.4")
    assert "back to itself" in (await look(tree, "loop.example.")).reason
    outcome = await look(tree, "c0.example.")
    assert (outcome.status, "links" in outcome.reason) == (Security.BOGUS, True)


# ---- lies ------------------------------------------------------------------------------------------------


def _without_denial(reply):
    denial = (dns.rdatatype.NSEC, dns.rdatatype.NSEC3)
    reply.authority = [r for r in reply.authority if r.rdtype not in denial and r.covers not in denial]
    return reply


def replace_rdata(rrset, text):
    rrset.clear()
    rrset.add(dns.rdata.from_text("IN", rrset.rdtype, text), rrset.ttl or 300)


def without_signatures(reply):
    for section in (reply.answer, reply.authority):
        section[:] = [rrset for rrset in section if rrset.rdtype != dns.rdatatype.RRSIG]
    return reply


def only(owner, lie, kind="A"):
    """The lie for one owner name and type, the truth for the others."""
    wanted = (name(owner), dns.rdatatype.from_text(kind))
    return lambda question, reply: lie(reply) if (question.name, question.type) == wanted else reply


def _forge(reply):
    for rrset in reply.answer:
        if rrset.rdtype == A:
            replace_rdata(rrset, "203.0.113.66")
    return reply


def _empty(reply):
    reply.answer, reply.authority = [], []
    return reply


def _nxdomain(reply):
    reply.answer, reply.authority = [], []
    reply.set_rcode(dns.rcode.NXDOMAIN)
    return reply


def _other_owner(reply):
    for rrset in reply.answer:
        rrset.name = name("other.example.")
    return reply


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (_forge, "does not fit"),
        (without_signatures, "came without signatures"),
        (_empty, "came without signatures"),
        (_nxdomain, "came without signatures"),
        (_other_owner, "came without signatures"),
    ],
)
@pytest.mark.parametrize("parent", PARENTS)
async def test_lies_about_a_signed_name_are_bogus_and_hand_out_nothing(lie, reason, parent):
    """Changed data, stripped signatures, empty replies, false NXDOMAIN: bogus, with no data."""
    tree = standard_tree()
    tree.lies.append(only(f"www.child.{parent}", lie))
    outcome = await look(tree, f"www.child.{parent}")
    assert (outcome.status, outcome.rdatas) == (Security.BOGUS, ())
    assert reason in outcome.reason


@pytest.mark.parametrize("parent", [*PARENTS, "opt."])
async def test_a_stripped_ds_does_not_make_a_signed_zone_insecure(parent):
    """Neither an empty DS reply nor one without signatures is a proof of an unsigned delegation."""
    for lie in (_empty, without_signatures, _without_denial):
        tree = standard_tree()
        tree.lies.append(only(f"child.{parent}", lie, "DS"))
        tree.lies.append(only(f"www.child.{parent}", without_signatures))
        outcome = await look(tree, f"www.child.{parent}")
        if lie is _without_denial:  # the DS itself is untouched by this one
            assert "came without signatures" in outcome.reason
        assert outcome.status is Security.BOGUS, outcome.reason


async def test_a_denial_from_another_place_proves_nothing():
    """A signed NSEC that neither matches nor covers the name, moved into the reply, is no proof."""
    tree = standard_tree()
    zone = tree.zones[name("example.")]

    def lie(reply):
        _nxdomain(reply)
        tree._put(reply.authority, zone, zone.rrset(zone.origin, int(dns.rdatatype.SOA)))
        reply.authority += zone.denial(name("zzz.example."))
        return reply

    tree.lies.append(only("alias.example.", lie))
    outcome = await look(tree, "alias.example.")
    assert outcome.status is Security.BOGUS
    assert "does not prove" in outcome.reason


async def test_the_parents_nsec_at_a_cut_proves_nothing_about_the_child():
    """RFC 6840 §4.1: the delegation's own NSEC covers names below it in canonical order, but not in truth."""
    for parent in ("example.", "three."):
        tree = standard_tree()
        zone = tree.zones[name(parent)]

        def lie(reply, tree=tree, zone=zone, parent=parent):
            _nxdomain(reply)
            tree._put(reply.authority, zone, zone.rrset(zone.origin, int(dns.rdatatype.SOA)))
            names = (f"child.{parent}", f"www.child.{parent}", f"*.child.{parent}", parent)
            reply.authority += zone.denial(*map(name, names))
            return reply

        tree.lies.append(only(f"www.child.{parent}", lie))
        outcome = await look(tree, f"www.child.{parent}")
        assert outcome.status is Security.BOGUS, outcome.reason


async def test_the_childs_denial_of_its_own_ds_is_no_proof():
    """An apex NSEC of the child says nothing about the DS, which is the parent's (RFC 4035 §5.2)."""
    tree = standard_tree()
    child = tree.zones[name("child.example.")]

    def lie(question, reply):
        if question.name == child.origin and question.type == dns.rdatatype.DS:
            _empty(reply)
            tree._put(reply.authority, child, child.rrset(child.origin, int(dns.rdatatype.SOA)))
            reply.authority += child.denial(child.origin)
        return reply

    tree.lies.append(lie)
    assert (await look(tree, "www.child.example.")).status is Security.BOGUS
    assert (await look(tree, "child.example.", "DS")).status is Security.BOGUS


async def test_signatures_by_a_stranger_are_bogus():
    """A zone elsewhere in the tree, properly signed itself, cannot sign for this name."""
    tree = standard_tree()
    stranger = tree.zones[name("three.")]

    def lie(reply):
        reply.answer = [reply.answer[0]]
        signature = stranger.sign(reply.answer[0])
        reply.answer.append(signature)
        return reply

    tree.lies.append(only("www.example.", lie))
    assert (await look(tree, "www.example.")).status is Security.BOGUS


@pytest.mark.parametrize(
    ("now", "reason"),
    [(1_800_000_000 + 86401, "expired"), (1_800_000_000 - 3600 - 301, "is not valid before")],
)
async def test_time_outside_of_the_signatures_is_bogus_and_says_when(now, reason):
    """Expired by a second, or begun later than the allowed clock lag: bogus."""
    outcome = await look(standard_tree(), "www.example.", now=now)
    assert outcome.status is Security.BOGUS
    assert reason in outcome.reason


async def test_a_clock_that_lags_five_minutes_is_forgiven():
    """The stated skew policy: an inception up to 300 s ahead is accepted."""
    outcome = await look(standard_tree(), "www.example.", now=1_800_000_000 - 3600 - 299)
    assert outcome.status is Security.SECURE


async def test_ttl_is_capped_by_the_signature():
    """Neither a raised TTL in the reply nor a signature near its end may be outlived."""
    tree = standard_tree()

    def lie(question, reply):
        for rrset in reply.answer:
            rrset.ttl = 100000
        return reply

    tree.lies.append(lie)
    assert (await look(tree, "www.example.")).ttl == 300
    assert (await look(tree, "www.example.", now=1_800_000_000 + 86400 - 10)).ttl == 10


async def test_silence_and_servfail_prove_nothing():
    """No reply or SERVFAIL: indeterminate and unreachable, never insecure."""
    tree = standard_tree()
    tree.lies.append(only("www.example.", lambda reply: None))
    silent = await look(tree, "www.example.")
    assert (silent.status, silent.unreachable) == (Security.INDETERMINATE, True)
    tree.lies[:] = [only("www.example.", lambda reply: (reply.set_rcode(2), reply)[1])]
    failing = await look(tree, "www.example.")
    assert (failing.status, failing.unreachable) == (Security.INDETERMINATE, True)
    assert "SERVFAIL" in failing.reason


async def test_the_root_key_must_be_the_trusted_one():
    """With another root's anchor everything is bogus, and the reason names the anchor."""
    tree, other = standard_tree(), SignedTree()
    tree.anchors = other.anchors
    outcome = await look(tree, "www.example.")
    assert outcome.status is Security.BOGUS
    assert "trust anchor" in outcome.reason


async def test_a_resolver_without_dnssec_is_named_as_the_cause():
    """All signatures missing from the root on: bogus, with a hint that the resolver is to blame."""
    tree = standard_tree()
    tree.lies.append(lambda question, reply: without_signatures(reply))
    outcome = await look(tree, "www.example.")
    assert outcome.status is Security.BOGUS
    assert "resolver" in outcome.reason


async def test_a_resolver_that_strips_later_is_named_too():
    """The keys above are in the cache already; the resolver is asked for one signature that must be there."""
    tree = standard_tree()
    validator = tree.validator()
    assert (await validator.lookup(name("www.example."), A)).status is Security.SECURE
    tree.lies.append(lambda question, reply: without_signatures(reply))
    outcome = await validator.lookup(name("deep.empty.example."), A)
    assert (outcome.status, outcome.stripped) == (Security.BOGUS, True)
    assert outcome.reason.startswith("the resolver strips DNSSEC")


async def test_a_zone_that_lost_its_signatures_is_not_the_resolvers_fault():
    """The anchor's own signature is there, so the zone or somebody on the way is to blame."""
    tree = standard_tree()
    tree.lies.append(only("www.example.", without_signatures))
    outcome = await look(tree, "www.example.")
    assert (outcome.status, outcome.stripped) == (Security.BOGUS, False)


# ---- anchors in the middle --------------------------------------------------------------------------------


def _validator_with(tree, negative=(), positive=None):
    tree.delegate()
    records = {dns.name.root: tree.zones[dns.name.root].make_ds()} | (positive or {})
    anchors = TrustAnchors.of(records)
    anchors.add_negative(map(name, negative))
    return Validator(tree, anchors, lambda: NOW, lambda: 1000.0)


@pytest.mark.parametrize("warm", [False, True])
async def test_below_a_negative_trust_anchor_nothing_is_checked(warm):
    """RFC 7646: a broken zone is insecure by configuration, its neighbours are checked as ever."""
    tree = standard_tree()
    tree.lies.append(only("www.example.", without_signatures))
    tree.lies.append(only("www.child.example.", without_signatures))
    validator = _validator_with(tree, ["example."])
    if warm:
        assert (await validator.lookup(name("www.three."), A)).status is Security.SECURE
    for owner in ("www.example.", "www.child.example.", "nothing.example.", "deep.empty.example."):
        outcome = await validator.lookup(name(owner), A)
        assert outcome.status is Security.INSECURE, owner
        assert "negative trust anchor" in outcome.reason
    assert (await validator.lookup(name("example."), int(dns.rdatatype.DS))).status is Security.SECURE
    assert (await validator.lookup(name("www.three."), A)).status is Security.SECURE


async def test_an_anchor_below_a_negative_one_is_checked_again():
    """The nearest anchor decides."""
    tree = standard_tree()
    child = tree.zones[name("child.example.")]
    validator = _validator_with(tree, ["example."], {child.origin: child.make_ds()})
    assert (await validator.lookup(name("www.child.example."), A)).status is Security.SECURE
    assert (await validator.lookup(name("www.example."), A)).status is Security.INSECURE
    tree.lies.append(only("www.child.example.", without_signatures))
    again = _validator_with(tree, ["example."], {child.origin: child.make_ds()})
    assert (await again.lookup(name("www.child.example."), A)).status is Security.BOGUS


@pytest.mark.parametrize("warm", [False, True])
async def test_an_island_with_an_anchor_is_not_excused_by_the_zone_above(warm):
    """Its delegation is provably unsigned, but its own anchor says that signatures must be there."""
    tree = standard_tree()
    island = tree.add("island.unsigned.example.")
    island.add("www", "A", "192.0.2.30")
    tree.lies.append(only("www.island.unsigned.example.", without_signatures))
    validator = _validator_with(tree, (), {island.origin: island.make_ds()})
    if warm:
        assert (await validator.lookup(name("www.unsigned.example."), A)).status is Security.INSECURE
    outcome = await validator.lookup(name("www.island.unsigned.example."), A)
    assert outcome.status is Security.BOGUS


@pytest.mark.parametrize(("wrong", "expected"), [(2, Security.SECURE), (4, Security.BOGUS)])
async def test_the_strongest_digest_of_a_key_counts(wrong, expected):
    """A DS with SHA-256 must not stand in for a SHA-384 one of the same key that does not fit."""
    tree = standard_tree()
    child = tree.zones[name("child.example.")]
    child.ds = [
        ds.replace(digest=bytes(len(ds.digest))) if digest == wrong else ds
        for digest in (2, 4)
        for ds in [make_ds(child.origin, child.dnskey, digest)]
    ]
    assert (await look(tree, "www.child.example.")).status is expected


async def test_the_ad_bit_is_never_believed():
    """AD on a forged reply changes nothing."""
    tree = standard_tree()

    def lie(question, reply):
        reply.flags |= dns.flags.AD
        return without_signatures(reply)

    tree.lies.append(only("www.example.", lambda reply: lie(None, reply)))
    assert (await look(tree, "www.example.")).status is Security.BOGUS


# ---- algorithms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "digests",
    [
        ["4242 5 2 " + "AA" * 32],  # RSASHA1
        ["4242 250 2 " + "AA" * 32],  # a private algorithm
        ["4242 15 1 " + "AA" * 20],  # a SHA-1 digest
        ["4242 15 3 " + "AA" * 32],  # a GOST digest
    ],
)
async def test_a_zone_with_only_unknown_algorithms_is_insecure(digests):
    """RFC 6840 §5.2 and RFC 9905: nothing that we verify in the DS set makes the zone insecure."""
    tree = standard_tree()
    tree.zones[name("child.example.")].ds = [dns.rdata.from_text("IN", "DS", text) for text in digests]
    outcome = await look(tree, "www.child.example.")
    assert outcome.status is Security.INSECURE
    assert "not supported" in outcome.reason or "only SHA-1" in outcome.reason


async def test_one_good_path_is_enough_and_a_wrong_ds_is_bogus():
    """An unknown DS beside the right one does no harm; only wrong supported ones are bogus."""
    tree = standard_tree()
    child = tree.zones[name("child.example.")]
    unknown = dns.rdata.from_text("IN", "DS", "4242 250 2 " + "AA" * 32)
    child.ds = [unknown, *child.make_ds()]
    assert (await look(tree, "www.child.example.")).status is Security.SECURE
    child.ds = [dns.rdata.from_text("IN", "DS", f"{child.dnskey.key_id()} 15 2 " + "AA" * 32)]
    outcome = await look(tree, "www.child.example.")
    assert outcome.status is Security.BOGUS
    assert "fits the DS" in outcome.reason
    assert (outcome.chain[-1].zone, outcome.chain[-1].status) == ("child.example.", "bogus")


async def test_ecdsa_zones_verify():
    """P-256, the commonest algorithm, goes through the same path."""
    tree = SignedTree()
    tree.add("example.", algorithm=13).add("www", "A", "192.0.2.1")
    assert (await look(tree, "www.example.")).status is Security.SECURE


# ---- limits ----------------------------------------------------------------------------------------------


async def test_keytrap_fails_closed_within_the_budget():
    """Many colliding keys and many signatures that do not verify: bogus after a bounded number of checks."""
    tree = standard_tree()

    def lie(reply):
        _data, signatures = reply.answer
        good = signatures[0]
        signatures.clear()
        for number in range(40):
            signatures.add(good.replace(signature=bytes([number]) * 64), 300)
        return reply

    tree.lies.append(only("www.example.", lie))
    outcome = await look(tree, "www.example.")
    assert outcome.status is Security.BOGUS
    assert "more than" in outcome.reason or "does not fit" in outcome.reason


def test_colliding_keys_and_signatures_are_tried_a_bounded_number_of_times():
    """KeyTrap (CVE-2023-50387): 30 keys of one tag times 16 signatures stop after a few failures."""
    zone = Zone(name("example."))
    zone.add("www", "A", "192.0.2.1")
    truth = zone.rrset(name("www.example."), A)
    good = zone.sign(truth)[0]
    tag = good.key_tag
    keys = [
        ZoneKey(k.dnskey, tag, k.public)
        for _ in range(30)
        for k in usable_keys([Zone(name("x.")).dnskey], STRICT)
    ]
    signatures = tuple(Signature.of(good.replace(signature=bytes([n]) * 64)) for n in range(16))
    rrset = RRset(truth.name, A, 300, tuple(truth), signatures)
    budget = Budget()
    with pytest.raises(LimitExceeded):
        verify(rrset, name("example."), keys, NOW, budget)
    assert limits.MAX_SIGNATURE_CHECKS - budget.signatures <= limits.MAX_FAILED_CHECKS + 1


@pytest.mark.parametrize(("flags", "protocol"), [(1, 3), (257 | 128, 3), (257, 2)])
def test_keys_that_may_not_sign_data_are_not_used(flags, protocol):
    """Without the ZONE flag, revoked, or of another protocol: no key of the zone."""
    key = Zone(name("example.")).dnskey
    assert usable_keys([key], STRICT)
    assert usable_keys([key.replace(flags=flags, protocol=protocol)], STRICT) == ()


def test_a_dnskey_with_a_giant_exponent_is_not_used():
    """Verifying with it would cost as much as signing."""
    exponent = b"\x00\x01\x00" + b"\xff" * 256
    key = Zone(name("example.")).dnskey.replace(algorithm=8, key=exponent + b"\xff" * 256)
    assert usable_keys([key], STRICT) == ()


async def test_an_empty_budget_of_another_lookup_is_not_contagious():
    """Lookups that share a zone in the making do not inherit each other's exhaustion."""
    tree = standard_tree()
    tree.delay = 0.01
    validator = tree.validator()
    poor = Chain(validator._shared, Budget(signatures=0))
    rich = Chain(validator._shared, Budget())
    results = await asyncio.gather(
        poor.zone(name("example.")), rich.zone(name("example.")), return_exceptions=True
    )
    assert isinstance(results[0], Verdict)
    assert isinstance(results[1], ZoneState)
    assert results[1].is_secure


async def test_nsec3_iterations_over_the_cap_are_insecure():
    """RFC 9276: a zone with many iterations cannot prove absence, and no hash is computed for it."""
    tree = standard_tree()
    tree.add("heavy.", nsec3=(2000, b"\x01" * 8, False)).add("www", "A", "192.0.2.1")
    outcome = await look(tree, "nothing.heavy.")
    assert outcome.status is Security.INSECURE
    assert "iterations" in outcome.reason
    assert (await look(tree, "www.heavy.")).status is Security.SECURE


async def test_a_deep_unsigned_name_asks_a_bounded_number_of_questions():
    """A name of 100 labels without signatures ends bogus, below the question limit."""
    tree = standard_tree()
    deep = ".".join(["a"] * 100) + ".example."
    tree.lies.append(only(deep, without_signatures))
    outcome = await look(tree, deep)
    assert outcome.status is Security.BOGUS
    assert len(tree.asked) <= 100


# ---- caches and sharing ----------------------------------------------------------------------------------


async def test_a_second_lookup_needs_one_question_and_a_third_none():
    """The chain is cached by zone, the answer by name and type."""
    tree = standard_tree()
    tree.zones[name("child.example.")].add("www2", "A", "192.0.2.11")
    validator = tree.validator()
    await validator.lookup(name("www.child.example."), A)
    before = len(tree.asked)
    second = await validator.lookup(name("www2.child.example."), A)
    assert (second.status, second.questions, len(tree.asked) - before) == (Security.SECURE, 1, 1)
    third = await validator.lookup(name("www2.child.example."), A)
    assert (third.questions, len(tree.asked) - before) == (0, 1)


async def test_an_answer_is_asked_again_when_its_ttl_is_over():
    """The cache keeps an answer for its TTL and not longer; the TTL shown shrinks with time."""
    tree, clock = standard_tree(), [1000.0]
    validator = tree.validator(monotonic=lambda: clock[0])
    assert (await validator.lookup(name("www.example."), A)).ttl == 300
    clock[0] += 299
    again = await validator.lookup(name("www.example."), A)
    assert (again.ttl, again.questions) == (1, 0)
    clock[0] += 1
    assert (await validator.lookup(name("www.example."), A)).questions > 0


async def test_a_hundred_lookups_at_once_share_their_questions():
    """In-flight questions are asked once, whoever needs them."""
    tree = standard_tree()
    tree.delay = 0.01
    validator = tree.validator()
    outcomes = await asyncio.gather(*(validator.lookup(name("www.child.example."), A) for _ in range(100)))
    assert {outcome.status for outcome in outcomes} == {Security.SECURE}
    assert len(tree.asked) == len(set(tree.asked)) <= 8


async def test_a_cold_lookup_takes_two_round_trips():
    """The chain's questions go out together: root, TLD, zone and data in at most two waits."""
    tree = standard_tree()
    tree.delay = 0.05
    validator = tree.validator()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    outcome = await validator.lookup(name("www.child.example."), A)
    assert outcome.status is Security.SECURE
    assert loop.time() - begun < 2.8 * tree.delay


async def test_a_bogus_answer_is_not_cached():
    """When the lie ends, the next lookup is secure."""
    tree = standard_tree()
    validator = tree.validator()
    tree.lies.append(only("www.example.", _forge))
    assert (await validator.lookup(name("www.example."), A)).status is Security.BOGUS
    tree.lies.clear()
    assert (await validator.lookup(name("www.example."), A)).status is Security.SECURE


@pytest.mark.parametrize(("algorithm", "digests"), [(5, (2,)), (7, (2,)), (15, (1,))])
async def test_sha1_protects_by_policy_only(algorithm, digests):
    """RFC 9905: insecure, and the reason names the switch; with `dns.sha1` secure, and changed data bogus."""
    tree = SignedTree()
    tree.add("old.", algorithm=algorithm, digests=digests).add("www", "A", "192.0.2.1")
    tree.delegate()
    strict = await tree.validator().lookup(name("www.old."), A)
    assert strict.status is Security.INSECURE
    assert "dns.sha1" in strict.reason
    lax = Validator(tree, tree.anchors(), lambda: NOW, lambda: 1000.0, WITH_SHA1)
    assert (await lax.lookup(name("www.old."), A)).status is Security.SECURE
    lax.flush()
    tree.zones[name("old.")].private = make_private(algorithm)
    assert (await lax.lookup(name("www.old."), A)).status is Security.BOGUS
