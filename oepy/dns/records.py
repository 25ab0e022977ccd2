"""Key records: IPSECKEY rdata (RFC 4025 §2, RFC 9373) and the TXT of RFC 4322 §5.2, both ways.

Parsing is ours and not the DNS library's, so that one odd record never costs the good ones beside it. Two
kinds of refusal are told apart, because the engine treats them differently: `UnsupportedRecord` is a record
that is perhaps fine but not for us (an unknown algorithm, no key in it), `ParseError` is one of our kind
that is malformed.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import dns.exception
import dns.name

from oepy.errors import KeyFormatError, ParseError
from oepy.keys import from_public_key
from oepy.model import GatewayType, IpAddress, KeyAlgorithm, PublicKey
from oepy.wire import Reader, Writer

MAX_TEXT_CHUNK = 240  # of the 255 that a TXT string may have; what other generators write
ALGORITHM_NONE = 0
_TEXT_TAG = b"x-ipsec-server"
_OLD_TEXT_TAG = b"x-ipsec-gateway"  # of the 2001 design; never accepted, but worth telling its owner

Gateway = IPv4Address | IPv6Address | dns.name.Name | None


class UnsupportedRecord(ParseError):
    """Not malformed as far as we can see, but nothing that we can use."""


@dataclass(frozen=True, slots=True)
class IpsecKey:
    """RFC 4025 §2.1. `gateway` is None for type 0; `key` is the raw public key field."""

    precedence: int
    algorithm: int
    gateway: Gateway
    key: bytes

    @property
    def gateway_type(self) -> GatewayType:
        return gateway_type_of(self.gateway)

    def public_key(self) -> PublicKey:
        """The key, checked to be usable. Raises UnsupportedRecord or ParseError."""
        if self.algorithm == ALGORITHM_NONE:
            raise UnsupportedRecord("the record holds no key (algorithm 0)")
        try:
            algorithm = KeyAlgorithm(self.algorithm)
        except ValueError:
            raise UnsupportedRecord(f"unknown key algorithm {self.algorithm}") from None
        return checked_key(PublicKey(algorithm, self.key))

    def to_text(self) -> str:
        """Presentation format of RFC 4025 §3.1."""
        encoded = base64.b64encode(self.key).decode("ascii")
        head = f"{self.precedence} {int(self.gateway_type)} {self.algorithm} {gateway_text(self.gateway)}"
        return f"{head} {encoded}".rstrip()


def gateway_type_of(gateway: Gateway) -> GatewayType:
    if gateway is None:
        return GatewayType.NONE
    if isinstance(gateway, IPv4Address):
        return GatewayType.IPV4
    return GatewayType.IPV6 if isinstance(gateway, IPv6Address) else GatewayType.NAME


def gateway_text(gateway: Gateway) -> str:
    """The gateway as published; `.` for none."""
    return "." if gateway is None else str(gateway)


def checked_key(key: PublicKey) -> PublicKey:
    """The same key. Raises ParseError where it cannot be used for verification."""
    try:
        from_public_key(key)
    except KeyFormatError as error:
        raise ParseError(error.what) from None
    return key


def parse_ipseckey(rdata: bytes) -> IpsecKey:
    """From wire form. Raises UnsupportedRecord for an unknown gateway type, ParseError for broken bytes."""
    reader = Reader(rdata, what="IPSECKEY")
    precedence, gateway_type, algorithm = reader.pull_u8(), reader.pull_u8(), reader.pull_u8()
    gateway: Gateway
    if gateway_type == GatewayType.NONE:
        gateway = None
    elif gateway_type == GatewayType.IPV4:
        gateway = IPv4Address(reader.pull_bytes(4))
    elif gateway_type == GatewayType.IPV6:
        gateway = IPv6Address(reader.pull_bytes(16))
    elif gateway_type == GatewayType.NAME:
        gateway = _pull_name(reader)
    else:
        raise UnsupportedRecord(f"unknown gateway type {gateway_type}")
    return IpsecKey(precedence, algorithm, gateway, reader.pull_rest())


def _pull_name(reader: Reader) -> dns.name.Name:
    """An uncompressed name (RFC 4025 §2.5): a compression pointer is an error, so there is no loop."""
    labels: list[bytes] = []
    total = 0
    while True:
        length = reader.pull_u8()
        total += length + 1
        if length > 63 or total > 255:
            raise ParseError("IPSECKEY: the gateway is no uncompressed domain name")
        labels.append(reader.pull_bytes(length))
        if length == 0:
            return dns.name.Name(labels)


def build_ipseckey(record: IpsecKey) -> bytes:
    """To wire form; the mirror of `parse_ipseckey`."""
    writer = Writer()
    writer.push_u8(record.precedence)
    writer.push_u8(record.gateway_type)
    writer.push_u8(record.algorithm)
    if isinstance(record.gateway, dns.name.Name):
        writer.push_bytes(record.gateway.to_wire() or b"")
    elif record.gateway is not None:
        writer.push_bytes(record.gateway.packed)
    writer.push_bytes(record.key)
    return writer.finish()


@dataclass(frozen=True, slots=True)
class OeText:
    """RFC 4322 §5.2. `gateway` is a name for `@fqdn`; `key` is None where it stands elsewhere."""

    precedence: int
    gateway: IpAddress | dns.name.Name
    key: PublicKey | None

    @property
    def gateway_text(self) -> str:
        if isinstance(self.gateway, dns.name.Name):
            return f"@{self.gateway.to_text(omit_final_dot=True)}"
        return str(self.gateway)


_TEXT_FORM = re.compile(
    rb"x-ipsec-server[ \t]*\([ \t]*([0-9]{1,5})[ \t]*\)[ \t]*=[ \t]*([^ \t]+)(?:[ \t]+(.*))?",
    re.IGNORECASE | re.DOTALL,
)


def is_oe_text(text: bytes) -> bool:
    """Whether this TXT claims to be RFC 4322's; everybody else's TXT is none of our business."""
    head = text[: len(_TEXT_TAG)].lower()
    follower = text[len(_TEXT_TAG) : len(_TEXT_TAG) + 1]
    return head == _TEXT_TAG and not re.match(rb"[0-9A-Za-z_-]", follower)


def is_old_oe_text(text: bytes) -> bool:
    return text[: len(_OLD_TEXT_TAG)].lower() == _OLD_TEXT_TAG


def parse_oe_text(strings: Sequence[bytes]) -> OeText:
    """From the strings of one TXT record that `is_oe_text`; joined without separator. Raises ParseError."""
    text = b"".join(strings)
    if b"\0" in text:
        raise ParseError("X-IPsec-Server: contains a NUL byte")
    match = _TEXT_FORM.fullmatch(text)
    if match is None:
        raise ParseError("X-IPsec-Server: not of the form X-IPsec-Server(PRECEDENCE)=GATEWAY KEY")
    precedence = int(match[1])
    if precedence > 65535:
        raise ParseError(f"X-IPsec-Server: precedence {precedence} is over 65535")
    encoded = b"".join((match[3] or b"").split())
    return OeText(precedence, _text_gateway(match[2]), _text_key(encoded) if encoded else None)


def _text_gateway(field: bytes) -> IpAddress | dns.name.Name:
    text = field.decode("ascii", "backslashreplace")
    if text.startswith("@"):
        try:
            name = dns.name.from_text(text[1:], dns.name.root)
        except (dns.exception.DNSException, ValueError):
            raise ParseError(f"X-IPsec-Server: {text[:80]!r} is no domain name") from None
        if name == dns.name.root:
            raise ParseError("X-IPsec-Server: the gateway name is empty")
        return name
    try:
        address = ip_address(text)
    except ValueError:
        raise ParseError(f"X-IPsec-Server: the gateway {text[:80]!r} is no address and no @name") from None
    if address.is_unspecified or (isinstance(address, IPv6Address) and address.scope_id):
        raise ParseError(f"X-IPsec-Server: {address} cannot be a gateway")
    return address


def _text_key(encoded: bytes) -> PublicKey:
    try:
        data = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ParseError("X-IPsec-Server: the key is not valid base64") from None
    return checked_key(PublicKey(KeyAlgorithm.RSA, data))


def build_oe_text(record: OeText) -> tuple[bytes, ...]:
    """The strings of the TXT record: head, then the key in pieces. The mirror of `parse_oe_text`."""
    head = f"X-IPsec-Server({record.precedence})={record.gateway_text}".encode("ascii")
    if record.key is None:
        return (head,)
    encoded = base64.b64encode(record.key.data)
    pieces = (encoded[at : at + MAX_TEXT_CHUNK] for at in range(0, len(encoded), MAX_TEXT_CHUNK))
    return (head + b" ", *pieces)


def text_rdata(strings: Sequence[bytes]) -> str:
    """Presentation format of a TXT whose strings need no escapes."""
    return " ".join('"' + string.decode("ascii") + '"' for string in strings)
