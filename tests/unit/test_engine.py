"""The decision table, row by row, and the life of a destination, on a clock made of numbers."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest

from oepy.engine import Engine, EngineSettings, table
from oepy.engine.entry import candidates_of
from oepy.engine.messages import (
    CancelIke,
    CloseTunnel,
    Counters,
    Decide,
    Failure,
    Flush,
    Forget,
    Initiate,
    Install,
    InstallFailed,
    LookupDone,
    NegotiationFailed,
    NoSa,
    ReadCounters,
    Reloaded,
    Remove,
    Report,
    StartIke,
    StartLookup,
    Terminate,
    Tick,
    Trapped,
    TunnelDown,
    TunnelMoved,
    TunnelUp,
    UnknownSpi,
)
from oepy.engine.table import Cause, State
from oepy.model import (
    Absent,
    Authenticated,
    Bogus,
    Endpoint,
    EspSuite,
    Flow,
    GatewayType,
    Insecure,
    IpAddress,
    KeyAlgorithm,
    KeyAnswer,
    PeerIdentity,
    PeerKey,
    PolicyGroup,
    PublicKey,
    SaCounters,
    SaKeys,
    SaPair,
    Secret,
    Secure,
    TrafficSelector,
    Unreachable,
    Verdict,
)

US = ip_address("198.18.0.1")
PEER = ip_address("198.18.0.2")
GATEWAY = ip_address("198.18.0.3")
OTHER_GATEWAY = ip_address("198.18.0.4")
OE, PRIVATE = PolicyGroup.PRIVATE_OR_CLEAR, PolicyGroup.PRIVATE
KEY = PublicKey(KeyAlgorithm.EDDSA, b"k" * 32)
OTHER_KEY = PublicKey(KeyAlgorithm.EDDSA, b"o" * 32)


def record(gateway: IpAddress = PEER, key: PublicKey = KEY, precedence: int = 10) -> PeerKey:
    return PeerKey(key, (gateway,), GatewayType.IPV4, str(gateway), precedence, "IPSECKEY", "owner.", 300)


def secure(*keys: PeerKey, ttl: int = 300) -> Secure:
    return Secure(str(PEER), "owner.", ttl, keys=keys or (record(),))


ABSENT = Absent(str(PEER), "owner.", 900)
BOGUS = Bogus(str(PEER), "owner.", 30, "the signature of owner. expired")
SILENT_DNS = Unreachable(str(PEER), "owner.", 0, "no answer in 6 s")
INSECURE = Insecure(str(PEER), "owner.", 300, "unsigned", keys=(record(),))


def pair(
    spi: int = 0x1000,
    authenticated: Authenticated = Authenticated.DNS,
    peer: IpAddress = PEER,
    gateway: IpAddress | None = None,
) -> SaPair:
    keys = SaKeys(Secret(b"x" * 36))
    return SaPair(
        spi_in=spi,
        spi_out=spi + 1,
        local=Endpoint(US, 4500),
        remote=Endpoint(gateway or peer, 4500),
        suite=EspSuite("aes256gcm16"),
        keys_in=keys,
        keys_out=keys,
        local_ts=(TrafficSelector.of(US),),
        remote_ts=(TrafficSelector.of(peer),),
        authenticated=authenticated,
        peer=PeerIdentity.address(gateway or peer),
    )


def engine(group: PolicyGroup = OE, **settings: Any) -> Engine:
    return Engine(EngineSettings(lambda _: (group, "0.0.0.0/0"), **settings))


def trapped(group: PolicyGroup = OE, destination: IpAddress = PEER) -> Trapped:
    return Trapped(group, Flow(US, destination, 6, 40000, 80))


def without_reports(actions: list) -> list:
    return [action for action in actions if not isinstance(action, Report)]


def looked_up(group: PolicyGroup, answer: KeyAnswer, **settings: Any) -> tuple[Engine, list]:
    machine = engine(group, **settings)
    assert without_reports(machine.handle(trapped(group), 0.0)) == [StartLookup(PEER)]
    return machine, without_reports(machine.handle(LookupDone(PEER, answer), 0.1))


def failed(group: PolicyGroup, failure: Failure, **settings: bool) -> list:
    machine, actions = looked_up(group, secure(), **settings)
    start = actions[0]
    assert isinstance(start, StartIke)
    return without_reports(machine.handle(NegotiationFailed(PEER, start.attempt, failure, "why"), 1.0))


@pytest.mark.parametrize(
    ("group", "answer", "verdict", "life"),
    [
        (OE, ABSENT, Verdict.CLEAR, 900),
        (OE, INSECURE, Verdict.CLEAR, 300),
        (OE, SILENT_DNS, Verdict.CLEAR, 60),
        (OE, BOGUS, Verdict.BLOCK, 60),
        (PRIVATE, ABSENT, Verdict.BLOCK, 900),
        (PRIVATE, INSECURE, Verdict.BLOCK, 300),
        (PRIVATE, SILENT_DNS, Verdict.BLOCK, 5),
        (PRIVATE, BOGUS, Verdict.BLOCK, 60),
    ],
)
def test_a_lookup_without_usable_keys_ends_in_the_tables_row(
    group: PolicyGroup, answer: KeyAnswer, verdict: Verdict, life: float
) -> None:
    """Each class of DNS answer gives the verdict and the life that the table promises."""
    _, actions = looked_up(group, answer)
    assert actions == [Decide(group, PEER, verdict, pytest.approx(life))]


@pytest.mark.parametrize(
    ("group", "failure", "verdict", "life"),
    [
        (OE, Failure.SILENT, Verdict.CLEAR, 600),
        (OE, Failure.REJECTED, Verdict.CLEAR, 3600),
        (OE, Failure.PROOF_FAILED, Verdict.BLOCK, 299.1),
        (PRIVATE, Failure.SILENT, Verdict.BLOCK, 5),
        (PRIVATE, Failure.REJECTED, Verdict.BLOCK, 5),
        (PRIVATE, Failure.PROOF_FAILED, Verdict.BLOCK, 299.1),
    ],
)
def test_a_failed_negotiation_ends_in_the_tables_row(
    group: PolicyGroup, failure: Failure, verdict: Verdict, life: float
) -> None:
    """Silence, rejection and a failed proof each have their own verdict and life."""
    assert failed(group, failure) == [Decide(group, PEER, verdict, pytest.approx(life))]


@pytest.mark.parametrize("failure", [Failure.SILENT, Failure.REJECTED])
def test_after_failed_ike_block_closes_the_permissive_group(failure: Failure) -> None:
    """`after_failed_ike: block`: a published key that IKE could not use means no traffic."""
    actions = failed(OE, failure, after_failed_ike_blocks=True)
    assert [action.verdict for action in actions] == [Verdict.BLOCK]


def test_insecure_keys_are_used_only_when_told() -> None:
    """`insecure_keys: use` negotiates with keys of an unsigned zone; without it they are as absent."""
    _, actions = looked_up(OE, INSECURE, use_insecure_keys=True)
    assert [type(action) for action in actions] == [StartIke]


@pytest.mark.parametrize("cause", list(Cause))
@pytest.mark.parametrize("group", list(PolicyGroup))
def test_private_and_block_never_open(group: PolicyGroup, cause: Cause) -> None:
    """Whatever goes wrong, no row of the table lets a fail-closed group speak in the clear."""
    outcome = table.outcome_for(group, cause, after_failed_ike_blocks=False)
    if group.fails_closed or (group, cause) not in table.OUTCOMES:
        assert outcome.verdict is Verdict.BLOCK
    assert table.life_of(outcome, 10_000_000, 50) <= table.LONGEST_LIFE


@pytest.mark.parametrize("group", [PolicyGroup.CLEAR_OR_PRIVATE, OE, PRIVATE])
@pytest.mark.parametrize("cause", [Cause.BOGUS, Cause.PROOF_FAILED])
def test_forgery_blocks_in_every_group(group: PolicyGroup, cause: Cause) -> None:
    """RFC 4322: a failed validation or proof denies even where the policy is permissive, and alerts."""
    outcome = table.outcome_for(group, cause, after_failed_ike_blocks=False)
    assert outcome.verdict is Verdict.BLOCK
    assert outcome.alert


def test_gateways_are_tried_in_order_and_the_worst_failure_decides() -> None:
    """All gateways get their turn; one that failed its proof weighs more than a silent one."""
    machine, actions = looked_up(OE, secure(record(GATEWAY), record(OTHER_GATEWAY, OTHER_KEY, 20)))
    first = actions[0]
    assert isinstance(first, StartIke)
    assert (first.gateway, first.keys) == (GATEWAY, (KEY,))
    second = without_reports(
        machine.handle(NegotiationFailed(PEER, first.attempt, Failure.PROOF_FAILED, "bad AUTH"), 1.0)
    )[0]
    assert isinstance(second, StartIke)
    assert (second.gateway, second.keys) == (OTHER_GATEWAY, (OTHER_KEY,))
    end = without_reports(machine.handle(NegotiationFailed(PEER, second.attempt, Failure.SILENT, ""), 9.0))
    assert [action.verdict for action in end] == [Verdict.BLOCK]


def test_keys_of_one_gateway_are_offered_together() -> None:
    """In a roll-over a gateway has two records: whichever key it proves is right."""
    found = candidates_of([record(GATEWAY), record(GATEWAY, OTHER_KEY, 20)], US)
    assert [(c.gateway, c.keys) for c in found] == [(GATEWAY, (KEY, OTHER_KEY))]


def test_an_endless_list_of_gateways_is_cut() -> None:
    """A zone with thousands of gateways costs a bounded number of negotiations."""
    records = [record(IPv4Address(0xC6120000 + n)) for n in range(1000)]
    assert len(candidates_of(records, US)) == table.MAX_GATEWAYS


def private_engine(group: PolicyGroup = OE, now: float = 1.0) -> tuple[Engine, list]:
    machine, actions = looked_up(group, secure())
    return machine, machine.handle(TunnelUp(pair(), True, actions[0].attempt), now)


def test_a_tunnel_is_installed_before_the_held_packets_go_on() -> None:
    """Install comes before the verdict: no packet meets a device without an SA."""
    _, actions = private_engine()
    assert without_reports(actions) == [
        Install(pair(), True),
        Decide(OE, PEER, Verdict.PRIVATE, table.PRIVATE_ELEMENT_LIFE),
    ]


def test_the_trap_is_back_before_the_sa_goes() -> None:
    """A peer's Delete never opens a destination: first "ask" again, then the SA is removed."""
    machine, _ = private_engine(PRIVATE)
    actions = without_reports(machine.handle(TunnelDown(0x1000, "peer-delete"), 50.0))
    assert actions == [Forget(PRIVATE, PEER), Remove(0x1000)]
    assert without_reports(machine.handle(trapped(PRIVATE), 51.0)) == [StartLookup(PEER)]


def test_an_inbound_tunnel_replaces_clear_at_once() -> None:
    """A peer without a record that offers a tunnel is private from then on."""
    machine, _ = looked_up(OE, ABSENT)
    actions = machine.handle(TunnelUp(pair(authenticated=Authenticated.NULL), False), 5.0)
    assert Decide(OE, PEER, Verdict.PRIVATE, table.PRIVATE_ELEMENT_LIFE) in actions


def test_an_inbound_tunnel_leaves_our_own_attempt_alone() -> None:
    """Both sides start at once: calling off our attempt could end the tunnel that the peer uses."""
    machine, actions = looked_up(OE, secure())
    up = without_reports(machine.handle(TunnelUp(pair(0x2000), False), 0.5))
    assert not [action for action in up if isinstance(action, CancelIke)]
    assert machine.find(PEER).state is State.PRIVATE
    late = NegotiationFailed(PEER, actions[0].attempt, Failure.SILENT, "")
    assert machine.handle(late, 9.0) == []
    assert machine.find(PEER).state is State.PRIVATE


def test_a_null_peer_never_replaces_an_authenticated_sa() -> None:
    """The NULL tunnel is closed; the authenticated one stays in use."""
    machine, _ = private_engine()
    actions = machine.handle(TunnelUp(pair(0x3000, Authenticated.NULL), False), 2.0)
    assert [type(action) for action in actions] == [CloseTunnel]
    assert machine.find(PEER).authenticated is Authenticated.DNS


@pytest.mark.parametrize(
    ("group", "authenticated", "answers"),
    [
        (PolicyGroup.CLEAR, Authenticated.DNS, False),
        (PolicyGroup.CLEAR_OR_PRIVATE, Authenticated.NULL, True),
        (OE, Authenticated.NULL, True),
        (OE, Authenticated.DNS, True),
        (PRIVATE, Authenticated.DNS, True),
        (PRIVATE, Authenticated.NULL, False),
        (PolicyGroup.BLOCK, Authenticated.DNS, False),
    ],
)
def test_who_is_answered(group: PolicyGroup, authenticated: Authenticated, answers: bool) -> None:
    """`clear` and `block` answer nobody, `private` only who proves a key."""
    assert (engine(group).refuses_responder(PEER, authenticated) == "") is answers


def test_a_peer_that_publishes_a_key_is_not_served_as_null() -> None:
    """An impostor that failed its proof does not get in by AUTH NULL."""
    machine, actions = looked_up(OE, secure())
    machine.handle(NegotiationFailed(PEER, actions[0].attempt, Failure.PROOF_FAILED, "bad AUTH"), 1.0)
    assert machine.refuses_responder(PEER, Authenticated.NULL)
    assert not machine.refuses_responder(PEER, Authenticated.DNS)


def test_a_rekeyed_pair_takes_over_without_a_gap() -> None:
    """After a rekey the entry stays private; the old pair's end changes nothing."""
    machine, _ = private_engine()
    up = without_reports(machine.handle(TunnelUp(pair(0x4000), True, replaces=0x1000), 100.0))
    assert up == [Install(pair(0x4000), True)]
    down = without_reports(machine.handle(TunnelDown(0x1000, "rekeyed"), 101.0))
    assert down == [Remove(0x1000)]
    assert machine.find(PEER).state is State.PRIVATE


def test_a_peer_that_moves_is_followed() -> None:
    """Another outer address: the same SAs are installed again with the new endpoints."""
    machine, _ = private_engine()
    moved = Endpoint(GATEWAY, 60000)
    (install,) = machine.handle(TunnelMoved(0x1000, pair().local, moved), 5.0)
    assert isinstance(install, Install)
    assert (install.pair.remote, install.pair.spi_in) == (moved, 0x1000)
    assert machine.handle(TunnelMoved(0x9999, pair().local, moved), 5.0) == []


def test_an_idle_tunnel_is_let_go_and_a_used_one_stays() -> None:
    """Aging: after a minute an unused SA is closed, the trap first; a used one is looked at 20 min later."""
    machine, _ = private_engine(now=1.0)
    asked = [a for a in machine.handle(Tick(), 61.5) if isinstance(a, ReadCounters)]
    assert asked == [ReadCounters((0x1000,))]
    assert machine.handle(Counters([SaCounters(0x1000, last_in=50.0)]), 61.5) == []
    assert not [a for a in machine.handle(Tick(), 1200.0) if isinstance(a, ReadCounters)]
    asked = [a for a in machine.handle(Tick(), 1262.0) if isinstance(a, ReadCounters)]
    assert asked == [ReadCounters((0x1000,))]
    actions = without_reports(machine.handle(Counters([SaCounters(0x1000, last_out=900.0)]), 1262.0))
    assert actions == [Forget(OE, PEER), CloseTunnel(0x1000, "idle")]


def test_private_elements_are_renewed_while_the_daemon_lives() -> None:
    """The kernel's element outlives one refresh, but not a dead daemon."""
    machine, _ = private_engine(now=1.0)
    actions = machine.handle(Tick(), 62.0)
    assert Decide(OE, PEER, Verdict.PRIVATE, table.PRIVATE_ELEMENT_LIFE) in actions
    assert table.PRIVATE_REFRESH * 2 < table.PRIVATE_ELEMENT_LIFE


def test_a_tunnel_that_comes_and_goes_is_renewed_once_a_minute() -> None:
    """However often a destination became private, it has one running renewal."""
    machine, _ = looked_up(OE, secure())
    for number in range(20):
        machine.handle(TunnelUp(pair(0x9000 + 2 * number), False), 1.0)
        if number < 19:
            machine.handle(TunnelDown(0x9000 + 2 * number, "peer-delete"), 1.0)
    renewals = [a for a in machine.handle(Tick(), 61.1) if isinstance(a, Decide)]
    assert renewals == [Decide(OE, PEER, Verdict.PRIVATE, table.PRIVATE_ELEMENT_LIFE)]


def test_decisions_expire_and_ask_again() -> None:
    """At the end of its life `clear` becomes "ask": the next packet is looked up."""
    machine, _ = looked_up(OE, ABSENT)
    assert without_reports(machine.handle(Tick(), 1000.0)) == [Forget(OE, PEER)]
    assert without_reports(machine.handle(trapped(), 1001.0)) == [StartLookup(PEER)]


def test_private_failures_back_off() -> None:
    """Repeated silence of a private peer is tried again ever more slowly, up to five minutes."""
    machine = engine(PRIVATE)
    now, lives = 0.0, []
    for _ in range(10):
        machine.handle(trapped(PRIVATE), now)
        (decision,) = without_reports(machine.handle(LookupDone(PEER, SILENT_DNS), now))
        lives.append(decision.lifetime)
        now += decision.lifetime + 1
        machine.handle(Tick(), now)
    assert lives[:4] == [5, 10, 20, 40]
    assert lives[-1] == table.BACK_OFF_LONGEST


@pytest.mark.parametrize(("group", "verdict"), [(OE, Verdict.CLEAR), (PRIVATE, Verdict.BLOCK)])
def test_nothing_stays_undecided(group: PolicyGroup, verdict: Verdict) -> None:
    """A lookup that never ends is ended by the engine."""
    machine = engine(group)
    machine.handle(trapped(group), 0.0)
    actions = without_reports(machine.handle(Tick(), table.HELD_LIMIT + 1))
    assert [action.verdict for action in actions] == [verdict]
    assert without_reports(machine.handle(LookupDone(PEER, secure()), 40.0)) == []


def test_a_hanging_negotiation_is_cancelled() -> None:
    """IKE that neither succeeds nor fails is called off and counts as silence."""
    machine, actions = looked_up(OE, secure())
    late = without_reports(machine.handle(Tick(), 100.0))
    assert late == [CancelIke(actions[0].attempt), Decide(OE, PEER, Verdict.CLEAR, 600.0)]


def test_more_packets_ask_only_once() -> None:
    """While a destination is held, further packets start nothing new."""
    machine = engine()
    machine.handle(trapped(), 0.0)
    assert machine.handle(trapped(), 0.1) == []


def test_two_groups_of_one_address_share_the_lookup_but_not_the_verdict() -> None:
    """A port rule puts one address into two groups: one question, two answers."""
    machine = engine()
    machine.handle(trapped(OE), 0.0)
    assert without_reports(machine.handle(trapped(PRIVATE), 0.0)) == []
    decisions = without_reports(machine.handle(LookupDone(PEER, ABSENT), 0.1))
    assert {(d.group, d.verdict) for d in decisions} == {(OE, Verdict.CLEAR), (PRIVATE, Verdict.BLOCK)}


def test_an_unknown_spi_starts_at_most_one_negotiation_in_ten_seconds() -> None:
    """ESP for a lost SA makes us negotiate again, rate-limited, and changes no state by itself."""
    machine = engine()
    assert without_reports(machine.handle(UnknownSpi(PEER), 0.0)) == [StartLookup(PEER)]
    machine.handle(LookupDone(PEER, ABSENT), 0.1)
    assert machine.handle(UnknownSpi(PEER), 5.0) == []
    clear = engine(PolicyGroup.CLEAR)
    assert clear.handle(UnknownSpi(PEER), 0.0) == []


def test_a_further_own_address_gets_a_tunnel_of_its_own() -> None:
    """A packet that no SA covers starts one more negotiation; the destination stays private all the time."""
    machine, _ = private_engine(PRIVATE)
    covered = next(iter(machine.pairs.values()))[0].local_ts[0].start
    assert machine.handle(NoSa(covered, PEER), 4.0) == []  # dropped just before the SA was there
    assert machine.handle(NoSa(GATEWAY, PEER), 5.0) == [StartLookup(PEER)]
    (start,) = without_reports(machine.handle(LookupDone(PEER, secure()), 5.1))
    assert isinstance(start, StartIke)
    assert (start.source, start.gateway) == (GATEWAY, PEER)
    assert machine.find(PEER).state is State.PRIVATE
    up = without_reports(machine.handle(TunnelUp(pair(0x7000), True, start.attempt), 6.0))
    assert up == [Install(pair(0x7000), True)]
    assert len(machine.find(PEER).tunnels) == 2
    assert without_reports(machine.handle(TunnelDown(0x7000, "peer-delete"), 9.0)) == [Remove(0x7000)]
    assert engine().handle(NoSa(GATEWAY, PEER), 0.0) == []


def test_commands() -> None:
    """initiate asks at once; terminate puts the trap back and closes; flush forgets decisions only."""
    machine = engine()
    assert without_reports(machine.handle(Initiate(PEER, OE), 0.0)) == [StartLookup(PEER)]
    machine, _ = private_engine()
    assert without_reports(machine.handle(Flush(), 2.0)) == []
    actions = without_reports(machine.handle(Terminate(PEER), 3.0))
    assert actions == [Forget(OE, PEER), CloseTunnel(0x1000, "terminated by command")]
    machine, _ = looked_up(OE, ABSENT)
    assert without_reports(machine.handle(Flush(), 1.0)) == [Forget(OE, PEER)]


def test_a_full_table_fails_by_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound nothing is remembered: private is blocked, the permissive group goes clear."""
    monkeypatch.setattr(table, "MAX_ENTRIES", 1)
    for group, verdict in ((OE, Verdict.CLEAR), (PRIVATE, Verdict.BLOCK)):
        machine = engine(group)
        machine.handle(trapped(group), 0.0)
        (decision,) = machine.handle(trapped(group, GATEWAY), 0.0)
        assert decision.verdict is verdict
        assert len(machine.entries) == 1


def test_a_private_destination_is_never_clear_on_any_path() -> None:
    """A thousand random histories of a private destination: no action ever says clear."""
    import random

    for seed in range(1000):
        dice = random.Random(seed)
        machine, now, spi = engine(PRIVATE), 0.0, 0x5000
        attempts: list[int] = [0]
        for _ in range(30):
            now += dice.choice([0.01, 1.0, 40.0, 700.0])
            spi += 2
            message = dice.choice(
                [
                    trapped(PRIVATE),
                    trapped(PRIVATE),
                    LookupDone(PEER, dice.choice([secure(), ABSENT, BOGUS, SILENT_DNS, INSECURE])),
                    NegotiationFailed(PEER, attempts[-1], dice.choice(list(Failure)), ""),
                    TunnelUp(pair(spi), dice.random() < 0.5, attempts[-1]),
                    TunnelDown(dice.choice([spi - 2, spi - 4]), "peer-delete"),
                    UnknownSpi(PEER),
                    Terminate(PEER),
                    Flush(),
                    Tick(),
                ]
            )
            for action in machine.handle(message, now):
                if isinstance(action, StartIke):
                    attempts.append(action.attempt)
                assert not (isinstance(action, Decide) and action.verdict is Verdict.CLEAR)
            entry = machine.entries.get((PRIVATE, PEER))
            assert entry is None or (entry.state is State.PRIVATE) == bool(entry.tunnels)


@pytest.mark.parametrize("answer", [ABSENT, BOGUS, SILENT_DNS])
def test_a_strangers_datagram_decides_nothing(answer: KeyAnswer) -> None:
    """ESP with a forged source begins a lookup of that address; it must not close it (or open it) to us."""
    machine = engine()
    machine.handle(UnknownSpi(PEER), 0.0)
    assert without_reports(machine.handle(LookupDone(PEER, answer), 0.1)) == []
    assert not machine.entries
    machine.handle(UnknownSpi(PEER), 20.0)
    assert machine.handle(trapped(), 20.1) == []
    (decision,) = without_reports(machine.handle(LookupDone(PEER, answer), 20.2))
    assert isinstance(decision, Decide)


def test_a_strangers_datagram_and_a_failed_negotiation_decide_nothing() -> None:
    """The same where a key is found and its gateway cannot prove it."""
    machine = engine()
    machine.handle(UnknownSpi(PEER), 0.0)
    (start,) = without_reports(machine.handle(LookupDone(PEER, secure()), 0.1))
    failure = NegotiationFailed(PEER, start.attempt, Failure.PROOF_FAILED, "bad AUTH")
    assert without_reports(machine.handle(failure, 0.2)) == []
    assert not machine.entries


@pytest.mark.parametrize(("group", "verdict", "life"), [(OE, Verdict.CLEAR, 60), (PRIVATE, Verdict.BLOCK, 5)])
def test_a_datapath_that_refuses_locks_nobody_out(group: PolicyGroup, verdict: Verdict, life: float) -> None:
    """The table decides: asking, negotiating and failing again for each packet would be a lockout."""
    machine, _ = private_engine(group)
    spi = next(iter(machine.pairs))
    actions = without_reports(machine.handle(InstallFailed(spi, "no room"), 2.0))
    assert actions == [Decide(group, PEER, verdict, life), Remove(spi)]


def test_a_refused_successor_leaves_the_older_tunnel() -> None:
    """A rekeyed pair that the datapath refuses changes nothing for the destination."""
    machine, _ = private_engine(PRIVATE)
    old = next(iter(machine.pairs))
    machine.handle(TunnelUp(pair(0x7000), True, replaces=old), 2.0)
    assert without_reports(machine.handle(InstallFailed(0x7000, "no room"), 2.1)) == [Remove(0x7000)]
    assert machine.find(PEER).state is State.PRIVATE


def with_a_private_port() -> EngineSettings:
    return EngineSettings(lambda _: (OE, "default"), groups_of=lambda _: frozenset({OE, PRIVATE}))


def test_a_null_peer_never_carries_a_private_port() -> None:
    """Tunnels belong to addresses: where one port is `private`, the address's tunnel wants proof."""
    machine = Engine(with_a_private_port())
    assert machine.refuses_responder(PEER, Authenticated.NULL)
    assert not machine.refuses_responder(PEER, Authenticated.DNS)
    late = without_reports(machine.handle(TunnelUp(pair(0x7000, Authenticated.NULL), False), 1.0))
    assert [type(action) for action in late] == [CloseTunnel]
    machine = engine()
    machine.handle(TunnelUp(pair(0x7000, Authenticated.NULL), False), 1.0)
    machine.settings = with_a_private_port()
    actions = without_reports(machine.handle(Reloaded(), 2.0))
    assert [type(action) for action in actions] == [Forget, CloseTunnel]


@pytest.mark.parametrize(
    ("within", "ends"),
    [
        (None, True),
        (((PEER, PEER),), True),
        (((PEER - 1, PEER + 1),), True),
        (((PEER + 1, PEER + 1),), False),
        (((PEER + 1, PEER + 9), (ip_address("::"), ip_address("::ffff:ffff:ffff"))), False),
        ((), False),
    ],
)
def test_a_reload_of_some_addresses_leaves_the_others(within, ends) -> None:
    machine = engine()
    machine.handle(TunnelUp(pair(0x7000, Authenticated.NULL), False), 1.0)
    machine.settings = with_a_private_port()
    actions = without_reports(machine.handle(Reloaded(within), 2.0))
    assert (CloseTunnel in map(type, actions)) is ends


def test_a_reload_keeps_the_tunnels_of_port_rules() -> None:
    """An entry of a group that only one port has is still right after a reload that changes nothing."""
    machine = Engine(with_a_private_port())
    machine.handle(trapped(PRIVATE), 0.0)
    (start,) = without_reports(machine.handle(LookupDone(PEER, secure()), 0.1))
    machine.handle(TunnelUp(pair(0x7000), True, start.attempt), 1.0)
    assert without_reports(machine.handle(Reloaded(), 2.0)) == []
    assert machine.find(PEER, PRIVATE).state is State.PRIVATE


@pytest.mark.parametrize(("group", "ends"), [(OE, True), (PRIVATE, False)])
def test_many_dead_gateways_hold_nobody_for_longer_than_promised(group: PolicyGroup, ends: bool) -> None:
    """30 s in all, not for each gateway, where the alternative is the clear; `private` tries them all."""
    machine = engine(group)
    gateways = [record(ip_address(f"198.18.7.{n}"), precedence=n) for n in range(1, 9)]
    machine.handle(trapped(group), 0.0)
    (start,) = without_reports(machine.handle(LookupDone(PEER, secure(*gateways)), 1.0))
    for number in range(1, 4):
        failure = NegotiationFailed(PEER, start.attempt, Failure.SILENT, "no answer")
        (start,) = without_reports(machine.handle(failure, 1.0 + 9 * number))
    actions = without_reports(machine.handle(Tick(), 30.1))
    assert (Decide(OE, PEER, Verdict.CLEAR, 600) in actions) is ends
