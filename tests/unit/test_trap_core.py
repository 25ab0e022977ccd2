"""The trap without a kernel: flows, disjoint ranges, held packets, decisions."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.errors import ParseError
from oepy.interfaces import PolicyRule
from oepy.model import Direction, Flow, PolicyGroup, Verdict
from oepy.policy import PolicyTable
from oepy.trap import decided, hold
from oepy.trap.decided import Decided
from oepy.trap.hold import HeldPacket, Hold
from oepy.trap.packet import parse_flow
from oepy.trap.prefixes import lookups
from tests.fakes.datapath import ipv4_packet, ipv6_packet

G = PolicyGroup


# -- flows -----------------------------------------------------------------------------------------------


def test_flows_are_read_from_the_first_bytes() -> None:
    """UDP over IPv4 and IPv6, also with options, extension headers and in fragments."""
    four = ipv4_packet("192.0.2.1", "192.0.2.2", ports=(10, 20))
    assert parse_flow(four, Direction.OUTPUT) == Flow(
        ip_address("192.0.2.1"), ip_address("192.0.2.2"), 17, 10, 20, Direction.OUTPUT
    )
    optioned = bytes((0x46,)) + four[1:20] + bytes(4) + four[20:]
    assert parse_flow(optioned, Direction.FORWARD).destination_port == 20
    later = four[:6] + b"\x00\x05" + four[8:]
    assert parse_flow(later, Direction.OUTPUT).destination_port == 0
    assert parse_flow(four[:20], Direction.OUTPUT).destination_port == 0
    six = ipv6_packet("2001:db8::1", "2001:db8::2", ports=(10, 20))
    assert parse_flow(six, Direction.OUTPUT).destination_port == 20
    options = bytes((17, 0)) + bytes(6)
    hopped = six[:6] + b"\x00" + six[7:40] + options + six[40:]
    flow = parse_flow(hopped, Direction.OUTPUT)
    assert (flow.protocol, flow.source_port, flow.destination_port) == (17, 10, 20)
    fragment = six[:6] + b"\x2c" + six[7:40] + bytes((17, 0)) + b"\x00\x08" + bytes(4) + six[40:]
    flow = parse_flow(fragment, Direction.OUTPUT)
    assert (flow.protocol, flow.destination_port) == (17, 0)


@given(st.binary(max_size=100), st.sampled_from([b"", b"\x45", b"\x60", b"\x4f"]))
def test_random_packets_are_a_parse_error_or_a_flow(data: bytes, first: bytes) -> None:
    """Parse, or ParseError, never anything else."""
    try:
        flow = parse_flow(first + data, Direction.OUTPUT)
    except ParseError:
        return
    assert 0 <= flow.destination_port <= 65535


# -- ranges ----------------------------------------------------------------------------------------------

# A small corner of the address space, so that prefixes meet
_RULES = st.lists(
    st.builds(
        lambda group, bits, length, protocol, port, six: PolicyRule(
            group,
            ip_network(
                (IPv6Address(bits) if six else IPv4Address(bits), (124 if six else 28) + length), strict=False
            ),
            protocol,
            port,
        ),
        st.sampled_from(list(G)),
        st.integers(0, 31),
        st.integers(0, 4),
        st.sampled_from([0, 0, 6, 17]),
        st.sampled_from([0, 0, 53, 80]),
        st.booleans(),
    ),
    max_size=12,
)


@given(_RULES, st.integers(0, 40), st.sampled_from([6, 17, 1]), st.sampled_from([53, 80, 99]), st.booleans())
def test_the_ranges_decide_as_the_policy_table(
    rules: list[PolicyRule], bits: int, protocol: int, port: int, six: bool
) -> None:
    """For any rules and flow, the kernel's steps and PolicyTable name the same group."""
    address = IPv6Address(bits) if six else IPv4Address(bits)
    port = port if protocol != 1 else 0
    flow = Flow(address, address, protocol, 1, port)
    assert _by_steps(rules, flow) == PolicyTable(rules, G.PRIVATE_OR_CLEAR).match(flow).group


def _by_steps(rules: list[PolicyRule], flow: Flow) -> PolicyGroup:
    for step in lookups(rules):
        if step.version != flow.destination.version:
            continue
        if step.protocol not in (0, flow.protocol) or step.port not in (0, flow.destination_port):
            continue
        for item in step.ranges:
            if item.first <= int(flow.destination) <= item.last:
                return item.group
    return G.PRIVATE_OR_CLEAR


@given(_RULES)
def test_ranges_are_disjoint_and_ascending(rules: list[PolicyRule]) -> None:
    """As an interval map needs them."""
    for step in lookups(rules):
        for before, after in zip(step.ranges, step.ranges[1:], strict=False):
            assert before.first <= before.last < after.first


# -- holding ---------------------------------------------------------------------------------------------

_HERE = (G.PRIVATE, ip_address("192.0.2.1"))
FLOW = Flow(ip_address("10.0.0.1"), ip_address("192.0.2.1"), 6, 1, 2)


def _packet(number: int, length: int = 100) -> HeldPacket:
    return HeldPacket(1, number, 0, length, FLOW)


def test_the_first_and_the_last_survive_a_flood() -> None:
    """Beyond the bound of one destination the middle goes, whatever comes."""
    held = Hold()
    dropped = []
    for number in range(500):
        new, gone = held.add(_HERE, _packet(number), 0.0)
        assert new == (number == 0)
        dropped += gone
    kept = [packet.id for packet in held.release(_HERE)]
    assert kept == [*range(hold.MAX_PACKETS_PER_DESTINATION - 1), 499]
    assert len(dropped) == 500 - len(kept)
    assert (held.packets, held.bytes) == (0, 0)


def test_one_senders_packets_are_taken_out_and_the_others_stay() -> None:
    """In their order, of every destination of the policy; what the configuration catches is never taken."""
    held, other = Hold(), Flow(ip_address("10.0.0.2"), ip_address("192.0.2.1"), 6, 1, 2)
    for number, flow in enumerate((FLOW, other, FLOW)):
        held.add(_HERE, HeldPacket(1, number, 0, 100, flow), 0.0)
    held.add((G.PRIVATE_OR_CLEAR, ip_address("192.0.2.9")), _packet(7), 0.0)
    held.add((5, ip_address("192.0.2.9")), _packet(8), 0.0)
    taken = list(held.take_from(FLOW.source))
    assert [(group, [packet.id for packet in packets], left) for group, packets, left in taken] == [
        (G.PRIVATE, [0, 2], other),
        (G.PRIVATE_OR_CLEAR, [7], None),
    ]
    assert (held.packets, held.bytes) == (2, 200)
    assert [packet.id for packet in held.release(_HERE)] == [1]
    assert list(held.take_from(FLOW.source)) == []


def test_a_full_hold_takes_no_new_destination() -> None:
    """Others' packets are not thrown away for it, and it is not counted as held."""
    held = Hold()
    for number in range(hold.MAX_PACKETS):
        new, gone = held.add((G.PRIVATE, IPv4Address(number)), _packet(number), 0.0)
        assert (new, gone) == (True, [])
    late = _packet(9999)
    assert held.add((G.BLOCK, IPv4Address(1)), late, 0.0) == (False, [late])
    assert (G.BLOCK, IPv4Address(1)) not in held
    assert held.packets == hold.MAX_PACKETS
    second = _packet(10_000)
    new, gone = held.add((G.PRIVATE, IPv4Address(5)), second, 0.0)
    assert (new, gone) == (False, [second])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 70_000), st.booleans()), max_size=150))
def test_the_bounds_hold_for_any_traffic(actions: list[tuple[int, int, bool]]) -> None:
    """Packets and bytes never exceed their bounds, and the totals are the sums."""
    held = Hold()
    inside: dict[int, list[int]] = {}
    for index, (host, length, release) in enumerate(actions):
        key = (G.PRIVATE, IPv4Address(host))
        if release:
            held.release(key)
            inside.pop(host, None)
            continue
        _, gone = held.add(key, _packet(index, length), 0.0)
        inside.setdefault(host, []).append(length)
        for packet in gone:
            inside[host].remove(packet.length)
    assert held.packets == sum(map(len, inside.values()))
    assert held.bytes == sum(map(sum, inside.values()))
    for lengths in inside.values():
        assert len(lengths) <= hold.MAX_PACKETS_PER_DESTINATION
        assert len(lengths) == 1 or sum(lengths) <= hold.MAX_BYTES_PER_DESTINATION


def test_forgotten_packets_expire() -> None:
    """What nobody decides within HOLD_SECONDS comes back to be dropped; younger ones stay."""
    held = Hold()
    held.add(_HERE, _packet(1), 0.0)
    held.add((G.PRIVATE, IPv4Address(9)), _packet(2), 30.0)
    assert [packet.id for packet in held.expire(hold.HOLD_SECONDS)] == [1]
    assert held.packets == 1


# -- decisions -------------------------------------------------------------------------------------------

_A = ip_address("192.0.2.1")


def _names(changes: list[decided.SetChange]) -> list[tuple[str, bool, bool]]:
    return [(change.name, change.present, change.add) for change in changes]


def test_a_later_decision_takes_the_place_of_the_earlier() -> None:
    """Out of the one set and into the other, and a refresh replaces the element."""
    state = Decided()
    assert _names(state.decide(G.PRIVATE_OR_CLEAR, _A, Verdict.CLEAR, 10, 0.0)) == [("clear4", False, True)]
    assert _names(state.decide(G.PRIVATE_OR_CLEAR, _A, Verdict.PRIVATE, 10, 1.0)) == [
        ("clear4", True, False),
        ("private4", False, True),
    ]
    (refresh,) = state.decide(G.PRIVATE_OR_CLEAR, _A, Verdict.PRIVATE, None, 2.0)
    assert (refresh.present, refresh.add, refresh.end) == (True, True, float("inf"))
    assert state.verdict(G.PRIVATE_OR_CLEAR, _A, 1e9) is Verdict.PRIVATE
    assert _names(state.forget(G.PRIVATE_OR_CLEAR, _A)) == [("private4", True, False)]
    assert state.verdict(G.PRIVATE_OR_CLEAR, _A, 2.0) is None


def test_groups_that_share_an_element_keep_it_for_each_other() -> None:
    """@private is asked by address alone: it stays until no group needs it, as long as the longest."""
    state = Decided()
    state.decide(G.PRIVATE, _A, Verdict.PRIVATE, 100, 0.0)
    (change,) = state.decide(G.PRIVATE_OR_CLEAR, _A, Verdict.PRIVATE, 10, 0.0)
    assert (change.present, change.add, change.end) == (True, True, 100.0)
    assert _names(state.forget(G.PRIVATE, _A)) == [("private4", True, True)]
    assert _names(state.forget(G.PRIVATE_OR_CLEAR, _A)) == [("private4", True, False)]


def test_a_block_of_the_private_group_is_apart() -> None:
    """It must not block the same address's other ports, and needs no @clear element to say so."""
    state = Decided()
    assert _names(state.decide(G.PRIVATE, _A, Verdict.BLOCK, 10, 0.0)) == [("refused4", False, True)]
    assert _names(state.decide(G.PRIVATE_OR_CLEAR, _A, Verdict.BLOCK, 10, 0.0)) == [("block4", False, True)]
    assert state.decide(G.CLEAR_OR_PRIVATE, _A, Verdict.CLEAR, 10, 0.0) == []


def test_decisions_end_by_themselves() -> None:
    """At the second, not before, and a refreshed one stays."""
    state = Decided()
    six = ip_address("2001:db8::1")
    state.decide(G.PRIVATE_OR_CLEAR, _A, Verdict.CLEAR, 10, 0.0)
    state.decide(G.PRIVATE_OR_CLEAR, six, Verdict.CLEAR, 10, 0.0)
    state.decide(G.PRIVATE_OR_CLEAR, six, Verdict.CLEAR, 30, 5.0)
    assert state.verdict(G.PRIVATE_OR_CLEAR, _A, 9.9) is Verdict.CLEAR
    assert state.verdict(G.PRIVATE_OR_CLEAR, _A, 10.0) is None
    for now in range(40):
        state.expire(float(now))
        assert len(state) == (2 if now < 11 else 1 if now < 36 else 0)
    assert list(state.items()) == []


def test_decisions_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond MAX_DECIDED the oldest of the largest set goes, out of the kernel's set too."""
    monkeypatch.setattr(decided, "MAX_DECIDED", 3)
    state = Decided()
    for number in range(3):
        state.decide(G.PRIVATE_OR_CLEAR, IPv4Address(number), Verdict.CLEAR, None, 0.0)
    changes = state.decide(G.PRIVATE_OR_CLEAR, IPv4Address(9), Verdict.CLEAR, None, 0.0)
    assert [(change.key, change.add) for change in changes] == [
        (bytes(4), False),
        (IPv4Address(9).packed, True),
    ]
    assert len(state) == 3
