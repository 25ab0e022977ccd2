"""Whole messages: in the clear, inside of SK, or in fragments (RFC 7296 §3.14, RFC 7383)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from oepy.errors import ParseError
from oepy.ike.crypto import Protection
from oepy.ike.header import HEADER_SIZE, MAX_MESSAGE, Header, PayloadType, build_header
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import Chain, Encrypted, Notify, Payload, build_chain, parse_chain

MAX_FRAGMENTS = 64
_FRAGMENT_FIELDS = 4
_GENERIC = 4

T = TypeVar("T")


@dataclass(slots=True)
class Message:
    """A parsed message. `raw` is what came over the wire (of a fragmented one: its last fragment)."""

    header: Header
    chain: Chain
    raw: bytes
    _first: dict[int, Notify] | None = field(default=None, init=False)

    def get(self, kind: PayloadType, expected: type[T]) -> T | None:
        """The first payload of a type."""
        items = self.chain.parsed.get(kind)
        if not items:
            return None
        item = items[0]
        assert isinstance(item, expected)
        return item

    def must(self, kind: PayloadType, expected: type[T]) -> T:
        item = self.get(kind, expected)
        if item is None:
            raise ParseError(f"no {kind.name} payload")
        return item

    def notifies(self) -> list[Notify]:
        return [n for n in self.chain.parsed.get(PayloadType.NOTIFY, ()) if isinstance(n, Notify)]

    def notify(self, kind: NotifyType) -> Notify | None:
        """The first one of this type."""
        if self._first is None:
            self._first = {}
            for item in self.notifies():
                self._first.setdefault(item.type, item)
        return self._first.get(kind)


def build_plain(header: Header, payloads: Sequence[Payload]) -> bytes:
    first, body = build_chain(payloads)
    return build_header(header, HEADER_SIZE + len(body), first) + body


def build_sealed(
    header: Header, payloads: Sequence[Payload], protection: Protection, fragment_size: int = 0
) -> list[bytes]:
    """The datagrams of a protected message: one, or fragments where it would exceed `fragment_size`."""
    first, plain = build_chain(payloads)
    whole = HEADER_SIZE + _GENERIC + len(plain) + protection.overhead(len(plain))
    if not fragment_size or whole <= fragment_size:
        return [_seal(header, protection, kind=PayloadType.SK, first=first, fields=b"", plain=plain)]
    room = fragment_size - HEADER_SIZE - _GENERIC - _FRAGMENT_FIELDS - protection.overhead(0) - 16
    pieces = [plain[start : start + room] for start in range(0, len(plain), room)]
    total = len(pieces)
    return [
        _seal(
            header,
            protection,
            kind=PayloadType.SKF,
            first=first if number == 1 else 0,  # RFC 7383 §2.5
            fields=number.to_bytes(2, "big") + total.to_bytes(2, "big"),
            plain=piece,
        )
        for number, piece in enumerate(pieces, 1)
    ]


def _seal(
    header: Header, protection: Protection, *, kind: int, first: int, fields: bytes, plain: bytes
) -> bytes:
    inner = _GENERIC + len(fields) + len(plain) + protection.overhead(len(plain))
    associated = (
        build_header(header, HEADER_SIZE + inner, kind)
        + bytes((first, 0))
        + inner.to_bytes(2, "big")
        + fields
    )
    return associated + protection.seal(plain, associated)


@dataclass(frozen=True, slots=True)
class Fragment:
    number: int
    total: int
    first_inner: int
    plain: bytes


def fragment_number(data: bytes, encrypted: Encrypted) -> int:
    """Of a SKF payload, before anything is decrypted; 0 for SK. Raises ParseError."""
    if encrypted.type != PayloadType.SKF:
        return 0
    if encrypted.end - encrypted.start < _FRAGMENT_FIELDS:
        raise ParseError("encrypted fragment: too short")
    return int.from_bytes(data[encrypted.start : encrypted.start + 2], "big")


def open_sealed(data: bytes, encrypted: Encrypted, protection: Protection) -> bytes | Fragment:
    """The bytes inside of an SK payload, or one fragment. Raises ParseError where it does not verify."""
    if encrypted.type == PayloadType.SK:
        return protection.open(data[encrypted.start : encrypted.end], data[: encrypted.start])
    number = fragment_number(data, encrypted)
    start = encrypted.start + _FRAGMENT_FIELDS
    total = int.from_bytes(data[start - 2 : start], "big")
    if not 0 < number <= total <= MAX_FRAGMENTS:
        raise ParseError(f"encrypted fragment {number} of {total}")
    return Fragment(
        number, total, encrypted.first_inner, protection.open(data[start : encrypted.end], data[:start])
    )


class Reassembly:
    """Fragments of one message (RFC 7383 §2.6): authenticated ones only, bounded in number and size."""

    __slots__ = ("_limit", "_pieces", "_total", "message_id")

    def __init__(self, message_id: int, limit: int = MAX_MESSAGE) -> None:
        self.message_id = message_id
        self._limit = limit
        self._total = 0
        self._pieces: dict[int, Fragment] = {}

    def add(self, fragment: Fragment) -> tuple[int, bytes] | None:
        """First payload type and bytes of the whole, as soon as it is whole. Raises ParseError."""
        if fragment.total > self._total:  # the sender chose smaller fragments: begin anew (§2.6)
            self._total, self._pieces = fragment.total, {}
        elif fragment.total < self._total:
            return None
        self._pieces.setdefault(fragment.number, fragment)
        if sum(len(piece.plain) for piece in self._pieces.values()) > self._limit:
            self._pieces = {}
            raise ParseError("encrypted fragments: more than a message may hold")
        if len(self._pieces) < self._total:
            return None
        plain = b"".join(self._pieces[number].plain for number in range(1, self._total + 1))
        return self._pieces[1].first_inner, plain


def parse_inner(header: Header, first: int, plain: bytes, raw: bytes) -> Message:
    return Message(header, parse_chain(plain, first, sealed=False), raw)
