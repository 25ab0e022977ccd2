"""Configured rules by islands: each rule in one, no address in two, their order kept."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network

from hypothesis import given
from hypothesis import strategies as st

from oepy.exchange import Exchange
from oepy.interfaces import ConfiguredRule, Way
from oepy.model import Verdict
from oepy.trap.islands import Shores, difference, islands, remote_of

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
    assert found.fresh | found.same == after


@given(
    st.lists(_rules(), max_size=12),
    st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=4), st.lists(_rules(), max_size=4)), max_size=4),
)
def test_what_changes_leads_to_what_all_rules_give(first, steps):
    """Removed and added, in any order of their ranks, and equal rules in the place of equal ones."""
    rules = _ranked(first, 0)
    there = islands(rules)
    shores = Shores(there)
    for step, (leaving, coming) in enumerate(steps, 1):
        gone = [rule for number, rule in enumerate(rules) if number in leaving]
        equal = [replace(rule) for rule in gone[::2]]
        fresh = [*_ranked(coming, step), *equal]
        rules = [*(rule for rule in rules if not any(rule is each for each in gone)), *fresh]
        found = shores.difference(there, Exchange(gone, fresh))
        shores.take(found)
        there = {place: rules for place, rules in there.items() if place not in found.gone}
        there |= found.fresh | found.same
        assert there == islands(rules)
        assert {id(rule) for group in there.values() for rule in group} == set(map(id, rules))


def _ranked(rules, step):
    """Of distinct ranks, not in their order."""
    return [replace(rule, rank=(number * 7 % 13, step, number)) for number, rule in enumerate(rules)]
