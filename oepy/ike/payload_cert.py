"""Certificate and certificate request payloads (RFC 7296 §3.6, 3.7; RFC 4806 for OCSP)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from oepy.errors import ParseError
from oepy.wire import Reader

MAX_DATA = 16 * 1024  # bytes of one certificate or response; real ones have 1 to 3 kB
MAX_AUTHORITIES = 1024  # that one request names; Debian's bundle of all public CAs has 140
HASH_SIZE = 20  # SHA-1 of a CA's SubjectPublicKeyInfo


class CertEncoding(enum.IntEnum):
    X509 = 4
    OCSP = 14


@dataclass(frozen=True, slots=True)
class CertData:
    """`encoding` stays a number: what is unknown is passed over."""

    encoding: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CertRequest:
    """`authorities`: key hashes of CAs whose certificates the sender takes; none of them: whichever."""

    encoding: int
    authorities: tuple[bytes, ...] = ()


def parse_cert(reader: Reader) -> CertData:
    encoding = reader.pull_u8()
    if reader.remaining > MAX_DATA:
        raise ParseError(f"a certificate payload of {reader.remaining} bytes is over the limit of {MAX_DATA}")
    return CertData(encoding, reader.pull_rest())


def build_cert(cert: CertData) -> bytes:
    return bytes((cert.encoding,)) + cert.data


def parse_certreq(reader: Reader) -> CertRequest:
    encoding = reader.pull_u8()
    data = reader.pull_rest()
    if encoding != CertEncoding.X509:
        return CertRequest(encoding)
    if len(data) % HASH_SIZE or len(data) > MAX_AUTHORITIES * HASH_SIZE:
        raise ParseError(f"a certificate request with {len(data)} bytes of key hashes")
    return CertRequest(encoding, tuple(data[at : at + HASH_SIZE] for at in range(0, len(data), HASH_SIZE)))


def build_certreq(request: CertRequest) -> bytes:
    return bytes((request.encoding,)) + b"".join(request.authorities)
