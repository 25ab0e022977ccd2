"""The interoperation matrix: every line of docs/interop.md, oepy as initiator and as responder."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from oepy.lab.capture import Packet
from oepy.lab.namespaces import Lab
from tests.interop.matrix.cases import (
    ASKING,
    ASSIGNED,
    COMING_UP,
    DYING,
    INITIATOR,
    KERNEL,
    LIBRESWAN,
    MOVING,
    OEPY,
    OPENIKED,
    PEER,
    REKEYED,
    REKEYS,
    RESPONDER,
    ROLES,
    STRONGSWAN,
    USERLAND,
    WHERE,
    Setup,
    loses,
    notices_late,
    obstacle,
)
from tests.interop.matrix.credentials import Credentials, credentials
from tests.interop.matrix.ground import Ground, wait_for
from tests.interop.matrix.libreswan import Libreswan
from tests.interop.matrix.openiked import OpenIked
from tests.interop.matrix.ours import Oepy
from tests.interop.matrix.peers import Peer
from tests.interop.matrix.strongswan import StrongSwan
from tests.interop.matrix.table import RUN_ROWS, Recorder

pytestmark = [pytest.mark.root, pytest.mark.interop]

KERNEL_NAME = os.environ.get("OEPY_SECOND_KERNEL", "")
HERE = KERNEL if KERNEL_NAME else USERLAND
PACE = {"qemu": 6.0, "uml": 3.0}.get(KERNEL_NAME, 1.0)
_SKF = 53  # Encrypted and Authenticated Fragment, RFC 7383 §2.5


@dataclass
class Game:
    ground: Ground
    oepy: Oepy
    peer: Peer
    recorder: Recorder

    def begin(self, setup: Setup, role: str) -> Setup:
        """Both loaded, nothing left of what was before, and up. Returns the setup with who begins."""
        setup = replace(setup, begins=OEPY if role == INITIATOR else PEER)
        self.peer.clear()
        self.oepy.down()
        self.ground.forget_translations()
        self.peer.load(setup)
        self.oepy.load(setup)
        self.ground.tap.packets()
        try:
            (self.oepy if role == INITIATOR else self.peer).up()
            self.wait(lambda: len(self.oepy.sas()) == 1 and self.peer.children() == 1)
        except Exception as error:
            raise AssertionError(f"{error}{self.told()}") from error
        if setup.assigns:
            selectors = self.oepy.sas()[0]["local_ts" if role == INITIATOR else "remote_ts"]
            (self.ground.given,) = (text.removesuffix("/32") for text in selectors)
            if role == RESPONDER:
                self.peer.take_address(self.ground.given)
        return setup

    def wait(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        wait_for(condition, seconds * self.ground.pace, self.told)

    def told(self) -> str:
        return f"\n{self.oepy.sas()}{self.oepy.log()}{self.peer.log()}"

    def facts(self, setup: Setup) -> dict[str, Any]:
        (sa,) = self.oepy.sas()
        assert sa["mode"] == setup.mode
        assert sa["authenticated"] == (
            "psk" if setup.auth == "psk" else "x509" if setup.is_x509 else "manual"
        )
        return {"ike": self.oepy.ike(setup)["algorithms"], "esp": sa["algorithm"], "encap": sa["encap"]}

    def end(self, role: str) -> None:
        """By a Delete of whoever began."""
        (self.oepy if role == INITIATOR else self.peer).down()
        self.wait(lambda: not self.oepy.sas() and self.peer.children() == 0)


_MARKS: dict[tuple[str, ...], tuple[pytest.MarkDecorator, ...]] = {
    (USERLAND, KERNEL): (pytest.mark.any_kernel,),
    (KERNEL,): (pytest.mark.kernel,),
    (USERLAND,): (),
}


def _params(setups: tuple[Setup, ...]) -> Iterator[Any]:
    for peer, places in WHERE.items():
        for setup, role in itertools.product(setups, ROLES):
            able = tuple(where for where in places if obstacle(peer, where, setup, role) is None)
            if able:
                name = f"{peer}-{setup.name}-{role}"
                yield pytest.param(peer, setup, role, id=name, marks=_MARKS[able])


def over(*setups: Setup) -> Any:
    return pytest.mark.parametrize(
        ("game", "setup", "role"), list(_params(setups)), indirect=["game"], scope="module"
    )


@pytest.fixture(scope="module")
def fresh_rows() -> None:
    RUN_ROWS.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def game(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, fresh_rows: None
) -> Iterator[Game]:
    directory = tmp_path_factory.mktemp("matrix")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    keys = credentials()
    with Lab() as lab:
        ground = Ground(lab, PACE, translates=KERNEL_NAME != "uml")
        peer = _peer(request.param, ground, directory / "peer", keys)
        ours = Oepy(ground, directory / "oepy", "tun" if HERE == USERLAND else "auto", keys)
        try:
            peer.start()
            yield Game(ground, ours, peer, Recorder(peer.name, peer.version, HERE))
        finally:
            peer.stop()
            ours.stop()
            ground.tap.close()


def _peer(name: str, ground: Ground, directory: Path, keys: Credentials) -> Peer:
    if name == OPENIKED:
        return OpenIked(ground, directory, keys)
    if name == LIBRESWAN:
        return Libreswan(ground, directory, keys)
    assert name == STRONGSWAN
    return StrongSwan(ground, directory, keys, userland=HERE == USERLAND)


@over(*COMING_UP, ASSIGNED)
def test_it_comes_up_carries_traffic_and_ends(game: Game, setup: Setup, role: str) -> None:
    """Both authenticate, pings pass both ways, the wire sees IKE and ESP alone (in UDP where an address was
    translated), and after the Delete of whoever began neither has the tunnel."""
    with game.recorder.cell(setup.name, role) as facts:
        setup = game.begin(setup, role)
        facts.update(game.facts(setup))
        assert game.ground.lost(setup) == 0, game.told()
        game.end(role)
        packets = game.ground.tap.packets()
        assert {packet.kind for packet in packets} == {"ike", "esp"}
        in_udp = {packet.protocol == 17 for packet in packets if packet.kind == "esp"}
        assert in_udp == {facts["encap"]}
        assert facts["encap"] or not setup.natted
        if setup.is_fragmented:
            fragments = {str(packet.source) for packet in packets if _is_ike_fragment(packet)}
            assert fragments == {game.ground.own(setup, OEPY), game.ground.seen(setup, PEER)}


def _is_ike_fragment(packet: Packet) -> bool:
    return packet.kind == "ike" and _ike(packet)[16] == _SKF


@over(*REKEYED)
def test_both_rekey_under_traffic(game: Game, setup: Setup, role: str) -> None:
    """Pings go on both ways while each end rekeys the CHILD SA and the IKE SA: none is lost (but where the peer
    can't help it), nothing goes in the clear, and in the end there is one tunnel, as before."""
    up = ""
    for kind in REKEYS:
        what, who = kind.split("-")
        with game.recorder.cell(f"{setup.name}-{kind}", role):
            wanted = what if who == PEER and not game.peer.rekeys_on_command else ""
            if up != wanted or kind == next(iter(REKEYS)):
                setup = game.begin(replace(setup, peer_rekeys=wanted), role)
                up = wanted
            _rekey_under_traffic(game, setup, what, who)
    game.end(role)


def _rekey_under_traffic(game: Game, setup: Setup, what: str, who: str) -> None:
    ike = what == "ike"
    with game.ground.traffic(setup) as traffic:
        before = game.oepy.spis(setup, ike=ike)
        if who == OEPY:
            game.oepy.rekey(setup, ike=ike)
        else:
            game.peer.rekey(ike=ike)
        game.wait(lambda: game.oepy.spis(setup, ike=ike) != before, game.peer.rekeys_within)
        game.wait(lambda: len(game.oepy.sas()) == 1 and game.peer.children() == 1)
        time.sleep(0.5 * game.ground.pace)
        traffic.stop()
        assert traffic.sent > 20
        assert traffic.lost == 0 or loses(game.peer.name, f"{what}-{who}"), game.told()
        assert traffic.lost < traffic.sent / 2, game.told()
        kinds = {packet.kind for packet in game.ground.tap.packets()}
        assert kinds == {"ike", "esp"}


@over(*ASKING)
def test_a_living_peer_answers(game: Game, setup: Setup, role: str) -> None:
    """One end asks in silence whether the other is there, and is answered; the tunnel stays."""
    with game.recorder.cell(setup.name, role):
        setup = game.begin(setup, role)
        game.ground.tap.packets()
        (asking,) = setup.asking
        own = game.ground.own(setup, asking)
        session = bytes.fromhex(game.oepy.spis(setup, ike=True))
        packets: list[Packet] = []

        def answered() -> bool:
            packets.extend(_ike_of(session, game.ground.tap.packets()))
            seen = [(str(packet.source) == own, _is_request(packet)) for packet in packets]
            return (True, True) in seen and (False, False) in seen

        game.wait(answered, game.peer.asks_within if asking == PEER else 10.0)
        requests = {str(packet.source) for packet in packets if _is_request(packet)}
        assert requests == {own}, f"{game.told()}{packets}"
        assert len(game.oepy.sas()) == game.peer.children() == 1
        game.end(role)


@over(DYING)
@pytest.mark.timeout(900)
def test_a_dead_peer_is_noticed(game: Game, setup: Setup, role: str) -> None:
    """The wire is cut under traffic, and both notice. Mended, they come together again."""
    setup = game.begin(setup, role)
    game.ground.cut()
    try:
        with game.ground.traffic(setup):
            with game.recorder.cell("dpd-oepy-notices", role):
                game.wait(lambda: not game.oepy.sas(), 45)
                assert "liveness" in game.oepy.log()
            if notices_late(game.peer.name) is None:
                with game.recorder.cell("dpd-peer-notices", role):
                    game.wait(lambda: game.peer.children() == 0, 45)
    finally:
        game.ground.mend()
    with game.recorder.cell("dpd-again", role):
        if role == RESPONDER and game.peer.children():
            game.peer.down()
        (game.oepy if role == INITIATOR else game.peer).up()
        game.wait(lambda: len(game.oepy.sas()) == 1 and game.peer.children() == 1)
        assert game.ground.lost(setup) == 0, game.told()
        game.end(role)


def _ike_of(session: bytes, packets: list[Packet]) -> list[Packet]:
    """Of an earlier case's session there may still be a word."""
    return [one for one in packets if one.kind == "ike" and _ike(one)[:16] == session]


def _ike(packet: Packet) -> bytes:
    """The message, without the non-ESP marker."""
    return packet.payload[4:] if packet.payload[:4] == bytes(4) else packet.payload


def _is_request(packet: Packet) -> bool:
    return not _ike(packet)[19] & 0x20  # the Response flag, RFC 7296 §3.1


@over(*MOVING)
def test_who_began_moves(game: Game, setup: Setup, role: str) -> None:
    """Its address is taken away, and it has another: the IKE SA goes there, and pings go on both ways. (Last of
    all: both ends look at their paths for a while after addresses have changed.)"""
    setup = game.begin(setup, role)
    mover = OEPY if role == INITIATOR else PEER
    with game.recorder.cell(setup.name, role):
        before = game.oepy.spis(setup, ike=True)
        new = game.ground.move(mover)
        try:
            place = "local" if mover == OEPY else "remote"
            game.wait(lambda: any(sa[place].startswith(f"{new}:") for sa in game.oepy.sas()))
            game.wait(lambda: len(game.oepy.sas()) == 1 and game.peer.children() == 1)
            # ESP follows the IKE SA only when the other end has answered at the new place (RFC 4555 §3.5, §3.7)
            game.wait(lambda: game.ground.lost(setup, 1) == 0)
            game.ground.tap.packets()
            assert game.ground.lost(setup) == 0, game.told()
            assert game.oepy.spis(setup, ike=True) == before
            game.end(role)
            packets = game.ground.tap.packets()
            assert {packet.kind for packet in packets} == {"ike", "esp"}
            own = [one for one in packets if one.kind == "esp"] + _ike_of(bytes.fromhex(before), packets)
            elsewhere = [one for one in own if new not in (str(one.source), str(one.destination))]
            assert not elsewhere, f"{elsewhere}{game.told()}"
        finally:
            game.ground.move(mover, back=True)
