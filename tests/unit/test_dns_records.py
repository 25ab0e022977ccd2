"""IPSECKEY and RFC 4322's TXT: the RFCs' examples, every malformation, and both ways for anything."""

from __future__ import annotations

import base64
from ipaddress import IPv4Address, IPv6Address, ip_address

import dns.name
import dns.rdata
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st

from oepy.dns import records
from oepy.dns.records import IpsecKey, OeText, UnsupportedRecord
from oepy.errors import ParseError
from oepy.keys import HostKey, to_public_key
from oepy.model import GatewayType, KeyAlgorithm, PublicKey

RSA = HostKey.generate("rsa-2048").public
RSA_TEXT = base64.b64encode(RSA.data)
ED25519 = HostKey.generate("ed25519").public
RFC4025_KEY = "AQNRU3mG7TVTO2BkR47usntb102uFJtugbo6BSGvgqt4AQ=="

names = st.lists(st.binary(min_size=1, max_size=63), min_size=1, max_size=3).map(
    lambda labels: dns.name.Name([*labels, b""])
)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
gateways = st.one_of(st.none(), addresses, names)


@pytest.mark.parametrize(
    ("text", "gateway_type", "gateway"),
    [
        ("10 1 2 192.0.2.38", GatewayType.IPV4, IPv4Address("192.0.2.38")),
        ("10 0 2 .", GatewayType.NONE, None),
        ("10 1 2 192.0.2.3", GatewayType.IPV4, IPv4Address("192.0.2.3")),
        ("10 3 2 mygateway.example.com.", GatewayType.NAME, dns.name.from_text("mygateway.example.com")),
        ("10 2 2 2001:0DB8:0:8002::2000:1", GatewayType.IPV6, IPv6Address("2001:db8:0:8002::2000:1")),
    ],
)
def test_rfc4025_examples(text, gateway_type, gateway):
    """The five examples of RFC 4025 §3.2, from an independent encoder's wire form and back."""
    wire = dns.rdata.from_text("IN", "IPSECKEY", f"{text} {RFC4025_KEY}").to_wire()
    record = records.parse_ipseckey(wire)
    assert (record.precedence, record.gateway_type, record.gateway) == (10, gateway_type, gateway)
    assert record.key == base64.b64decode(RFC4025_KEY)
    assert records.build_ipseckey(record) == wire
    assert dns.rdata.from_text("IN", "IPSECKEY", record.to_text()).to_wire() == wire


def test_rfc9373_example():
    """RFC 9373 appendix A: the record's key is that of the private key given there."""
    wire = bytes.fromhex("0a0004") + base64.b64decode("3WTXgUvpn1RlCXnm80gGY2LZ/ErUUEZtZ33IDi8yfhM=")
    private = bytes.fromhex("c7be71a45cbf87785f639dc4fd1c82637c21b5e02488939976ece32b9268d0b7")
    expected = to_public_key(ed25519.Ed25519PrivateKey.from_private_bytes(private).public_key())
    record = records.parse_ipseckey(wire)
    assert record.public_key() == expected
    assert record.to_text() == "10 0 4 . 3WTXgUvpn1RlCXnm80gGY2LZ/ErUUEZtZ33IDi8yfhM="


@given(st.integers(0, 255), st.integers(0, 255), gateways, st.binary(max_size=300))
def test_ipseckey_survives_both_ways(precedence, algorithm, gateway, key):
    """Built and parsed again it is the same record, whatever the key field holds."""
    record = IpsecKey(precedence, algorithm, gateway, key)
    assert records.parse_ipseckey(records.build_ipseckey(record)) == record


@given(st.binary(max_size=80))
def test_any_bytes_are_an_ipseckey_or_a_parse_error(wire):
    """Nothing but ParseError comes out of the parser, and what parses builds the same bytes."""
    try:
        record = records.parse_ipseckey(wire)
    except ParseError:
        return
    assert records.build_ipseckey(record) == wire


@pytest.mark.parametrize(
    "wire",
    [
        "",
        "0a",
        "0a00",
        "0a0104c00002",  # a short IPv4 gateway
        "0a0204" + "20" * 15,  # a short IPv6 gateway
        "0a0304",  # no name
        "0a030403616263",  # a name without end
        "0a0304c00c",  # a compression pointer
        "0a030440" + "61" * 64,  # a label of 64 bytes
        "0a0304" + ("3f" + "61" * 63) * 4 + "00",  # a name of 257 bytes
    ],
)
def test_truncated_and_compressed_ipseckeys_are_malformed(wire):
    """Each short field and each forbidden name form is a ParseError of our kind."""
    with pytest.raises(ParseError) as caught:
        records.parse_ipseckey(bytes.fromhex(wire))
    assert not isinstance(caught.value, UnsupportedRecord)


@pytest.mark.parametrize(("algorithm", "key"), [(0, b""), (0, b"x"), (1, b"dsa"), (5, b"x"), (255, b"")])
def test_records_that_are_not_for_us_are_unsupported(algorithm, key):
    """No key, DSA and unknown algorithms are not malformed, only useless."""
    with pytest.raises(UnsupportedRecord):
        IpsecKey(10, algorithm, None, key).public_key()


def test_an_unknown_gateway_type_is_unsupported():
    """A later RFC may define type 4: such a record is skipped, not an attack."""
    with pytest.raises(UnsupportedRecord):
        records.parse_ipseckey(b"\x0a\x04\x04" + bytes(32))


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [(2, b""), (2, b"\x03\x01\x00\x01"), (3, bytes(64)), (3, b"x" * 63), (4, b""), (4, b"x" * 33)],
)
def test_bad_keys_of_known_algorithms_are_malformed(algorithm, key):
    """RSA, ECDSA and EdDSA with an impossible key: ParseError, so that it can make an answer bogus."""
    with pytest.raises(ParseError) as caught:
        IpsecKey(10, algorithm, None, key).public_key()
    assert not isinstance(caught.value, UnsupportedRecord)


# ---- RFC 4322 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strings", "precedence", "gateway"),
    [
        ([b"X-IPsec-Server(10)=192.1.1.5 ", RSA_TEXT], 10, ip_address("192.1.1.5")),
        ([b"X-IPsec-Server(10)=192.1.1.5", b" " + RSA_TEXT], 10, ip_address("192.1.1.5")),
        (
            [b"x-ipsec-SERVER ( 0 ) = 2001:db8::1 ", RSA_TEXT[:99], RSA_TEXT[99:]],
            0,
            ip_address("2001:db8::1"),
        ),
        ([b"X-IPsec-Server(65535)=@gw.example.com ", RSA_TEXT], 65535, dns.name.from_text("gw.example.com")),
        (
            [b"X-IPsec-Server\t(\t7\t)\t=\t192.1.1.5\t" + RSA_TEXT[:50] + b" \t " + RSA_TEXT[50:]],
            7,
            ip_address("192.1.1.5"),
        ),
    ],
)
def test_txt_forms_that_rfc4322_allows(strings, precedence, gateway):
    """Any case, blanks around the signs, the key in pieces or with white space inside."""
    assert records.is_oe_text(b"".join(strings))
    assert records.parse_oe_text(strings) == OeText(precedence, gateway, RSA)


def test_txt_without_a_key():
    """The key may stand at the gateway's own name."""
    assert records.parse_oe_text([b"X-IPsec-Server(10)=192.1.1.5"]).key is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"X-IPsec-Server=192.1.1.5 " + RSA_TEXT, "form"),
        (b"X-IPsec-Server()=192.1.1.5 " + RSA_TEXT, "form"),
        (b"X-IPsec-Server(-1)=192.1.1.5 " + RSA_TEXT, "form"),
        (b"X-IPsec-Server(65536)=192.1.1.5 " + RSA_TEXT, "65535"),
        (b"X-IPsec-Server(10)=", "form"),
        (b"X-IPsec-Server(10) 192.1.1.5 " + RSA_TEXT, "form"),
        (b"X-IPsec-Server(10)=0.0.0.0 " + RSA_TEXT, "gateway"),
        (b"X-IPsec-Server(10)=:: " + RSA_TEXT, "gateway"),
        (b"X-IPsec-Server(10)=fe80::1%eth0 " + RSA_TEXT, "gateway"),
        (b"X-IPsec-Server(10)=gw.example.com " + RSA_TEXT, "no address"),
        (b"X-IPsec-Server(10)=192.1.1 " + RSA_TEXT, "no address"),
        (b"X-IPsec-Server(10)=@ " + RSA_TEXT, "empty|no domain name"),
        (b"X-IPsec-Server(10)=@a..b " + RSA_TEXT, "no domain name"),
        (b"X-IPsec-Server(10)=192.1.1.5 " + RSA_TEXT[:-3], "base64|RSA"),
        (b"X-IPsec-Server(10)=192.1.1.5 !!!!", "base64"),
        (b"X-IPsec-Server(10)=192.1.1.5 AQMMAA==", "RSA"),
        (b"X-IPsec-Server(10)=192.1.1.5 " + RSA_TEXT + b"\0", "NUL"),
        (b"X-IPsec-Server(10)=192.1.1.5 " + RSA_TEXT + b" " + RSA_TEXT, "base64"),
    ],
)
def test_malformed_txt_is_refused_with_the_reason(text, reason):
    """Every rule of RFC 4322 §5.2 has its own refusal; a second key in one TXT is one of them."""
    assert records.is_oe_text(text)
    with pytest.raises(ParseError, match=reason):
        records.parse_oe_text([text])


@pytest.mark.parametrize(
    "text",
    [b"", b"v=spf1 -all", b"X-IPsec-ServerFarm=1", b" X-IPsec-Server(10)=192.1.1.5", b"X-IPsec-Gateway(1)=x"],
)
def test_other_txt_records_are_not_ours(text):
    """Only the exact tag at the beginning makes a TXT ours; the tag of 2001 is a near miss."""
    assert not records.is_oe_text(text)
    assert records.is_old_oe_text(text) == (b"Gateway" in text)


@given(st.integers(0, 65535), addresses, st.sampled_from([None, RSA]))
def test_txt_survives_both_ways(precedence, gateway, key):
    """Built in pieces of at most 255 bytes and parsed again it is the same."""
    if gateway.is_unspecified or getattr(gateway, "scope_id", None):
        return
    record = OeText(precedence, gateway, key)
    strings = records.build_oe_text(record)
    assert all(len(string) <= 255 for string in strings)
    assert records.parse_oe_text(strings) == record


@given(st.lists(st.binary(max_size=255), max_size=4))
def test_any_txt_is_a_record_or_a_parse_error(strings):
    """Nothing but ParseError comes out, even with our tag in front."""
    for attempt in (strings, [b"X-IPsec-Server(1)=", *strings]):
        try:
            records.parse_oe_text(attempt)
        except ParseError:
            continue


def test_the_txt_key_is_rsa_only():
    """RFC 4322 knows no other algorithm: an Ed25519 key's bytes are no RSA key."""
    with pytest.raises(ParseError):
        records.parse_oe_text([b"X-IPsec-Server(1)=192.0.2.1 ", base64.b64encode(ED25519.data)])
    assert PublicKey(KeyAlgorithm.RSA, RSA.data) == RSA
