"""Keys of a connection's child that reach the trap and the datapath: marks, interfaces, priority."""

from __future__ import annotations

import dataclasses
import socket
import sys
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.connections.model import Child
from oepy.daemon.connection_values import both_ways, first_of, order_of
from oepy.daemon.datapaths import userland_lacks
from oepy.daemon.updown import environments
from oepy.datapath.esp.database import SaDatabase
from oepy.datapath.esp.sa import EspPair
from oepy.datapath.tun import control
from oepy.datapath.tun.forwarder import Forwarder
from oepy.datapath.xfrm import plan
from oepy.datapath.xfrm.spd import Claims
from oepy.errors import OepyError
from oepy.interfaces import ConfiguredRule, Way
from oepy.model import MARK_MASK, NO_MARKS, Copied, Endpoint, Flow, Mark, Marks, SaPair
from oepy.trap.joined import Asking
from oepy.xfrm import requests
from oepy.xfrm import values as v
from tests.fakes.connections import between, good, read
from tests.fakes.datapath import MemoryDevice, MemorySocket, ipv4_packet, ipv6_packet, pairs, selector
from tests.unit.test_updown import action

PSK = {"psk": b"correct horse\n"}
A, B = "192.0.2.1", "192.0.2.2"
U32 = st.integers(0, 0xFFFFFFFF)


def child_of(**child: Any) -> Child:
    (connection,) = good(between(A, B, own="a.example", peer="b.example", child=child), PSK).connections
    return connection.children[0]


def problems_of(**child: Any) -> list[str]:
    _, problems = read(between(A, B, own="a.example", peer="b.example", child=child), PSK)
    return [f"{problem.path[-1]}: {problem.text}" for problem in problems]


def test_marks_are_read_as_swanctl_writes_them() -> None:
    """Numbers, numbers with a mask, %same; none has oepy's own bits, which are left out of the default mask too."""
    found = child_of(mark_in=42, mark_out="0x12a/0xff", set_mark_in="%same/0x3f", set_mark_out="7").marks
    assert found == Marks(Mark(42, 0xCFFFFFFF), Mark(0x2A, 0xFF), Mark(42, 0x3F), Mark(7, 0xCFFFFFFF))
    assert child_of(mark_out=0).marks.outward == Mark(0, 0xCFFFFFFF)
    assert child_of().marks == NO_MARKS


@pytest.mark.parametrize(
    ("child", "words"),
    [
        ({"mark_in": "%unique"}, "mark_in: %unique: a mark of each SA's own"),
        ({"mark_out": "%unique-dir/0xff"}, "write a number for each child"),
        ({"set_mark_in": "%same"}, "which is not there"),
        ({"mark_in": 5, "set_mark_out": "%same"}, "which is not there"),
        ({"mark_out": "blue"}, "number/mask"),
        ({"mark_out": "5/"}, "number/mask"),
        ({"mark_out": 1 << 32}, "32 bits"),
        ({"mark_out": "-1"}, "32 bits"),
        ({"mark_out": "0x10000001"}, "oepy's own; take others"),
        ({"mark_in_sa": True}, "policies alone"),
        ({"mark_out": "0/0x30000000"}, "no bit is left"),
    ],
)
def test_marks_that_cannot_be(child: dict[str, Any], words: str) -> None:
    """Each is named with its mend."""
    assert any(words in text for text in problems_of(**child)), problems_of(**child)


def test_assigned_addresses_do_not_go_with_mark_out() -> None:
    """Their routes are for whatever goes there, marked or not."""
    children = {"net": {"remote_ts": ["10.2.0.0/16"], "mark_out": 1}}
    text = between(A, B, own="a.example", peer="b.example", vips=["0.0.0.0"], children=children)
    _, problems = read(text, PSK)
    assert [problem.path[-1] for problem in problems] == ["mark_out"]


@given(U32, U32, U32)
def test_a_mark_never_looks_at_our_own_bits(value: int, mask: int, packet: int) -> None:
    """Whatever is configured: what the trap does with its bits changes no match."""
    try:
        found = child_of(mark_out=f"{value}/{mask:#x}").marks.outward
    except AssertionError:
        assert value & mask & MARK_MASK or not mask & ~MARK_MASK
        return
    assert found is not None
    assert found.matches(packet) is found.matches(packet ^ MARK_MASK)
    assert found.matches(packet) is ((packet & mask & ~MARK_MASK) == (value & mask))


def rules_of(number: int, marks: Marks, *, required: bool = True) -> list[ConfiguredRule]:
    ours, theirs = ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16")
    return list(
        both_ways(*(ours, theirs, 0, 0, 0), number=number, required=required, transport=False, marks=marks)
    )


def test_a_packet_asks_for_the_child_of_its_mark() -> None:
    """Outward rules have mark_out, inward ones mark_in; of two children with the same selectors the marked one is
    asked first, and what has no mark, or another one, is not its."""
    red = rules_of(1, Marks(inward=Mark(9), outward=Mark(0x11, 0xFF)))
    assert {(rule.way, rule.mark) for rule in red} == {
        (Way.OUT, Mark(0x11, 0xFF)),
        (Way.IN, Mark(9)),
        (Way.FORWARD, Mark(9)),
    }
    flow = Flow(ip_address("10.1.0.1"), ip_address("10.2.0.1"), 6, 40000, 80)
    alone = Asking(red)
    assert [alone.number_of(flow, mark) for mark in (0x11, 0x211, 0, 0x12)] == [1, 1, 0, 0]
    both = Asking([*rules_of(2, NO_MARKS), *red])
    assert [both.number_of(flow, mark) for mark in (0x11, 0, 0x12)] == [1, 2, 2]


@pytest.mark.parametrize("scheme", [plan.BY_DEVICE, plan.BY_MARK, plan.BARE])
def test_the_kernels_policies_and_sas_have_the_marks(scheme: plan.Scheme) -> None:
    """Beside those of the scheme; and a marked policy comes before one of the same selector without a mark."""
    pair = dataclasses.replace(pairs()[0], connection="office/net")
    marks = Marks(Mark(1, 0xF), Mark(2, 0xF), Mark(3, 0xF), Mark(4, 0xF))
    marked = dataclasses.replace(pair, marks=marks)
    inbound, outbound = plan.sas(marked, 7, scheme)
    assert inbound.set_mark == Mark(3, 0xF)
    assert outbound.set_mark == Mark(0x20000004, 0x3000000F)
    assert inbound.mark is outbound.mark is None
    (inward,) = [p for p in plan.inward_policies(marked, 7, scheme) if p.direction is v.PolicyDirection.IN]
    (outward,) = plan.outward_policies(marked, 7, scheme)
    own = scheme.mark or Mark(0, 0)
    assert inward.mark == Mark(1, 0xF)
    assert outward.mark == Mark(own.value | 2, own.mask | 0xF)
    (plain,) = plan.outward_policies(pair, 7, scheme)
    assert plain.mark == scheme.mark
    assert outward.priority < plain.priority


@pytest.mark.parametrize("scheme", [plan.BY_DEVICE, plan.BY_MARK])
def test_each_direction_has_its_interface(scheme: plan.Scheme) -> None:
    """Where only one has one of the administrator's, the other goes the datapath's own way."""
    pair, _ = pairs()
    for ids in ((42, 43), (42, 0), (0, 43)):
        made = dataclasses.replace(pair, if_id_in=ids[0], if_id_out=ids[1])
        wanted = tuple(number or scheme.if_id for number in ids)
        assert tuple(sa.if_id for sa in plan.sas(made, 7, scheme)) == wanted
        inward, outward = (
            list(policies(made, 7, scheme)) for policies in (plan.inward_policies, plan.outward_policies)
        )
        assert {policy.if_id for policy in inward} == {wanted[0]}
        assert {policy.if_id for policy in outward} == {wanted[1]}
        assert {policy.mark for policy in outward} == {None if ids[1] else scheme.mark}


REMOTES = ["10.2.0.0/15", "10.2.0.0/16", "10.2.3.0/24", "10.2.3.4/32"]
LOCALS = ["10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24"]
SETUPS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1, 7, 10_000]),
        st.sampled_from(LOCALS),
        st.sampled_from(REMOTES),
        st.sampled_from(["", "[tcp]", "[tcp/80]"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(SETUPS, st.booleans())
def test_which_child_wins_is_the_same_everywhere(
    setups: list[tuple[int, str, str, str, bool]], other_order: bool
) -> None:
    """By priority, then the narrower remote, then local selectors, ports, protocols, marks: in the trap's rules,
    both datapaths and the list of policies, whatever the order in which the tunnels come up."""
    children = {
        f"c{place}": {"local_ts": [here], "remote_ts": [there + suffix], "priority": first}
        | ({"mark_out": "0x11/0xff", "mark_in": "0x11/0xff"} if marked else {})
        for place, (first, here, there, suffix, marked) in enumerate(setups)
    }
    (connection,) = good(between(A, B, own="a.example", peer="b.example", children=children), PSK).connections
    flow = Flow(ip_address("10.1.1.1"), ip_address("10.2.3.4"), 6, 40000, 80)
    rules: list[ConfiguredRule] = []
    database, policies = SaDatabase(), []
    made = list(enumerate(connection.children, 1))
    for number, child in reversed(made) if other_order else made:
        (local,), (remote,) = child.local_ts, child.remote_ts
        assert local.network is not None
        assert remote.network is not None
        rules += both_ways(
            *(local.network, remote.network, remote.protocol, local.port, remote.port),
            number=number,
            required=True,
            transport=False,
            marks=child.marks,
            first=first_of(child),
            stands=(number,),
        )
        ours, theirs = local.at(None), remote.at(None)
        assert ours is not None
        assert theirs is not None
        pair, _ = pairs(selectors=(ours, theirs), spis=(0x1000 + number, 1))
        pair = dataclasses.replace(pair, connection=connection.label(child), priority=child.priority)
        pair = dataclasses.replace(pair, marks=child.marks)
        database.add(EspPair(pair, 0.0))
        database.enable_sending(database.by_spi[pair.spi_in.to_bytes(4, "big")])
        for direction in (plan.outward_policies, plan.inward_policies):
            policies += [
                (policy.priority, policy.direction, number) for policy in direction(pair, 1, plan.BARE)
            ]
    by_trap = Asking(rules).number_of(flow, 0x11)
    for way in v.PolicyDirection:
        assert min(item for item in policies if item[1] is way)[-1] == by_trap
    found = database.outbound(
        ipv4_packet("10.1.1.1", "10.2.3.4", ports=(40000, 80), protocol=6), Mark(0x11, 0xFF)
    )
    assert found is not None
    assert found.pair.spi_in == 0x1000 + by_trap
    first = min(made, key=lambda item: order_of(item[1], item[1].local_ts[0], item[1].remote_ts[0]))
    assert first[0] == by_trap


def test_of_one_selector_the_lower_priority_has_the_policy() -> None:
    """However late the other comes, and again when it is alone; of equal ones the newest has it."""
    pair = dataclasses.replace(pairs()[0], connection="office/net")
    claims = Claims()

    def policies(spi_out: int, priority: int) -> list[v.Policy]:
        return list(
            plan.outward_policies(dataclasses.replace(pair, spi_out=spi_out, priority=priority), 1, plan.BARE)
        )

    assert claims.claim(1, policies(0x11, 5)) == [requests.new_policy(*policies(0x11, 5))]
    assert claims.claim(2, policies(0x22, 9)) == []
    assert claims.claim(3, policies(0x33, 0)) == []
    assert claims.claim(4, policies(0x44, 5)) == [requests.update_policy(*policies(0x44, 5))]
    assert claims.release(4) == [requests.update_policy(*policies(0x11, 5))]
    assert claims.release(1) == [requests.update_policy(*policies(0x22, 9))]


@pytest.mark.parametrize("value", [10_001, -1, "first", True])
def test_priorities_that_cannot_be(value: object) -> None:
    """Numbers from 1 on; 0 is none."""
    assert problems_of(priority=value)
    assert child_of(priority=0).priority == 0


@pytest.mark.parametrize(
    ("keys", "inward", "outward", "extra"),
    [
        ({}, v.SaFlag.NONE, v.SaFlag.NO_PMTU_DISCOVERY, 1),
        ({"copy_df": True}, v.SaFlag.NONE, v.SaFlag.NONE, 1),
        ({"copy_ecn": True}, v.SaFlag.NONE, v.SaFlag.NO_PMTU_DISCOVERY, 1),
        ({"copy_ecn": False}, v.SaFlag.NO_ECN, v.SaFlag.NO_ECN | v.SaFlag.NO_PMTU_DISCOVERY, 1),
        ({"copy_dscp": "out"}, v.SaFlag.NONE, v.SaFlag.NO_PMTU_DISCOVERY, 0),
        ({"copy_dscp": "in"}, v.SaFlag.DECAP_DSCP, v.SaFlag.NO_PMTU_DISCOVERY, 1),
        ({"copy_dscp": True}, v.SaFlag.DECAP_DSCP, v.SaFlag.NO_PMTU_DISCOVERY, 0),
        ({"copy_dscp": False}, v.SaFlag.NONE, v.SaFlag.NO_PMTU_DISCOVERY, 1),
    ],
)
def test_what_the_kernel_copies(
    keys: dict[str, object], inward: v.SaFlag, outward: v.SaFlag, extra: int
) -> None:
    """Of tunnels; by default neither DF nor DSCP, and ECN."""
    both = v.SaFlag.ESN | v.SaFlag.AF_UNSPEC
    pair = dataclasses.replace(pairs()[0], copied=child_of(**keys).copied)
    inbound, outbound = plan.sas(pair, 7, plan.BY_DEVICE)
    assert (inbound.flags, outbound.flags) == (both | inward, both | outward)
    assert (inbound.extra_flags, outbound.extra_flags) == (0, extra)


def test_copies_that_cannot_be() -> None:
    """Words, and transport mode, which has one header."""
    assert any("one of out, in, yes, no" in text for text in problems_of(copy_dscp="both"))
    assert any("tunnel mode" in text for text in problems_of(copy_df=True, mode="transport"))
    assert problems_of(copy_df="perhaps")


def test_a_pair_with_a_mark_takes_its_packets_alone() -> None:
    """Before one without, for two hosts as for networks; what has no mark, or another one, is not its."""
    for inner in (("192.0.2.1", "192.0.2.2"), ("10.1.0.0/16", "10.2.0.0/16")):
        database = SaDatabase()
        plain, marked = (
            EspPair(dataclasses.replace(pairs(inner=inner, spis=(spi, 1))[0], marks=marks), 0.0)
            for spi, marks in ((0x1001, NO_MARKS), (0x1002, Marks(outward=Mark(0x11, 0xFF))))
        )
        packet = ipv4_packet(inner[0].replace("0.0/16", "0.1"), inner[1].replace("0.0/16", "0.1"))
        for pair in (marked, plain):
            database.add(pair)
            database.enable_sending(pair)
        for mark, wanted in ((Mark(0x11, 0xFF), marked), (Mark(0x12, 0xFF), plain), (None, plain)):
            assert database.outbound(packet, mark) is wanted
        database.remove(0x1001)
        for mark, left in ((Mark(0x11, 0xFF), marked), (Mark(0x12, 0xFF), None), (None, None)):
            assert database.outbound(packet, mark) is left
        database.remove(0x1002)
        assert database.outbound(packet, Mark(0x11, 0xFF)) is None


class Devices:
    """One for each mark."""

    def __init__(self) -> None:
        self.there: dict[Mark, MemoryDevice] = {}
        self.refuses = False

    def open(self, mark: Mark) -> MemoryDevice:
        if self.refuses:
            raise OepyError("no device")
        return self.there.setdefault(mark, MemoryDevice())

    def close(self, mark: Mark) -> None:
        del self.there[mark]


def test_the_forwarder_has_a_device_for_each_mark() -> None:
    """While a pair has it; what is read there goes by that pair, what is read elsewhere does not and waits for
    nothing; a device that cannot be had is an error, and the pair is not there."""
    devices, device, sock = Devices(), MemoryDevice(), MemorySocket()
    forwarder = Forwarder(device, {4: sock}, 1390, lambda _: None, lambda *_: None, marked=devices)
    mark = Mark(0x11, 0xFF)
    first, again = (
        dataclasses.replace(pairs(spis=(spi, 1))[0], marks=Marks(None, mark, None, Mark(7, 0xFF)))
        for spi in (0x1001, 0x1002)
    )
    packet = ipv4_packet("192.0.2.1", "192.0.2.2")
    devices.refuses = True
    with pytest.raises(OepyError):
        forwarder.install(first, True, 0.0)
    assert not len(forwarder.database)
    devices.refuses = False
    forwarder.install(first, True, 0.0)
    device.incoming.append(packet)
    assert forwarder.pump_device(10, 0.0) == 1
    assert not sock.sent
    assert forwarder.counters["no_sa"] == 1
    devices.there[mark].incoming.append(packet)
    assert forwarder.pump_device(10, 0.0, mark) == 1
    ((_, route),) = sock.sent
    assert (socket.SOL_SOCKET, socket.SO_MARK, (0x20000007).to_bytes(4, sys.byteorder)) in route.ancillary
    forwarder.install(again, True, 1.0)
    forwarder.remove(0x1001)
    assert devices.there
    devices.there[mark].incoming.append(ipv4_packet("192.0.2.1", "192.0.2.9"))
    assert forwarder.pump_device(10, 1.0, mark) == 1
    assert forwarder.counters["waited"] == 0
    forwarder.remove(0x1002)
    assert not devices.there


@pytest.mark.parametrize("aggregation", [False, True])
def test_userland_copies_dscp_outward(aggregation: bool) -> None:
    """Each packet's own to its ESP packet, for both families inside; ECN stays inside, 0 is left away, and a pair
    without the key does none of it."""

    def made(number: int, copied: Copied) -> SaPair:
        return dataclasses.replace(
            pairs(spis=(0x1000 + number, 1))[0],
            aggregation=aggregation,
            copied=copied,
            local_ts=(selector("10.1.0.1"), selector("fd00::1")),
            remote_ts=(selector(f"10.{number}.0.1"), selector(f"fd00::{number}")),
        )

    copying, quiet = made(2, Copied(dscp_out=True)), made(3, Copied())
    device, sock = MemoryDevice(), MemorySocket()
    forwarder = Forwarder(device, {4: sock}, 1390, lambda _: None, lambda *_: None)
    for pair in (copying, quiet):
        forwarder.install(pair, True, 0.0)

    def outside(*packets: bytes) -> list[int]:
        sock.sent.clear()
        device.incoming.extend(packets)
        assert forwarder.pump_device(20, 0.0) == len(packets)
        return [
            next((int.from_bytes(value, sys.byteorder) for _, kind, value in route.ancillary if kind == 1), 0)
            for _, route in sock.sent
        ]

    def four(tos: int, last: int = 2) -> bytes:
        packet = bytearray(ipv4_packet("10.1.0.1", f"10.{last}.0.1"))
        packet[1] = tos
        return bytes(packet)

    six = bytearray(ipv6_packet("fd00::1", "fd00::2"))
    six[0], six[1] = 0x6B, 0x90
    assert sorted(outside(four(0xB9), four(0x03), four(0xB8), bytes(six))) == [0, 0xB8, 0xB8, 0xB8]
    assert set(outside(four(0xB9, 3), four(0xB9, 3))) == {0}
    forwarder.install(
        dataclasses.replace(copying, remote=Endpoint(ip_address("192.0.2.77"), 4500)), True, 1.0
    )
    outside(four(0x28))
    ((_, route),) = sock.sent
    assert route.address[0] == "192.0.2.77"


def test_what_userland_lacks() -> None:
    """By its name, with the mend; set_mark_out it has."""
    lacks = list(userland_lacks(child_of(mark_in=1, mark_out=2, set_mark_in=3, set_mark_out=4)))
    assert [text.split()[0] for text in lacks] == ["mark_in", "set_mark_in"]
    lacks = list(userland_lacks(child_of(copy_df=True, copy_ecn=True, copy_dscp="in")))
    assert list(userland_lacks(child_of(copy_dscp="out"))) == []
    assert [text.split()[0] for text in lacks] == ["copy_df", "copy_ecn", "copy_dscp"]
    assert (
        list(userland_lacks(child_of(set_mark_out=4, copy_df=False, copy_ecn=False, copy_dscp=False))) == []
    )


def test_marks_reach_the_datapath_process_and_updown() -> None:
    """As they are."""
    marks = Marks(Mark(1), None, Mark(3, 0xFF), None)
    pair, _ = pairs()
    pair = dataclasses.replace(pair, marks=marks)
    assert control.decode_pair(control.encode_pair(pair)).marks == marks
    told = dataclasses.replace(action("/bin/true"), pair=pair)
    environment = next(iter(environments(told)))
    assert environment["PLUTO_MARK_IN"] == "1/0xffffffff"
    assert "PLUTO_MARK_OUT" not in environment
