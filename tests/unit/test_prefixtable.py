"""Values by network, against looking through all of them."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from oepy.prefixtable import PrefixTable

networks = st.builds(
    lambda version, bits, length: ip_network(
        (bits if version == 6 else bits >> 96, length if version == 6 else length // 4), strict=False
    ),
    st.sampled_from([4, 6]),
    st.integers(0, (1 << 128) - 1),
    st.integers(0, 128),
)
entries = st.lists(st.tuples(networks, st.integers(0, 3)), max_size=20)


@given(entries, entries, st.integers(0, (1 << 128) - 1))
def test_it_finds_what_a_search_through_all_finds(added, removed, number):
    """Of both families, with values that stand twice, and after removals of what is there and what is not."""
    table: PrefixTable[int] = PrefixTable()
    held = []
    for network, value in added:
        table.add(network, value)
        held.append((network, value))
    for network, value in [*removed, *added[::3]]:
        table.remove(network, value)
        if (network, value) in held:
            held.remove((network, value))
    assert bool(table) == bool(held)
    near = [network.network_address for network, _ in added]
    for address in (ip_address(number >> 96), ip_address((1 << 127) | number >> 1), *near):
        found = sorted((length, value) for length, values in table.matching(address) for value in values)
        right = sorted((network.prefixlen, value) for network, value in held if address in network)
        assert found == right


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 20)), max_size=8), st.integers(0, 8))
def test_ranges_of_addresses(ranges, removed):
    table: PrefixTable[int] = PrefixTable()
    held = []
    for number, (first, more) in enumerate(ranges):
        ends = ip_address(0x0A000000 + first), ip_address(0x0A000000 + first + more)
        table.add_range(ends, number)
        held.append((ends, number))
    for ends, number in held[:removed]:
        table.remove_range(ends, number)
    for low in range(280):
        address = ip_address(0x0A000000 + low)
        found = sorted(number for _, values in table.matching(address) for number in values)
        assert found == [number for (first, last), number in held[removed:] if first <= address <= last]


@given(entries, st.lists(st.integers(0, 19), max_size=10))
def test_values_of_one_network_stand_in_their_order(added, removed):
    table: PrefixTable[tuple[int, int]] = PrefixTable(lambda value: value[0])
    held = [(networks, (value, number)) for number, (networks, value) in enumerate(added)]
    for network, value in held:
        table.add(network, value)
    for network, value in [held[number] for number in set(removed) if number < len(held)]:
        table.remove(network, value)
        held.remove((network, value))
    for network, _ in held:
        (values,) = [found for length, found in table.matching(network[0]) if length == network.prefixlen]
        assert values == sorted(value for other, value in held if other == network)
