"""Certificates, paths and identities: right ones, and wrong in every way that RFC 5280 and RFC 4945 name."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from oepy.errors import KeyFormatError, ParseError
from oepy.model import IdType, PeerIdentity
from oepy.x509.certificates import MAX_CERTIFICATE, from_der, from_pem, key_hash, subject_of, to_der
from oepy.x509.identity import identities_of, speaks_for
from oepy.x509.path import MAX_CHECKS, MAX_DEPTH, PathError, validate
from tests.fakes.certificates import DAY, DNS, IP, MAIL, MOMENT, NOW, Holder, name, usage

ROOT = Holder("Root")
MIDDLE = Holder("Middle", ROOT)
HOST = Holder("host", MIDDLE, ca=False, alternatives=[DNS("gw.example")])


def check(
    leaf: Holder, others: Sequence[Holder] = (), anchors: Sequence[Holder] = (ROOT,), now: int = NOW
) -> int:
    """The number of certificates of the path."""
    path = validate(
        leaf.certificate, [one.certificate for one in others], [one.certificate for one in anchors], now
    )
    assert path.leaf == leaf.certificate
    assert path.anchor in [one.certificate for one in anchors]
    return len(path.certificates)


# ---- paths --------------------------------------------------------------------------------------------------


def test_paths_of_every_length() -> None:
    """Directly below the root, with intermediates in any order, with others that do not belong."""
    assert check(Holder("a", ROOT, ca=False)) == 2
    assert check(HOST, [MIDDLE]) == 3
    lower = Holder("Lower", MIDDLE)
    stranger = Holder("Stranger")
    assert check(Holder("b", lower, ca=False), [stranger, lower, HOST, MIDDLE]) == 4
    assert check(HOST, [], [MIDDLE]) == 2, "an intermediate may be the anchor"


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)])
def test_kinds_of_keys(key: Any) -> None:
    root = Holder("R", key=key)
    assert check(Holder("h", root, ca=False, key=key), anchors=[root]) == 2


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (Holder("h", ROOT, ca=False, end=-0.5), "expired"),
        (Holder("h", ROOT, ca=False, start=1), "not valid before"),
        (Holder("h", ROOT, ca=False, extensions=[(usage(key_agreement=True), True)]), "no signatures"),
        (
            Holder(
                "h",
                ROOT,
                ca=False,
                extensions=[(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False)],
            ),
            "extended key usage",
        ),
        (
            Holder(
                "h",
                ROOT,
                ca=False,
                extensions=[
                    (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)
                ],
            ),
            "1.2.3.4 is not understood",
        ),
        (Holder("h", ROOT, ca=False, key=rsa.generate_private_key(65537, 1024)), "too short"),
        (Holder("h", Holder("Root"), ca=False), "signature is not by"),
        (Holder("h", Holder("Nobody"), ca=False), "no CA that is trusted or was sent is called"),
    ],
)
def test_leaves_that_are_refused(leaf: Holder, why: str) -> None:
    with pytest.raises(PathError, match=why):
        check(leaf)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ca": False}, "no CA"),
        ({"end": -0.5}, "expired"),
        ({"extensions": [(usage(crl_sign=True), True)]}, "no certificates"),
        ({"digest": hashes.SHA224()}, ""),
    ],
)
def test_issuers_that_are_refused(options: dict[str, Any], why: str) -> None:
    middle = Holder("M", ROOT, **options)
    leaf = Holder("h", middle, ca=False)
    if not why:
        assert check(leaf, [middle]) == 3
        return
    with pytest.raises(PathError, match=why):
        check(leaf, [middle])


def test_path_length_counts_the_cas_between() -> None:
    root = Holder("R", path_length=1)
    first = Holder("1", root)
    second = Holder("2", first)
    assert check(Holder("h", first, ca=False), [first], [root]) == 3
    with pytest.raises(PathError, match="path length"):
        check(Holder("h", second, ca=False), [first, second], [root])


def test_a_trust_anchor_must_be_valid_itself() -> None:
    old = Holder("Root", end=-0.5)
    with pytest.raises(PathError, match="expired"):
        check(Holder("h", old, ca=False), anchors=[old])
    with pytest.raises(PathError, match="no CA is trusted"):
        check(HOST, [MIDDLE], [])


def test_long_paths_and_many_of_one_name_are_bounded() -> None:
    """Whoever sends certificates cannot make us check signatures without end."""
    chain = [ROOT]
    for number in range(MAX_DEPTH + 2):
        chain.append(Holder(f"L{number}", chain[-1]))
    with pytest.raises(PathError):
        check(Holder("h", chain[-1], ca=False), chain[1:])
    same = [Holder("Same", issuer_name="Same") for _ in range(MAX_CHECKS - 2)]
    with pytest.raises(PathError):
        check(Holder("h", same[0], ca=False, issuer_name="Same"), same, [ROOT])


def test_loops_end() -> None:
    a = Holder("A", issuer_name="B")
    b = Holder("B", issuer_name="A")
    with pytest.raises(PathError):
        check(Holder("h", a, ca=False), [a, b])


@pytest.mark.parametrize(
    ("permitted", "excluded", "names", "good"),
    [
        ([DNS("example")], [], [DNS("gw.example")], True),
        ([DNS("example")], [], [DNS("gw.other")], False),
        ([DNS("example")], [], [DNS("gwexample")], False),
        ([], [DNS("bad.example")], [DNS("x.bad.example")], False),
        ([], [DNS("bad.example")], [DNS("good.example")], True),
        ([IP(ip_network("192.0.2.0/24"))], [], [IP(ip_address("192.0.2.9"))], True),
        ([IP(ip_network("192.0.2.0/24"))], [], [IP(ip_address("198.51.100.9"))], False),
        ([MAIL("example")], [], [MAIL("u@example")], True),
        ([MAIL(".example")], [], [MAIL("u@example")], False),
        ([x509.DirectoryName(name("h"))], [], [DNS("anything")], True),
        ([x509.DirectoryName(name("other"))], [], [DNS("anything")], False),
    ],
)
def test_name_constraints(permitted: list[Any], excluded: list[Any], names: list[Any], good: bool) -> None:
    constraints = x509.NameConstraints(permitted or None, excluded or None)
    middle = Holder("M", ROOT, extensions=[(constraints, True)])
    leaf = Holder("h", middle, ca=False, alternatives=names)
    if good:
        assert check(leaf, [middle]) == 3
    else:
        with pytest.raises(PathError, match="name constraints"):
            check(leaf, [middle])


# ---- identities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "good"),
    [
        ("gw.example", True),
        ("GW.Example.", True),
        ("example", False),
        ("x.gw.example", False),
        ("a.wild.example", False),
        ("user@Example", True),
        ("192.0.2.1", True),
        ("192.0.2.2", False),
        ("2001:db8::1", True),
    ],
)
def test_identities_by_alternative_names(identity: str, good: bool) -> None:
    alternatives = [DNS("gw.example"), DNS("*.wild.example"), MAIL("user@example")]
    alternatives += [IP(ip_address("192.0.2.1")), IP(ip_address("2001:db8::1"))]
    holder = Holder("cn.example", ROOT, ca=False, alternatives=alternatives)
    assert speaks_for(holder.certificate, PeerIdentity.parse(identity)) is good
    assert not speaks_for(holder.certificate, PeerIdentity.parse("cn.example")), "the CN is no domain name"
    assert not speaks_for(holder.certificate, PeerIdentity.null())
    assert all(speaks_for(holder.certificate, found) for found in identities_of(holder.certificate)[:1])


def test_a_dn_is_the_subject() -> None:
    holder = Holder("gw", ROOT, ca=False)
    (identity,) = identities_of(holder.certificate)
    assert identity.type is IdType.DER_ASN1_DN
    assert speaks_for(holder.certificate, identity)
    assert not speaks_for(HOST.certificate, identity)
    assert subject_of(holder.certificate) == "CN=gw"
    assert (
        subject_of(Holder("", ROOT, ca=False, alternatives=[DNS("only.example")]).certificate)
        == "only.example"
    )


# ---- reading ------------------------------------------------------------------------------------------------


def test_der_and_pem_round_trip() -> None:
    der = to_der(HOST.certificate)
    assert from_der(der) == HOST.certificate
    pem = b"".join(one.certificate.public_bytes(serialization.Encoding.PEM) for one in (HOST, MIDDLE))
    assert from_pem(b"text before\n" + pem, "x.pem") == [HOST.certificate, MIDDLE.certificate]
    assert len(key_hash(HOST.certificate)) == 20


def test_what_cannot_be_read_says_so() -> None:
    with pytest.raises(KeyFormatError, match=r"x\.pem"):
        from_pem(b"nothing", "x.pem")
    with pytest.raises(ParseError, match="limit"):
        from_der(bytes(MAX_CERTIFICATE + 1))


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_any_bytes_are_a_certificate_or_a_parse_error(data: bytes, at: int, change: bytes) -> None:
    """Random ones, and a good one with some bytes changed."""
    good = bytearray(to_der(HOST.certificate))
    good[at : at + len(change)] = change
    for candidate in (data, bytes(good)):
        try:
            certificate = from_der(candidate)
        except ParseError:
            continue
        with contextlib.suppress(PathError):
            validate(certificate, [MIDDLE.certificate], [ROOT.certificate], NOW)
        identities_of(certificate)
        speaks_for(certificate, PeerIdentity.parse("gw.example"))


def test_a_name_is_what_its_kind_says_not_what_it_reads_like() -> None:
    """A dNSName that looks like an address, a subject or a line of a log is a name and stays one."""
    odd = [DNS("192.0.2.1"), DNS("gw.\x03E="), DNS("a\nb.example"), MAIL("CN=a@b.example")]
    holder = Holder("h", ROOT, ca=False, alternatives=odd)
    found = identities_of(holder.certificate)
    assert [one.type for one in found] == [IdType.FQDN] * 3 + [IdType.RFC822_ADDR, IdType.DER_ASN1_DN]
    assert all(str(one).isprintable() for one in found)
    nobody = Holder("", ROOT, ca=False, alternatives=[DNS("a\nb.example")])
    assert subject_of(nobody.certificate) == "a?b.example"
    assert not speaks_for(holder.certificate, PeerIdentity.parse("192.0.2.1"))


def test_certificates_that_are_made_to_be_costly_are_given_up() -> None:
    """A leaf with many names below CAs of one name with many constraints, as anybody can make them up."""
    trees = [DNS(f"x{number}.example") for number in range(250)]
    constraints = x509.NameConstraints(permitted_subtrees=None, excluded_subtrees=trees)
    bombs = [Holder("CA", extensions=[(constraints, True)]) for _ in range(7)]
    leaf = Holder("h", bombs[0], ca=False, alternatives=[DNS(f"y{number}.example") for number in range(250)])
    with pytest.raises(PathError, match="names would have to be compared"):
        check(leaf, bombs)
    few = Holder("h", bombs[0], ca=False, alternatives=[DNS("y.example")])
    assert check(few, bombs, anchors=bombs[:1]) == 2


def test_keys_that_are_made_to_be_costly_are_not_tried() -> None:
    """A modulus of 16,000 bits makes one check take as long as hundreds of usual ones."""
    huge = rsa.RSAPublicNumbers(65537, (1 << 16_000) + 1).public_key()
    builder = x509.CertificateBuilder().subject_name(name("CA")).issuer_name(ROOT.name).public_key(huge)
    builder = builder.serial_number(1).not_valid_before(MOMENT - DAY).not_valid_after(MOMENT + DAY)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    middle = builder.sign(ROOT.key, hashes.SHA256())
    leaf = Holder("h", issuer_name="CA", ca=False)
    with pytest.raises(PathError, match="costs too much"):
        validate(leaf.certificate, [middle], [ROOT.certificate], NOW)
