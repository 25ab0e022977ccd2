"""Distinguished names (X.501, RFC 5280 §4.1.2.4) as bytes of DER: written as people write them, compared by what
they say. Text has the order of the DER, as strongSwan and OpenSSL show it: `C=CH, O=Acme, CN=gw.example`.

A reader of our own, for cryptography reads names inside of certificates only, and IKE sends them alone.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from oepy.errors import ParseError

MAX_NAME = 1024  # bytes
MAX_ATTRIBUTES = 32
ANY_VALUE = "*"

Attribute = tuple[str, str]
"""Dotted OID and value."""
Name = tuple[tuple[Attribute, ...], ...]
"""Relative names in the order of the DER; nearly always of one attribute."""

_OIDS = {
    "CN": "2.5.4.3",
    "SURNAME": "2.5.4.4",
    "SERIALNUMBER": "2.5.4.5",
    "C": "2.5.4.6",
    "L": "2.5.4.7",
    "ST": "2.5.4.8",
    "STREET": "2.5.4.9",
    "O": "2.5.4.10",
    "OU": "2.5.4.11",
    "T": "2.5.4.12",
    "GN": "2.5.4.42",
    "DC": "0.9.2342.19200300.100.1.25",
    "UID": "0.9.2342.19200300.100.1.1",
    "E": "1.2.840.113549.1.9.1",
}
_ALIASES = {"S": "ST", "SN": "SERIALNUMBER", "G": "GN", "EMAIL": "E", "EMAILADDRESS": "E"}
_NAMES = {oid: name for name, oid in _OIDS.items()}
_DOTTED = re.compile(r"[0-2](\.\d{1,10}){1,20}\Z")
_PRINTABLE = re.compile(r"[A-Za-z0-9 '()+,./:=?-]*\Z")
_SEQUENCE, _SET, _OID = 0x30, 0x31, 0x06
_UTF8, _PRINTABLE_STRING, _IA5 = 0x0C, 0x13, 0x16
_ENCODINGS = {
    _UTF8: "utf-8",
    _PRINTABLE_STRING: "ascii",
    _IA5: "ascii",
    0x14: "latin-1",
    0x1C: "utf-32-be",
    0x1E: "utf-16-be",
}


# ---- DER ---------------------------------------------------------------------------------------------------


def _element(data: bytes, at: int, end: int, tag: int | None = None) -> tuple[int, int, int]:
    """Tag, start and end of the content of the element at `at`."""
    if at + 2 > end:
        raise ParseError("distinguished name: cut off")
    found, size = data[at], data[at + 1]
    at += 2
    if size & 0x80:
        count = size & 0x7F
        if not 1 <= count <= 2 or at + count > end:
            raise ParseError("distinguished name: a length that cannot be")
        size = int.from_bytes(data[at : at + count], "big")
        at += count
    if at + size > end or (tag is not None and found != tag):
        raise ParseError("distinguished name: not of the form that X.501 gives it")
    return found, at, at + size


def _oid(data: bytes) -> str:
    numbers, value = [], 0
    for byte in data:
        value = value << 7 | byte & 0x7F
        if value >> 64:
            raise ParseError("distinguished name: an object identifier out of all bounds")
        if not byte & 0x80:
            numbers.append(value)
            value = 0
    if not numbers or data[-1] & 0x80:
        raise ParseError("distinguished name: an object identifier cut off")
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, (first, numbers[0] - 40 * first, *numbers[1:])))


def _value(tag: int, data: bytes) -> str:
    encoding = _ENCODINGS.get(tag)
    try:
        return "#" + data.hex() if encoding is None else data.decode(encoding)
    except UnicodeDecodeError:
        raise ParseError("distinguished name: a text that is none") from None


def read(der: bytes) -> Name:
    """Raises ParseError."""
    if len(der) > MAX_NAME:
        raise ParseError(f"distinguished name of {len(der)} bytes")
    _, at, end = _element(der, 0, len(der), _SEQUENCE)
    if end != len(der):
        raise ParseError("distinguished name: something follows it")
    found: list[tuple[Attribute, ...]] = []
    while at < end:
        _, inner, at = _element(der, at, end, _SET)
        attributes = []
        while inner < at:
            _, kind, inner = _element(der, inner, at, _SEQUENCE)
            _, start, stop = _element(der, kind, inner, _OID)
            tag, text, last = _element(der, stop, inner)
            if last != inner:
                raise ParseError("distinguished name: an attribute of more than one value")
            attributes.append((_oid(der[start:stop]), _value(tag, der[text:last])))
        found.append(tuple(attributes))
        if sum(map(len, found)) > MAX_ATTRIBUTES:
            raise ParseError(f"distinguished name of more than {MAX_ATTRIBUTES} attributes")
    return tuple(found)


def _wrap(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    if len(body) < 128:
        return bytes((tag, len(body))) + body
    size = len(body).to_bytes(2, "big").lstrip(b"\0")
    return bytes((tag, 0x80 | len(size))) + size + body


def _oid_bytes(dotted: str) -> bytes:
    first, second, *rest = map(int, dotted.split("."))
    encoded = b""
    for number in (40 * first + second, *rest):
        groups = [number & 0x7F]
        while number := number >> 7:
            groups.append(0x80 | number & 0x7F)
        encoded += bytes(reversed(groups))
    return encoded


def _text_bytes(oid: str, value: str) -> bytes:
    """RFC 5280 appendix A: a country is printable, e-mail and domain are IA5; the others UTF-8, as it asks for."""
    if oid in (_OIDS["C"], _OIDS["SERIALNUMBER"]) and _PRINTABLE.match(value):
        return _wrap(_PRINTABLE_STRING, value.encode("ascii"))
    if oid in (_OIDS["E"], _OIDS["DC"]) and value.isascii():
        return _wrap(_IA5, value.encode("ascii"))
    return _wrap(_UTF8, value.encode("utf-8"))


# ---- text --------------------------------------------------------------------------------------------------


def _split(text: str) -> list[str]:
    """At commas and semicolons that no backslash hides."""
    parts, current, hidden = [], "", False
    for letter in text:
        if not hidden and letter in ",;":
            parts.append(current)
            current = ""
            continue
        hidden = not hidden and letter == "\\"
        current += letter
    return [*parts, current]


def _attribute(text: str) -> Attribute:
    name, equals, value = text.partition("=")
    name = name.strip().upper()
    name = _ALIASES.get(name, name)
    oid = _OIDS.get(name) or (name if _DOTTED.match(name) else "")
    value = re.sub(r"\\(.)", r"\1", value.strip(), flags=re.DOTALL)
    if not equals or not oid:
        known = ", ".join(_OIDS)
        raise ValueError(f"{text.strip()[:60]!r}: write it like CN=gw.example; known are {known}, or an OID")
    if not value:
        raise ValueError(f"{text.strip()[:60]!r} has no value")
    return oid, value


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> bytes:
    """DER of `C=CH, O=Acme, CN=gw`; a comma inside of a value is written `\\,`. Raises ValueError."""
    attributes = [_attribute(part) for part in _split(text)]
    der = _wrap(
        _SEQUENCE,
        *(
            _wrap(_SET, _wrap(_SEQUENCE, _wrap(_OID, _oid_bytes(oid)), _text_bytes(oid, value)))
            for oid, value in attributes
        ),
    )
    if len(attributes) > MAX_ATTRIBUTES or len(der) > MAX_NAME:
        raise ValueError(f"a distinguished name of more than {MAX_ATTRIBUTES} attributes or {MAX_NAME} bytes")
    return der


def to_text(der: bytes) -> str:
    """What `parse` reads again, for names that can be read; else the start of the bytes."""
    try:
        name = read(der)
    except ParseError:
        return f"DN:{der[:64].hex()}"
    return ", ".join(
        "+".join(f"{_NAMES.get(oid, oid)}={_shown(value)}" for oid, value in relative) for relative in name
    )


def printable(text: str) -> str:
    """For messages: of what strangers write no more than a line's worth, and nothing that ends a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:255])


def _shown(value: str) -> str:
    return re.sub(r"([\\,;])", r"\\\1", printable(value))


# ---- comparison --------------------------------------------------------------------------------------------


def _folded(value: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", value).casefold().split())


@functools.lru_cache(maxsize=4096)
def _canonical(der: bytes) -> tuple[frozenset[Attribute], ...]:
    return tuple(frozenset((oid, _folded(value)) for oid, value in relative) for relative in read(der))


def same(one: bytes, other: bytes) -> bool:
    """RFC 5280 §7.1: by attributes, whatever kind of string holds them, in any case, blanks counted once."""
    if one == other:
        return True
    try:
        return _canonical(one) == _canonical(other)
    except ParseError:
        return False


def below(tree: bytes, der: bytes) -> bool:
    """Whether a name begins with all of another, `same` part by part."""
    try:
        wanted = _canonical(tree)
        return _canonical(der)[: len(wanted)] == wanted
    except ParseError:
        return False


def matches(pattern: bytes, der: bytes) -> bool:
    """`same`, where a value `*` in the pattern stands for any."""
    try:
        wanted, found = _canonical(pattern), _canonical(der)
    except ParseError:
        return False
    if len(wanted) != len(found):
        return False
    return all(
        left == right
        or (
            len(left) == len(right) == 1
            and next(iter(left))[0] == next(iter(right))[0]
            and next(iter(left))[1] == ANY_VALUE
        )
        for left, right in zip(wanted, found, strict=True)
    )


def wildcards(der: bytes) -> int:
    """How many values of the pattern are `*`. Raises ParseError."""
    return sum(value == ANY_VALUE for relative in read(der) for _, value in relative)
