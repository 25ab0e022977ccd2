"""The daemon's commands where something refuses: a reload that the kernel does not take, odd requests."""

from __future__ import annotations

import asyncio
import random
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from oepy import config as configuration
from oepy.control.client import ControlClient
from oepy.control.server import ControlServer
from oepy.daemon.api import ControlApi
from oepy.daemon.core import Surroundings
from oepy.daemon.datapaths import Chosen, NoDatapath
from oepy.daemon.runtime import Daemon
from oepy.engine.messages import Trapped
from oepy.errors import OepyError
from oepy.ike.settings import IkeSettings
from oepy.interfaces import TrapPolicy
from oepy.keys import HostKey
from oepy.model import Flow, PolicyGroup
from tests.fakes.rooms import FakeDatapath, FakeKeys, FakeTrap

US, PEER = ip_address("198.18.0.1"), ip_address("198.18.0.2")
BEFORE = "dns: {resolvers: [127.0.0.1]}\npolicy: {groups: {private: [198.18.0.0/24]}}\n"
AFTER = "dns: {resolvers: [127.0.0.1]}\npolicy: {groups: {clear: [198.18.0.0/24]}}\n"


def daemon_of(path: Path, trap: FakeTrap) -> Daemon:
    """One that has never started: fakes for its rooms, a real configuration file."""
    key = path.with_name("host.key")
    path.write_text(f"identity: {{key: {key}}}\n" + BEFORE)
    daemon = Daemon(configuration.load(path), str(path), lambda _: None)
    daemon.host_key = HostKey.generate("ed25519")
    daemon.host_key.save(key)
    daemon.chosen = Chosen("none", NoDatapath(), "for this test")
    daemon.wire(
        Surroundings(
            keys=FakeKeys({}),
            trap=trap,
            datapath=FakeDatapath(random.Random(1).randbytes),
            send=lambda _: None,
            monotonic=asyncio.get_running_loop().time,
            host_key=daemon.host_key,
            identity=None,
            ike_settings=IkeSettings(),
            is_own=lambda address: address == US,
            source_towards=lambda _: US,
        )
    )
    return daemon


class RefusingTrap(FakeTrap):
    def reload(self, policy: TrapPolicy) -> None:
        raise OepyError("nft refused the rules")


@pytest.mark.parametrize(("trap", "taken"), [(RefusingTrap(), False), (FakeTrap(), True)])
async def test_a_reload_that_the_kernel_refuses_changes_nothing(
    tmp_path: Path, trap: FakeTrap, taken: bool
) -> None:
    """Engine and kernel must go by one policy: else a peer were private in one of them and clear in the other."""
    daemon = daemon_of(tmp_path / "oepy.yaml", trap)
    (tmp_path / "oepy.yaml").write_text(f"identity: {{key: {tmp_path / 'host.key'}}}\n" + AFTER)
    daemon.reload()
    group = PolicyGroup.CLEAR if taken else PolicyGroup.PRIVATE
    assert daemon.engine.settings.group_of(PEER)[0] is group
    assert daemon.policy.match_address(PEER).group is group
    assert daemon.config.rules[0].group is group
    assert bool(daemon.journal.last_alerts) is not taken


async def test_nobody_negotiates_with_itself(tmp_path: Path) -> None:
    """`oepy initiate` of an own address is refused with a sentence."""
    api = ControlApi(daemon_of(tmp_path / "oepy.yaml", FakeTrap()))
    with pytest.raises(OepyError, match="this host"):
        await api.initiate(US, 1.0)


async def test_a_long_list_of_peers_lets_packets_go_on(tmp_path: Path) -> None:
    """Other work gets its turn while many destinations are listed."""
    daemon = daemon_of(tmp_path / "oepy.yaml", FakeTrap())
    for number in range(5000):
        flow = Flow(US, ip_address(f"198.18.{1 + number // 250}.{number % 250}"), 6, 1, 80)
        daemon.engine.handle(Trapped(PolicyGroup.PRIVATE_OR_CLEAR, flow), 0.0)
    turns = 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    work = asyncio.ensure_future(other_work())
    listed = await ControlApi(daemon).peers()
    work.cancel()
    assert (len(listed), turns >= 5) == (5000, True)


@pytest.mark.parametrize("seconds", ["soon", None, [], 1e999, -1e999])
async def test_odd_waiting_times_are_refused_with_a_sentence(tmp_path: Path, seconds: Any) -> None:
    """No traceback, no wait without end; the socket is for root alone."""
    daemon = daemon_of(tmp_path / "oepy.yaml", FakeTrap())
    path = tmp_path / "s"
    server = ControlServer(ControlApi(daemon), path)
    await server.start()
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        client = ControlClient(path)
        body = {"destination": str(US), "timeout": seconds}
        with pytest.raises(OepyError, match="seconds"):
            await asyncio.to_thread(client.post, "/v1/initiate", body)
        assert await asyncio.to_thread(client.get, "/v1/peers") == []
    finally:
        await server.stop()


async def test_a_reload_takes_up_a_rolled_over_key(tmp_path: Path) -> None:
    """The key that is proven changes with the file; where that is gone, nothing changes, with an alert."""
    daemon = daemon_of(tmp_path / "oepy.yaml", FakeTrap())
    old, new = daemon.host_key.public, HostKey.generate("ed25519")
    (tmp_path / "host.key").unlink()
    daemon.reload()
    assert daemon.host_key.public == old
    assert daemon.journal.last_alerts
    new.save(tmp_path / "host.key")
    daemon.reload()
    assert daemon.host_key.public == new.public
    assert daemon.negotiator._key.public == new.public
    assert daemon.own._public == new.public
