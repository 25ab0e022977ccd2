"""The daemon's parts that decide: ordered steps, the journal, own records, and whom we answer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from ipaddress import ip_address

import pytest

from oepy.daemon.admission import Admissions, Offer
from oepy.daemon.journal import MAX_BACKLOG, MAX_EVENTS, Journal
from oepy.daemon.own import OwnRecords
from oepy.daemon.steps import Steps
from oepy.engine import Engine, EngineSettings
from oepy.model import (
    Absent,
    Authenticated,
    Bogus,
    GatewayType,
    IdType,
    Insecure,
    IpAddress,
    KeyAlgorithm,
    KeyAnswer,
    PeerIdentity,
    PeerKey,
    PolicyGroup,
    PublicKey,
    Secret,
    Secure,
    TrafficSelector,
    Unreachable,
)

US, PEER, HOST = (ip_address(text) for text in ("198.18.0.1", "198.18.0.2", "198.18.5.5"))
KEY, OTHER = (PublicKey(KeyAlgorithm.EDDSA, letter * 32) for letter in (b"k", b"o"))


def answer(subject: IpAddress, key: PublicKey, gateway: IpAddress) -> Secure:
    record = PeerKey(key, (gateway,), GatewayType.IPV4, str(gateway), 10, "IPSECKEY", "owner.", 60)
    return Secure(str(subject), "owner.", 60, keys=(record,))


class FakeKeys:
    """A KeySource from a dictionary; everything else is absent."""

    def __init__(self, answers: dict[str, KeyAnswer]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def peer_keys(self, subject: IpAddress | str, names: Sequence[str] = ()) -> KeyAnswer:
        self.asked.append(str(subject))
        return self.answers.get(str(subject), Absent(str(subject), "owner.", 60))


async def test_steps_keep_their_order_when_some_wait() -> None:
    """What comes after a waiting step waits for it; an error is reported and the rest goes on."""
    done: list[str] = []
    errors: list[Exception] = []
    steps = Steps(errors.append)

    async def slow() -> None:
        await asyncio.sleep(0.01)
        done.append("slow")

    async def broken() -> None:
        raise OSError("broken")

    steps.do(lambda: done.append("first"))
    steps.do(slow)
    steps.do(lambda: done.append("after"))
    steps.do(broken)
    steps.do(lambda: done.append("last"))
    assert done == ["first"]
    await steps.idle()
    assert done == ["first", "slow", "after", "last"]
    assert [str(error) for error in errors] == ["broken"]


async def test_the_journal_is_bounded_and_followers_see_what_comes() -> None:
    """Old events give way; a follower that reads slowly loses the oldest, not the newest."""
    journal = Journal(lambda: 1.0)
    follower = journal.follow()
    first = asyncio.ensure_future(anext(follower))
    await asyncio.sleep(0)
    for number in range(MAX_EVENTS + 10):
        journal.add("test", peer=str(number))
    assert len(journal.recent()) == MAX_EVENTS
    assert (await first)["peer"] == str(MAX_EVENTS + 10 - MAX_BACKLOG)
    await follower.aclose()


@pytest.mark.parametrize(
    ("published", "state"),
    [
        (answer(US, KEY, US), "published"),
        (answer(US, OTHER, US), "mismatch"),
        (Absent("x", "owner.", 60), "absent"),
        (Insecure("x", "owner.", 60), "absent"),
        (Bogus("x", "owner.", 60), "unknown"),
        (Unreachable("x", "owner.", 0), "unknown"),
    ],
)
async def test_own_records(published: KeyAnswer, state: str) -> None:
    """AUTH NULL only where our record is provably absent; a foreign key in our place is a mismatch."""
    keys, now = FakeKeys({str(US): published}), [0.0]
    changes: list[str] = []
    own = OwnRecords(keys, KEY, lambda: now[0], lambda record: changes.append(record.state))
    assert (await own.get(US)).state == state
    assert (await own.get(US)).state == state
    assert (keys.asked, changes) == ([str(US)], [state])
    now[0] = 120.0
    await own.get(US)
    await asyncio.sleep(0)
    assert len(keys.asked) == 2


def admissions(
    answers: dict[str, KeyAnswer], group: PolicyGroup = PolicyGroup.PRIVATE_OR_CLEAR
) -> Admissions:
    engine = Engine(EngineSettings(lambda _: (group, "default")))
    return Admissions(FakeKeys(answers), engine, lambda address: address == US)


def offer(
    tsi: IpAddress, authenticated: Authenticated = Authenticated.DNS, key: PublicKey | None = KEY
) -> Offer:
    return Offer(PEER, US, authenticated, key, (TrafficSelector.of(tsi),), (TrafficSelector.of(US),))


async def test_a_peer_speaks_for_its_own_address_with_the_key_published_there() -> None:
    """The proven key must stand at the peer's own reverse name."""
    good = await admissions({str(PEER): answer(PEER, KEY, PEER)}).decide(offer(PEER))
    assert good.refusal == ""
    assert good.remote_ts == (TrafficSelector.of(PEER),)
    stolen = await admissions({str(PEER): answer(PEER, OTHER, PEER)}).decide(offer(PEER))
    assert "does not name" in stolen.refusal


async def test_a_gateway_speaks_for_hosts_that_name_it() -> None:
    """RFC 4322: for a foreign address its record must name the peer as gateway, with the proven key."""
    delegated = await admissions({str(HOST): answer(HOST, KEY, PEER)}).decide(offer(HOST))
    assert delegated.remote_ts == (TrafficSelector.of(HOST),)
    foreign = await admissions({str(HOST): answer(HOST, KEY, HOST)}).decide(offer(HOST))
    assert foreign.refusal
    unknown = await admissions({}).decide(offer(HOST))
    assert unknown.refusal


async def test_a_null_peer_gets_its_own_outer_address_only() -> None:
    """RFC 7619 peers are anonymous: nobody else's traffic goes to them."""
    own = await admissions({}).decide(offer(PEER, Authenticated.NULL, None))
    assert own.remote_ts == (TrafficSelector.of(PEER),)
    other = await admissions({}).decide(offer(HOST, Authenticated.NULL, None))
    assert "own outer address only" in other.refusal
    strict = await admissions({}, PolicyGroup.PRIVATE).decide(offer(PEER, Authenticated.NULL, None))
    assert "AUTH NULL" in strict.refusal


@pytest.mark.parametrize(
    "published", [answer(PEER, KEY, PEER), answer(PEER, KEY, HOST), Bogus(str(PEER), "owner.", 60, "expired")]
)
async def test_a_null_peer_never_stands_in_for_a_published_key(published: KeyAnswer) -> None:
    """Who can send from an address gets no tunnel by AUTH NULL where the DNS says that a key lives there."""
    refused = await admissions({str(PEER): published}).decide(offer(PEER, Authenticated.NULL, None))
    assert refused.refusal
    unsigned = await admissions({str(PEER): Insecure("x", "owner.", 60)}).decide(
        offer(PEER, Authenticated.NULL, None)
    )
    assert not unsigned.refusal


async def test_a_null_peer_behind_a_nat_is_refused() -> None:
    """Its outer address is that of all its neighbours, whose traffic would be sent to it."""
    shared = dataclasses.replace(offer(PEER, Authenticated.NULL, None), peer_port=31_000)
    assert "NAT" in (await admissions({}).decide(shared)).refusal


@pytest.mark.parametrize(
    ("identity", "key", "admitted"),
    [
        (PeerIdentity.parse("road.example"), KEY, True),
        (PeerIdentity(IdType.FQDN, b"Road.Example"), KEY, True),
        (PeerIdentity.parse("other.example"), KEY, False),
        (PeerIdentity.parse("road.example"), OTHER, False),
        (PeerIdentity(IdType.RFC822_ADDR, b"road.example"), KEY, False),
        (PeerIdentity.address(PEER), KEY, False),
    ],
)
async def test_a_text_record_with_a_name_authorises_who_proves_it(
    identity: PeerIdentity, key: PublicKey, admitted: bool
) -> None:
    """RFC 4322 `@fqdn`: that name as IDi and that record's key, from whatever outer address."""
    record = PeerKey(KEY, (), GatewayType.NAME, "@road.example.", 10, "TXT", "owner.", 60)
    source = admissions({str(HOST): Secure(str(HOST), "owner.", 60, keys=(record,))})
    decision = await source.decide(dataclasses.replace(offer(HOST, key=key), identity=identity))
    assert (not decision.refusal) is admitted
    ipseckey = dataclasses.replace(record, record="IPSECKEY")
    source = admissions({str(HOST): Secure(str(HOST), "owner.", 60, keys=(ipseckey,))})
    assert (await source.decide(dataclasses.replace(offer(HOST, key=key), identity=identity))).refusal


async def test_a_wide_offer_is_narrowed_to_hosts() -> None:
    """0.0.0.0/0 on both sides becomes the two host addresses (RFC 7296 §2.9)."""
    everything = TrafficSelector(ip_address("0.0.0.0"), ip_address("255.255.255.255"))
    wide = Offer(PEER, US, Authenticated.NULL, None, (everything,), (everything,))
    admission = await admissions({}).decide(wide)
    assert (admission.local_ts, admission.remote_ts) == (
        (TrafficSelector.of(US),),
        (TrafficSelector.of(PEER),),
    )


async def test_only_our_own_side_is_offered() -> None:
    """A peer that asks for traffic of an address that isn't ours, nor delegated to us, is refused."""
    strange = Offer(
        PEER, US, Authenticated.NULL, None, (TrafficSelector.of(PEER),), (TrafficSelector.of(HOST),)
    )
    assert "not ours" in (await admissions({}).decide(strange)).refusal
    delegated = admissions({str(HOST): answer(HOST, KEY, US)})
    assert (await delegated.decide(strange)).local_ts == (TrafficSelector.of(HOST),)


async def test_keys_of_an_identity() -> None:
    """An address is looked up at its reverse name, an FQDN forward; without keys the reason is told."""
    source = admissions({"peer.example": answer(PEER, KEY, PEER)})
    assert await source.keys_of(PeerIdentity.parse("peer.example")) == ((KEY,), "")
    keys, reason = await source.keys_of(PeerIdentity.address(PEER))
    assert keys == ()
    assert "absent" in reason


def test_secrets_do_not_show() -> None:
    """Neither repr nor str nor pickling gives key material away; comparison is by value."""
    import pickle

    secret = Secret(b"very secret")
    assert "very" not in f"{secret!r} {secret}"
    assert secret == Secret(b"very secret")
    with pytest.raises(TypeError):
        pickle.dumps(secret)
