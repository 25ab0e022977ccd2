"""CERT and CERTREQ payloads: codecs, bounds, and which are sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.errors import ParseError
from oepy.ike import certificates
from oepy.ike.header import PayloadType
from oepy.ike.payload_cert import (
    HASH_SIZE,
    MAX_AUTHORITIES,
    MAX_DATA,
    CertData,
    CertEncoding,
    CertRequest,
    build_cert,
    build_certreq,
    parse_cert,
    parse_certreq,
)
from oepy.ike.settings import Certificates
from oepy.wire import Reader

HASHES = tuple(bytes([number]) * HASH_SIZE for number in range(20))


@given(st.integers(0, 255), st.binary(max_size=300))
def test_certificates_go_there_and_back(encoding: int, data: bytes) -> None:
    cert = CertData(encoding, data)
    assert parse_cert(Reader(build_cert(cert))) == cert


@given(st.lists(st.binary(min_size=HASH_SIZE, max_size=HASH_SIZE), max_size=20))
def test_requests_go_there_and_back(hashes: list[bytes]) -> None:
    wanted = CertRequest(CertEncoding.X509, tuple(hashes))
    assert parse_certreq(Reader(build_certreq(wanted))) == wanted


def test_other_encodings_of_requests_are_known_by_their_number_alone() -> None:
    assert parse_certreq(Reader(bytes((1,)) + b"anything")) == CertRequest(1)


@pytest.mark.parametrize(
    "data", [b"", b"\x04" + b"x" * 19, b"\x04" + bytes(HASH_SIZE * (MAX_AUTHORITIES + 1))]
)
def test_malformed_requests(data: bytes) -> None:
    with pytest.raises(ParseError):
        parse_certreq(Reader(data))


def test_malformed_certificates() -> None:
    for data in (b"", b"\x04" + bytes(MAX_DATA + 1)):
        with pytest.raises(ParseError):
            parse_cert(Reader(data))


def test_of_too_many_authorities_none_is_named() -> None:
    """IKE_SA_INIT is not fragmented, and its answer goes to whoever asks."""
    few = certificates.requests(Certificates(ask=True, authorities=HASHES[:8]))
    assert [len(body) for _, body in few] == [1 + 8 * HASH_SIZE]
    assert certificates.requests(Certificates(ask=True, authorities=HASHES)) == [
        (PayloadType.CERTREQ, bytes((CertEncoding.X509,)))
    ]
    assert certificates.requests(Certificates(authorities=HASHES)) == []


@pytest.mark.parametrize(
    ("send", "asked", "count"),
    [("ifasked", True, 2), ("ifasked", False, 0), ("always", False, 2), ("never", True, 0)],
)
def test_the_chain_goes_as_configured(send: str, asked: bool, count: int) -> None:
    wanted = frozenset((CertEncoding.X509,)) if asked else frozenset[int]()
    chain = certificates.own(Certificates(chain=(b"own", b"above"), send=send), wanted)
    assert chain == [(PayloadType.CERT, b"\x04own"), (PayloadType.CERT, b"\x04above")][:count]


def test_what_a_responder_says_goes_along_where_it_is_asked_for() -> None:
    """RFC 4806; never without the certificate itself."""
    ours = Certificates(chain=(b"own",), responses=(b"good",))
    both = frozenset((CertEncoding.X509, CertEncoding.OCSP))
    assert certificates.own(ours, both) == [(PayloadType.CERT, b"\x04own"), (PayloadType.CERT, b"\x0egood")]
    assert certificates.own(ours, frozenset((CertEncoding.X509,))) == [(PayloadType.CERT, b"\x04own")]
    assert certificates.own(ours, frozenset((CertEncoding.OCSP,))) == []
