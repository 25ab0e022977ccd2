"""How a resolver is written: `ADDRESS[@PORT][#NAME][#pin-sha256=BASE64]`, as in unbound's `forward-addr`.

Whatever stands behind a `#` makes it DNS over TLS (RFC 7858) in the strict profile (RFC 8310 §5): the server
proves the name by a certificate, or shows a pinned key (RFC 7858 §4.2), or both; else it is not asked.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, ip_address

from oepy.model import IpAddress

DNS_PORT = 53
TLS_PORT = 853
MAX_PINS = 8
_PIN = "pin-sha256="
_NAME = re.compile(r"(?=.{1,253}$)(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?")


@dataclass(frozen=True, slots=True)
class Resolver:
    """One recursive resolver. `name` and `pins` (SHA-256 over a certificate's SubjectPublicKeyInfo) say how it
    proves itself over TLS; without both it is asked over UDP and TCP."""

    address: IpAddress
    port: int = DNS_PORT
    name: str = ""
    pins: tuple[bytes, ...] = ()

    @property
    def is_tls(self) -> bool:
        return bool(self.name or self.pins)

    def __str__(self) -> str:
        text = str(self.address)
        if self.port != (TLS_PORT if self.is_tls else DNS_PORT):
            text += f"@{self.port}"
        text += f"#{self.name}" * bool(self.name)
        return text + "".join(f"#{_PIN}{base64.b64encode(pin).decode()}" for pin in self.pins)


@dataclass(frozen=True, slots=True)
class ResolverState:
    """For people: `state` is unknown, up, suspect or down; `round_trip` in milliseconds, None before the first
    reply; `since` is for how many seconds it is not up."""

    resolver: str
    state: str
    round_trip: float | None
    questions: int
    replies: int
    reason: str = ""
    since: float = 0.0


def parse_resolver(value: object, default_port: int = DNS_PORT) -> Resolver:
    """`default_port` is for those without TLS and without a port. Raises ValueError with the mend."""
    text = str(value)
    place, *proofs = text.split("#")
    host, at, digits = place.partition("@")
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    if address is None or (isinstance(address, IPv6Address) and address.scope_id):
        raise ValueError(
            f"{text!r} is no IP address; write it like 192.0.2.53 or 2001:db8::53, "
            "with TLS like 192.0.2.53@853#dns.example"
        )
    port = TLS_PORT if proofs else default_port
    if at:
        if not digits.isascii() or not digits.isdigit() or not 0 < int(digits[:6]) < 65536:
            raise ValueError(f"{text!r}: the port must be 1 to 65535")
        port = int(digits)
    if at and port == TLS_PORT and not proofs:
        raise ValueError(f"{text!r}: DNS over TLS needs the server's name: write {text}#dns.example")
    resolver = Resolver(address, port)
    for proof in proofs:
        resolver = _with_proof(resolver, proof, text)
    return resolver


def _with_proof(resolver: Resolver, proof: str, text: str) -> Resolver:
    if proof.startswith(_PIN):
        try:
            pin = base64.b64decode(proof.removeprefix(_PIN), validate=True)
        except (binascii.Error, ValueError):
            pin = b""
        if len(pin) != 32 or len(resolver.pins) >= MAX_PINS:
            raise ValueError(f"{text!r}: a pin is the SHA-256 of a public key, 44 characters of base64")
        return replace(resolver, pins=(*resolver.pins, pin))
    if resolver.name or not _NAME.fullmatch(proof):
        raise ValueError(f"{text!r}: behind # stands one host name, or pin-sha256=BASE64")
    return replace(resolver, name=proof.rstrip(".").lower())


def check_all(resolvers: Iterable[Resolver]) -> None:
    """Raises ValueError where some have TLS and some not: failing over would tell the questions to everybody."""
    if len({resolver.is_tls for resolver in resolvers}) > 1:
        raise ValueError(
            "some resolvers have TLS and some not; give all of them a name (ADDRESS@853#NAME), or none"
        )
