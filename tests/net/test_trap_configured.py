"""Configured rules in the kernel: as `nft` reads them, changed by the difference, and never open in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from oepy.errors import OepyError
from oepy.exchange import exchange
from oepy.interfaces import ConfiguredRule, TrapPolicy, Way
from oepy.lab.capture import Capture
from oepy.lab.namespaces import Namespace
from oepy.model import Mark, PolicyGroup, Verdict
from oepy.trap import configured as configured_rules
from oepy.trap import islands, kernel, switch
from oepy.trap.rules import Ruleset
from oepy.trap.standing import Standing
from tests.net.harness import (
    A4,
    B4,
    TrapIn,
    Wired,
    address,
    arrived,
    listen_udp,
    received,
    trapping,
    udp,
    until,
    wired,
)
from tests.net.test_trap import _NEVER_STOPS

pytestmark = [pytest.mark.root, pytest.mark.any_kernel]

CHANGES = 20 if os.environ.get("OEPY_SECOND_KERNEL") else 100  # its processor is emulated


@pytest.fixture(scope="module")
def net() -> Iterator[Wired]:
    with wired() as made:
        yield made


def out(source: str, destination: str, number: int = 0, **more: Any) -> ConfiguredRule:
    verdict = more.pop("verdict", Verdict.PRIVATE)
    return ConfiguredRule(
        Way.OUT, ip_network(source), ip_network(destination), verdict, number=number, **more
    )


def both_ways(here: str, there: str, number: int, **more: Any) -> list[ConfiguredRule]:
    inward = ConfiguredRule(Way.IN, ip_network(there), ip_network(here), Verdict.BLOCK, number=number, **more)
    return [out(here, there, number, **more), inward, replace(inward, way=Way.FORWARD)]


def with_rules(*rules: ConfiguredRule) -> TrapPolicy:
    return TrapPolicy((), PolicyGroup.CLEAR, (), configured=rules)


def listed(namespace: Namespace, table: str = "oepy") -> dict[str, Any]:
    """Each key of each configured map with the rules that it leads to, and the sets, by `nft`'s own reading."""
    found = json.loads(namespace.run("nft", "-j", "list", "table", "inet", table).stdout)["nftables"]
    chains: dict[str, list[Any]] = {}
    for item in found:
        if "rule" in item:
            chains.setdefault(item["rule"]["chain"], []).append(item["rule"]["expr"])
    maps = {item["map"]["name"]: item["map"] for item in found if "map" in item}
    jumps = {
        (name, str(key)): target["jump"]["target"]
        for name, each in maps.items()
        if name.startswith("configured_")
        for key, target in each.get("elem", [])
    }
    names = {item["chain"]["name"] for item in found if "chain" in item}
    assert {name for name in names if name.startswith("configured_")} == set(jumps.values())
    configured = {place: chains.get(target, []) for place, target in jumps.items()}
    sets = sorted(item["set"]["name"] for item in found if "set" in item)
    return {"configured": configured, "sets": sets}


def lines(namespace: Namespace, table: str = "oepy") -> list[str]:
    text = namespace.run("nft", "-nn", "list", "table", "inet", table).stdout
    chain, found = "", []
    for line in (line.strip() for line in text.splitlines()):
        if line.startswith("chain "):
            chain = line.split()[1]
        elif chain.startswith("configured_") and line not in ("}", ""):
            found.append(line)
    return found


async def test_as_nft_reads_them(net: Wired) -> None:
    """Selectors of both families, narrower before wider, ports, protocols, what is up of a child, verdicts."""
    rules = (
        out("192.0.2.0/24", "10.1.2.3/32", 5, protocol=6, destination_port=443, required=True),
        out("192.0.2.10/32", "10.1.0.0/16", 6),
        out("0.0.0.0/0", "10.1.0.0/16", verdict=Verdict.CLEAR),
        out("192.0.2.10/32", "10.1.0.0/24", 8, mark=Mark(0x2A, 0xCFFFFFFF), required=True),
        *both_ways("2001:db8::/64", "2001:db8:1::/48", 7, protocol=17, source_port=53, required=True)[:2],
        ConfiguredRule(
            Way.FORWARD, ip_network("0.0.0.0/0"), ip_network("192.0.2.0/24"), Verdict.CLEAR, protocol=1
        ),
    )
    with trapping(net.a, with_rules(*rules)):
        assert sorted(lines(net.a)) == sorted(
            [
                "ip saddr 192.0.2.0/24 ip daddr 10.1.2.3 tcp dport 443 ip daddr @joined_5_4 goto tunnel",
                "ip saddr 192.0.2.0/24 ip daddr 10.1.2.3 tcp dport 443 goto ask_closed",
                "ip saddr 192.0.2.10 ip daddr 10.1.0.0/16 ip daddr @joined_6_4 goto tunnel",
                "ip daddr 10.1.0.0/16 accept",
                "meta mark & 0xcfffffff == 0x0000002a ip saddr 192.0.2.10 ip daddr 10.1.0.0/24 "
                "ip daddr @joined_8_4 goto tunnel",
                "meta mark & 0xcfffffff == 0x0000002a ip saddr 192.0.2.10 ip daddr 10.1.0.0/24 goto ask_closed",
                "ip6 saddr 2001:db8::/64 ip6 daddr 2001:db8:1::/48 udp sport 53 "
                "ip6 daddr @joined_7_6 goto tunnel",
                "ip6 saddr 2001:db8::/64 ip6 daddr 2001:db8:1::/48 udp sport 53 goto ask_closed",
                "ip6 saddr 2001:db8:1::/48 ip6 daddr 2001:db8::/64 udp sport 53 drop",
                "ip daddr 192.0.2.0/24 meta l4proto 1 goto sort",
            ]
        )
        keys = {key for _, key in listed(net.a)["configured"]}
        assert keys == {"10.1.0.0", "2001:db8:1::", "0.0.0.0", "128.0.0.0"}


async def test_marked_packets_are_their_childs(net: Wired) -> None:
    """Of two children with the same selectors the mark decides; what has none is its group's, in the clear or held.
    Where the child holds its traffic, a stopped trap keeps what is marked shut, and nothing else."""

    def held(trap: TrapIn) -> dict[Any, int]:
        return dict(trap.trap.held())

    rules = [
        *both_ways(f"{A4}/32", f"{B4}/32", 5, mark=Mark(0x11, 0xFF), required=True),
        *both_ways(f"{A4}/32", f"{B4}/32", 6, mark=Mark(0x22, 0xFF)),
    ]
    with (
        listen_udp(net.b, B4, 7100) as listener,
        udp(net.a, B4, 7100) as plain,
        udp(net.a, B4, 7100, mark=0x4411) as red,
        udp(net.a, B4, 7100, mark=0x22) as blue,
    ):
        with trapping(net.a, with_rules(*rules)) as trap:
            for name, sender in ((b"red", red), (b"plain", plain), (b"blue", blue)):
                sender.send(name)
            await until(lambda: held(trap) == {(5, address(B4)): 1})
            assert await arrived(listener, 2) == [b"plain", b"blue"]  # blue's child is down and holds nothing
        with trapping(net.a, TrapPolicy((), PolicyGroup.PRIVATE, (), configured=tuple(rules))) as trap:
            for sender in (red, plain, blue):
                sender.send(b"held")
            await until(lambda: sum(held(trap).values()) == 3)
            assert held(trap) == {(5, address(B4)): 1, (PolicyGroup.PRIVATE, address(B4)): 2}
            assert received(listener) == []
        inside = TrapIn(net.a)
        inside.start(with_rules(*rules))
        inside.stop(guard=True)
        for name, sender in ((b"red", red), (b"plain", plain)):
            with contextlib.suppress(PermissionError):
                sender.send(name)
        assert await arrived(listener, 1) == [b"plain"]
        inside.start(with_rules())
        inside.stop(guard=False)


def test_the_difference_is_what_a_fresh_load_makes(net: Wired) -> None:
    """Forty random changes, with prefixes in one another, new lengths and none left: each time the same as loaded
    anew elsewhere, and no chain or set is left over."""
    dice = random.Random(4)
    networks = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "10.1.2.4/32", "0.0.0.0/0"]
    networks += ["10.2.0.0/16", "2001:db8::/32", "2001:db8:1::/48", "2001:db8:1::1/128"]
    pool = []
    for number in range(1, 25):
        there = dice.choice(networks)
        here = "2001:db8:9::1/128" if ":" in there else "192.0.2.10/32"
        more: dict[str, Any] = {"required": dice.random() < 0.5, "protocol": dice.choice((0, 6))}
        pool.append(both_ways(here, there, number, **more))
    pool.append([out("0.0.0.0/0", "10.1.2.0/24", verdict=Verdict.BLOCK)])
    pool = [[replace(rule, rank=(place,)) for rule in group] for place, group in enumerate(pool)]
    current = with_rules(*(rule for group in pool[:3] for rule in group))
    with net.a.entered():
        changer = kernel.Tables()
        ruleset = Ruleset(current)
        standing = Standing(current, ruleset.islands)
        configured = switch.take_over(current, ruleset, changer)
    with net.b.entered():
        elsewhere = kernel.Tables()
    for _ in range(40):
        chosen = [group for group in pool if dice.random() < 0.3]
        following = with_rules(*(rule for group in chosen for rule in group))
        changes = exchange(current.configured, following.configured)
        found = standing.difference(configured.there, changes)
        with net.a.entered():
            if islands.lengths(found.fresh) <= ruleset.lengths:
                switch.change_configured(following, found, configured, changer)
                standing.take(following, changes, found)
            else:
                new = Ruleset(following)
                switch.change(following, ruleset, new, configured, changer)
                ruleset, standing = new, Standing(following, new.islands)
        with net.b.entered():
            switch.take_over(following, Ruleset(following), elsewhere)
        assert listed(net.a) == listed(net.b)
        assert "oepy_bracket" not in net.a.run("nft", "list", "tables").stdout
        current = following
    for namespace, tables in ((net.a, changer), (net.b, elsewhere)):
        with namespace.entered():
            switch.leave(current, False, tables)
        tables.close()


async def test_in_several_transactions_what_is_up_stays_up(
    net: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Islands that one wider prefix swallows: the sets of what their children have joined keep their elements."""
    monkeypatch.setattr(configured_rules, "MAX_AT_ONCE", 1)
    narrow = [r for n in (1, 2, 3) for r in both_ways("192.0.2.10/32", f"10.{n}.0.0/16", n, required=True)]
    first, second = (
        with_rules(*narrow),
        with_rules(*narrow, *both_ways("192.0.2.10/32", "10.0.0.0/8", 9)),
    )
    with trapping(net.a, first) as trap:
        joined = ip_network("10.2.0.0/24")
        trap.trap.join(2, (), [(joined[0], joined[-1])])
        trap.reload(second)
        assert "10.2.0.0/24" in net.a.run("nft", "list", "set", "inet", "oepy", "joined_2_4").stdout
        assert len(listed(net.a)["configured"]) == 3
        trap.reload(first)
        assert "10.2.0.0/24" in net.a.run("nft", "list", "set", "inet", "oepy", "joined_2_4").stdout
        assert len(listed(net.a)["configured"]) == 9


def test_what_the_kernel_refuses_changes_nothing(net: Wired) -> None:
    """Somebody else leads into a chain of ours, so that it cannot go: the old rules stay, all of them."""
    first = with_rules(*both_ways("192.0.2.10/32", "10.1.0.0/16", 1, required=True))
    second = with_rules(*both_ways("192.0.2.10/32", "10.2.0.0/16", 2, required=True))
    with net.a.entered():
        changer = kernel.Tables()
        configured = switch.take_over(first, Ruleset(first), changer)
        before = listed(net.a)
        net.a.run("nft", "add chain inet oepy foreign; add rule inet oepy foreign jump configured_1")
        wanted = islands.difference(configured.there, islands.islands(second.configured))
        with pytest.raises(OepyError, match="refused the rules of connections"):
            switch.change_configured(second, wanted, configured, changer)
        assert listed(net.a) == before
        net.a.run("nft", "flush chain inet oepy foreign; delete chain inet oepy foreign")
        switch.change_configured(second, wanted, configured, changer)
        assert listed(net.a) != before
        switch.leave(second, False, changer)
        changer.close()


def test_the_guard_keeps_what_is_required(net: Wired) -> None:
    """And nothing else: a connection that is not required passes while no daemon runs."""
    chosen = with_rules(
        *both_ways("192.0.2.10/32", "10.1.0.0/16", 1, required=True),
        *both_ways("192.0.2.10/32", "10.2.0.0/16", 2),
    )
    with net.a.entered():
        changer = kernel.Tables()
        switch.take_over(chosen, Ruleset(chosen), changer)
        switch.leave(chosen, True, changer)
        try:
            assert set(lines(net.a, "oepy_guard")) == {
                "ip saddr 192.0.2.10 ip daddr 10.1.0.0/16 drop",
                "ip saddr 10.1.0.0/16 ip daddr 192.0.2.10 drop",
            }
        finally:
            switch.leave(chosen, False, changer)
            changer.close()


async def test_no_change_of_connections_opens_one(net: Wired, tmp_path: Path) -> None:
    """A child that must be private, whose island is changed many times by another child in it and by a wider
    one around it; a sender in a tight loop gets nothing through."""
    kept = both_ways(f"{A4}/32", f"{B4}/32", 1, required=True)
    inside = both_ways(f"{A4}/32", f"{B4}/32", 2, required=True, protocol=17, destination_port=9)
    around = both_ways(f"{A4}/32", "198.18.0.0/24", 3, required=True)
    beside = both_ways(f"{A4}/32", "10.1.1.1/32", 4)
    states = [kept, [*inside, *kept], [*kept, *around], [*kept, *beside]]
    with (
        trapping(net.a, with_rules(*kept, *around)) as trap,
        Capture(net.b, "eth0", tmp_path / "p") as capture,
    ):
        sender = net.a.popen(sys.executable, "-c", _NEVER_STOPS, B4, stdout=subprocess.PIPE)
        assert sender.stdout is not None
        assert sender.stdout.readline() == "sending\n"
        for turn in range(CHANGES):
            trap.reload(with_rules(*states[turn % 4]))
            await asyncio.sleep(0.001)
        leaked = [packet for packet in capture.packets() if packet.source == address(A4)]
        sender.kill()
        sender.wait()
    assert leaked == []


async def test_what_the_kernel_decrypts_past_the_device(net: Wired) -> None:
    """Transport mode over the kernel's ESP: its own chains, and the kernel's word on the way in."""
    rules = both_ways("192.0.2.10/32", "10.1.0.0/16", 9, required=True, transport=True)
    chosen = replace(with_rules(*rules), kernel_ipsec=True)
    with trapping(net.a, chosen):
        there = "ip saddr 10.1.0.0/16 ip daddr 192.0.2.10"
        assert lines(net.a) == [
            "ip saddr 192.0.2.10 ip daddr 10.1.0.0/16 ip daddr @joined_9_4 goto kernel",
            "ip saddr 192.0.2.10 ip daddr 10.1.0.0/16 goto ask_closed",
            *[f"{there} ip saddr @joined_9_4 meta ipsec 1 goto decrypted", f"{there} drop"] * 2,
        ]
