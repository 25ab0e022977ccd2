"""The XFRM codec: known sizes and bytes, both ways for any value, and what happens with broken ones."""

from __future__ import annotations

import contextlib
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.errors import ParseError
from oepy.model import IpAddress, IpNetwork, Mark, Secret
from oepy.netlink import Frame, attribute, frame, parse_frames
from oepy.xfrm import answers, pieces, requests
from oepy.xfrm import values as v
from tests.fakes.xfrm import acquire_body, expire_body, mapping_body, policy_expire_body

U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
ADDRESS = {
    4: st.integers(0, 2**32 - 1).map(IPv4Address),
    6: st.integers(0, 2**128 - 1).map(IPv6Address),
}


def networks(version: int) -> st.SearchStrategy[IpNetwork]:
    return st.tuples(ADDRESS[version], st.integers(0, 32 if version == 4 else 128)).map(
        lambda pair: ip_network(pair, strict=False)
    )


PORTS = st.tuples(U16, U16)
SELECTORS = st.sampled_from((4, 6)).flatmap(
    lambda version: st.builds(
        v.Selector, networks(version), networks(version), U8, PORTS, PORTS, st.integers(0, 2**31 - 1)
    )
) | st.builds(
    lambda protocol: v.Selector(v.ANY_NETWORK, v.ANY_NETWORK, protocol, wild=True), st.integers(0, 255)
)
COUNTS = st.integers(0, 2**64 - 2)
LIMITS = st.builds(v.Limits, COUNTS, COUNTS, COUNTS, COUNTS, U64, U64)
USAGE = st.builds(v.Usage, U64, U64, U64, U64)
MARKS = st.none() | st.builds(Mark, U32, U32)
KEYS = st.binary(max_size=80).map(Secret)
NAMES = st.sampled_from(("rfc4106(gcm(aes))", "hmac(sha256)", "ecb(cipher_null)", "x" * 63))
ALGORITHMS = st.none() | st.builds(v.Algorithm, NAMES, KEYS)
ALGORITHMS_ICV = st.none() | st.builds(v.Algorithm, NAMES, KEYS, U32)
REPLAYS = st.integers(0, 4096).flatmap(
    lambda window: st.builds(
        v.Replay,
        st.just(window),
        U64,
        U64,
        st.binary(min_size=4 * ((window + 31) // 32), max_size=4 * ((window + 31) // 32)),
    )
)


def pairs_of(version: int) -> st.SearchStrategy[tuple[IpAddress, IpAddress]]:
    return st.tuples(ADDRESS[version], ADDRESS[version])


@st.composite
def sas(draw: st.DrawFn) -> v.Sa:
    source, destination = draw(st.sampled_from((4, 6)).flatmap(pairs_of))
    return v.Sa(
        source,
        destination,
        draw(U32),
        draw(st.sampled_from((v.ESP, v.AH))),
        draw(st.sampled_from(v.Mode)),
        reqid=draw(U32),
        selector=draw(SELECTORS),
        limits=draw(LIMITS),
        encryption=draw(ALGORITHMS),
        integrity=draw(ALGORITHMS_ICV),
        aead=draw(ALGORITHMS_ICV),
        encapsulation=draw(st.none() | st.builds(v.Encapsulation, U16, U16)),
        replay=draw(st.none() | REPLAYS),
        replay_window=draw(U8),
        flags=v.SaFlag(draw(U8)),
        mark=draw(MARKS),
        set_mark=draw(MARKS),
        if_id=draw(U32),
        extra_flags=draw(U32),
        tfc_padding=draw(U32),
        care_of=draw(st.none() | ADDRESS[source.version]),
        usage=draw(USAGE),
        out_of_window=draw(U32),
        replayed=draw(U32),
        integrity_failed=draw(U32),
        last_used=draw(U64),
        sequence=draw(U32),
    )


@st.composite
def templates(draw: st.DrawFn) -> v.Template:
    source, destination = draw(st.sampled_from((4, 6)).flatmap(pairs_of))
    mode = draw(st.sampled_from(v.Mode))
    return v.Template(source, destination, draw(U8), mode, draw(U32), draw(U32), draw(st.booleans()))


POLICIES = st.builds(
    v.Policy,
    st.sampled_from(v.PolicyDirection),
    SELECTORS,
    st.lists(templates(), max_size=6).map(tuple),
    st.sampled_from(v.PolicyAction),
    U32,
    LIMITS,
    U8.map(v.PolicyFlag),
    MARKS,
    U32,
    st.booleans(),
    U32,
    USAGE,
)


def heard(request: requests.Request) -> v.Answer | None:
    """The request as it would come back from the kernel."""
    (found,) = parse_frames(frame(*request))
    return answers.parse(found)


def test_the_structures_have_the_kernels_sizes() -> None:
    """As linux/xfrm.h has them on 64 bits."""
    sizes = {
        pieces.SELECTOR: 56,
        pieces.SA: 224,
        pieces.SA_ID: 24,
        pieces.POLICY: 168,
        pieces.POLICY_ID: 64,
        pieces.TEMPLATE: 64,
        pieces.ACQUIRE: 280,
        pieces.EXPIRE: 232,
        pieces.POLICY_EXPIRE: 176,
        pieces.MOVE: 76,
        pieces.MAPPING: 64,
        pieces.ENCAP: 24,
        pieces.ALGORITHM: 68,
        pieces.ALGORITHM_ICV: 72,
        pieces.REPLAY: 24,
        pieces.LIMITS: 64,
        pieces.FILTER: 36,
        pieces.POLICY_TYPE: 6,
    }
    assert {form: form.size for form in sizes} == sizes


@given(sas())
def test_an_sa_comes_back(sa: v.Sa) -> None:
    """Whatever its attributes, from NEWSA and UPDSA."""
    assert heard(requests.new_sa(sa)) == sa
    assert heard(requests.update_sa(sa)) == sa


@given(POLICIES)
def test_a_policy_comes_back(policy: v.Policy) -> None:
    """With its templates, of both families."""
    assert heard(requests.new_policy(policy)) == policy
    assert heard(requests.update_policy(policy)) == policy


@given(st.sampled_from((4, 6)).flatmap(pairs_of), U32, MARKS)
def test_ids_come_back(addresses: tuple[IpAddress, IpAddress], spi: int, mark: Mark | None) -> None:
    """In what the kernel says of a deleted SA."""
    name = v.SaId(addresses[0], spi, v.AH, mark, addresses[1])
    assert heard(requests.delete_sa(name)) == v.SaDeleted(name)


@given(SELECTORS, st.sampled_from(v.PolicyDirection), MARKS, U32, U32)
def test_policy_ids_come_back(
    selector: v.Selector, direction: v.PolicyDirection, mark: Mark | None, if_id: int, index: int
) -> None:
    """In what the kernel says of a deleted policy."""
    name = v.PolicyId(direction, selector, mark, if_id, index)
    assert heard(requests.delete_policy(name)) == v.PolicyDeleted(name)


@given(sas(), st.booleans())
def test_an_expiry_comes_back(sa: v.Sa, hard: bool) -> None:
    """An SA, a byte, then the attributes."""
    assert answers.parse(Frame(pieces.MSG_EXPIRE, 0, 0, expire_body(sa, hard))) == v.Expire(sa, hard)


@given(POLICIES, st.booleans())
def test_a_policys_expiry_comes_back(policy: v.Policy, hard: bool) -> None:
    """The same of a policy."""
    body = policy_expire_body(policy, hard)
    assert answers.parse(Frame(pieces.MSG_POLEXPIRE, 0, 0, body)) == v.PolicyExpire(policy, hard)


@given(POLICIES.filter(lambda policy: not policy.selector.wild), U32, st.data())
def test_an_acquire_comes_back(policy: v.Policy, sequence: int, data: st.DataObject) -> None:
    """With the outer addresses in the family of a tunnel's template, else in the packet's own."""
    first = policy.templates[0] if policy.templates else None
    tunnel = first is not None and first.mode is not v.Mode.TRANSPORT
    version = first.destination.version if first is not None and tunnel else policy.selector.version
    source, destination = data.draw(pairs_of(version))
    acquire = v.Acquire(source, destination, v.ESP, policy.selector, policy, sequence)
    assert answers.parse(Frame(pieces.MSG_ACQUIRE, 0, 0, acquire_body(acquire))) == acquire


@given(st.sampled_from((4, 6)).flatmap(lambda w: st.tuples(*(ADDRESS[w],) * 3)), U32, U16, U16)
def test_a_new_mapping_comes_back(
    addresses: tuple[IpAddress, IpAddress, IpAddress], spi: int, old: int, new: int
) -> None:
    """A NAT's, of an SA in UDP."""
    mapping = v.Mapping(v.SaId(addresses[0], spi), 7, addresses[1], addresses[2], old, new)
    assert answers.parse(Frame(pieces.MSG_MAPPING, 0, 0, mapping_body(mapping))) == mapping


@given(SELECTORS, st.lists(st.sampled_from((4, 6)).flatmap(pairs_of), min_size=1, max_size=6))
def test_a_migration_comes_back(selector: v.Selector, addresses: list[tuple[IpAddress, IpAddress]]) -> None:
    """Each move with both families."""
    old = addresses[0]
    moves = tuple(v.Move(*old, *new, v.ESP, v.Mode.TUNNEL, 9) for new in addresses)
    name = v.PolicyId(v.PolicyDirection.OUT, selector, None, 17)
    migrate = v.Migrate(name, moves, v.Encapsulation(4500, 1024))
    assert heard(requests.migrate(migrate)) == migrate


@given(st.integers(0x10, 0x28), st.binary(max_size=400))
def test_random_bytes_are_a_parse_error_or_values(kind: int, body: bytes) -> None:
    """Parse, or ParseError, never anything else."""
    with contextlib.suppress(ParseError):
        answers.parse(Frame(kind, 0, 0, body))


@given(sas(), st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_is_a_parse_error_or_another_sa(sa: v.Sa, at: int, value: int) -> None:
    """The same close to what the kernel sends, where the bounds are."""
    body = bytearray(requests.sa_body(sa))
    body[at % len(body)] = value
    with contextlib.suppress(ParseError):
        answers.parse(Frame(pieces.MSG_NEWSA, 0, 0, bytes(body)))


SA = v.Sa(ip_address("192.0.2.1"), ip_address("192.0.2.2"), 0x1001)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pieces.A_AEAD, pieces.ALGORITHM_ICV.pack(b"x", 4097, 128) + bytes(600)),
        (pieces.A_AEAD, pieces.ALGORITHM_ICV.pack(b"x", 160, 128) + bytes(19)),
        (pieces.A_CRYPT, bytes(67)),
        (pieces.A_REPLAY_ESN, pieces.REPLAY.pack(129, 0, 0, 0, 0, 32) + bytes(4 * 129)),
        (pieces.A_REPLAY_ESN, pieces.REPLAY.pack(1, 0, 0, 0, 0, 33) + bytes(4)),
        (pieces.A_REPLAY_ESN, pieces.REPLAY.pack(2, 0, 0, 0, 0, 33) + bytes(4)),
        (pieces.A_ENCAP, bytes(23)),
        (pieces.A_MARK, bytes(7)),
        (pieces.A_IF_ID, bytes(3)),
        (pieces.A_COADDR, bytes(15)),
        (pieces.A_LASTUSED, bytes(4)),
    ],
)
def test_attributes_beyond_their_bounds_are_refused(kind: int, value: bytes) -> None:
    """Too short, or claiming more than there is or may be."""
    body = requests.sa_body(SA) + attribute(kind, value)
    with pytest.raises(ParseError):
        answers.parse(Frame(pieces.MSG_NEWSA, 0, 0, body))


def test_prefixes_modes_and_directions_beyond_the_kernels_are_refused() -> None:
    """33 bits of IPv4, mode 9, direction 3, seven templates."""
    body = bytearray(requests.sa_body(SA))
    body[42:44] = struct.pack("=BB", 2, 0)
    body[40:42] = struct.pack("=H", 2)
    body[42] = 33
    with pytest.raises(ParseError):
        answers.parse(Frame(pieces.MSG_NEWSA, 0, 0, bytes(body)))
    mode = bytearray(requests.sa_body(SA))
    mode[214] = 9
    with pytest.raises(ParseError):
        answers.parse(Frame(pieces.MSG_NEWSA, 0, 0, bytes(mode)))
    policy = v.Policy(v.PolicyDirection.OUT, v.Selector(ip_network("0.0.0.0/0"), ip_network("0.0.0.0/0")))
    direction = bytearray(requests.policy_body(policy))
    direction[160] = 3
    with pytest.raises(ParseError):
        answers.parse(Frame(pieces.MSG_NEWPOLICY, 0, 0, bytes(direction)))
    many = requests.policy_body(policy) + attribute(pieces.A_TMPL, bytes(7 * 64))
    with pytest.raises(ParseError):
        answers.parse(Frame(pieces.MSG_NEWPOLICY, 0, 0, many))


def test_keys_stay_out_of_repr() -> None:
    """A dump holds every key of the host."""
    sa = v.Sa(SA.source, SA.destination, 1, aead=v.Algorithm("rfc4106(gcm(aes))", Secret(b"k" * 20), 128))
    assert "kkk" not in repr(sa)
    assert "6b6b" not in repr(sa)
