"""The built-in anchor, and the check of anchors against what their zones publish."""

from __future__ import annotations

import dns.name
import dns.rdata
import pytest

from oepy.dns.anchorcheck import check_anchors
from oepy.dns.anchors import TrustAnchors
from oepy.dns.signatures import STRICT, usable_keys
from oepy.dns.validator import Validator
from tests.fakes.signed_tree import NOW, SignedTree, make_dnskey, make_ds, make_private

# IANA's key signing keys of 2017 and 2024, as published with the root zone and in
# https://data.iana.org/root-anchors/root-anchors.xml
KSK = {
    20326: "AwEAAaz/tAm8yTn4Mfeh5eyI96WSVexTBAvkMgJzkKTOiW1vkIbzxeF3+/4RgWOq7HrxRixHlFlExOLAJr5emLvN7SWXgnLh4+B5"
    "xQlNVz8Og8kvArMtNROxVQuCaSnIDdD5LKyWbRd2n9WGe2R8PzgCmr3EgVLrjyBxWezF0jLHwVN8efS3rCj/EWgvIWgb9tarpVUDK/b5"
    "8Da+sqqls3eNbuv7pr+eoZG+SrDK6nWeL3c6H5Apxz7LjVc1uTIdsIXxuOLYA4/ilBmSVIzuDWfdRUfhHdY6+cn8HFRm+2hM8AnXGXws"
    "9555KrUB5qihylGa8subX2Nn6UwNR1AkUTV74bU=",
    38696: "AwEAAa96jeuknZlaeSrvyAJj6ZHv28hhOKkx3rLGXVaC6rXTsDc449/cidltpkyGwCJNnOAlFNKF2jBosZBU5eeHspaQWOmOElZs"
    "jICMQMC3aeHbGiShvZsx4wMYSjH8e7Vrhbu6irwCzVBApESjbUdpWWmEnhathWu1jo+siFUiRAAxm9qyJNg/wOZqqzL/dL/q8PkcRU5o"
    "UKEpUge71M3ej2/7CPqpdVwuMoTvoB+ZOT4YeGyxMvHmbrxlFzGOHOijtzN+u1TQNatX2XBuzZNQ1K+s2CXkPIZo7s6JgZyvaBevYtxP"
    "vYLw4z9mR7K2vaF18UYH9Z9GNUUeayffKC73PYc=",
}


@pytest.mark.parametrize("tag", KSK)
def test_the_built_in_anchor_fits_the_roots_keys(tag):
    """Both keys by their digest, and a changed one by none."""
    anchor = TrustAnchors.iana().at(dns.name.root)
    (key,) = usable_keys([dns.rdata.from_text("IN", "DNSKEY", f"257 3 8 {KSK[tag]}")], STRICT)
    assert key.tag == tag
    assert anchor.accepts(key, STRICT)
    (other,) = usable_keys(
        [dns.rdata.from_text("IN", "DNSKEY", f"257 3 8 {KSK[tag].replace('K', 'L', 1)}")], STRICT
    )
    assert not anchor.accepts(other, STRICT)


async def test_the_state_of_each_anchor_is_told():
    """In use, revoked (by its public key, since the tag changes), not published; as DS and as DNSKEY."""
    tree = SignedTree()
    root = tree.zones[dns.name.root]
    old, gone = make_private(13), make_private(13)
    revoked = make_dnskey(old, 13, 257 | 128)
    root.add_rdata("@", revoked)
    trusted = [
        *root.make_ds(),
        make_ds(dns.name.root, make_dnskey(old, 13), 2),
        make_ds(dns.name.root, make_dnskey(gone, 13), 4),
        root.dnskey,
        make_dnskey(old, 13),
    ]
    anchors = TrustAnchors.of({dns.name.root: trusted})
    anchors.add_negative([dns.name.from_text("broken.example.")])
    states = await check_anchors(Validator(tree, anchors, lambda: NOW, lambda: 1000.0))
    assert [(state.kind, state.state) for state in states] == [
        ("DS", "in use"),
        ("DS", "revoked"),
        ("DS", "not published"),
        ("DNSKEY", "in use"),
        ("DNSKEY", "revoked"),
        ("", "negative"),
    ]


async def test_an_anchor_that_cannot_be_checked_says_why():
    """All keys trusted are strangers to the zone: bogus, so nothing is known."""
    tree = SignedTree()
    stranger = make_ds(dns.name.root, make_dnskey(make_private(13), 13), 2)
    validator = Validator(tree, TrustAnchors.of({dns.name.root: [stranger]}), lambda: NOW, lambda: 1000.0)
    (state,) = await check_anchors(validator)
    assert state.state == "unknown"
    assert "trust anchor" in state.reason
