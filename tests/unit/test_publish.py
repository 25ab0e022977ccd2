"""The plan of an update: what is sent, what is never touched, what the prerequisites protect; TSIG key files."""

from __future__ import annotations

import base64
import contextlib
from dataclasses import replace

import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.update
import dns.versioned
import dns.zone
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oepy.dns.primary import build_demand, build_first, build_update
from oepy.dns.publish import (
    IPSECKEY,
    MAX_BATCH_BYTES,
    MAX_BATCH_CHANGES,
    TXT,
    Change,
    Conflict,
    Found,
    FoundSet,
    KeyRecord,
    Wanted,
    batches,
    compare,
    is_key_record,
    key_of,
    plan,
    text_strings,
)
from oepy.dns.publishing import pieces
from oepy.dns.records import IpsecKey, OeText, build_ipseckey, build_oe_text
from oepy.dns.tsig import parse_tsig
from oepy.errors import KeyFormatError
from oepy.keys import HostKey
from oepy.model import PublicKey

ZONE = dns.name.from_text("example.")
OWNER = dns.name.from_text("alpha.example.")
OURS, NEXT, OTHER = (HostKey.generate("ed25519").public for _ in range(3))
RSA = HostKey.generate("rsa-2048").public


def ipseckey(key: PublicKey, precedence: int = 10) -> bytes:
    return build_ipseckey(IpsecKey(precedence, int(key.algorithm), None, key.data))


def text(*strings: bytes) -> bytes:
    return b"".join(bytes([len(string)]) + string for string in strings)


def oe_text(key: PublicKey | None) -> bytes:
    return text(*build_oe_text(OeText(10, OWNER, key)))


SPF = text(b"v=spf1 -all")


def wanted(*records: bytes, keys=(OURS,), ttl: int = 300) -> Wanted:
    return Wanted(ZONE, OWNER, ttl, frozenset(KeyRecord(IPSECKEY, r) for r in records), frozenset(keys))


def found(ipseckeys=(), texts=(), ttl: int = 300) -> Found:
    sets = {IPSECKEY: frozenset(ipseckeys), TXT: frozenset(texts)}
    return Found({kind: FoundSet(ttl, data) for kind, data in sets.items() if data})


def test_what_is_there_is_not_sent_again():
    assert plan(wanted(ipseckey(OURS)), found([ipseckey(OURS)], [SPF])) is None


def test_only_the_difference_is_sent():
    """A roll-over adds the next key and leaves the present one where it is."""
    change = plan(wanted(ipseckey(OURS), ipseckey(NEXT), keys=(OURS, NEXT)), found([ipseckey(OURS)], [SPF]))
    assert isinstance(change, Change)
    (rrset,) = change.sets
    assert (rrset.type, rrset.removed, rrset.added) == (IPSECKEY, (), (ipseckey(NEXT),))
    assert [line[0] for line in change.lines()] == ["+"]


def test_own_records_of_another_form_are_replaced():
    change = plan(wanted(ipseckey(OURS, 5)), found([ipseckey(OURS, 10)]))
    assert isinstance(change, Change)
    assert [line.split()[:2] for line in change.lines()] == [["-", "alpha.example."], ["+", "alpha.example."]]


def test_a_foreign_key_stops_the_name_unless_replaced():
    there = found([ipseckey(OTHER)], [SPF])
    conflict = plan(wanted(ipseckey(OURS)), there)
    assert isinstance(conflict, Conflict)
    assert "--replace" in str(conflict)
    change = plan(wanted(ipseckey(OURS)), there, replace=True)
    assert isinstance(change, Change)
    assert change.sets[0].removed == (ipseckey(OTHER),)
    assert all(rrset.type != TXT for rrset in change.sets)


@pytest.mark.parametrize(
    "data", [oe_text(RSA), oe_text(None), text(b"X-IPsec-Server(10)=@a.b"), text(b"X-IPsec-Server broken")]
)
def test_foreign_oe_text_is_a_conflict(data):
    assert isinstance(plan(wanted(ipseckey(OURS)), found((), [data])), Conflict)


def test_withdrawal_takes_own_records_only():
    there = found([ipseckey(OURS), ipseckey(OTHER)], [SPF, oe_text(RSA)])
    change = plan(wanted(keys=(OURS, RSA)), there)
    assert isinstance(change, Change)
    assert [rrset.removed for rrset in change.sets] == [(ipseckey(OURS),), (oe_text(RSA),)]
    assert plan(wanted(keys=(NEXT,)), there) is None
    assert not compare(wanted(keys=(NEXT,)), there)


def test_aliases_and_unreadable_names_are_left_alone():
    alias = Found(alias=dns.name.from_text("beta.example."))
    assert "alias of beta.example." in str(plan(wanted(ipseckey(OURS)), alias))
    assert plan(wanted(), alias) is None
    assert isinstance(plan(wanted(ipseckey(OURS)), Found(unreadable="broken")), Conflict)


def test_the_ttl_is_changed_alone_but_never_that_of_foreign_records():
    change = plan(wanted(ipseckey(OURS), ttl=60), found([ipseckey(OURS)], ttl=3600))
    assert isinstance(change, Change)
    assert change.old_ttl(900) == 3600
    own_text = replace(wanted(keys=(RSA,), ttl=60), records=frozenset([KeyRecord(TXT, oe_text(RSA))]))
    mixed = plan(own_text, found((), [SPF], ttl=3600))
    assert isinstance(mixed, Change)
    assert mixed.sets[0].ttl == 3600
    assert plan(own_text, found((), [SPF, oe_text(RSA)], ttl=3600)) is None


# ---- properties: the message, carried out by another implementation of RFC 2136 ---------------------------


def carry_out(message: dns.update.UpdateMessage, content: dict[int, set[bytes]]) -> bool:
    """RFC 2136 §3.2 and §3.4 for one name, on its own terms; False where a prerequisite fails."""
    asked: dict[int, set[bytes]] = {}
    for rrset in message.prerequisite:
        if rrset.deleting == dns.rdataclass.NONE:
            if content.get(rrset.rdtype):
                return False
        else:
            asked.setdefault(rrset.rdtype, set()).update(rdata.to_wire() for rdata in rrset)
    if any(content.get(kind, set()) != datas for kind, datas in asked.items()):
        return False
    for rrset in message.update:
        for rdata in rrset:
            if rrset.deleting == dns.rdataclass.NONE:
                content.get(rrset.rdtype, set()).discard(rdata.to_wire())
            else:
                content.setdefault(rrset.rdtype, set()).add(rdata.to_wire())
    return True


KEYS = (OURS, NEXT, OTHER)
some_keys = st.sets(st.sampled_from([ipseckey(key, at) for key in KEYS for at in (1, 10)]))
some_texts = st.sets(st.sampled_from([SPF, text(b"other"), oe_text(RSA), oe_text(None), text(b"")]))
ttls = st.sampled_from([60, 300])


@given(want=some_keys, keys=some_keys, texts=some_texts, swap=st.booleans(), old=ttls, new=ttls)
@settings(deadline=None)
def test_carried_out_the_zone_is_as_wanted_and_nothing_foreign_is_touched(want, keys, texts, swap, old, new):
    mine = frozenset(key for data in want if (key := key_of(KeyRecord(IPSECKEY, data)))) | {OURS}
    target = replace(wanted(*want, ttl=new), own_keys=mine)
    there = found(keys, texts, old)
    step = plan(target, there, replace=swap)
    if step is None:
        assert not compare(target, there)
        return
    if isinstance(step, Conflict):
        assert want
        assert not swap
        return
    wire = build_update(ZONE, [step]).to_wire()
    assert len(wire) <= step.size + 64
    message = dns.message.from_wire(wire)
    assert isinstance(message, dns.update.UpdateMessage)
    content = {IPSECKEY: set(keys), TXT: set(texts)}
    assert carry_out(message, content)
    after = found(content[IPSECKEY], content[TXT], new)
    assert not compare(target, after)
    kept = {data for data in texts if not is_key_record(KeyRecord(TXT, data))}
    assert kept <= content[TXT]
    if not (swap and want):
        assert {d for d in keys if key_of(KeyRecord(IPSECKEY, d)) not in mine} <= content[IPSECKEY]
    # a zone that changed in the meantime is not touched
    other = {IPSECKEY: set(keys) ^ {ipseckey(OTHER, 77)}, TXT: set(texts) ^ {text(b"new")}}
    assert not carry_out(message, other)


@given(want=some_keys, keys=some_keys, texts=some_texts)
@settings(deadline=None)
def test_a_guess_holds_only_where_it_is_so(want, keys, texts):
    """Unread names change only where there is no key record nor TXT; a demand holds for the very records."""
    target = wanted(*want)
    content = {IPSECKEY: set(keys), TXT: set(texts)}
    step = plan(target, Found())
    if isinstance(step, Change):
        first = dns.message.from_wire(build_first(ZONE, [step]).to_wire())
        assert isinstance(first, dns.update.UpdateMessage)
        assert carry_out(first, content) == (not keys and not texts)
        assert content[IPSECKEY] == (set(keys) if keys or texts else set(want))
    content = {IPSECKEY: set(keys), TXT: set(texts)}
    demand = dns.message.from_wire(build_demand([target]).to_wire())
    assert isinstance(demand, dns.update.UpdateMessage)
    assert not demand.update
    assert carry_out(demand, content) == (set(keys) == set(want) and not texts)


def test_a_guess_demands_that_the_names_are_in_this_zone():
    """No delegation at the name or above it, up to the apex, each asked for once; no alias."""
    owners = [dns.name.from_text(text) for text in ("a.b.c.example.", "d.b.c.example.", "example.")]
    targets = [replace(wanted(ipseckey(OURS)), owner=owner) for owner in owners]
    message = dns.message.from_wire(build_demand(targets).to_wire())
    assert isinstance(message, dns.update.UpdateMessage)
    asked = [(str(r.name), r.rdtype.name) for r in message.prerequisite if r.deleting == dns.rdataclass.NONE]
    places = [name for name, kind in asked if kind == "NS"]
    assert sorted(places) == ["a.b.c.example.", "b.c.example.", "c.example.", "d.b.c.example."]
    assert [name for name, kind in asked if kind == "CNAME"] == [str(owner) for owner in owners]


@given(sizes=st.lists(st.integers(0, 900), max_size=60))
def test_pieces_are_bounded_and_lose_nothing(sizes):
    targets = [
        replace(wanted(b"\0" * size) if size else wanted(), owner=dns.name.from_text(f"n{number}.example."))
        for number, size in enumerate(sizes * 8)
    ]
    found = list(pieces(targets))
    assert [one for piece in found for one in piece] == targets
    for piece in found:
        assert len(build_demand(piece).to_wire()) < 65_000
        assert len(piece) <= MAX_BATCH_CHANGES


@given(sizes=st.lists(st.integers(1, 6), max_size=60), limit=st.integers(200, 3000), most=st.integers(1, 20))
def test_batches_are_bounded_and_lose_nothing(sizes, limit, most):
    changes = []
    for at, count in enumerate(sizes):
        owner = dns.name.from_text(f"h{at}.example.")
        one = replace(wanted(*(ipseckey(OURS, n) for n in range(count))), owner=owner)
        change = plan(one, Found())
        assert isinstance(change, Change)
        changes.append(replace(change, zone=ZONE if at % 7 else OWNER))
    made = list(batches(changes, limit, most))
    assert [change for batch in made for change in batch] == changes
    for batch in made:
        assert len({change.zone for change in batch}) == 1
        assert len(batch) == 1 or (len(batch) <= most and sum(change.size for change in batch) <= limit)


def test_a_full_batch_fits_into_one_message():
    owners = [dns.name.from_text(f"{'x' * 60}.{at}.example.") for at in range(400)]
    changes = [plan(replace(wanted(ipseckey(OURS)), owner=owner), Found()) for owner in owners]
    for batch in batches([change for change in changes if isinstance(change, Change)]):
        assert len(build_update(ZONE, batch).to_wire(max_size=65535)) <= MAX_BATCH_BYTES


@given(st.binary(max_size=300), st.sampled_from([IPSECKEY, TXT]))
def test_any_record_of_a_zone_can_be_judged(data, kind):
    record = KeyRecord(kind, data)
    key_of(record)
    is_key_record(record)
    assert record.to_text()
    assert sum(map(len, text_strings(data))) <= len(data)


# ---- TSIG files ------------------------------------------------------------------------------------------

GOOD = base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    "form",
    [
        'key "k.example" {\n\talgorithm hmac-sha256;\n\tsecret "%s";\n};\n',
        "# made today\nkey k.example. { secret %s; algorithm HMAC-SHA256; }; // end",
        '/* a\nb */ key "k.example" { algorithm "hmac-sha256"; /* x */ secret "%s"; };',
    ],
)
def test_tsig_files_of_bind_are_read(form):
    key = parse_tsig(form % GOOD, "f")
    assert (str(key.name), key.secret, str(key.algorithm)) == ("k.example.", bytes(range(32)), "hmac-sha256.")


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("", "no TSIG key file"),
        ('key "a" { algorithm hmac-md5; secret "%s"; };', "not usable"),
        ('key "a" { algorithm hmac-sha256; };', "missing"),
        ('key "a" { algorithm hmac-sha256; secret "%s"; secret "%s"; };', "something else"),
        ('key "a" { algorithm hmac-sha256; secret "!!!"; };', "base64"),
        ('key "a" { algorithm hmac-sha256; secret "AAAA"; };', "128 bits"),
        ('key "a" { algorithm hmac-sha256; secret "%s"; }; key "b" { };', "no TSIG key file"),
        ('key "a..b" { algorithm hmac-sha256; secret "%s"; };', "no domain name"),
    ],
)
def test_broken_tsig_files_are_refused_without_showing_the_secret(form, why):
    with pytest.raises(KeyFormatError, match=why) as caught:
        parse_tsig(form.replace("%s", GOOD), "file")
    assert GOOD not in str(caught.value)


@given(st.text(alphabet='key"{};algorithmsecret hmac-sha256/*#\n=A', max_size=200))
def test_any_text_is_a_key_or_an_error(text):
    with contextlib.suppress(KeyFormatError):
        parse_tsig(text, "file")
