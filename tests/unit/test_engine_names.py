"""The engine and names: looked up ahead of the first packet, and claims that decide nothing."""

from __future__ import annotations

from dataclasses import replace

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
    return without_reports(machine.handle(TunnelUp(candidate, True, attempt), 2.0))  # type: ignore[arg-type]


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
