"""IKEv2 payload codecs: both ways on everything, and nothing but ParseError for what is malformed."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.errors import ParseError
from oepy.ike import rules
from oepy.ike.crypto import AeadProtection
from oepy.ike.header import Exchange, Header, PayloadType, build_header, parse_header
from oepy.ike.message import Fragment, Message, Reassembly, build_plain, build_sealed, open_sealed
from oepy.ike.notify import NotifyType, ProtocolError
from oepy.ike.payload_cp import parse_cp
from oepy.ike.payload_sa import Proposal, SaPayload, Transform, build_sa, parse_sa
from oepy.ike.payload_ts import build_ts, parse_ts
from oepy.ike.payloads import (
    MAX_PAYLOADS,
    PARSERS,
    AuthData,
    Delete,
    KeyShareData,
    Notify,
    build_auth,
    build_chain,
    build_delete,
    build_id,
    build_ke,
    build_notify,
    parse_auth,
    parse_chain,
    parse_delete,
    parse_id,
    parse_ke,
    parse_nonce,
    parse_notify,
)
from oepy.model import IdType, PeerIdentity, Secret, TrafficSelector
from oepy.wire import Reader

u8, u16, u32 = st.integers(0, 255), st.integers(0, 65535), st.integers(0, 0xFFFFFFFF)
transforms = st.builds(Transform, u8, u16, st.sampled_from((0, 128, 192, 256)))
proposals = st.builds(
    Proposal,
    u8,
    st.integers(1, 3),
    st.binary(max_size=8),
    st.lists(transforms, min_size=1, max_size=12).map(tuple),
)
identities = st.one_of(
    st.builds(PeerIdentity.address, st.ip_addresses()),
    st.builds(
        PeerIdentity,
        st.sampled_from((IdType.FQDN, IdType.RFC822_ADDR, IdType.KEY_ID)),
        st.binary(max_size=64),
    ),
    st.just(PeerIdentity.null()),
)


@st.composite
def selectors(draw: st.DrawFn) -> TrafficSelector:
    family = draw(st.sampled_from((IPv4Address, IPv6Address)))
    width = 32 if family is IPv4Address else 128
    ends = sorted(draw(st.tuples(st.integers(0, (1 << width) - 1), st.integers(0, (1 << width) - 1))))
    ports = sorted(draw(st.tuples(u16, u16)))
    return TrafficSelector(family(ends[0]), family(ends[1]), draw(u8), ports[0], ports[1])


@given(st.lists(proposals, min_size=1, max_size=6).map(tuple))
def test_sa_both_ways(items: tuple[Proposal, ...]) -> None:
    """Proposals and transforms survive the wire."""
    payload = SaPayload(items)
    assert parse_sa(Reader(build_sa(payload))) == payload


@given(st.lists(selectors(), min_size=1, max_size=8).map(tuple))
def test_ts_both_ways(items: tuple[TrafficSelector, ...]) -> None:
    """Traffic selectors of both families survive the wire."""
    assert parse_ts(Reader(build_ts(items))) == items


@given(u16, st.binary(max_size=300))
def test_ke_both_ways(group: int, data: bytes) -> None:
    """Key shares survive the wire."""
    assert parse_ke(Reader(build_ke(group, data))) == KeyShareData(group, data)


@given(u16, st.binary(max_size=300), u8, st.binary(max_size=8))
def test_notify_both_ways(kind: int, data: bytes, protocol: int, spi: bytes) -> None:
    """Notifies of any type survive the wire."""
    item = Notify(kind, data, protocol, spi)
    assert parse_notify(Reader(build_notify(item))) == item


@given(u8, st.lists(st.binary(min_size=4, max_size=4), max_size=20).map(tuple))
def test_delete_both_ways(protocol: int, spis: tuple[bytes, ...]) -> None:
    """Deletes survive the wire."""
    assert parse_delete(Reader(build_delete(Delete(protocol, spis)))) == Delete(protocol, spis)


@given(u8, st.binary(max_size=300))
def test_auth_both_ways(method: int, data: bytes) -> None:
    """AUTH survives the wire."""
    assert parse_auth(Reader(build_auth(AuthData(method, data)))) == AuthData(method, data)


@given(identities)
def test_id_both_ways(identity: PeerIdentity) -> None:
    """Identities survive the wire, and the body that AUTH covers is what was sent."""
    body = build_id(identity)
    parsed = parse_id(Reader(body))
    assert parsed.identity == identity
    assert parsed.body == body


@given(st.binary(min_size=8, max_size=8).filter(any), st.binary(min_size=8, max_size=8), u8, u8, u8, u8, u32)
def test_header_both_ways(
    spi_i: bytes, spi_r: bytes, first: int, version: int, exchange: int, flags: int, mid: int
) -> None:
    """The header survives the wire, with the length of the whole."""
    header = Header(spi_i, spi_r, first, version, exchange, flags, mid, 28)
    assert parse_header(build_header(header, 28)) == header


@given(st.sampled_from(sorted(PARSERS)), st.binary(max_size=200))
def test_every_parser_raises_nothing_but_parse_error(kind: int, data: bytes) -> None:
    """Random bytes: parse or ParseError."""
    with contextlib.suppress(ParseError):
        PARSERS[kind](Reader(data))


@given(st.binary(max_size=400), u8, st.booleans())
def test_the_chain_raises_nothing_but_parse_error(data: bytes, first: int, sealed: bool) -> None:
    """Random chains: parse or ParseError, and it always ends."""
    with contextlib.suppress(ParseError):
        parse_chain(data, first, sealed=sealed)


@given(st.lists(st.tuples(st.just(PayloadType.VENDOR), st.binary(max_size=40)), max_size=10))
def test_chain_both_ways(payloads: list[tuple[PayloadType, bytes]]) -> None:
    """A chain has as many payloads as went in."""
    first, body = build_chain(payloads)
    assert parse_chain(body, first).counts.get(PayloadType.VENDOR, 0) == len(payloads)


def test_nonces_have_bounds() -> None:
    """RFC 7296 §3.9: 16 to 256 bytes."""
    for size in (16, 256):
        assert len(parse_nonce(Reader(bytes(size)))) == size
    for size in (0, 15, 257):
        with pytest.raises(ParseError):
            parse_nonce(Reader(bytes(size)))


def test_unknown_payloads() -> None:
    """Skipped without the critical bit, UNSUPPORTED_CRITICAL_PAYLOAD with it, and the number is told."""
    body = bytes((0, 0, 0, 4))
    assert parse_chain(body, 200).counts == {200: 1}
    with pytest.raises(ProtocolError) as caught:
        parse_chain(bytes((0, 0x80, 0, 4)), 200)
    assert caught.value.notify is NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD
    assert caught.value.data == bytes((200,))


def test_payloads_are_bounded_in_number() -> None:
    """More than MAX_PAYLOADS are refused."""
    vendor = (PayloadType.VENDOR, b"")
    first, body = build_chain([vendor] * MAX_PAYLOADS)
    parse_chain(body, first)
    first, body = build_chain([vendor] * (MAX_PAYLOADS + 1))
    with pytest.raises(ParseError):
        parse_chain(body, first)


def test_a_transform_with_an_unknown_attribute_is_not_usable() -> None:
    """RFC 7296 §3.3.6: it parses, and must not be chosen."""
    transform = bytes((0, 0, 0, 12, 1, 0, 0, 20)) + bytes((0x80, 99, 0, 1))
    body = bytes((0, 0, 0, 8 + len(transform), 1, 1, 0, 1)) + transform
    [parsed] = parse_sa(Reader(body)).proposals[0].transforms
    assert not parsed.usable


def test_length_zero_does_not_loop() -> None:
    """A payload, proposal, transform or selector of length 0 is an error."""
    with pytest.raises(ParseError):
        parse_chain(bytes((43, 0, 0, 0)) * 4, 43)
    with pytest.raises(ParseError):
        parse_sa(Reader(bytes((2, 0, 0, 0, 1, 1, 0, 1)) * 3))
    with pytest.raises(ParseError):
        parse_ts(Reader(bytes((2, 0, 0, 0)) + bytes((7, 0, 0, 0)) * 8))


@pytest.mark.parametrize(("exchange", "response"), sorted(rules.RULES))
def test_every_rule_is_enforced(exchange: int, response: bool) -> None:
    """One payload less than the least, or one more than the most, is INVALID_SYNTAX."""
    rule = rules.RULES[exchange, response]
    good = {int(kind): least for kind, (least, _) in rule.items()}
    rules.check(exchange, response, parse_chain(b"", 0).__class__({}, good))
    for kind, (least, most) in rule.items():
        for count in {least - 1, most + 1} - {-1}:
            if response and kind is PayloadType.SA and count == 0:
                continue  # an error notify may stand in for it
            chain = parse_chain(b"", 0).__class__({}, good | {int(kind): count})
            with pytest.raises(ProtocolError):
                rules.check(exchange, response, chain)


HEADER = Header(b"i" * 8, b"r" * 8, 0, 0x20, Exchange.IKE_AUTH, 8, 1)
KEY = Secret(bytes(range(36)))


@given(st.binary(max_size=4000), st.integers(150, 1500), st.randoms())
def test_fragments_come_together_in_any_order(content: bytes, size: int, random: object) -> None:
    """RFC 7383: the pieces of a message, shuffled and doubled, give the message again."""
    datagrams = build_sealed(
        HEADER, [(PayloadType.VENDOR, content)], AeadProtection("aes256gcm16", KEY), size
    )
    if len(datagrams) == 1:
        return
    assert max(map(len, datagrams)) <= size
    if len(datagrams) > 64:
        return
    random.shuffle(datagrams)  # type: ignore[attr-defined]
    reader, reassembly, whole = AeadProtection("aes256gcm16", KEY), Reassembly(1), None
    for data in [datagrams[0], *datagrams]:
        chain = parse_chain(data, parse_header(data).next_payload, 28)
        assert chain.encrypted is not None
        opened = open_sealed(data, chain.encrypted, reader)
        assert isinstance(opened, Fragment)
        whole = reassembly.add(opened) or whole
    assert whole is not None
    assert whole[1] == build_chain([(PayloadType.VENDOR, content)])[1]


@given(st.integers(0, 10_000))
def test_any_flipped_bit_of_a_sealed_message_is_noticed(position: int) -> None:
    """Header, generic header, IV, ciphertext and ICV are all covered."""
    [data] = build_sealed(HEADER, [(PayloadType.NONCE, bytes(20))], AeadProtection("aes256gcm16", KEY))
    bit = position % (len(data) * 8)
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ParseError):
        _open(bytes(changed))


def _open(data: bytes) -> None:
    chain = parse_chain(data, parse_header(data).next_payload, 28)
    if chain.encrypted is None:
        raise ParseError("no longer encrypted")
    open_sealed(data, chain.encrypted, AeadProtection("aes256gcm16", KEY))


def test_a_message_has_what_was_put_in() -> None:
    """`get`, `must` and `notify` of a plain message."""
    data = build_plain(
        HEADER, [(PayloadType.NONCE, bytes(20)), (PayloadType.NOTIFY, build_notify(Notify(16390, b"c")))]
    )
    header = parse_header(data)
    message = Message(header, parse_chain(data, header.next_payload, 28), data)
    assert message.must(PayloadType.NONCE, bytes) == bytes(20)
    assert message.notify(NotifyType.COOKIE) == Notify(16390, b"c")
    with pytest.raises(ParseError):
        message.must(PayloadType.SA, SaPayload)


@pytest.mark.parametrize(
    "attribute",
    [
        "0001000301020304",  # an IPv4 address of 3 bytes
        "000800042001",  # runs past the end
        "000800100102030405060708090a0b0c0d0e0f10",  # an IPv6 address without its prefix
        "000d00080a000000ff00ff00",  # a netmask with holes
        "000f0011" + "20010db8" + "00" * 12 + "81",  # a prefix of 129 bits
        "00190003612e2e",  # a domain with an empty label
        "0019000161",
        "0001",
    ],
)
def test_configuration_attributes_of_a_wrong_form(attribute: str) -> None:
    """Refused; but one label is a domain."""
    data = b"\x02\0\0\0" + bytes.fromhex(attribute)
    if attribute == "0019000161":
        assert parse_cp(Reader(data)).domains == ("a",)
        return
    with pytest.raises(ParseError):
        parse_cp(Reader(data))


def test_configuration_attributes_are_bounded_in_number() -> None:
    """64 of them and no more."""
    assert parse_cp(Reader(bytes(4) + bytes.fromhex("00010000") * 64)).asked == {1}
    with pytest.raises(ParseError):
        parse_cp(Reader(bytes(4) + bytes.fromhex("00010000") * 65))
