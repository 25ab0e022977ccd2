"""What goes and what comes, by identity."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oepy.exchange import exchange

_THINGS = [[number % 2] for number in range(12)]  # equal ones among them, and no two of them the same
_some = st.lists(st.sampled_from(range(12)), unique=True).map(lambda numbers: [_THINGS[n] for n in numbers])


@given(_some, _some)
def test_it_is_what_looking_for_each_gives(old, new):
    found = exchange(old, new)
    assert list(map(id, found.gone)) == [id(one) for one in old if not any(one is each for each in new)]
    assert list(map(id, found.fresh)) == [id(one) for one in new if not any(one is each for each in old)]
    assert bool(found) == (set(map(id, old)) != set(map(id, new)))
