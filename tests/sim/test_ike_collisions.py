"""Every interleaving of two peers' commands and of the datagrams between them, up to a depth (RFC 7296 §2.8, 2.25):
one working tunnel in the end, or none where somebody wanted that, and nothing left over.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from oepy.ike.algorithms import parse_ike_proposal
from oepy.ike.events import ChildUp, DownReason, SessionDown
from oepy.ike.settings import ChildRequest, IkeSettings, Initiate, Lifetimes
from oepy.model import Endpoint
from tests.sim.ike_net import Host, Net, assert_mirror, assert_one_tunnel, request, two_hosts
from tests.sim.test_ike_children import NET_A, NET_B, pair_of
from tests.sim.test_ike_lifecycle import QUIET, assert_never_without_a_tunnel, connected, only_session

LIFETIMES = Lifetimes(rekey_retry=3.0, ike_rekey=1e6, child_rekey=1e6, child_hard=2e6)
SETTINGS = IkeSettings(
    liveness_interval=0.0,
    lifetimes=LIFETIMES,
    ike_offers=(parse_ike_proposal("aes128gcm16-prfsha256-x25519"),),
    own_auth="null",
)
HYBRID = replace(SETTINGS, ike_offers=(parse_ike_proposal("aes128gcm16-prfsha256-x25519-ke1_ecp256"),))
COMMANDS = ("rekey-child", "rekey-ike", "delete-child", "delete-ike", "reauthenticate")
ENDING = {"delete-child", "delete-ike"}
DEPTH = 6


class Held(Net):
    """Datagrams wait until they are let through, in any order."""

    def __init__(self, a: Host, b: Host) -> None:
        super().__init__((a, b))
        self.held: dict[Host, list[Callable[[], None]]] | None = None
        self.a, self.b = a, b

    def _carry(self, source: Endpoint, target: Endpoint, data: bytes) -> None:
        if self.held is None:
            super()._carry(source, target, data)
            return
        to = 0 if target.address == self.a.at.address else 1
        host = (self.a, self.b)[to]

        def deliver() -> None:
            host.ike.receive(data, target, source, self.now)
            self.flush(host)

        self.waiting[to].append(deliver)

    def hold(self) -> None:
        self.held = {}
        self.waiting: tuple[list[Callable[[], None]], list[Callable[[], None]]] = ([], [])

    def let_go(self) -> None:
        """What is still held arrives, then all goes its ordinary way."""
        self.held = None
        for queue in self.waiting:
            for deliver in queue:
                self.at(self.now + self.delay, deliver)


class Run:
    """Two peers with one tunnel, each with commands to give. `path`: which step was taken each time."""

    def __init__(self, settings: IkeSettings, commands: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        a, b = two_hosts(settings, None, None)
        self.hosts = (a, b)
        self.net = Held(a, b)
        self.commands = [list(of_one) for of_one in commands]
        a.ike.initiate(self.request(0), self.net.now)
        self.net.run(1)
        assert_one_tunnel(a, b)
        self.net.hold()

    def request(self, side: int) -> Initiate:
        host, peer = self.hosts[side], self.hosts[1 - side]
        return request(host, peer, own_auth="null", accept_null=True, remote_keys=())

    def steps(self) -> list[tuple[str, int, int]]:
        """What can be done now: a command, or the first or second datagram that waits."""
        found = [("command", side, 0) for side in (0, 1) if self.commands[side]]
        for side in (0, 1):
            found += [("deliver", side, at) for at in range(min(2, len(self.net.waiting[side])))]
        return found

    def take(self, step: tuple[str, int, int]) -> None:
        what, side, at = step
        if what == "deliver":
            self.net.waiting[side].pop(at)()
            return
        host = self.hosts[side]
        sessions = [info.session for info in host.ike.sessions() if info.state == "established"]
        self.give(self.commands[side].pop(0), side, host, sessions)
        self.net.flush(host)

    def give(self, command: str, side: int, host: Host, sessions: list[int]) -> None:
        now = self.net.now
        if command == "rekey-child" and host.pairs:
            host.ike.rekey_child(max(host.pairs), now)
        elif command == "delete-child" and host.pairs:
            host.ike.delete_child(max(host.pairs), now)
        elif sessions and command == "rekey-ike":
            host.ike.rekey_ike(sessions[-1], now)
        elif sessions and command == "delete-ike":
            host.ike.terminate(sessions[-1], now)
        elif sessions and command == "reauthenticate":
            host.ike.reauthenticate(sessions[-1], now, self.request(side))

    def finish(self, ending: bool) -> None:
        self.net.let_go()
        for side in (0, 1):
            while self.commands[side]:
                self.take(("command", side, 0))
        self.net.run(600)
        a, b = self.hosts
        assert len(a.pairs) == len(b.pairs) <= 1
        assert ending or len(a.pairs) == 1
        for host in self.hosts:
            context = host.ike._context
            assert host.sendable == set(host.pairs)
            assert len(context.by_spi) == len(context.by_number) == len(context.by_child) == len(host.pairs)
            assert set(context.by_child) == set(host.pairs)
            assert sorted(spi for like in context._alike.values() for spi in like) == sorted(host.pairs)
            assert not context.questions
            assert not context.half_open
            assert not context.half_open_of
            assert sum(map(len, context.by_remote.values())) == len(host.pairs)
            assert sum(map(len, context.by_identity.values())) == len(host.pairs)
            if not ending:
                assert_never_without_a_tunnel(host)
            for session in context.by_spi.values():
                assert session.own is session.serving is session.candidate is session.followup is None
                assert not session.queue
        for pair in a.pairs.values():
            assert_mirror(pair, b.pairs[pair.spi_out])


def paths(
    settings: IkeSettings, commands: tuple[tuple[str, ...], tuple[str, ...]], depth: int
) -> Iterator[str]:
    """Runs every sequence of steps; each is told by its name when it has ended as it should."""
    ending = bool(ENDING & {command for of_one in commands for command in of_one})
    todo: list[list[int]] = [[]]
    while todo:
        path = todo.pop()
        run = Run(settings, commands)
        taken = []
        for choice in path:
            step = run.steps()[choice]
            taken.append(step)
            run.take(step)
        choices = run.steps()
        if len(path) < depth and choices:
            todo += [[*path, choice] for choice in range(len(choices))]
            continue
        try:
            run.finish(ending)
        except AssertionError as error:
            raise AssertionError(f"{commands} {taken}: {error}") from error
        yield str(taken)


PAIRS = list(itertools.combinations_with_replacement(COMMANDS, 2)) + [
    (two, one) for one, two in itertools.combinations(COMMANDS, 2)
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_two_commands_at_once(first: str, second: str) -> None:
    """Each peer gives one, at any moment of the other's: to depth 4, for a second at most."""
    until = time.monotonic() + 1.0
    for settings in (SETTINGS, HYBRID):
        for number, _ in enumerate(paths(settings, ((first,), (second,)), 4)):
            if number > 20 and time.monotonic() > until:
                break


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_two_commands_at_once_to_the_whole_depth(first: str, second: str) -> None:
    """All of them, to depth 6."""
    for settings in (SETTINGS, HYBRID):
        assert sum(1 for _ in paths(settings, ((first,), (second,)), DEPTH)) > 10


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("third", COMMANDS)
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_three_commands_at_once(first: str, second: str, third: str) -> None:
    """One peer gives two, to depth 4."""
    assert sum(1 for _ in paths(SETTINGS, ((first, third), (second,)), 4)) > 10


# ---- reauthentication ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_reauthentication_takes_all_children_along(seed: int) -> None:
    """The new IKE SA has them before the old one goes; neither side is ever without a tunnel."""
    patient = replace(QUIET, established=replace(QUIET.established, total=60.0))
    a, b, net = connected(patient, seed)
    old = only_session(a)
    a.ike.create_child(old, ChildRequest(NET_A, NET_B, connection="office", label="second"), net.now)
    net.run(3)
    net.loss = net.copies = 0.2 if seed else 0.0
    request_ = replace(request(a, b), retransmission=replace(QUIET.established, total=60.0))
    new = a.ike.reauthenticate(old, net.now, request_)
    assert new
    assert a.ike.reauthenticate(old, net.now) == 0  # it is under way
    net.run(300)
    assert len(a.pairs) == len(b.pairs) == 2
    assert [info.session for info in a.ike.sessions()] == [new]
    assert len(b.ike.sessions()) == 1
    assert pair_of(a, NET_A).connection == "office"
    for pair in a.pairs.values():
        assert_mirror(pair, b.pairs[pair.spi_out])
    assert_never_without_a_tunnel(a, b)
    [down] = a.of(SessionDown)
    assert isinstance(down, SessionDown)
    assert down.reason is DownReason.SUPERSEDED
    assert a.of(ChildUp)[-1].label == "second"  # type: ignore[attr-defined]


def test_a_reauthentication_that_fails_leaves_the_old_one() -> None:
    """The peer does not accept us any more: the tunnel stays, and it is tried again when its time comes."""
    a, b, net = connected(replace(QUIET, lifetimes=Lifetimes(ike_reauth=100.0, rekey_retry=50.0)))
    keys, b.keys = b.keys, {}
    net.run(120)
    assert_one_tunnel(a, b)
    assert a.of(SessionDown) == []
    b.keys = keys
    net.run(100)
    assert a.of(SessionDown)
    assert_one_tunnel(a, b)
    assert_never_without_a_tunnel(a, b)


def test_a_session_of_the_peers_has_no_request() -> None:
    """Without one nothing is begun; with one the responder reauthenticates as well."""
    a, b, net = connected()
    assert b.ike.reauthenticate(only_session(b), net.now) == 0
    assert b.ike.reauthenticate(99, net.now) == 0
    assert b.ike.reauthenticate(only_session(b), net.now, request(b, a))
    net.run(30)
    assert_one_tunnel(a, b)
    assert len(a.ike.sessions()) == 1
    assert_never_without_a_tunnel(a, b)
