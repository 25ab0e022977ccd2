"""Aggressive use of NSEC (RFC 8198): saves questions, and never says anything else than the zone itself."""

from __future__ import annotations

import asyncio

import dns.name
import dns.rdata
import dns.rdatatype
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oepy.dns import ranges
from oepy.dns.anchors import TrustAnchors
from oepy.dns.ranges import Ranges
from oepy.dns.validator import Validator
from oepy.model import Security
from tests.fakes.signed_tree import NOW, SignedTree, name, standard_tree

A, TXT = int(dns.rdatatype.A), int(dns.rdatatype.TXT)


def nsec(follower: str):
    return dns.rdata.from_text("IN", "NSEC", f"{follower} A RRSIG NSEC", origin=dns.name.root)


async def test_a_second_name_in_the_same_range_needs_no_question():
    """As when addresses of a network without published keys are met one after the other."""
    tree = SignedTree()
    zone = tree.add("2.0.192.in-addr.arpa.")
    zone.add("10", "TXT", '"key"')
    validator = tree.validator()
    first = await validator.lookup(zone.owner("200"), TXT)
    asked = len(tree.asked)
    for number in (201, 250, 99):
        outcome = await validator.lookup(zone.owner(str(number)), TXT)
        assert (outcome.status, outcome.rcode, outcome.questions) == (Security.SECURE, "NXDOMAIN", 0)
        assert [entry.zone for entry in outcome.chain] == [entry.zone for entry in first.chain]
        assert 0 < outcome.ttl <= 120
    assert len(tree.asked) == asked
    assert (await validator.lookup(zone.owner("10"), TXT)).rdatas


async def test_neither_the_time_nor_a_forgotten_name_is_outlived():
    """After the TTL, and after `forget` (a peer says that it has published a key), the zone is asked again."""
    now = [1000.0]
    tree = standard_tree()
    validator = tree.validator(monotonic=lambda: now[0])
    await validator.lookup(name("nothing.example."), A)
    assert (await validator.lookup(name("nowhere.example."), A)).questions == 0
    validator.forget(name("nowhere.example."), [A])
    tree.zones[name("example.")].add("nowhere", "A", "192.0.2.44")
    assert (await validator.lookup(name("nowhere.example."), A)).rdatas
    tree.zones[name("example.")].add("nothing2", "A", "192.0.2.45")
    now[0] += 130
    assert (await validator.lookup(name("nothing2.example."), A)).rdatas


async def test_a_range_from_above_a_cut_is_silent_about_what_is_below():
    """The NSEC of an unsigned delegation covers its names in order, but belongs to the zone above."""
    tree = standard_tree()
    validator = tree.validator()
    ds = await validator.lookup(name("unsigned.example."), int(dns.rdatatype.DS))
    assert (ds.status, ds.rdatas) == (Security.SECURE, ())
    outcome = await validator.lookup(name("www.unsigned.example."), A)
    assert (outcome.status, len(outcome.rdatas)) == (Security.INSECURE, 1)


async def test_a_range_from_above_an_anchor_says_nothing_below_it():
    """An island that the public tree does not know, as in a network with names of its own."""
    tree = standard_tree()
    hidden = tree.add("hidden.example.")
    hidden.add("www", "A", "192.0.2.50")
    tree.delegate()
    example = tree.zones[name("example.")]
    for kind in (dns.rdatatype.NS, dns.rdatatype.DS):
        example.records.pop((hidden.origin, int(kind)))
    roots = tree.zones[dns.name.root].make_ds()
    anchors = TrustAnchors.of({dns.name.root: roots, hidden.origin: hidden.make_ds()})
    validator = Validator(tree, anchors, lambda: NOW, lambda: 1000.0)
    assert (await validator.lookup(name("hiddem.example."), A)).rcode == "NXDOMAIN"
    assert (await validator.lookup(name("hidden2.example."), A)).questions == 0
    outcome = await validator.lookup(name("www.hidden.example."), A)
    assert (outcome.status, len(outcome.rdatas)) == (Security.SECURE, 1)


def test_the_store_is_bounded(monkeypatch):
    """By zones and by records in one zone."""
    monkeypatch.setattr(ranges, "MAX_ZONES", 3)
    monkeypatch.setattr(ranges, "MAX_IN_ZONE", 4)
    held = Ranges()
    for zone in range(10):
        origin = name(f"z{zone}.")
        for number in range(10):
            held.put(origin, name(f"n{number}.z{zone}."), nsec(f"n{number + 1}.z{zone}."), 60, 0.0)
    assert len(held) <= 12
    assert held.around(name("z9."), name("n9.z9."), 1.0)[0]
    assert not held.around(name("z0."), name("n9.z0."), 1.0)[0]
    assert held.around(name("z9."), name("n9.z9."), 61.0) == ([], 0.0)


async def test_hashed_ranges_save_questions_too():
    """RFC 8198 §5.2: names of a zone with NSEC3 whose hashes fall into ranges that are known."""
    tree = SignedTree()
    zone = tree.add("2.0.192.in-addr.arpa.", nsec3=(0, b"", False))
    zone.add("10", "TXT", '"key"')
    validator = tree.validator()
    for number in (1, 2, 3, 4, 5, 6, 7, 8):
        await validator.lookup(zone.owner(str(number)), TXT)
    asked = len(tree.asked)
    for number in (20, 99, 201, 250):
        outcome = await validator.lookup(zone.owner(str(number)), TXT)
        assert (outcome.status, outcome.rcode, outcome.questions) == (Security.SECURE, "NXDOMAIN", 0)
    outcome = await validator.lookup(zone.owner("10"), A)  # its own record is the other end of some range
    assert (outcome.status, outcome.rcode, outcome.questions) == (Security.SECURE, "NOERROR", 0)
    assert len(tree.asked) == asked
    assert (await validator.lookup(zone.owner("10"), TXT)).rdatas
    validator.forget(zone.owner("99"), [TXT])
    assert (await validator.lookup(zone.owner("99"), TXT)).questions


@pytest.mark.parametrize("nsec3", [(0, b"", True), (11, b"", False)])
async def test_opt_out_and_costly_hashes_are_not_used(nsec3):
    """RFC 8198 §5.2: an opt-out range proves no absence; and a hash of many iterations costs what it saves."""
    tree = SignedTree()
    zone = tree.add("example.", nsec3=nsec3)
    validator = tree.validator()
    for number in range(6):
        outcome = await validator.lookup(zone.owner(f"n{number}"), TXT)
        assert outcome.questions
    assert len(validator._shared.ranges) == 0 or nsec3[2] is False


async def test_a_zone_that_changes_its_kind_of_denial_is_followed():
    """From NSEC to NSEC3, to another salt, and back."""
    tree = SignedTree()
    zone = tree.add("example.")
    validator = tree.validator()
    for turn, nsec3 in enumerate((None, (0, b"", False), (1, b"\xaa", False), None)):
        zone.nsec3 = nsec3
        validator._shared.ranges.clear() if turn == 1 else None
        validator._answers.clear()
        for depth in ("a", "b", "c"):
            outcome = await validator.lookup(zone.owner(f"{depth}{turn}.x{turn}"), A)
            assert (outcome.status, outcome.rcode) == (Security.SECURE, "NXDOMAIN")
        validator._shared.ranges.forget(zone.owner("x"))


_LABEL = st.sampled_from(["a", "b", "c", "B", "*"])
_OWNER = st.lists(_LABEL, min_size=1, max_size=3).map(".".join)
_KIND = st.sampled_from(["A", "TXT", "NS", "DNAME", "CNAME"])
_DATA = {"A": "192.0.2.1", "TXT": '"x"', "NS": "ns.invalid.", "DNAME": "www.other.", "CNAME": "www.other."}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([None, (0, b"", False), (1, b"\xab", True)]),
    st.dictionaries(_OWNER, _KIND, max_size=6),
    st.lists(st.tuples(_OWNER, st.sampled_from([A, TXT])), max_size=12),
)
def test_a_warm_validator_says_what_a_cold_one_says(nsec3, records, questions):
    """Whatever was asked before, and however the zone denies."""
    tree = SignedTree()
    tree.add("other.").add("www", "A", "192.0.2.2")
    zone = tree.add("example.", nsec3=nsec3)
    for owner, kind in records.items():
        if kind == "NS" and "*" not in owner:
            tree.add(f"{owner}.example.", signed=False)
        elif kind != "NS" and not any(
            z.is_subdomain(zone.origin) and zone.owner(owner).is_subdomain(z)
            for z in tree.zones
            if z not in (zone.origin, dns.name.root)
        ):
            zone.add(owner, kind, _DATA[kind])
    warm: Validator = tree.validator()

    async def look(validator, owner, rdtype):
        outcome = await validator.lookup(zone.owner(owner), rdtype)
        return outcome.status, outcome.rcode, outcome.rdatas

    async def run():
        for owner, rdtype in questions:
            cold = Validator(tree, tree.anchors(), lambda: NOW, lambda: 1000.0)
            assert await look(warm, owner, rdtype) == await look(cold, owner, rdtype)

    asyncio.run(run())
