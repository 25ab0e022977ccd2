"""The Security Association payload: proposals and transforms (RFC 7296 §3.3)."""

from __future__ import annotations

import enum
import functools
import struct
from dataclasses import dataclass

from oepy.errors import ParseError
from oepy.wire import Reader, Writer

MAX_PROPOSALS = 32
MAX_TRANSFORMS = 128
MAX_ATTRIBUTES = 8

PROTOCOL_IKE = 1
PROTOCOL_AH = 2
PROTOCOL_ESP = 3

_KEY_LENGTH = 14
_PROPOSAL = struct.Struct("!BBHBBBB")
_TRANSFORM = struct.Struct("!BBHBBH")
_FORMAT_TV = 0x8000


class TransformType(enum.IntEnum):
    ENCR = 1
    PRF = 2
    INTEG = 3
    KE = 4
    ESN = 5
    ADDKE1 = 6  # additional key exchanges, RFC 9370
    ADDKE2 = 7
    ADDKE3 = 8
    ADDKE4 = 9
    ADDKE5 = 10
    ADDKE6 = 11
    ADDKE7 = 12


@dataclass(frozen=True, slots=True)
class Transform:
    """`key_length` in bits, 0 where the attribute is absent. `usable` is False where the peer attached an
    attribute that nobody here knows: such a transform must not be chosen (RFC 7296 §3.3.6)."""

    type: int
    id: int
    key_length: int = 0
    usable: bool = True


@dataclass(frozen=True, slots=True)
class Proposal:
    number: int
    protocol: int
    spi: bytes
    transforms: tuple[Transform, ...]


@dataclass(frozen=True, slots=True)
class SaPayload:
    proposals: tuple[Proposal, ...]


def parse_sa(reader: Reader) -> SaPayload:
    proposals: list[Proposal] = []
    more = True
    while more:
        if len(proposals) >= MAX_PROPOSALS:
            raise ParseError(f"SA payload: more than {MAX_PROPOSALS} proposals")
        proposal, more = _pull_proposal(reader)
        proposals.append(proposal)
    reader.expect_end()
    return SaPayload(tuple(proposals))


def _pull_proposal(reader: Reader) -> tuple[Proposal, bool]:
    last, _, length, number, protocol, spi_size, count = reader.pull(_PROPOSAL)
    if last not in (0, 2):
        raise ParseError(f"proposal: last-substructure field {last}")
    inner = reader.pull_reader(length - _PROPOSAL.size, "proposal")
    spi = inner.pull_bytes(spi_size)
    if not 0 < count <= MAX_TRANSFORMS:
        raise ParseError(f"proposal: {count} transforms")
    return Proposal(number, protocol, spi, _parse_transforms(inner.pull_rest(), count)), last == 2


@functools.lru_cache(maxsize=128)
def _parse_transforms(data: bytes, count: int) -> tuple[Transform, ...]:
    """Peers of one kind propose the same bytes, apart from the SPI: most handshakes find them here."""
    reader = Reader(data, what="transforms")
    transforms = []
    for index in range(count):
        transform, more = _pull_transform(reader)
        if more != (index < count - 1):
            raise ParseError("proposal: transform count and chain disagree")
        transforms.append(transform)
    reader.expect_end()
    return tuple(transforms)


def _pull_transform(reader: Reader) -> tuple[Transform, bool]:
    last, _, length, kind, _, number = reader.pull(_TRANSFORM)
    if last not in (0, 3):
        raise ParseError(f"transform: last-substructure field {last}")
    if length == _TRANSFORM.size:
        return _plain_transform(kind, number, 0), last == 3
    inner = reader.pull_reader(length - _TRANSFORM.size, "transform")
    key_length, usable, attributes = 0, True, 0
    while inner.remaining:
        attributes += 1
        if attributes > MAX_ATTRIBUTES:
            raise ParseError("transform: too many attributes")
        attribute = inner.pull_u16()
        if attribute == _FORMAT_TV | _KEY_LENGTH:
            key_length = inner.pull_u16()
            continue
        usable = False
        value = inner.pull_u16()
        if not attribute & _FORMAT_TV:
            inner.pull_bytes(value)
    if usable:
        return _plain_transform(kind, number, key_length), last == 3
    return Transform(kind, number, key_length, usable), last == 3


@functools.lru_cache(maxsize=256)
def _plain_transform(kind: int, number: int, key_length: int) -> Transform:
    """The same few transforms are in every proposal of every peer."""
    return Transform(kind, number, key_length)


@functools.lru_cache(maxsize=64)
def _transforms(transforms: tuple[Transform, ...]) -> bytes:
    """The same few lists are sent over and over."""
    writer = Writer()
    for position, transform in enumerate(transforms):
        last = 3 if position < len(transforms) - 1 else 0
        length = 12 if transform.key_length else 8
        writer.push_bytes(_TRANSFORM.pack(last, 0, length, transform.type, 0, transform.id))
        if transform.key_length:
            writer.push_u16(_FORMAT_TV | _KEY_LENGTH)
            writer.push_u16(transform.key_length)
    return writer.finish()


def build_sa(payload: SaPayload) -> bytes:
    parts: list[bytes] = []
    for left, proposal in enumerate(payload.proposals, 1 - len(payload.proposals)):
        body = proposal.spi + _transforms(proposal.transforms)
        parts += (
            _PROPOSAL.pack(
                *(2 if left else 0, 0, _PROPOSAL.size + len(body)),
                *(proposal.number, proposal.protocol, len(proposal.spi), len(proposal.transforms)),
            ),
            body,
        )
    return b"".join(parts)
