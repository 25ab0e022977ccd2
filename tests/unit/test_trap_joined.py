"""What connections' tunnels carry, as runs in the kernel's sets: always the union of the ranges, changed by the
difference alone."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from hypothesis import given
from hypothesis import strategies as st

from oepy.model import AddressRange
from oepy.trap.joined import Coverage, Joined, Range

_RANGES = st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair)))


def runs_of(ranges: list[Range]) -> list[Range]:
    """By brute force."""
    numbers = sorted({number for first, last in ranges for number in range(first, last + 1)})
    found: list[Range] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


@given(st.lists(st.tuples(st.booleans(), _RANGES), max_size=30))
def test_coverage_is_the_union(steps: list[tuple[bool, Range]]) -> None:
    """Whatever comes and goes, and near() tells the runs that overlap or touch."""
    covered, there = Coverage(), list[Range]()
    for comes, (first, last) in steps:
        if comes:
            covered.add(first, last)
            there.append((first, last))
        elif (first, last) in there:
            covered.remove(first, last)
            there.remove((first, last))
        runs = runs_of(there)
        assert covered.runs() == runs
        assert covered.near(first, last) == [
            run for run in runs if run[0] <= last + 1 and run[1] >= first - 1
        ]
        assert [number for number in range(60) if number in covered] == [
            number for number in range(60) if any(a <= number <= b for a, b in runs)
        ]


def address_range(version: int, first: int, last: int) -> AddressRange:
    if version == 4:
        return IPv4Address(first), IPv4Address(last)
    return IPv6Address(first), IPv6Address(last)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2),
            st.lists(st.tuples(st.sampled_from((4, 6)), _RANGES), max_size=4),
            st.lists(st.tuples(st.sampled_from((4, 6)), _RANGES), max_size=4),
        ),
        max_size=12,
    )
)
def test_the_kernel_hears_of_the_difference(steps: list[tuple[int, list, list]]) -> None:  # type: ignore[type-arg]
    """A set that only hears what change() yields holds the runs; nothing is taken out that is not in, nor put in
    twice; what comes twice or goes unheard of does no harm."""
    joined = Joined()
    there: dict[int, set[AddressRange]] = {1: set(), 2: set()}
    kernel: dict[tuple[int, int], set[Range]] = {}
    for number, out, into in steps:
        gone = [address_range(version, *each) for version, each in out]
        fresh = [address_range(version, *each) for version, each in into]
        for version, taken, put in joined.change(number, gone, fresh):
            held = kernel.setdefault((number, version), set())
            assert held.issuperset(taken)
            held -= set(taken)
            assert held.isdisjoint(put)
            held |= set(put)
        there[number] = (there[number] - set(gone)) | set(fresh)
        for version in (4, 6):
            wanted = runs_of([(int(a), int(b)) for a, b in there[number] if a.version == version])
            assert sorted(kernel.get((number, version), ())) == wanted
        everything = {(n, v): set(runs) for n, v, runs in joined.all() if runs}
        assert everything == {place: runs for place, runs in kernel.items() if runs}


def test_a_pool_of_addresses_side_by_side() -> None:
    """Twenty thousand clients with addresses of one pool: each change is of a run or two."""
    joined = Joined()
    clients = [(IPv4Address(0x0A000000 + n),) * 2 for n in range(20_000)]
    changes = [len(out) + len(put) for one in clients for _, out, put in joined.change(7, (), [one])]
    for one in clients[1::2]:
        changes += [len(out) + len(put) for _, out, put in joined.change(7, [one], ())]
    assert max(changes) <= 3
    assert len(changes) == 30_000
    assert joined.holds(7, clients[0][0])
    assert not joined.holds(7, clients[1][0])
    joined.forget(7)
    assert not joined.holds(7, clients[0][0])
