"""Configured rules by islands: each rule in one, no address in two, their order kept."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from hypothesis import given
from hypothesis import strategies as st

from oepy.interfaces import ConfiguredRule, Way
from oepy.model import Verdict
from oepy.trap.islands import difference, islands, remote_of

_networks = st.one_of(
    st.builds(
        lambda bits, length: IPv4Network((bits << 28, length), strict=False),
        st.integers(0, 15),
        st.integers(0, 6),
    ),
    st.builds(
        lambda bits, length: IPv6Network((bits << 124, length), strict=False),
        st.integers(0, 15),
        st.integers(0, 6),
    ),
)


@st.composite
def _rules(draw: st.DrawFn) -> ConfiguredRule:
    remote = draw(_networks)
    anywhere = remote.supernet(new_prefix=0)
    way = draw(st.sampled_from(Way))
    source, destination = (anywhere, remote) if way is Way.OUT else (remote, anywhere)
    return ConfiguredRule(
        way,
        source,
        destination,
        draw(st.sampled_from((Verdict.BLOCK, Verdict.CLEAR))),
        draw(st.integers(0, 3)),
    )


@given(st.lists(_rules(), max_size=20))
def test_islands_are_apart_and_whole(rules):
    found = islands(rules)
    assert sorted(map(repr, (rule for group in found.values() for rule in group))) == sorted(map(repr, rules))
    places = list(found)
    for number, (way, network) in enumerate(places):
        assert not any(
            other_way is way and other.version == network.version and other.overlaps(network)
            for other_way, other in places[number + 1 :]
        )
    for (way, network), group in found.items():
        assert all(rule.way is way and remote_of(rule).subnet_of(network) for rule in group)
        assert any(remote_of(rule) == network for rule in group)
        assert list(group) == [rule for rule in rules if rule in group]


@given(st.lists(_rules(), max_size=8), st.lists(_rules(), max_size=8))
def test_the_difference_leads_from_one_to_the_other(old, new):
    before, after = islands(old), islands(new)
    found = difference(before, after)
    assert {place: rules for place, rules in before.items() if place not in found.gone} | found.fresh == after
