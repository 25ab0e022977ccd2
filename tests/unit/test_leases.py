"""Address pools: one address for one client, the same again, and never two clients with one."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.errors import UsageError
from oepy.leases import Pool, parse_range


def test_a_client_gets_what_it_had() -> None:
    """While it is there, when it comes again, and after a restart of ours."""
    pool = Pool.of("10.3.0.0/24")
    first = pool.acquire("alice", 1)
    assert first == ip_address("10.3.0.1")
    assert pool.acquire("bob", 2) == ip_address("10.3.0.2")
    assert pool.acquire("alice", 3) == first  # a reauthentication: the old session is still there
    pool.release(1)
    assert pool.holders()["alice"] == first
    pool.release(3)
    pool.release(3)
    assert "alice" not in pool.holders()
    again = Pool.of("10.3.0.0/24")
    assert again.load(pool.dump()) == 2
    assert again.acquire("carol", 9) == ip_address("10.3.0.3")
    assert again.acquire("alice", 10) == first
    assert again.dump() == again.dump()


def test_a_full_pool_takes_from_whoever_is_away_longest() -> None:
    """Present clients keep theirs; None when all are present."""
    pool = Pool.of("10.3.0.1-10.3.0.3", frozenset((ip_address("10.3.0.2"),)))
    one, two = pool.acquire("a", 1), pool.acquire("b", 2)
    assert (one, two) == (ip_address("10.3.0.1"), ip_address("10.3.0.3"))
    assert pool.acquire("c", 3) is None
    pool.release(2)
    pool.release(1)
    assert pool.acquire("c", 4) == two
    assert pool.acquire("a", 5) == one
    assert pool.acquire("b", 6) is None


def test_a_wanted_address_is_given_where_it_is_free() -> None:
    """Not that of another one who is present, nor one outside of the pool."""
    pool = Pool.of("2001:db8::/120")
    wanted = ip_address("2001:db8::77")
    assert pool.acquire("a", 1, wanted) == wanted
    assert pool.acquire("b", 2, wanted) == ip_address("2001:db8::1")
    assert pool.acquire("c", 3, ip_address("10.0.0.1")) == ip_address("2001:db8::2")
    pool.release(1)
    assert pool.acquire("d", 4, wanted) == wanted
    assert pool.acquire("a", 5) == ip_address("2001:db8::3")


@pytest.mark.parametrize("text", ["", "10.0.0.0/33", "10.0.0.9-10.0.0.1", "10.0.0.1-2001:db8::1", "x-y"])
def test_pools_that_are_none(text: str) -> None:
    """A clear error."""
    with pytest.raises(UsageError):
        parse_range(text)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 2, "leases": []}', '{"version":1,"leases":[["a"]]}', "1"]
)
def test_a_file_that_is_no_list_of_leases(text: str) -> None:
    """A clear error with its mend."""
    with pytest.raises(UsageError, match="leases"):
        Pool.of("10.0.0.0/24").load(text)


def test_leases_outside_of_the_pool_are_forgotten() -> None:
    """The configuration changed since."""
    pool = Pool.of("10.0.0.0/24")
    pool.acquire("a", 1)
    other = Pool.of("10.9.0.0/24")
    assert other.load(pool.dump()) == 0


_STEPS = st.lists(
    st.tuples(
        st.sampled_from("abcdef"),
        st.integers(1, 12),
        st.sampled_from(("come", "go", "restart")),
        st.integers(0, 6),
    ),
    max_size=60,
)


@given(_STEPS)
def test_no_two_clients_have_one_address(steps: list[tuple[str, int, str, int]]) -> None:
    """Whatever comes and goes; nor does anybody's address change while it is there."""
    pool = Pool.of("10.0.0.1-10.0.0.4")
    sessions: dict[int, str] = {}
    for client, session, what, wish in steps:
        before = pool.holders()
        if what == "come" and session not in sessions:
            if pool.acquire(client, session, ip_address("10.0.0.0") + wish) is not None:
                sessions[session] = client
            else:
                assert len(before) == 4
        elif what == "go":
            pool.release(session)
            sessions.pop(session, None)
        elif what == "restart":
            fresh = Pool.of("10.0.0.1-10.0.0.4")
            fresh.load(pool.dump())
            pool, sessions, before = fresh, {}, {}
        after = pool.holders()
        assert set(after) == set(sessions.values())
        assert len(set(after.values())) == len(after)
        assert all(after[name] == address for name, address in before.items() if name in after)
        assert len(pool._client_at) == len(pool._address_of) <= 4
