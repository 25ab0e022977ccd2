"""Which secret two identities share: the index finds what looking through all of them finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oepy.connections.match import Matcher, _secret_rank
from oepy.connections.model import ConnectionSet, IdPattern, SharedSecret
from oepy.model import PeerIdentity, Secret

_EXACT = ("gw.example", "a.example", "b.example", "192.0.2.1", "2001:db8::1", "me@a.example", "c=ch, cn=gw")
_IDS = st.sampled_from((*_EXACT, "*.example", "*", "%any", "c=ch, cn=*"))
_NAMES = st.sampled_from((*_EXACT, "C=CH, CN=gw", "GW.example")).map(PeerIdentity.parse)


@given(
    st.lists(st.lists(_IDS, max_size=3), max_size=8),
    st.lists(_NAMES, min_size=1, max_size=2),
    st.lists(_NAMES, min_size=1, max_size=2),
)
def test_the_index_finds_the_same(
    ids: list[list[str]], ours: list[PeerIdentity], theirs: list[PeerIdentity]
) -> None:
    shared = tuple(
        SharedSecret(tuple(IdPattern(text) for text in each), Secret(bytes([number + 1])), (0, "", number))
        for number, each in enumerate(ids)
    )
    ranked = [(_secret_rank(one.ids, tuple(ours), tuple(theirs)), n) for n, one in enumerate(shared)]
    best = min(((rank, n) for rank, n in ranked if rank is not None), default=None)
    found = Matcher(ConnectionSet((), shared)).secret(ours, theirs)
    assert found == (None if best is None else shared[best[1]].secret)
