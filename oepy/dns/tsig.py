"""TSIG key files in BIND's form (`tsig-keygen`): `key "name" { algorithm hmac-sha256; secret "…"; };`."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

import dns.exception
import dns.name
import dns.tsig

from oepy.errors import KeyFormatError
from oepy.privatefile import read_private_file

MIN_SECRET_BYTES = 16  # 128 bits: RFC 8945 §8 wants at least that
_ALGORITHMS = {
    "hmac-sha224": dns.tsig.HMAC_SHA224,
    "hmac-sha256": dns.tsig.HMAC_SHA256,
    "hmac-sha384": dns.tsig.HMAC_SHA384,
    "hmac-sha512": dns.tsig.HMAC_SHA512,
}
_COMMENT = re.compile(r"/\*.*?\*/|(?://|#)[^\n]*", re.DOTALL)
_KEY = re.compile(r'\s*key\s+(?:"([^"\s]+)"|([^"\s{};]+))\s*\{([^{}]*)\}\s*;\s*')
_FIELD = re.compile(r'\s*(algorithm|secret)\s+(?:"([^"]*)"|([^"\s;]+))\s*;', re.IGNORECASE)


def load_tsig(path: Path) -> dns.tsig.Key:
    """The one key of a file that only its owner can read. Raises KeyFormatError; never shows the secret."""
    data = read_private_file(path, "make it with `tsig-keygen NAME > FILE`, mode 0600")
    try:
        return parse_tsig(data.decode("ascii"), str(path))
    except UnicodeDecodeError:
        raise KeyFormatError(f"{path} is no TSIG key file", "make it with `tsig-keygen`") from None


def parse_tsig(text: str, source: str) -> dns.tsig.Key:
    """Raises KeyFormatError where there is not exactly one complete key."""
    # A `//` or `#` inside of the quoted base64 is no comment: strings are put aside first
    match = _KEY.fullmatch(_without_comments(text))
    if match is None:
        raise KeyFormatError(
            f"{source} is no TSIG key file",
            'write one `key "NAME" { algorithm hmac-sha256; secret "BASE64"; };` as tsig-keygen does',
        )
    fields: dict[str, str] = {}
    rest = match[3]
    while rest.strip():
        part = _FIELD.match(rest)
        if part is None or part[1].lower() in fields:
            raise KeyFormatError(f"{source}: the key holds something else than one algorithm and one secret")
        fields[part[1].lower()] = part[2] if part[2] is not None else part[3]
        rest = rest[part.end() :]
    if fields.keys() != {"algorithm", "secret"}:
        raise KeyFormatError(f"{source}: `algorithm` or `secret` is missing")
    algorithm = _ALGORITHMS.get(fields["algorithm"].lower().rstrip("."))
    if algorithm is None:
        raise KeyFormatError(
            f"{source}: algorithm {fields['algorithm'][:40]!r} is not usable",
            f"take {', '.join(_ALGORITHMS)}",
        )
    try:
        secret = base64.b64decode("".join(fields["secret"].split()), validate=True)
        name = dns.name.from_text(match[1] or match[2], dns.name.root)
    except binascii.Error:
        raise KeyFormatError(f"{source}: the secret is no base64") from None
    except (dns.exception.DNSException, ValueError):
        raise KeyFormatError(f"{source}: the key's name is no domain name") from None
    if len(secret) < MIN_SECRET_BYTES:
        raise KeyFormatError(f"{source}: the secret has less than 128 bits", "make it with `tsig-keygen`")
    return dns.tsig.Key(name, secret, algorithm)


def _without_comments(text: str) -> str:
    pieces = re.split(r'("[^"\n]*")', text)
    return "".join(piece if at % 2 else _COMMENT.sub(" ", piece) for at, piece in enumerate(pieces))
