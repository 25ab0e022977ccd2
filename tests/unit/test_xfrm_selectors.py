"""Ranges become prefixes and masks that match exactly the same packets, and priorities keep their order."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.errors import OepyError
from oepy.model import TrafficSelector
from oepy.xfrm import ids
from oepy.xfrm.ids import PolicyClass, priority
from oepy.xfrm.selectors import MAX_SELECTORS, reverse, selectors
from oepy.xfrm.values import ANY_PORT, Selector
from tests.fakes.datapath import selector as ts

PORT = st.integers(0, 65535)


def matches(found: Selector, source_port: int, destination_port: int) -> bool:
    """As the kernel compares: `!((port ^ value) & mask)`."""
    (one, one_mask), (other, other_mask) = found.source_port, found.destination_port
    return not (source_port ^ one) & one_mask and not (destination_port ^ other) & other_mask


@given(PORT, PORT, PORT)
def test_port_ranges_match_the_same_ports(first: int, last: int, probe: int) -> None:
    """Every range, with few masks."""
    first, last = sorted((first, last))
    here = TrafficSelector(ip_address("192.0.2.1"), ip_address("192.0.2.1"), 6, first, last)
    found = selectors((here,), (ts("198.51.100.1/32"),))
    for port in (first, last, max(first - 1, 0), min(last + 1, 65535), probe):
        assert any(matches(item, port, 7) for item in found) == (first <= port <= last)
    assert len(found) <= 30


def test_subnets_combine() -> None:
    """Two networks here and two there are four policies; families do not mix."""
    here = (ts("10.0.0.0/24"), ts("2001:db8:1::/64"), ts("10.0.9.0/24"))
    there = (ts("10.1.0.0/16"), ts("2001:db8:2::/64"))
    found = {(str(item.source), str(item.destination)) for item in selectors(here, there)}
    assert found == {
        ("10.0.0.0/24", "10.1.0.0/16"),
        ("10.0.9.0/24", "10.1.0.0/16"),
        ("2001:db8:1::/64", "2001:db8:2::/64"),
    }


def test_a_range_that_is_no_prefix_becomes_several() -> None:
    """10.0.0.1 to 10.0.0.6."""
    here = TrafficSelector(ip_address("10.0.0.1"), ip_address("10.0.0.6"))
    found = [str(item.source) for item in selectors((here,), (ts("10.1.0.1/32"),))]
    assert found == ["10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/31", "10.0.0.6/32"]


def test_too_many_policies_are_refused() -> None:
    """A peer could otherwise fill the kernel with one SA."""
    ragged = TrafficSelector(ip_address("10.0.0.1"), ip_address("10.255.255.254"), 6, 1, 65534)
    with pytest.raises(OepyError, match=str(MAX_SELECTORS)):
        selectors((ragged,), (ragged,))


def test_protocols_of_both_sides_meet() -> None:
    """One side's protocol holds where the other has any; two that differ have no packet in common."""
    (found,) = selectors((ts("10.0.0.1/32", 6, 80),), (ts("10.0.0.2/32"),))
    assert (found.protocol, found.source_port, found.destination_port) == (6, (80, 0xFFFF), ANY_PORT)
    with pytest.raises(OepyError, match="no packet"):
        selectors((ts("10.0.0.1/32", 6),), (ts("10.0.0.2/32", 17),))


def test_icmp_types_and_codes_are_where_the_kernel_wants_them() -> None:
    """RFC 7296 §3.13.1 has the type in the upper byte of the port."""
    echo = TrafficSelector(ip_address("10.0.0.1"), ip_address("10.0.0.1"), 1, 8 << 8, 8 << 8 | 255)
    (found,) = selectors((echo,), (ts("10.0.0.2/32"),))
    assert (found.source_port, found.destination_port) == ((8, 0xFFFF), ANY_PORT)
    assert reverse(found).source_port == (8, 0xFFFF)
    several = TrafficSelector(ip_address("10.0.0.1"), ip_address("10.0.0.1"), 1, 0, 8 << 8)
    with pytest.raises(OepyError, match="ICMP"):
        selectors((several,), (ts("10.0.0.2/32"),))


def test_opaque_ports_are_refused() -> None:
    """RFC 7296 §3.13.1: 65535 to 0."""
    opaque = TrafficSelector(ip_address("10.0.0.1"), ip_address("10.0.0.1"), 17, 65535, 0)
    with pytest.raises(OepyError, match="OPAQUE"):
        selectors((opaque,), (ts("10.0.0.2/32"),))


def test_reversing_twice_changes_nothing() -> None:
    """In and out are mirrors."""
    found = Selector(ip_network("10.0.0.0/24"), ip_network("10.1.0.0/16"), 6, (80, 0xFFFF), ANY_PORT)
    assert reverse(found) != found
    assert reverse(reverse(found)) == found


NETWORKS = {4: ("0.0.0.0/0", "10.0.0.0/8", "10.0.0.1/32"), 6: ("::/0", "2001:db8::/32", "2001:db8::1/128")}


@pytest.mark.parametrize("version", [4, 6])
def test_classes_come_before_prefixes(version: int) -> None:
    """The widest exemption comes before the narrowest SA, and so on down; within one, longer ones first."""
    networks = [ip_network(text) for text in NETWORKS[version]]
    narrow, wide = Selector(networks[2], networks[2], 6, (1, 0xFFFF)), Selector(networks[0], networks[0])
    for earlier, later in zip(PolicyClass, list(PolicyClass)[1:], strict=False):
        assert priority(earlier, wide) < priority(later, narrow)
    order = [
        Selector(networks[1], networks[2], 6, ANY_PORT, (80, 0xFFFF)),
        Selector(networks[1], networks[2], 6),
        Selector(networks[1], networks[2]),
        Selector(networks[0], networks[2]),
        Selector(networks[2], networks[1]),
        Selector(networks[2], networks[0]),
    ]
    ranks = [priority(PolicyClass.OPPORTUNISTIC, item) for item in order]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)


def test_reqids_of_different_makers_are_apart() -> None:
    """Each cleans up behind itself by them."""
    assert ids.AUTOMATIC_REQIDS[-1] < ids.TRAP_REQID < ids.MANUAL_REQIDS[0]
