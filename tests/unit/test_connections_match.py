"""Which connection a peer belongs to and which secret a pair shares, on whatever configuration (hypothesis)."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from oepy.connections.fields import duration, selector
from oepy.connections.match import Matcher, place_rank
from oepy.connections.model import Connection, ConnectionSet, IdPattern, Place, SharedSecret
from oepy.connections.reading import SECTIONS
from oepy.daemon.connection_values import names_of
from oepy.exchange import exchange
from oepy.included import Memory
from oepy.leases import Pool
from oepy.model import PeerIdentity, Secret
from tests.fakes.connections import read_data

NAMES = ["a.example", "b.example", "x.b.example", "me@a.example", "192.0.2.1", "2001:db8::1"]
PATTERNS = [*NAMES, "*.example", "*@a.example", "x.*", "%any"]
ADDRESSES = ["192.0.2.1", "192.0.2.77", "198.51.100.1", "2001:db8::1", "2001:db8::2"]
PLACES = [*ADDRESSES[:3], "192.0.2.0/24", "0.0.0.0/0", "2001:db8::/32", "%any", "gw.example"]
RESOLVED = {"gw.example": frozenset(map(ip_address, ("192.0.2.77", "2001:db8::2")))}

secrets = st.lists(st.lists(st.sampled_from(PATTERNS), max_size=3), max_size=8)
places = st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)
# Whatever YAML can hold, with the words of the configuration among it
_keys = [
    *(
        "connections",
        "secrets",
        "pools",
        "authorities",
        "office",
        "local",
        "remote",
        "children",
        "net",
        "auth",
    ),
    *(
        "id",
        "psk",
        "local_ts",
        "remote_ts",
        "proposals",
        "esp_proposals",
        "vips",
        "addrs",
        "secret_file",
        "type",
    ),
    *(
        "rekey_time",
        "updown",
        "start_action",
        "unique",
        "mobike",
        "dynamic",
        "10.0.0.0/8",
        "%any",
        "trap|start",
        "mark_in",
        "set_mark_in",
        "%same/0xff",
        "priority",
        "copy_dscp",
    ),
]
_scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20)),
    st.sampled_from(_keys),
)
yaml_like = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_keys), inner, max_size=6),
    max_leaves=30,
)


@given(st.dictionaries(st.sampled_from(SECTIONS), yaml_like, max_size=4))
def test_whatever_is_written_is_read_or_named(data: dict[str, Any]) -> None:
    """No exception comes out; every problem has a place below one of the sections, and words."""
    found, problems = read_data(data)
    assert all(problem.path[0] in SECTIONS and problem.text for problem in problems)
    assert read_data(data) == (found, problems)


@given(secrets, st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_the_best_secret_is_that_of_a_plain_search(texts: list[list[str]], ours: str, theirs: str) -> None:
    """The dictionaries find what looking at each secret finds: both named before one before none, exact ones first,
    and of equals the first in the file."""
    shared = [
        SharedSecret(tuple(map(IdPattern, ids)), Secret(bytes((number,))), (0, "", number))
        for number, ids in enumerate(texts)
    ]
    one, other = PeerIdentity.parse(ours), PeerIdentity.parse(theirs)

    def rank(ids: tuple[IdPattern, ...]) -> tuple[int, int] | None:
        mine = [each.rank for each in ids if each.matches(one)]
        others = [each.rank for each in ids if each.matches(other)]
        if not ids:
            return 3, 0
        if mine and others:
            return 0, min(mine) + min(others)
        if others and len(ids) == 1:
            return 1, min(others)
        return (2, min(mine)) if mine and not others and len(ids) == 1 else None

    ranked = [(found, number) for number, each in enumerate(shared) if (found := rank(each.ids)) is not None]
    expected = shared[min(ranked)[1]].secret if ranked else None
    assert Matcher(ConnectionSet(secrets=tuple(shared))).secret([one], [other]) == expected


@given(st.lists(st.tuples(places, places, st.sampled_from(PATTERNS)), max_size=6), st.sampled_from(ADDRESSES))
def test_connections_are_found_by_place_and_name(
    rows: list[tuple[list[str], list[str], str]], remote: str
) -> None:
    """All that fit and no others; more exact places first, then more exact names."""
    data = {
        "connections": {
            f"c{number}": {
                "local_addrs": here,
                "remote_addrs": there,
                "local": {"auth": "psk", "id": "me.example"},
                "remote": {"auth": "psk", "id": pattern},
                "children": {"net": {}},
            }
            for number, (here, there, pattern) in enumerate(rows)
        }
    }
    configured, problems = read_data(data)
    assert problems == []
    local, address = ip_address("192.0.2.1"), ip_address(remote)
    matcher = Matcher(configured)
    found = matcher.by_address(local, address, RESOLVED)
    fits = [
        connection
        for connection in configured.connections
        if place_rank(connection.remote_addrs, address, RESOLVED) is not None
        and place_rank(connection.local_addrs, local, RESOLVED) is not None
    ]
    assert {one.name for one in found} == {one.name for one in fits}
    ranks = [place_rank(one.remote_addrs, address, RESOLVED) for one in found]
    assert ranks == sorted(ranks, key=lambda one: one or 0)
    for name in map(PeerIdentity.parse, NAMES):
        named = matcher.by_identity(local, address, name, PeerIdentity.parse("me.example"), RESOLVED)
        assert {one.name for one in named} == {one.name for one in found if one.remote.id.matches(name)}
        assert [one.remote.id.rank for one in named] == sorted(one.remote.id.rank for one in named)
        assert matcher.by_identity(local, address, name, PeerIdentity.parse("other.example"), RESOLVED) == []


rows_of_connections = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.tuples(places, places, st.sampled_from(PATTERNS)), max_size=4
)


def configured_of(rows: dict[str, tuple[list[str], list[str], str]], texts: list[list[str]]) -> ConnectionSet:
    connections = {
        name: {
            "local_addrs": here,
            "remote_addrs": there,
            "local": {"auth": "psk", "id": "me.example"},
            "remote": {"auth": "psk", "id": pattern},
            "children": {"net": {}},
        }
        for name, (here, there, pattern) in rows.items()
    }
    found, problems = read_data({"connections": connections})
    assert problems == []
    shared = (
        SharedSecret(tuple(map(IdPattern, ids)), Secret(bytes((len(ids), number))), (0, "", number))
        for number, ids in enumerate(texts)
    )
    return replace(found, secrets=tuple(shared))


@given(rows_of_connections, secrets, rows_of_connections, secrets)
def test_a_changed_configuration_is_found_like_a_new_one(
    rows: dict[str, Any], texts: list[list[str]], other_rows: dict[str, Any], other_texts: list[list[str]]
) -> None:
    """What stays equal stays the same object. And whoever has another secret afterwards was named before."""
    before, after = configured_of(rows, texts), configured_of(other_rows, other_texts)
    memory = Memory()
    before, after = memory.main(before), memory.main(after)
    matcher, fresh = Matcher(before), Matcher(after)
    connections = exchange(before.connections, after.connections)
    changed = exchange(before.secrets, after.secrets)
    for one in before.connections:
        assert (one in connections.gone) is (
            one not in after.connections or one.order != _order_in(after, one)
        )
    concerned = matcher.concerned((*changed.gone, *changed.fresh))
    had = {one.name: secret_of(one, matcher) for one in before.connections}
    matcher.take(connections, changed)
    for one in after.connections:
        assert secret_of(one, matcher) == secret_of(one, fresh)
        if one in before.connections and concerned is not None and one not in concerned:
            assert secret_of(one, matcher) == had[one.name]
    for remote in ADDRESSES:
        ends = ip_address("192.0.2.1"), ip_address(remote)
        assert matcher.by_address(*ends, RESOLVED) == fresh.by_address(*ends, RESOLVED)


def _order_in(configured: ConnectionSet, connection: Connection) -> object:
    return next(one.order for one in configured.connections if one == connection)


def secret_of(connection: Connection, matcher: Matcher) -> Secret | None:
    ours = names_of(connection.local.id, connection.local_addrs)
    return matcher.secret(ours, names_of(connection.remote.id.exact(), connection.remote_addrs))


@given(st.integers(0, 10**8), st.sampled_from("smhd"))
def test_durations(number: int, unit: str) -> None:
    """Both ways, up to ten years."""
    seconds = number * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    try:
        assert duration(f"{number}{unit}") == seconds
    except Exception as error:  # noqa: BLE001 - the refusal is told by its text
        assert "no time" in str(error)
        assert seconds > 10 * 365 * 86400


@given(
    st.sampled_from(["10.1.0.0/16", "2001:db8::/32", "192.0.2.1/32", "dynamic"]),
    st.sampled_from(["", "tcp", "udp", "47", "icmp"]),
    st.integers(0, 65535),
)
def test_selectors_are_read_as_they_are_written(network: str, protocol: str, port: int) -> None:
    """`str` of what was read is read as the same; ports are for protocols that have them."""
    text = (
        f"{network}[{protocol}/{port}]" if port and protocol in ("tcp", "udp") else f"{network}[{protocol}]"
    )
    made = selector(text)
    assert selector(str(made)) == made
    assert made.network == (None if network == "dynamic" else ip_network(network))
    outer = ip_address("192.0.2.9")
    at = made.at(outer)
    assert at is not None
    assert (at.start == outer) is (network == "dynamic")


@given(st.sampled_from(PLACES), st.sampled_from(ADDRESSES))
def test_places(text: str, address: str) -> None:
    """Their text is read as the same, and an address is more exact than any network."""
    place = Place.of(text)
    assert Place.of(str(place)) == place
    rank = place_rank([place], ip_address(address), RESOLVED)
    if text == address:
        assert rank == 0
    elif rank is not None:
        assert rank > 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "d", "e"]), st.integers(0, 9), st.booleans()), max_size=40
    )
)
def test_no_two_clients_have_one_address(steps: list[tuple[str, int, bool]]) -> None:
    """Whatever comes and goes: of present clients nobody has another's address, and a dump keeps who had which."""
    pool = Pool.of("10.0.0.0/29")
    for client, session, comes in steps:
        if comes:
            pool.acquire(client, session * 10 + ord(client) - 97)
        else:
            pool.release(session * 10 + ord(client) - 97)
        holders = pool.holders()
        assert len(set(holders.values())) == len(holders)
    again = Pool.of("10.0.0.0/29")
    again.load(pool.dump())
    for client, address in pool.holders().items():
        assert again.acquire(client, 1000 + ord(client)) == address
