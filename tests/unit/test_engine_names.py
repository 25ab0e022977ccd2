"""The engine, names and certificates: lookups ahead of packets, claims that decide nothing, and who is asked for
a certificate."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from oepy.engine import Engine, EngineSettings
from oepy.engine.messages import (
    CloseTunnel,
    Decide,
    Failure,
    Install,
    LookupDone,
    Named,
    NegotiationFailed,
    NoSa,
    Proof,
    Report,
    StartIke,
    StartLookup,
    TunnelUp,
)
from oepy.engine.table import CLAIM_REFUSED, State
from oepy.model import Authenticated, KeyAnswer, PolicyGroup, Verdict
from tests.unit.test_engine import (
    ABSENT,
    BOGUS,
    INSECURE,
    KEY,
    OE,
    OTHER_KEY,
    PEER,
    PRIVATE,
    SILENT_DNS,
    engine,
    looked_up,
    pair,
    record,
    secure,
    trapped,
    without_reports,
)

CLAIM = record(key=OTHER_KEY)
BY_NAME = pair(authenticated=Authenticated.NAME)


def claimed(answer: KeyAnswer = ABSENT) -> KeyAnswer:
    return replace(answer, claims=(CLAIM,))


@pytest.mark.parametrize("group", [OE, PRIVATE])
def test_a_name_starts_the_lookup_before_the_first_packet(group: PolicyGroup) -> None:
    """The packet that follows finds the lookup under way, and is then what the destination is wanted for."""
    machine = engine(group)
    assert without_reports(machine.handle(Named(PEER, "www.example."), 0.0)) == [StartLookup(PEER)]
    assert without_reports(machine.handle(trapped(group), 0.01)) == []
    actions = machine.handle(LookupDone(PEER, ABSENT), 0.1)
    verdict = Verdict.CLEAR if group is OE else Verdict.BLOCK
    assert [action.verdict for action in without_reports(actions)] == [verdict]


@pytest.mark.parametrize("group", [PolicyGroup.CLEAR, PolicyGroup.CLEAR_OR_PRIVATE, PolicyGroup.BLOCK])
def test_groups_that_begin_nothing_begin_nothing_for_names(group: PolicyGroup) -> None:
    assert engine(group).handle(Named(PEER, "www.example."), 0.0) == []


def test_a_name_without_a_packet_leaves_nothing_behind() -> None:
    """A lookup ahead that finds no key decides nothing: no packet asked for a decision."""
    machine = engine()
    machine.handle(Named(PEER, "www.example."), 0.0)
    assert without_reports(machine.handle(LookupDone(PEER, ABSENT), 0.1)) == []
    assert machine.entries == {}


def test_claims_are_tried_where_the_alternative_is_the_clear() -> None:
    """Whatever the reverse zone's answer is, as long as it is neither a key nor bogus."""
    for answer in (ABSENT, INSECURE, SILENT_DNS):
        _, actions = looked_up(OE, claimed(answer))
        (start,) = actions
        assert isinstance(start, StartIke)
        assert (start.keys, start.by) == ((OTHER_KEY,), Proof.NAME)
    _, (start,) = looked_up(OE, secure())
    assert (start.keys, start.by) == ((KEY,), Proof.RECORD)


@pytest.mark.parametrize("answer", [ABSENT, INSECURE, SILENT_DNS])
def test_private_takes_no_claim(answer: KeyAnswer) -> None:
    """Anybody's name could otherwise choose who reads what must be private."""
    _, actions = looked_up(PRIVATE, claimed(answer))
    assert [action.verdict for action in actions] == [Verdict.BLOCK]


def test_no_claim_where_one_port_is_private() -> None:
    """All groups of an address share its tunnel."""
    settings = EngineSettings(lambda _: (OE, "::/0"), groups_of=lambda _: frozenset((OE, PRIVATE)))
    machine = Engine(settings)
    machine.handle(trapped(), 0.0)
    actions = without_reports(machine.handle(LookupDone(PEER, claimed()), 0.1))
    assert [action.verdict for action in actions] == [Verdict.CLEAR]


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("failure", list(Failure))
def test_a_claim_that_fails_is_as_if_it_had_not_been(failure: Failure, blocks: bool) -> None:
    """No block, no alert, and the life of the answer without it: or names could close addresses to us."""
    machine, (start,) = looked_up(OE, claimed(), after_failed_ike_blocks=blocks)
    actions = machine.handle(NegotiationFailed(PEER, start.attempt, failure, "why"), 1.0)
    assert without_reports(actions) == [Decide(OE, PEER, Verdict.CLEAR, pytest.approx(899.1))]
    assert not any(action.alert for action in actions if isinstance(action, Report))
    entry = machine.find(PEER)
    assert entry is not None
    assert "no key" in entry.reason


def test_a_claim_that_failed_is_not_tried_again_for_a_while() -> None:
    """Packets would be held for it each time; another key is another claim."""
    machine, (start,) = looked_up(OE, claimed())
    machine.handle(NegotiationFailed(PEER, start.attempt, Failure.SILENT, "why"), 1.0)
    for now, answer, tried in (
        (1000.0, claimed(), False),
        (2000.0, replace(ABSENT, claims=(CLAIM, record())), True),
        (CLAIM_REFUSED + 2100.0, claimed(), True),
    ):
        machine.handle(trapped(), now)
        actions = without_reports(machine.handle(LookupDone(PEER, answer), now + 0.1))
        starts = [action for action in actions if isinstance(action, StartIke)]
        assert bool(starts) is tried, now
        for start in starts:
            machine.handle(NegotiationFailed(PEER, start.attempt, Failure.SILENT, "why"), now + 3.0)


def test_a_new_name_reopens_a_clear_decision_once() -> None:
    """A flow went in the clear; then the host asks for a name of that address."""
    machine, _ = looked_up(OE, ABSENT)
    named = Named(PEER, "www.example.")
    assert without_reports(machine.handle(named, 5.0)) == [StartLookup(PEER)]
    (start,) = without_reports(machine.handle(LookupDone(PEER, claimed()), 5.1))
    assert isinstance(start, StartIke)
    assert without_reports(machine.handle(named, 5.2)) == []
    machine.handle(NegotiationFailed(PEER, start.attempt, Failure.SILENT, "why"), 8.0)
    assert machine.handle(named, 9.0) == []


@pytest.mark.parametrize("answer", [BOGUS, secure()])
def test_a_name_does_not_reopen_what_was_decided_by_the_addresss_own_records(answer: KeyAnswer) -> None:
    machine, actions = looked_up(OE, answer)
    if isinstance(actions[0], StartIke):
        machine.handle(NegotiationFailed(PEER, actions[0].attempt, Failure.SILENT, "why"), 1.0)
    assert machine.handle(Named(PEER, "www.example."), 5.0) == []


def up(machine: Engine, candidate: object, attempt: int = 0) -> list[object]:
    return without_reports(machine.handle(TunnelUp(candidate, True, attempt), 2.0))


def test_certain_peers_replace_less_certain_ones_and_never_the_other_way() -> None:
    """NULL, then a name, then the address's own records."""
    proofs = [Authenticated.NULL, Authenticated.NAME, Authenticated.DNS]
    for held in proofs:
        for offered in proofs:
            machine, (start,) = looked_up(OE, claimed())
            up(machine, pair(0x1000, held), start.attempt)
            actions = up(machine, pair(0x2000, offered))
            allowed = proofs.index(offered) >= proofs.index(held)
            assert isinstance(actions[0], Install if allowed else CloseTunnel), (held, offered)


def test_a_responder_lets_names_in_only_where_null_would_be() -> None:
    """Not into `private`, and not where the peer's own records hold a key."""
    assert not engine(OE).refuses_responder(PEER, Authenticated.NAME)
    assert "by name" in engine(PRIVATE).refuses_responder(PEER, Authenticated.NAME)
    machine, _ = looked_up(OE, secure())
    assert "by name" in machine.refuses_responder(PEER, Authenticated.NAME)
    machine, (start,) = looked_up(OE, claimed())
    up(machine, pair(0x1000), start.attempt)
    assert "never replaces" in machine.refuses_responder(PEER, Authenticated.NAME)


def test_a_claimed_tunnel_makes_the_destination_private() -> None:
    machine, (start,) = looked_up(OE, claimed())
    actions = up(machine, BY_NAME, start.attempt)
    assert isinstance(actions[0], Install)
    entry = machine.find(PEER)
    assert entry is not None
    assert (entry.state, entry.authenticated) == (State.PRIVATE, Authenticated.NAME)


# ---- certificates --------------------------------------------------------------------------------------


def certified(group: PolicyGroup, answer: KeyAnswer) -> tuple[Engine, list]:
    return looked_up(group, answer, by_certificate=lambda _: True)


@pytest.mark.parametrize("group", [OE, PRIVATE])
@pytest.mark.parametrize("answer", [ABSENT, INSECURE])
def test_who_publishes_no_key_is_asked_for_a_certificate(group: PolicyGroup, answer: KeyAnswer) -> None:
    """At its own address."""
    _, (start,) = certified(group, answer)
    assert (start.gateway, start.keys, start.by) == (PEER, (), Proof.CERTIFICATE)


@pytest.mark.parametrize("answer", [BOGUS, SILENT_DNS, secure()])
@pytest.mark.parametrize("group", [OE, PRIVATE])
def test_a_certificate_never_stands_in_for_what_the_dns_may_say(
    group: PolicyGroup, answer: KeyAnswer
) -> None:
    _, actions = certified(group, answer)
    assert not [one for one in actions if isinstance(one, StartIke) and one.by is not Proof.RECORD]


def test_names_come_before_the_certificate() -> None:
    """Whoever has a key at its name has not told us to ask for a certificate."""
    machine, (first,) = certified(OE, claimed())
    failure = NegotiationFailed(PEER, first.attempt, Failure.PROOF_FAILED, "why")
    (second,) = without_reports(machine.handle(failure, 1.0))
    assert (first.by, second.by) == (Proof.NAME, Proof.CERTIFICATE)
    failure = NegotiationFailed(PEER, second.attempt, Failure.SILENT, "why")
    assert without_reports(machine.handle(failure, 2.0)) == [
        Decide(OE, PEER, Verdict.CLEAR, pytest.approx(898.1))
    ]


@pytest.mark.parametrize("failure", list(Failure))
def test_without_a_good_certificate_private_stays_shut(failure: Failure) -> None:
    """And tries again soon where the peer was only away: the record's absence says nothing of that."""
    machine, (start,) = certified(PRIVATE, ABSENT)
    actions = machine.handle(NegotiationFailed(PEER, start.attempt, failure, "why"), 1.0)
    (decided,) = without_reports(actions)
    assert decided.verdict is Verdict.BLOCK
    assert decided.lifetime == pytest.approx(899.1 if failure is Failure.PROOF_FAILED else 5.0)
    assert "no certificate could be proven" in str(machine.find(PEER))


@pytest.mark.parametrize("failure", list(Failure))
def test_without_a_good_certificate_the_clear_stays_open(failure: Failure) -> None:
    for blocks in (False, True):
        machine, (start,) = looked_up(
            OE,
            ABSENT,
            by_certificate=lambda _: True,
            after_failed_ike_blocks=blocks,
        )
        actions = machine.handle(NegotiationFailed(PEER, start.attempt, failure, "why"), 1.0)
        assert without_reports(actions) == [Decide(OE, PEER, Verdict.CLEAR, pytest.approx(899.1))]
        assert not any(action.alert for action in actions if isinstance(action, Report))


def test_a_further_source_is_proven_as_the_first_one() -> None:
    machine, (start,) = certified(PRIVATE, ABSENT)
    up = pair(authenticated=Authenticated.X509)
    machine.handle(TunnelUp(up, True, start.attempt), 1.0)
    further = ip_address("198.18.0.77")
    assert without_reports(machine.handle(NoSa(further, PEER), 2.0)) == [StartLookup(PEER)]
    (again,) = without_reports(machine.handle(LookupDone(PEER, ABSENT), 2.1))
    assert (again.source, again.by) == (further, Proof.CERTIFICATE)
