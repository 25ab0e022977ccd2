"""RFC 5011: which keys become trusted, when, and which never again; the file; the keeper against a tree."""

from __future__ import annotations

import contextlib
import json

import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from oepy.cli import main
from oepy.config import parse
from oepy.dns.anchorfile import format_points, parse_points, read_points, write_points
from oepy.dns.anchorkeeper import AnchorKeeper
from oepy.dns.anchors import Anchor
from oepy.dns.autoanchors import DAY, HOUR, KeyState, TrustPoint, changes, observe
from oepy.dns.message import RRset, Signature
from oepy.dns.signatures import REVOKE, STRICT, SignatureFailure
from oepy.errors import ConfigError
from oepy.model import Security
from tests.fakes.signed_tree import NOW, SignedTree, Zone, make_dnskey, make_private, name

ROOT = dns.name.root
DNSKEY = int(dns.rdatatype.DNSKEY)
TTL = 2 * DAY
KEYS = [make_private(15) for _ in range(4)]
VALID, PENDING, MISSING = KeyState.VALID, KeyState.ADD_PENDING, KeyState.MISSING
INITIAL = Anchor(ROOT, keys=(make_dnskey(KEYS[0], 15),))


def key_set(now: int, present, signers, revoked=()) -> RRset:
    """The root's key set with keys by number, signed by some, some with REVOKE."""
    zone = Zone(ROOT, private=KEYS[0], ttl=TTL)
    keys = {n: make_dnskey(KEYS[n], 15, 257 | (REVOKE if n in revoked else 0)) for n in present}
    rrset = dns.rrset.from_rdata_list(ROOT, TTL, list(keys.values()))
    signatures = [
        zone.signature(rrset, key=(KEYS[n], keys[n]), inception=now - HOUR, expiration=now + 10 * DAY)
        for n in signers
    ]
    return RRset(ROOT, DNSKEY, TTL, tuple(keys.values()), tuple(map(Signature.of, signatures)))


def look(point: TrustPoint, now: int, present, signers, revoked=()) -> TrustPoint:
    return observe(point, key_set(now, present, signers, revoked), INITIAL, now, STRICT)


def states(point: TrustPoint) -> dict[int, KeyState]:
    return {
        n: each.state
        for n in range(len(KEYS))
        for each in point.keys
        if each.is_same(make_dnskey(KEYS[n], 15))
    }


BEGUN = look(TrustPoint(ROOT), NOW, [0], [0])


def test_the_configured_key_is_valid_at_once_and_a_new_one_after_thirty_days():
    """§2.4.1: and not a second before; the set must show it again after that time."""
    point = look(BEGUN, NOW + DAY, [0, 1], [0])
    assert states(point) == {0: VALID, 1: PENDING}
    for day in range(2, 31):
        point = look(point, NOW + day * DAY, [0, 1], [0])
        assert states(point)[1] is PENDING
    point = look(point, NOW + 31 * DAY - 1, [0, 1], [0])
    assert states(point)[1] is PENDING
    point = look(point, NOW + 31 * DAY, [0, 1], [0])
    assert states(point) == {0: VALID, 1: VALID}
    assert states(look(point, NOW + 32 * DAY, [0, 1], [1])) == {0: VALID, 1: VALID}


def test_a_new_key_that_goes_away_begins_anew():
    """Whoever has stolen a key must hold the zone for thirty days on end, unnoticed."""
    point = look(BEGUN, NOW + DAY, [0, 1], [0])
    point = look(point, NOW + 20 * DAY, [0], [0])
    assert states(point) == {0: VALID}
    point = look(point, NOW + 21 * DAY, [0, 1], [0])
    point = look(point, NOW + 40 * DAY, [0, 1], [0])
    assert states(point)[1] is PENDING


def test_a_set_that_no_trusted_key_signs_changes_nothing():
    """Signed by a pending key, by a stranger, with a broken date: an error, and no new point."""
    point = look(BEGUN, NOW + DAY, [0, 1], [0])
    for present, signers in (([0, 1], [1]), ([2], [2]), ([0, 1], [])):
        with pytest.raises(SignatureFailure):
            look(point, NOW + 2 * DAY, present, signers)
    stale = key_set(NOW, [0, 1], [0])
    with pytest.raises(SignatureFailure):
        observe(point, stale, INITIAL, NOW + 40 * DAY, STRICT)


def test_a_missing_key_stays_trusted_and_returns():
    """§4.2: Missing."""
    point = look(look(BEGUN, NOW + DAY, [0, 1], [0]), NOW + 32 * DAY, [0, 1], [0])
    point = look(point, NOW + 33 * DAY, [1], [1])
    assert states(point) == {0: MISSING, 1: VALID}
    assert len(point.anchor().keys) == 2
    assert states(look(point, NOW + 34 * DAY, [0, 1], [0])) == {0: VALID, 1: VALID}


def test_a_key_revokes_itself_and_is_never_trusted_again():
    """§2.1: by its own signature with the flag, whoever else signs; without that signature nothing happens."""
    point = look(look(BEGUN, NOW + DAY, [0, 1], [0]), NOW + 32 * DAY, [0, 1], [0])
    unsigned = look(point, NOW + 33 * DAY, [0, 1], [1], revoked=[0])
    assert states(unsigned)[0] is MISSING
    point = look(point, NOW + 33 * DAY, [0, 1], [0, 1], revoked=[0])
    assert states(point) == {0: KeyState.REVOKED, 1: VALID}
    assert states(look(point, NOW + 34 * DAY, [0, 1], [0, 1]))[0] is KeyState.REVOKED
    point = look(point, NOW + 64 * DAY, [0, 1], [0, 1])
    assert states(point) == {0: KeyState.REMOVED, 1: VALID}
    assert states(look(point, NOW + 200 * DAY, [0, 1], [0, 1]))[0] is KeyState.REMOVED


def test_when_all_are_revoked_nothing_is_trusted():
    """Also by a set that nobody else signs."""
    point = look(BEGUN, NOW + DAY, [0], [0], revoked=[0])
    assert states(point) == {0: KeyState.REVOKED}
    assert point.anchor().keys == ()
    with pytest.raises(SignatureFailure):
        look(point, NOW + 2 * DAY, [0, 1], [0, 1])


def test_questions_are_as_far_apart_as_the_rfc_says():
    """§2.3: half of the TTL, half of the signature's life, an hour to fifteen days."""
    assert BEGUN.due - NOW == TTL // 2
    for ttl, gap in ((10, HOUR), (100 * DAY, 5 * DAY)):
        zone = Zone(ROOT, private=KEYS[0], ttl=ttl)
        rrset = dns.rrset.from_rdata(ROOT, ttl, make_dnskey(KEYS[0], 15))
        signature = zone.signature(rrset, inception=NOW, expiration=NOW + 10 * DAY)
        seen = RRset(ROOT, DNSKEY, ttl, tuple(rrset), (Signature.of(signature),))
        assert observe(TrustPoint(ROOT), seen, INITIAL, NOW, STRICT).due - NOW == gap


def test_a_configured_key_without_the_sep_flag_keeps_its_trust():
    """An anchor may be a zone's only key with flags 256; a new key beside it needs the flag."""
    private = make_private(15)
    zone = Zone(ROOT, private=private, flags=256)
    initial = Anchor(ROOT, keys=(zone.dnskey,))
    rrset = dns.rrset.from_rdata(
        ROOT, TTL, zone.dnskey, make_dnskey(KEYS[1], 15), make_dnskey(KEYS[2], 15, 256)
    )
    seen = RRset(ROOT, DNSKEY, TTL, tuple(rrset), (Signature.of(zone.signature(rrset)),))
    point = observe(TrustPoint(ROOT), seen, initial, NOW, STRICT)
    assert sorted(each.state.value for each in point.keys) == ["ADDPEND", "VALID"]


_STEP = st.tuples(
    st.integers(1, 20),
    st.sets(st.integers(0, 3), min_size=1),
    st.sets(st.integers(0, 3)),
    st.sets(st.integers(0, 3)),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(_STEP, max_size=14))
def test_whatever_happens_trust_is_earned_and_revocation_is_final(steps):
    """No key but the configured one is trusted unless every validated set of 30 days showed it; none after its
    revocation; the file says the same."""
    point, now = BEGUN, NOW
    seen_since: dict[int, int] = {}
    dead: set[int] = set()
    for gap, present, signers, revoked in steps:
        now += gap * DAY
        before = point
        try:
            point = look(point, now, present, signers & present, revoked)
        except SignatureFailure:
            assert point == before
            continue
        if point.checked == now:
            for number in range(1, 4):
                if number in present and number not in revoked:
                    seen_since.setdefault(number, now)
                elif states(point).get(number) not in (VALID, MISSING):
                    seen_since.pop(number, None)
        dead |= {n for n, state in states(point).items() if state is KeyState.REVOKED}
        for number, state in states(point).items():
            if state.is_trusted:
                assert number not in dead
                assert number == 0 or now - seen_since[number] >= 30 * DAY
        assert parse_points(format_points([point]), "x") == (point,)


# ---- the file --------------------------------------------------------------------------------------------


def test_the_file_shows_other_programs_the_trusted_keys_only(tmp_path):
    """As a file of trust anchors; and it reads back as it was."""
    point = look(BEGUN, NOW + DAY, [0, 1], [0])
    path = tmp_path / "deep" / "anchors.auto"
    write_points(path, [point])
    assert read_points(path) == (point,)
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in path.parent.iterdir()] == ["anchors.auto"]
    from oepy.dns.anchors import parse_anchors

    assert parse_anchors(path.read_text(), "x") == {ROOT: [make_dnskey(KEYS[0], 15)]}
    assert read_points(tmp_path / "none") == ()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace(";VALID", ";TRUSTED"),
        lambda text: text.replace(". IN", ";. IN"),
        lambda text: text.replace("IN DNSKEY 257", "IN DNSKEY 385"),
        lambda text: text.replace(";zone", ";zoom"),
        lambda text: text + text.splitlines()[-1],
        lambda text: text.replace("since 2027", "since 2x27"),
        lambda text: text + "\x00\n",
    ],
)
def test_a_damaged_file_is_refused_with_its_line(spoil):
    """Never half of it, and never the configured anchors in its stead."""
    with pytest.raises(ConfigError, match=r"line \d+: .*delete it"):
        parse_points(spoil(format_points([BEGUN])), "anchors.auto")


@given(st.text(max_size=200))
def test_any_text_is_points_or_a_mistake(text):
    """No other exception."""
    with contextlib.suppress(ConfigError):
        parse_points(format_points([BEGUN]) + text, "x")


# ---- the keeper ------------------------------------------------------------------------------------------


async def test_a_roll_over_of_the_root_is_followed(tmp_path):
    """The second key comes, ripens and takes over, the first is revoked: lookups are secure all the time, and the
    daemon that starts from the file knows the new key only."""
    tree = SignedTree()
    tree.add("example.").add("www", "A", "192.0.2.1")
    root = tree.zones[ROOT]
    root.ttl = TTL
    first, second = root.entry, (KEYS[1], make_dnskey(KEYS[1], 15))
    clock, said = [float(NOW)], []
    validator = tree.validator()
    validator._shared.clock = lambda: clock[0]
    validator._shared.monotonic = lambda: clock[0]
    initial = validator.anchors.copy()
    path = tmp_path / "anchors.auto"
    keeper = AnchorKeeper(path, initial, validator, lambda: clock[0], lambda *what: said.append(what))

    async def day(number: int) -> None:
        clock[0] = NOW + number * DAY
        for zone in tree.zones.values():
            zone.inception, zone.expiration = int(clock[0]) - HOUR, int(clock[0]) + 10 * DAY
        await keeper.check_due()
        outcome = await validator.lookup(name("www.example."), int(dns.rdatatype.A))
        assert outcome.status is Security.SECURE, outcome.reason

    await day(0)
    root.add_rdata("@", second[1])
    for number in range(1, 34):
        await day(number)
    assert [each.state for each in keeper.points[0].keys] == [VALID, VALID]
    revoked = make_dnskey(first[0], 15, 257 | REVOKE)
    root.records[ROOT, DNSKEY] = [revoked, second[1]]
    root.private, root.dnskey, root.entry = *second, second
    plain_signature = root.signature

    def signed_by_both(rrset, **changes):
        return plain_signature(rrset, **changes)

    def sign(rrset):
        signatures = dns.rrset.RRset(rrset.name, 1, dns.rdatatype.RRSIG, covers=rrset.rdtype)
        signatures.ttl = rrset.ttl
        signatures.add(signed_by_both(rrset))
        if rrset.rdtype == DNSKEY:
            signatures.add(signed_by_both(rrset, key=(first[0], revoked)))
        return signatures

    root.sign = sign
    await day(34)
    await day(36)
    assert [each.state for each in keeper.points[0].keys] == [KeyState.REVOKED, VALID]
    assert read_points(path) == tuple(keeper.points)
    assert any("VALID → REVOKED" in reason for _, reason, alert in said if alert)
    again = AnchorKeeper(path, initial, validator, lambda: clock[0], lambda *_: None)
    assert again.points == keeper.points


async def test_a_set_that_cannot_be_had_is_asked_for_again_in_an_hour(tmp_path):
    """Nothing else changes, and the reason is told."""
    tree = SignedTree()
    validator = tree.validator()
    said = []
    keeper = AnchorKeeper(
        tmp_path / "a", validator.anchors.copy(), validator, lambda: NOW, lambda *what: said.append(what)
    )
    tree.lies.append(lambda *_: None)
    await keeper.check_due()
    assert keeper.points[0].due == NOW + HOUR
    assert "silence" in said[0][1]
    tree.lies.clear()
    await keeper.check_due()
    assert keeper.points[0].keys == ()


def test_changes_are_told_in_words():
    """One line for each key that moved."""
    after = look(BEGUN, NOW + DAY, [0, 1], [0])
    (line,) = changes(BEGUN, after)
    assert line.endswith(": ADDPEND")
    assert changes(after, look(after, NOW + 2 * DAY, [0, 1], [0])) == []
    (line,) = changes(after, look(after, NOW + 2 * DAY, [0], [0]))
    assert "withdrawn" in line


def test_anchors_shows_what_is_pending(tmp_path):
    """`oepy dns anchors`, from the file that the configuration names."""
    path = tmp_path / "anchors.auto"
    write_points(path, [look(BEGUN, NOW + DAY, [0, 1], [0])])
    config = tmp_path / "oepy.yaml"
    config.write_text(
        yaml.safe_dump({"dns": {"resolvers": ["127.0.0.1@9"], "auto_trust_anchors": str(path)}})
    )
    assert parse(config.read_text()).auto_trust_anchors == path
    done = CliRunner().invoke(main, ["-c", str(config), "dns", "anchors", "--json"])
    found = {entry["key_tag"]: entry for entry in json.loads(done.output)}
    tags = [make_dnskey(KEYS[number], 15).key_id() for number in (0, 1)]
    assert (found[tags[0]]["state"], found[tags[1]]["state"]) == ("unknown", "pending")
    assert "2027-" in found[tags[1]]["reason"]
