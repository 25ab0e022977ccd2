"""Denial of existence as a property: given all records of a zone's chain, exactly the truth is provable."""

from __future__ import annotations

import dns.name
import dns.rdatatype
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oepy.dns.denial import Cut, Denial, Proof
from oepy.dns.limits import Budget
from tests.fakes.signed_tree import Zone, name

A, TXT, DS = (int(dns.rdatatype.from_text(kind)) for kind in ("A", "TXT", "DS"))
labels = st.sampled_from(["a", "b", "*", "ab", "z", "0"])
# An asterisk only leftmost: names below one are legal (RFC 4592 §2.1.3), but no host has one.
owners = st.lists(labels, min_size=1, max_size=4).filter(lambda found: "*" not in found[1:]).map(".".join)


def build(nsec3, hosts, cuts) -> Zone:
    zone = Zone(name("example."), nsec3=nsec3)
    for cut in cuts:
        zone.add(cut, "NS", "ns.invalid.")
    for host in hosts:
        if not any(zone.owner(host).is_subdomain(zone.owner(cut)) for cut in cuts):
            zone.add(host, "A", "192.0.2.1")
    return zone


def everything(zone: Zone) -> Denial:
    make = zone._nsec3_for if zone.nsec3 else zone._nsec_for
    known = zone.nsec3_names() if zone.nsec3 else zone.names()
    found = {rrset.name: rrset[0] for rrset in map(make, known)}
    return _denial(zone, list(found.items()))


def _denial(zone, records) -> Denial:
    denial = Denial(zone.origin, [], Budget(hashes=10000))
    # Past the bound on records in one reply: here the question is the logic, with all of the chain at hand.
    for at in range(0, len(records), 10):
        part = Denial(zone.origin, records[at : at + 10], denial._budget)
        denial._nsec += part._nsec
        denial._nsec3 |= part._nsec3
        denial._parameters = denial._parameters or part._parameters
    return denial


def truth(zone: Zone, cuts, owner) -> str:
    """exists | empty | wildcard | below | absent, as the server's rules (RFC 1034 §4.3.2, RFC 4592) say."""
    for cut in cuts:
        if owner.is_subdomain(zone.owner(cut)):
            return "below"
    if zone.types(owner):
        return "exists"
    if zone.exists(owner):
        return "empty"
    encloser = owner
    while not zone.exists(encloser):
        encloser = encloser.parent()
    return "wildcard" if zone.types(dns.name.Name((b"*", *encloser.labels))) else "absent"


@settings(max_examples=150)
@given(
    st.sampled_from([None, (0, b"", False), (3, b"salt", False)]),
    st.lists(owners, max_size=6),
    st.lists(owners.filter(lambda text: "*" not in text), max_size=2),
    owners,
)
def test_exactly_the_truth_is_provable(nsec3, hosts, cuts, asked):
    """What exists, or lies below a cut, is never denied; what does not exist always is."""
    cuts = [cut for cut in cuts if not any(cut != other and cut.endswith("." + other) for other in cuts)]
    zone = build(nsec3, hosts, cuts)
    denial, owner = everything(zone), zone.owner(asked)
    no_name, no_a, no_txt = denial.no_name(owner), denial.no_data(owner, A), denial.no_data(owner, TXT)
    expected = {
        "below": (Proof.NONE, Proof.NONE, Proof.NONE),
        "exists": (Proof.NONE, Proof.NONE, Proof.PROVEN),
        "empty": (Proof.NONE, Proof.PROVEN, Proof.PROVEN),
        "wildcard": (Proof.NONE, Proof.NONE, Proof.PROVEN),
        "absent": (Proof.PROVEN, Proof.NONE, Proof.NONE),
    }
    assert (no_name, no_a, no_txt) == expected[truth(zone, cuts, owner)]


@pytest.mark.parametrize("nsec3", [None, (0, b"", False), (0, b"", True)])
def test_what_the_absence_of_a_ds_means(nsec3):
    """A delegation without DS is unsigned; a host, an empty non-terminal and an absent name are no cut."""
    zone = build(nsec3, ["www", "a.b"], ["cut"])
    denial = everything(zone)
    unsigned = Cut.OPT_OUT if nsec3 and nsec3[2] else Cut.UNSIGNED
    assert denial.no_ds(name("cut.example.")) is unsigned
    assert denial.no_ds(name("www.example.")) is Cut.NO_CUT
    assert denial.no_ds(name("b.example.")) is Cut.NO_CUT
    absent = Cut.OPT_OUT if nsec3 and nsec3[2] else Cut.ABSENT
    assert denial.no_ds(name("nothing.example.")) is absent
    signed = Zone(name("example."), nsec3=nsec3)
    signed.add("cut", "NS", "ns.invalid.")
    signed.add("cut", "DS", "1 15 2 " + "AA" * 32)
    assert everything(signed).no_ds(name("cut.example.")) is Cut.UNKNOWN


def test_nothing_is_proven_by_nothing():
    """No record, or records of another zone's parameters: no proof of anything."""
    empty = Denial(name("example."), [], Budget())
    assert not empty
    for owner in ("example.", "www.example.", "elsewhere."):
        assert empty.no_name(name(owner)) is Proof.NONE
        assert empty.no_data(name(owner), A) is Proof.NONE
        assert empty.no_ds(name(owner)) is Cut.UNKNOWN
