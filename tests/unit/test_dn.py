"""Distinguished names: as text and as DER, compared as RFC 5280 §7.1 wants it; nothing a peer sends does harm."""

from __future__ import annotations

import contextlib

import pytest
from cryptography import x509
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from oepy import dn
from oepy.errors import ParseError
from oepy.model import IdType, PeerIdentity


def made(*attributes: tuple[x509.ObjectIdentifier, str], kind: _ASN1Type | None = None) -> bytes:
    return x509.Name([x509.NameAttribute(oid, value, kind) for oid, value in attributes]).public_bytes()


SITE = made(
    (NameOID.COUNTRY_NAME, "CH"), (NameOID.ORGANIZATION_NAME, "Acme"), (NameOID.COMMON_NAME, "gw.example")
)


def test_text_and_der_are_those_of_cryptography() -> None:
    """The same bytes as a library makes, order and kinds of strings included."""
    assert dn.parse("C=CH, O=Acme, CN=gw.example") == SITE
    assert dn.to_text(SITE) == "C=CH, O=Acme, CN=gw.example"
    assert dn.read(SITE) == (
        (("2.5.4.6", "CH"),),
        (("2.5.4.10", "Acme"),),
        (("2.5.4.3", "gw.example"),),
    )
    mail = made((NameOID.EMAIL_ADDRESS, "a@b.example"), (NameOID.DOMAIN_COMPONENT, "example"))
    assert dn.parse("emailAddress=a@b.example,DC=example") == mail


def test_commas_and_odd_letters_survive() -> None:
    for value in ("a, b", "back\\slash", "semi;colon", "Zürich", "x" * 200):
        der = made((NameOID.COMMON_NAME, value)) if len(value) <= 64 else None
        text = dn.to_text(der) if der else f"CN={value}"
        assert dn.same(dn.parse(text), der or dn.parse(f"CN={value}"))
        assert dn.read(dn.parse(text))[0][0][1] == value


@pytest.mark.parametrize(
    "text", ["", "gw.example", "CN=", "XX=1", "CN=a,,O=b", "CN", "=x", "9.9=1", "CN=" + "x" * 2000]
)
def test_bad_text_says_how_it_is_written(text: str) -> None:
    with pytest.raises(ValueError, match=r"write it like|has no value|more than"):
        dn.parse(text)


def test_the_kind_of_string_the_case_and_blanks_do_not_count() -> None:
    one = made((NameOID.ORGANIZATION_NAME, "Acme  Corp"), kind=_ASN1Type.PrintableString)
    assert dn.same(one, dn.parse("O=ACME corp"))
    assert not dn.same(one, dn.parse("O=Acme Corp2"))
    assert not dn.same(one, dn.parse("OU=Acme Corp")), "another attribute"
    assert not dn.same(dn.parse("C=CH, O=Acme"), dn.parse("O=Acme, C=CH")), "the order counts"
    assert not dn.same(dn.parse("C=CH, O=Acme"), dn.parse("C=CH")), "a part is not the whole"


def test_wildcards_stand_for_one_value() -> None:
    pattern = dn.parse("C=CH, O=Acme, CN=*")
    assert dn.matches(pattern, SITE)
    assert dn.wildcards(pattern) == 1
    assert not dn.matches(pattern, dn.parse("C=CH, O=Other, CN=gw"))
    assert not dn.matches(pattern, dn.parse("C=CH, O=Acme, OU=x, CN=gw"))
    assert not dn.matches(pattern, dn.parse("C=CH, O=Acme, OU=gw"))
    assert not dn.matches(SITE, pattern), "a star that a peer sends stands for itself"


def test_identities_are_the_same_to_people() -> None:
    name = PeerIdentity.parse("C=CH, O=acme, CN=GW.example")
    assert name.type is IdType.DER_ASN1_DN
    assert name.same_as(PeerIdentity(IdType.DER_ASN1_DN, SITE))
    assert str(PeerIdentity(IdType.DER_ASN1_DN, SITE)) == "C=CH, O=Acme, CN=gw.example"
    assert PeerIdentity(IdType.FQDN, b"GW.Example").same_as(PeerIdentity.parse("gw.example"))
    assert not PeerIdentity(IdType.RFC822_ADDR, b"gw.example").same_as(PeerIdentity.parse("gw.example"))


_VALUES = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=20
).filter(lambda text: text.strip() == text)


@given(
    st.lists(st.tuples(st.sampled_from(["CN", "O", "OU", "L", "2.5.4.99"]), _VALUES), min_size=1, max_size=6)
)
def test_what_is_written_is_read_again(attributes: list[tuple[str, str]]) -> None:
    def hidden(value: str) -> str:
        return value.replace("\\", "\\\\").replace(",", "\\,").replace(";", "\\;")

    der = dn.parse(", ".join(f"{name}={hidden(value)}" for name, value in attributes))
    assert [value for relative in dn.read(der) for _, value in relative] == [value for _, value in attributes]
    assert dn.same(der, der)


@given(
    st.one_of(st.binary(max_size=80), st.binary(max_size=12).map(lambda tail: SITE[:20] + tail + SITE[20:]))
)
def test_no_bytes_do_harm(data: bytes) -> None:
    """Read or ParseError; the text of anything is short and printable; comparison never raises."""
    with contextlib.suppress(ParseError):
        dn.read(data)
    assert dn.to_text(data).isprintable()
    assert dn.same(data, SITE) in (True, False)
    assert dn.matches(SITE, data) in (True, False)
