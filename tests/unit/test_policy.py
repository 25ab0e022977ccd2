"""Policy groups: the longest prefix wins, then the rule with a port, then the stricter group."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.interfaces import PolicyRule
from oepy.model import Flow, PolicyGroup, TrafficSelector
from oepy.policy import PolicyTable

US = ip_address("192.0.2.1")


def table(*rules: tuple[PolicyGroup, str, int, int]) -> PolicyTable:
    return PolicyTable(
        [PolicyRule(group, ip_network(net), proto, port) for group, net, proto, port in rules],
        PolicyGroup.PRIVATE_OR_CLEAR,
    )


@pytest.mark.parametrize(
    ("destination", "protocol", "port", "group"),
    [
        ("203.0.113.5", 6, 80, PolicyGroup.PRIVATE),
        ("203.0.113.5", 6, 22, PolicyGroup.CLEAR),
        ("203.0.113.129", 6, 22, PolicyGroup.BLOCK),
        ("198.51.100.1", 17, 53, PolicyGroup.PRIVATE_OR_CLEAR),
        ("2001:db8::1", 6, 80, PolicyGroup.CLEAR_OR_PRIVATE),
        ("2001:db9::1", 6, 80, PolicyGroup.PRIVATE_OR_CLEAR),
    ],
)
def test_the_most_specific_rule_decides(
    destination: str, protocol: int, port: int, group: PolicyGroup
) -> None:
    """A longer prefix beats a port rule of a shorter one; a port rule beats its own prefix."""
    policies = table(
        (PolicyGroup.PRIVATE, "203.0.113.0/24", 0, 0),
        (PolicyGroup.CLEAR, "203.0.113.0/24", 6, 22),
        (PolicyGroup.BLOCK, "203.0.113.128/25", 0, 0),
        (PolicyGroup.CLEAR_OR_PRIVATE, "2001:db8::/32", 0, 0),
    )
    assert policies.match(Flow(US, ip_address(destination), protocol, 1, port)).group is group


def test_equal_prefixes_take_the_stricter_group() -> None:
    """Two groups for one prefix: the stricter wins."""
    policies = table((PolicyGroup.CLEAR, "10.0.0.0/8", 0, 0), (PolicyGroup.PRIVATE, "10.0.0.0/8", 0, 0))
    assert policies.match_address(ip_address("10.1.1.1")).group is PolicyGroup.PRIVATE


_NETWORKS = st.builds(
    lambda number, length: ip_network((number >> (32 - length) << (32 - length) if length else 0, length)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)


@given(st.lists(st.tuples(_NETWORKS, st.sampled_from(list(PolicyGroup))), max_size=20), st.ip_addresses(v=4))
def test_the_table_agrees_with_a_plain_search(rules: list, address: object) -> None:
    """The dictionaries find what a search through all rules finds."""
    policies = PolicyTable([PolicyRule(group, net) for net, group in rules], PolicyGroup.CLEAR)
    matching = [(net.prefixlen, group.strictness, group) for net, group in rules if address in net]
    expected = max(matching)[2] if matching else PolicyGroup.CLEAR
    assert policies.match_address(address).group is expected


_SELECTORS = st.builds(
    lambda a, b, protocol, c, d: TrafficSelector(
        ip_address(min(a, b)), ip_address(max(a, b)), protocol, min(c, d), max(c, d)
    ),
    st.integers(1, 500),
    st.integers(1, 500),
    st.sampled_from([0, 6, 17]),
    st.integers(0, 65535),
    st.integers(0, 65535),
)


@given(_SELECTORS, _SELECTORS)
def test_narrowing_is_symmetric_and_within_both(one: TrafficSelector, other: TrafficSelector) -> None:
    """RFC 7296 §2.9: what two selectors have in common lies in both, whoever narrows."""
    common = one.intersect(other)
    assert common == other.intersect(one)
    if common is not None:
        assert one.covers(common)
        assert other.covers(common)
        for address in (common.start, common.end):
            assert one.contains_address(address)
            assert other.contains_address(address)
