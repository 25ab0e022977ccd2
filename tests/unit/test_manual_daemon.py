"""Manual keying in a daemon with fakes for its rooms: reloads, refusals, limits, keys that must not begin anew."""

from __future__ import annotations

import asyncio
import json
import random
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from oepy import config as configuration
from oepy.control import protocol
from oepy.control.client import ControlClient
from oepy.control.server import ControlServer
from oepy.daemon.api import ControlApi
from oepy.daemon.core import Surroundings
from oepy.daemon.datapaths import Chosen
from oepy.daemon.forecast import explain_without_daemon
from oepy.daemon.manual import KernelBackend, ManualKeying, UserlandBackend
from oepy.daemon.runtime import Daemon
from oepy.datapath.xfrm.manual import ManualKernel
from oepy.errors import OepyError, UsageError
from oepy.ike.settings import IkeSettings
from oepy.interfaces import DatapathEvent, TrapPolicy, Way
from oepy.keys import HostKey
from oepy.manual.checks import read_manual
from oepy.manual.model import NOTHING, ManualSet
from oepy.model import Authenticated, PolicyGroup, SaPair
from tests.fakes import manual
from tests.fakes.manual_kernel import MemoryKernel
from tests.fakes.rooms import FakeDatapath, FakeKeys, FakeTrap

A, B = "198.18.0.1", "198.18.0.2"
PEER = ip_address(B)


class RefusingDatapath(FakeDatapath):
    """Takes so many pairs and no more."""

    room = 1

    async def install(self, pair: SaPair, *, outbound: bool = True) -> None:
        if len(self.pairs) >= self.room:
            raise OepyError("no room")
        await super().install(pair, outbound=outbound)


async def daemon_of(path: Path, section: dict[str, Any], datapath: FakeDatapath | None = None) -> Daemon:
    write(path, section)
    daemon = Daemon(configuration.load(path), str(path), lambda _: None)
    daemon.host_key = HostKey.generate("ed25519")
    daemon.host_key.save(path.with_name("host.key"))
    loop = asyncio.get_running_loop()
    daemon.wire(
        Surroundings(
            keys=FakeKeys({}),
            trap=FakeTrap(),
            datapath=datapath or FakeDatapath(random.Random(1).randbytes),
            send=lambda _: None,
            monotonic=loop.time,
            host_key=daemon.host_key,
            identity=None,
            ike_settings=IkeSettings(),
            is_own=lambda address: str(address) == A,
            source_towards=lambda _: ip_address(A),
        )
    )
    daemon.chosen = Chosen("tun", daemon.datapath, "a test", device="oe0")
    daemon.manual = ManualKeying(UserlandBackend(daemon.datapath, loop.time))
    await daemon.manual.start(daemon.config.manual)
    daemon.trap.start(daemon._trap_policy(daemon.config), lambda *_: None)
    return daemon


def write(path: Path, section: dict[str, Any]) -> None:
    path.touch(mode=0o600)
    path.write_text(
        json.dumps(
            {
                "identity": {"key": str(path.with_name("host.key"))},
                "dns": {"resolvers": ["127.0.0.1"]},
                "manual": section,
            }
        )
    )


def rules(daemon: Daemon) -> list[Way]:
    assert isinstance(daemon.trap, FakeTrap)
    return [rule.way for rule in daemon.trap.policy.configured]


async def settled(daemon: Daemon) -> None:
    for _ in range(5):
        await asyncio.sleep(0)
    await daemon.steps.idle()


def events(daemon: Daemon) -> list[tuple[str, str]]:
    return [(event["event"], event.get("reason", "")) for event in daemon.journal.recent(100)]


def aead(**changes: Any) -> dict[str, Any]:
    gone = dict.fromkeys(("encryption", "encryption_key", "integrity", "integrity_key"))
    return {"aead": "aes128gcm16", "aead_key": manual.key(1, 20), "allow_weak": True, **gone, **changes}


async def test_start_installs_pairs_and_gives_the_trap_its_rules(tmp_path: Path) -> None:
    """The pair is authenticated `manual`; the engine takes its destination for settled and admits nobody there."""
    daemon = await daemon_of(tmp_path / "c", manual.section(A, B))
    (pair,) = daemon.datapath.pairs.values()  # type: ignore[attr-defined]
    assert pair.authenticated is Authenticated.MANUAL
    assert rules(daemon) == [Way.OUT, Way.IN]
    assert daemon.engine.settings.group_of(PEER)[0] is PolicyGroup.CLEAR
    assert "does not answer" in daemon.engine.refuses_responder(PEER, Authenticated.DNS)
    with pytest.raises(OepyError, match="keyed by hand"):
        await ControlApi(daemon).initiate(PEER, 1.0)
    assert (await ControlApi(daemon).explain(PEER))["sa"]["authenticated"] == "manual"


async def test_a_configuration_that_userland_cannot_serve_does_not_start(tmp_path: Path) -> None:
    """AH, and a policy without its counterpart: refused as a whole, with the reason."""
    one_way = {"sas": manual.sas(A, B), "policies": manual.policies(A, B)[:1]}
    with pytest.raises(UsageError, match="needs an `in` policy"):
        await daemon_of(tmp_path / "c", one_way)


async def test_a_refused_change_leaves_all_as_it_was(tmp_path: Path) -> None:
    """The datapath has no room for the second pair, or the trap refuses: SAs, rules and lists are as before."""
    daemon = await daemon_of(
        tmp_path / "c", manual.section(A, B), RefusingDatapath(random.Random(1).randbytes)
    )
    before, spis = daemon.manual.effective, set(daemon.datapath.pairs)  # type: ignore[attr-defined]
    other = "198.18.0.9"
    for spi, (src, dst) in ((0x2001, (A, other)), (0x2002, (other, A))):
        await daemon.change_manual("sa-add", manual.sa(src, dst, spi))
    with_sas = daemon.manual.effective
    out, back = manual.policies(A, other)
    await daemon.change_manual("policy-add", out)
    with pytest.raises(OepyError, match="no room"):
        await daemon.change_manual("policy-add", back)
    assert len(daemon.manual.effective.policies) == len(with_sas.policies) + 1
    assert set(daemon.datapath.pairs) == spis  # type: ignore[attr-defined]
    await daemon.change_manual("policy-delete", {name: out[name] for name in ("direction", "src", "dst")})

    def refuse(_policy: TrapPolicy) -> None:
        raise OepyError("nft refused the rules")

    daemon.trap.reload = refuse  # type: ignore[method-assign]
    with pytest.raises(OepyError, match="nft refused"):
        await daemon.change_manual("sa-flush", {})
    assert daemon.manual.effective == with_sas
    assert before.policies == daemon.manual.effective.policies
    assert set(daemon.datapath.pairs) == spis  # type: ignore[attr-defined]


async def test_a_reload_applies_what_changed(tmp_path: Path) -> None:
    """A new policy comes, the SA stays untouched; a mistake refuses the reload as a whole."""
    path = tmp_path / "c"
    section = manual.section(A, B)
    daemon = await daemon_of(path, section)
    (pair,) = daemon.datapath.pairs.values()  # type: ignore[attr-defined]
    block = {"direction": "out", "src": A, "dst": "192.0.2.0/24", "action": "block"}
    write(path, {**section, "policies": [*section["policies"], block]})
    daemon.reload()
    await settled(daemon)
    assert rules(daemon) == [Way.OUT, Way.IN, Way.OUT]
    assert daemon.datapath.pairs[pair.spi_in] is pair  # type: ignore[attr-defined]
    write(path, {**section, "policies": section["policies"][:1]})
    daemon.reload()
    await settled(daemon)
    assert events(daemon)[-1][0] == "reload-refused"
    assert len(daemon.manual.effective.policies) == 3
    write(path, {})
    daemon.reload()
    await settled(daemon)
    assert (rules(daemon), daemon.datapath.pairs) == ([], {})  # type: ignore[attr-defined]


async def test_a_counter_never_begins_anew_under_one_key(tmp_path: Path) -> None:
    """The key of an AEAD that was in use is refused in this process's life: nonces would repeat (RFC 8221 §5)."""
    path = tmp_path / "c"
    section = {"sas": manual.sas(A, B, **aead()), "policies": manual.policies(A, B)}
    daemon = await daemon_of(path, section)
    removed = section["sas"][0]
    await daemon.change_manual("sa-delete", {name: removed[name] for name in ("dst", "protocol", "spi")})
    with pytest.raises(UsageError, match="must not begin anew"):
        await daemon.change_manual("sa-add", removed)
    assert daemon.datapath.pairs == {}  # type: ignore[attr-defined]
    await daemon.change_manual("sa-add", {**removed, "aead_key": manual.key(9, 20)})
    assert len(daemon.datapath.pairs) == 1  # type: ignore[attr-defined]
    lost = await daemon.manual.restarted()
    assert "was in use before" in lost[0]


async def test_pairs_come_back_with_the_datapath(tmp_path: Path) -> None:
    """When the datapath process has ended, AES-CBC pairs are installed again."""
    daemon = await daemon_of(tmp_path / "c", manual.section(A, B))
    daemon.datapath.pairs.clear()  # type: ignore[attr-defined]
    assert await daemon.manual.restarted() == []
    assert len(daemon.datapath.pairs) == 1  # type: ignore[attr-defined]


async def test_limits_are_told_and_nothing_begins_again(tmp_path: Path) -> None:
    """Soft and hard limits raise an alert that asks for a new key; what has ended stays ended."""
    daemon = await daemon_of(tmp_path / "c", manual.section(A, B))
    (spi,) = daemon.datapath.pairs  # type: ignore[attr-defined]
    daemon.on_datapath_event(DatapathEvent("soft-expire", spi, PEER))
    daemon.on_datapath_event(DatapathEvent("hard-expire", spi, PEER))
    told = [reason for event, reason in events(daemon) if event == "manual-sa-expires"]
    assert ["will end soon" in told[0], "has ended" in told[1]] == [True, True]
    listed = await ControlApi(daemon).manual_list(everybodys=False)
    assert {sa["state"] for sa in listed["sas"]} == {"has reached its hard limit"}
    await daemon.datapath.remove(spi)
    await daemon.change_manual(
        "policy-add", {"direction": "fwd", "src": "10.0.0.0/8", "dst": A, "action": "block"}
    )
    assert daemon.datapath.pairs == {}  # type: ignore[attr-defined]


async def test_commands_over_the_socket(tmp_path: Path) -> None:
    """Lists without keys; mistakes with exit status 2; what is not there with 1."""
    daemon = await daemon_of(tmp_path / "c", manual.section(A, B))
    server = ControlServer(ControlApi(daemon), tmp_path / "s")
    await server.start()
    client = ControlClient(tmp_path / "s")

    def post(operation: object, entry: object) -> Any:
        return client.post(protocol.MANUAL, {"operation": operation, "entry": entry})

    try:
        listed = await asyncio.to_thread(client.get, protocol.MANUAL)
        assert ([len(listed["sas"]), len(listed["policies"])]) == [2, 2]
        assert manual.key(0x1001)[2:] not in json.dumps(listed)
        rows = await asyncio.to_thread(client.get, protocol.POLICIES)
        assert [row["group"] for row in rows] == ["manual", "manual", "private-or-clear"]
        for operation, entry, status in (
            ("sa-add", manual.sa(A, B, 0x1001), 2),
            ("sa-add", {"encryption_key_file": "/etc/shadow"}, 2),
            ("sa-add", ["x"], 2),
            ("sa-delete", {"dst": B, "protocol": "esp", "spi": 0x9999}, 1),
            (None, None, 2),
        ):
            with pytest.raises(OepyError) as caught:
                await asyncio.to_thread(post, operation, entry)
            assert caught.value.exit_status == status
        assert (await asyncio.to_thread(post, "policy-flush", None))["removed"] == 2
    finally:
        await server.stop()


async def test_what_commands_made_in_the_kernel_outlives_the_daemon() -> None:
    """Entries from before the daemon are in effect in it; with it go those of its configuration alone. An SA at its
    hard limit, which the kernel has removed, does not begin anew."""
    memory = MemoryKernel()
    kernel = ManualKernel(memory, lambda _: False)

    def block(network: str) -> dict[str, str]:
        return {"direction": "out", "src": A, "dst": network, "action": "block"}

    def read(section: dict[str, Any]) -> ManualSet:
        found, problems = read_manual(section, lambda _: b"")
        assert problems == []
        return found

    kernel.change(NOTHING, read({"policies": [block("192.0.2.0/24")]}))
    keying = ManualKeying(KernelBackend(kernel))
    await keying.start(read({"sas": manual.sas(A, B, encap=None), "policies": [block("198.51.100.0/24")]}))
    assert len(keying.effective.policies) == len(memory.policies) == 2
    await keying.take(keying.after("policy-add", block("203.0.113.0/24")))
    gone = next(iter(memory.sas))
    del memory.sas[gone]
    await keying.take(keying.after("policy-add", block("10.0.0.0/8")))
    assert gone not in memory.sas
    await keying.stop()
    left = {str(policy.selector.dst) for policy in kernel.current().policies}
    assert left == {"192.0.2.0/24", "203.0.113.0/24", "10.0.0.0/8"}
    assert memory.sas == {}


async def test_the_configuration_comes_before_leftovers() -> None:
    """After a crash and a change of the configuration the kernel holds what is no longer so: it gives way."""
    memory = MemoryKernel()
    kernel = ManualKernel(memory, lambda _: False)

    def read(*policies: dict[str, Any], **changes: Any) -> ManualSet:
        found, problems = read_manual(
            {"sas": manual.sas(A, B, encap=None, **changes), "policies": list(policies)}, lambda _: b""
        )
        assert problems == []
        return found

    out, back = manual.policies(A, B)
    other = {"direction": "out", "src": A, "dst": "192.0.2.0/24", "action": "block"}
    kernel.change(NOTHING, read({**out, "priority": 7}, back, other))
    keying = ManualKeying(KernelBackend(kernel))
    new = read(out, back, replay_window=32)
    await keying.start(new)
    assert kernel.current().sas == new.sas
    assert {str(policy.selector.dst) for policy in keying.effective.policies} == {
        f"{A}/32",
        f"{B}/32",
        "192.0.2.0/24",
    }
    assert 7 not in {policy.priority for policy in kernel.current().policies}
    await keying.stop(keep_shut=True)
    assert memory.sas == {}
    assert len(kernel.current().policies) == 3
    hiding = {"direction": "out", "src": A, "dst": "192.0.0.0/16", "action": "block", "priority": 1}
    await keying.start(read(out, back, hiding))
    assert "192.0.2.0/24" not in {str(policy.selector.dst) for policy in kernel.current().policies}


def test_explain_without_a_daemon_knows_the_policies(tmp_path: Path) -> None:
    """`oepy explain` says what would happen, without asking the DNS."""
    write(tmp_path / "c", manual.section(A, B))
    story = explain_without_daemon(str(tmp_path / "c"), PEER)
    assert (story["group"], story["disposition"]) == ("manual", "private")
