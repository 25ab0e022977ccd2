"""Payload bodies as parse/build pairs, and the chain of generic payload headers (RFC 7296 §3.2–3.14)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from oepy.errors import ParseError
from oepy.ike.header import PayloadType
from oepy.ike.notify import NotifyType, ProtocolError
from oepy.ike.payload_cert import parse_cert, parse_certreq
from oepy.ike.payload_cp import parse_cp
from oepy.ike.payload_sa import parse_sa
from oepy.ike.payload_ts import parse_ts
from oepy.model import IdType, PeerIdentity
from oepy.wire import Reader, Writer

MAX_PAYLOADS = 64
MAX_NOTIFY_DATA = 4096
MAX_NONCE = 256
MIN_NONCE = 16
MAX_DELETED_SPIS = 256
MAX_ID = 1024

_CRITICAL = 0x80
_GENERIC = struct.Struct("!BBH")
_NOTIFY = struct.Struct("!BBH")
_KE = struct.Struct("!HH")

Payload = tuple[PayloadType, bytes]
"""A payload to send: its type and its body without the generic header."""


@dataclass(frozen=True, slots=True)
class KeyShareData:
    """KE, §3.4."""

    group: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Notify:
    """§3.10. `type` stays a number: unknown status types are ignored, unknown errors are failures."""

    type: int
    data: bytes = b""
    protocol: int = 0
    spi: bytes = b""


@dataclass(frozen=True, slots=True)
class Delete:
    """§3.11."""

    protocol: int
    spis: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class AuthData:
    """§3.8."""

    method: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Identification:
    """§3.5. `body` is what AUTH covers; an ID type that is unknown here has no `identity`."""

    body: bytes
    identity: PeerIdentity | None


def parse_ke(reader: Reader) -> KeyShareData:
    group = reader.pull_u16()
    reader.pull_u16()
    return KeyShareData(group, reader.pull_rest())


def build_ke(group: int, data: bytes) -> bytes:
    return _KE.pack(group, 0) + data


def parse_nonce(reader: Reader) -> bytes:
    if not MIN_NONCE <= reader.remaining <= MAX_NONCE:
        raise ParseError(f"nonce of {reader.remaining} bytes")
    return reader.pull_rest()


def parse_notify(reader: Reader) -> Notify:
    protocol, spi_size, kind = reader.pull(_NOTIFY)
    spi = reader.pull_bytes(spi_size)
    if reader.remaining > MAX_NOTIFY_DATA:
        raise ParseError(f"notify: {reader.remaining} bytes of data")
    return Notify(kind, reader.pull_rest(), protocol, spi)


def build_notify(notify: Notify) -> bytes:
    return _NOTIFY.pack(notify.protocol, len(notify.spi), notify.type) + notify.spi + notify.data


def notify(kind: NotifyType, data: bytes = b"", protocol: int = 0, spi: bytes = b"") -> Payload:
    return PayloadType.NOTIFY, build_notify(Notify(kind, data, protocol, spi))


def parse_delete(reader: Reader) -> Delete:
    protocol, size, count = reader.pull_u8(), reader.pull_u8(), reader.pull_u16()
    if count > MAX_DELETED_SPIS or (count and not size):
        raise ParseError(f"delete: {count} SPIs of {size} bytes")
    spis = tuple(reader.pull_bytes(size) for _ in range(count))
    reader.expect_end()
    return Delete(protocol, spis)


def build_delete(delete: Delete) -> bytes:
    writer = Writer()
    writer.push_u8(delete.protocol)
    writer.push_u8(len(delete.spis[0]) if delete.spis else 0)
    writer.push_u16(len(delete.spis))
    for spi in delete.spis:
        writer.push_bytes(spi)
    return writer.finish()


def parse_auth(reader: Reader) -> AuthData:
    method = reader.pull_u8()
    reader.pull_bytes(3)
    return AuthData(method, reader.pull_rest())


def build_auth(auth: AuthData) -> bytes:
    return bytes((auth.method, 0, 0, 0)) + auth.data


_ID_SIZES = {IdType.IPV4_ADDR: 4, IdType.IPV6_ADDR: 16, IdType.NULL: 0}


def parse_id(reader: Reader) -> Identification:
    if reader.remaining > MAX_ID:
        raise ParseError(f"identification of {reader.remaining} bytes")
    body = reader.pull_rest()
    if len(body) < 4:
        raise ParseError("identification: too short")
    try:
        kind = IdType(body[0])
    except ValueError:
        return Identification(body, None)
    data = body[4:]
    if _ID_SIZES.get(kind, len(data)) != len(data):
        raise ParseError(f"identification: {kind.name} with {len(data)} bytes")
    return Identification(body, PeerIdentity(kind, data))


def build_id(identity: PeerIdentity) -> bytes:
    return bytes((identity.type, 0, 0, 0)) + identity.data


PARSERS: dict[int, Callable[[Reader], object]] = {
    PayloadType.SA: parse_sa,
    PayloadType.KE: parse_ke,
    PayloadType.IDI: parse_id,
    PayloadType.IDR: parse_id,
    PayloadType.CERT: parse_cert,
    PayloadType.CERTREQ: parse_certreq,
    PayloadType.AUTH: parse_auth,
    PayloadType.NONCE: parse_nonce,
    PayloadType.NOTIFY: parse_notify,
    PayloadType.DELETE: parse_delete,
    PayloadType.TSI: parse_ts,
    PayloadType.TSR: parse_ts,
    PayloadType.CP: parse_cp,
}
_KNOWN = frozenset(PayloadType)
_ENCRYPTED = (PayloadType.SK, PayloadType.SKF)


@dataclass(frozen=True, slots=True)
class Encrypted:
    """An SK or SKF payload as found: where its body starts, and the type of the first payload inside."""

    type: int
    first_inner: int
    start: int
    end: int


@dataclass(slots=True)
class Chain:
    """The payloads of a message by type, in order of appearance; `counts` includes the ones not parsed."""

    parsed: dict[int, list[object]]
    counts: dict[int, int]
    encrypted: Encrypted | None = None


def parse_chain(data: bytes, first: int, start: int = 0, *, sealed: bool = True) -> Chain:
    """Walk the payload chain of `data[start:]`. `sealed` False: inside of SK, where no SK may follow.

    Raises ProtocolError(UNSUPPORTED_CRITICAL_PAYLOAD) for an unknown payload with the critical bit, and
    ParseError for everything else that is wrong.
    """
    reader = Reader(data, start, what="payload")
    chain = Chain({}, {})
    kind, number = first, 0
    while kind != PayloadType.NONE:
        number += 1
        if number > MAX_PAYLOADS:
            raise ParseError(f"more than {MAX_PAYLOADS} payloads")
        next_kind, flags, length = reader.pull(_GENERIC)
        body = reader.pull_reader(length - 4)
        chain.counts[kind] = chain.counts.get(kind, 0) + 1
        if kind in _ENCRYPTED:
            if not sealed:
                raise ParseError("an encrypted payload inside of another")
            chain.encrypted = Encrypted(kind, next_kind, body.position, reader.position)
            break  # RFC 7296 §3.14: it is the last one, its next-payload field belongs to the inside
        parser = PARSERS.get(kind)
        if parser is not None:
            chain.parsed.setdefault(kind, []).append(parser(body))
        elif kind not in _KNOWN and flags & _CRITICAL:
            raise ProtocolError(
                f"critical payload {kind}", NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD, bytes((kind,))
            )
        kind = next_kind
    reader.expect_end()
    return chain


def build_chain(payloads: Iterable[Payload]) -> tuple[int, bytes]:
    """The type of the first payload and the bytes of them all."""
    following, parts = int(PayloadType.NONE), list[bytes]()
    for kind, body in reversed(list(payloads)):
        parts += body, _GENERIC.pack(following, 0, len(body) + 4)
        following = kind
    return following, b"".join(reversed(parts))
