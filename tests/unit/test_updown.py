"""`updown`: a real program, its environment, its order, its failures and its limit of time."""

from __future__ import annotations

import asyncio
import dataclasses
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from oepy.connections.messages import RunUpdown
from oepy.daemon import updown as module
from oepy.daemon.updown import Updown, environments
from oepy.keys import HostKey
from oepy.model import SaPair, TrafficSelector
from tests.fakes.connections import good
from tests.fakes.datapath import pairs

TEXT = """
connections:
  office:
    remote_addrs: 192.0.2.2
    local: {auth: "null"}
    remote: {auth: pubkey, id: gw.example, pubkeys: [peer]}
    children: {net: {}}
"""
(OFFICE,) = good(TEXT, public={"peer": HostKey.generate("ed25519").public}).connections
NETS = tuple(TrafficSelector.of(ip_network(text)) for text in ("10.1.0.0/16", "2001:db8::/32"))


def pair(**changes: Any) -> SaPair:
    one, _ = pairs()
    return dataclasses.replace(one, local_ts=NETS, remote_ts=NETS, connection="office/net", **changes)


def action(*command: str, up: bool = True, **changes: Any) -> RunUpdown:
    return RunUpdown(command, up, OFFICE, OFFICE.children[0], pair(), 1, **changes)


class Told(list[dict[str, Any]]):
    def __call__(self, event: str, alert: bool, **fields: Any) -> None:
        self.append({"event": event, "alert": alert, **fields})


def script(directory: Path, body: str) -> str:
    path = directory / "script"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


async def test_it_runs_once_for_each_family_with_strongswans_names(tmp_path: Path) -> None:
    """Arguments go as they are, through no shell; nothing of our own environment is there."""
    out = tmp_path / "out"
    program = script(tmp_path, f'env | sort >> {out}; echo "args $*" >> {out}; echo -- >> {out}')
    told = Told()
    given = {
        "addresses": (ip_address("10.3.0.1"), ip_address("2001:db8:3::1")),
        "dns": (ip_address("10.0.0.53"),),
    }
    await Updown(told).run(action(program, "$(reboot)", "; rm -rf", **given))
    first, second, _ = out.read_text().split("--\n")
    assert told == []
    assert "args $(reboot) ; rm -rf" in first
    for line in (
        "PLUTO_VERB=up-client",
        "PLUTO_CONNECTION=net",
        "PLUTO_IKE_CONNECTION=office",
        "PLUTO_MY_CLIENT=10.1.0.0/16",
        "PLUTO_PEER_CLIENT=10.1.0.0/16",
        "PLUTO_MY_SOURCEIP4_1=10.3.0.1",
        "PLUTO_MY_SOURCEIP6_1=2001:db8:3::1",
        "PLUTO_DNS4_1=10.0.0.53",
    ):
        assert line in first.splitlines(), first
    assert "PLUTO_VERB=up-client-v6" in second
    names = {line.partition("=")[0] for line in first.splitlines() if "=" in line}
    assert {name for name in names if not name.startswith("PLUTO_")} <= {
        "PATH",
        "PWD",
        "SHLVL",
        "OLDPWD",
        "_",
    }


async def test_one_after_the_other_in_their_order(tmp_path: Path) -> None:
    """A slow run up is over before the run down begins."""
    out = tmp_path / "out"
    program = script(tmp_path, f'[ "$1" = slow ] && sleep 0.3; echo "$PLUTO_VERB" >> {out}')
    runner = Updown(Told())
    await asyncio.gather(runner.run(action(program, "slow")), runner.run(action(program, "quick", up=False)))
    verbs = out.read_text().split()
    assert verbs == ["up-client", "up-client-v6", "down-client", "down-client-v6"]


async def test_what_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status with what it says, a program that is not there, one that does not end, and too many that wait."""
    told = Told()
    runner = Updown(told)
    await runner.run(action(script(tmp_path, "echo no way >&2; exit 3")))
    assert "ended with 3: no way" in told[0]["reason"]
    await runner.run(action("/nowhere/at/all"))
    assert "No such file" in told[-1]["reason"]
    monkeypatch.setattr(module, "SECONDS", 0.2)
    began = asyncio.get_running_loop().time()
    await runner.run(action(script(tmp_path, "sleep 60")))
    assert "did not end" in told[-1]["reason"]
    assert asyncio.get_running_loop().time() - began < 10
    await runner.run(action(script(tmp_path, "sleep 2 & exit 0")))  # left running, and none of our concern
    assert len(told) == 6  # three failures, of either family
    monkeypatch.setattr(module, "MAX_WAITING", 0)
    await runner.run(action("/bin/true"))
    assert told[-1]["event"] == "updown-skipped"
    assert all(event["alert"] and event["connection"].startswith("office") for event in told)


def test_host_and_client() -> None:
    """A side that is the outer address itself is a host, as strongSwan calls it."""
    one, _ = pairs()
    host = dataclasses.replace(
        one,
        local_ts=(TrafficSelector.of(one.local.address),),
        remote_ts=(TrafficSelector.of(one.remote.address),),
    )
    (environment,) = environments(RunUpdown((), False, OFFICE, OFFICE.children[0], host, 1))
    assert environment["PLUTO_VERB"] == "down-host"
