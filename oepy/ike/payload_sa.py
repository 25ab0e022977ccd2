"""The Security Association payload: proposals and transforms (RFC 7296 §3.3)."""

from __future__ import annotations

import enum
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
_FORMAT_TV = 0x8000


class TransformType(enum.IntEnum):
    ENCR = 1
    PRF = 2
    INTEG = 3
    KE = 4
    ESN = 5


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

    def of_type(self, kind: int) -> list[Transform]:
        return [transform for transform in self.transforms if transform.type == kind]


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
    last = reader.pull_u8()
    if last not in (0, 2):
        raise ParseError(f"proposal: last-substructure field {last}")
    reader.pull_u8()
    length = reader.pull_u16()
    inner = reader.pull_reader(length - 4, "proposal")
    number, protocol, spi_size, count = inner.pull_u8(), inner.pull_u8(), inner.pull_u8(), inner.pull_u8()
    spi = inner.pull_bytes(spi_size)
    if not 0 < count <= MAX_TRANSFORMS:
        raise ParseError(f"proposal: {count} transforms")
    transforms = []
    for index in range(count):
        transform, more = _pull_transform(inner)
        if more != (index < count - 1):
            raise ParseError("proposal: transform count and chain disagree")
        transforms.append(transform)
    inner.expect_end()
    return Proposal(number, protocol, spi, tuple(transforms)), last == 2


def _pull_transform(reader: Reader) -> tuple[Transform, bool]:
    last = reader.pull_u8()
    if last not in (0, 3):
        raise ParseError(f"transform: last-substructure field {last}")
    reader.pull_u8()
    length = reader.pull_u16()
    inner = reader.pull_reader(length - 4, "transform")
    kind = inner.pull_u8()
    inner.pull_u8()
    number = inner.pull_u16()
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
    return Transform(kind, number, key_length, usable), last == 3


def build_sa(payload: SaPayload) -> bytes:
    writer = Writer()
    for index, proposal in enumerate(payload.proposals):
        start = len(writer)
        writer.push_u8(2 if index < len(payload.proposals) - 1 else 0)
        writer.push_u8(0)
        writer.push_u16(0)
        writer.push_u8(proposal.number)
        writer.push_u8(proposal.protocol)
        writer.push_u8(len(proposal.spi))
        writer.push_u8(len(proposal.transforms))
        writer.push_bytes(proposal.spi)
        for position, transform in enumerate(proposal.transforms):
            writer.push_u8(3 if position < len(proposal.transforms) - 1 else 0)
            writer.push_u8(0)
            writer.push_u16(12 if transform.key_length else 8)
            writer.push_u8(transform.type)
            writer.push_u8(0)
            writer.push_u16(transform.id)
            if transform.key_length:
                writer.push_u16(_FORMAT_TV | _KEY_LENGTH)
                writer.push_u16(transform.key_length)
        writer.patch_u16(start + 2, len(writer) - start)
    return writer.finish()
