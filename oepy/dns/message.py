"""DNS questions and replies on the wire (RFC 1035, RFC 6891), as far as a validating stub needs them.

The reply parser is ours and not that of `dns.message` for two reasons: one odd record must not cost the whole
reply, and an RRset must keep every record byte for byte, or its signature no longer fits. So each record that
the library cannot read, and every IPSECKEY, stays as generic rdata (RFC 3597), which verifies as well.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import dns.exception
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.SOA

from oepy.errors import ParseError

MAX_RECORDS = 250  # in one reply; a legitimate one has some dozens
MAX_EFFORT = 1000  # records and their long names, in the time that one short record takes
MAX_NAMED = 24  # of them with a name in their data: the library needs milliseconds for one of 127 labels
EDNS_PAYLOAD = 1232  # what passes everywhere without fragments (DNS flag day 2020)
_FLAG_QR = 0x8000
_FLAG_TC = 0x0200
_FLAG_RD = 0x0100
_FLAG_CD = 0x0010
_EDNS_DO = 0x8000
_EDNS_PADDING = 12
PADDED_TO = 128
_IN = dns.rdataclass.IN
_OPT = int(dns.rdatatype.OPT)
_RRSIG = int(dns.rdatatype.RRSIG)
_HEADER = struct.Struct("!HHHHHH")
_TYPE_CLASS = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
_OPT_RECORD = struct.Struct("!HHBBHH")
_OPT_HEAD = struct.Struct("!BHHI")
_SIGNATURE = struct.Struct("!HBBIIIH")
SIGNATURE_HEAD = _SIGNATURE.size  # octets of an RRSIG before the signer's name
MAX_NAME = 255

NameKey = tuple[bytes, ...]
_RecordKey = tuple[NameKey, int]  # owner and type


def name_key(name: dns.name.Name) -> NameKey:
    """A key for dictionaries: the hash of the library's names costs a loop over every byte each time."""
    return tuple(map(bytes.lower, name.labels))


def labels_wire(labels: Iterable[bytes]) -> bytes:
    """Labels, with that of the root, as an uncompressed name on the wire."""
    return b"".join([bytes((len(label),)) + label for label in labels])


@dataclass(frozen=True, slots=True)
class Question:
    name: dns.name.Name
    type: int
    key: NameKey = field(default=(), init=False, repr=False, compare=False)
    wire: bytes = field(default=b"", init=False, repr=False, compare=False)
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", name_key(self.name))
        object.__setattr__(self, "wire", labels_wire(self.name.labels))
        object.__setattr__(self, "_hash", hash((self.key, self.type)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Question) and self.type == other.type and self.key == other.key

    def __str__(self) -> str:
        return f"{self.name} {dns.rdatatype.to_text(dns.rdatatype.RdataType.make(self.type))}"


@dataclass(frozen=True, slots=True)
class Signature:
    """An RRSIG (RFC 4034 §3.1). Times are seconds in 32 bits; `head` is its data before the signer's name, as it
    came. The library's own class costs as much as checking an RSA signature."""

    type_covered: int
    algorithm: int
    labels: int
    original_ttl: int
    expiration: int
    inception: int
    key_tag: int
    signer: dns.name.Name
    signature: bytes
    head: bytes

    @classmethod
    def parse(cls, head: bytes, signer: dns.name.Name, signature: bytes) -> Signature:
        """`head` has SIGNATURE_HEAD octets."""
        covered, algorithm, labels, ttl, expiration, inception, tag = _SIGNATURE.unpack(head)
        return cls(covered, algorithm, labels, ttl, expiration, inception, tag, signer, signature, head)

    @classmethod
    def of(cls, rdata: dns.rdata.Rdata) -> Signature:
        """From the library's class, for what was not read from a reply."""
        wire = rdata.to_wire() or b""
        signer, used = dns.name.from_wire(wire, SIGNATURE_HEAD)
        return cls.parse(wire[:SIGNATURE_HEAD], signer, wire[SIGNATURE_HEAD + used :])


# Owner, TTL, data, and what tells duplicates
_Record = tuple[
    dns.name.Name, int, dns.rdata.Rdata | Signature, Hashable
]  # owner, TTL, data, what tells duplicates


@dataclass(frozen=True, slots=True)
class RRset:
    """All records of one owner and type in one section, with the signatures that cover them. `key` is that of the
    name."""

    name: dns.name.Name
    type: int
    ttl: int
    rdatas: tuple[dns.rdata.Rdata, ...]
    signatures: tuple[Signature, ...] = ()
    key: NameKey = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", name_key(self.name))

    @property
    def type_text(self) -> str:
        return dns.rdatatype.to_text(dns.rdatatype.RdataType.make(self.type))

    def __str__(self) -> str:
        return f"{self.name} {self.type_text}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a resolver said. `rcode` includes the extended bits (RFC 6891 §6.1.3)."""

    question: Question
    rcode: int
    answer: tuple[RRset, ...]
    authority: tuple[RRset, ...]
    truncated: bool = False
    notes: tuple[str, ...] = ()
    effort: int = 0  # what reading it cost, in records of short names

    def find(self, name: dns.name.Name, rdtype: int) -> RRset | None:
        key = name_key(name)
        return next((r for r in self.answer if r.type == rdtype and r.key == key), None)

    @property
    def rcode_text(self) -> str:
        return rcode_text(self.rcode)

    @property
    def negative_ttl(self) -> float:
        """RFC 2308 §5, in seconds; 0.0 without a SOA. Its own signature is not needed: the signed denial's TTL
        is the cap."""
        for rrset in self.authority:
            if isinstance(soa := rrset.rdatas[0], dns.rdtypes.ANY.SOA.SOA):
                return float(min(rrset.ttl, soa.minimum))
        return 0.0


@functools.cache
def rcode_text(rcode: int) -> str:
    return dns.rcode.to_text(dns.rcode.Rcode.make(rcode))


def build_query(question: Question, identifier: int, *, padded: bool = False) -> bytes:
    """RD, CD and DO set; AD clear, since nobody's word but ours counts. `padded` fills it up to a multiple of 128
    bytes (RFC 7830, RFC 8467 §4.1), so that its length in a TLS record tells nothing of the name."""
    head = _HEADER.pack(identifier, _FLAG_RD | _FLAG_CD, 1, 0, 0, 1)
    query = head + question.wire + _TYPE_CLASS.pack(question.type, _IN)
    # The OPT record's owner is the root; extended rcode 0, version 0, flags.
    opt = _OPT_HEAD.pack(0, _OPT, EDNS_PAYLOAD, _EDNS_DO)
    if not padded:
        return query + opt + bytes(2)
    padding = -(len(query) + len(opt) + 6) % PADDED_TO
    return query + opt + struct.pack("!HHH", padding + 4, _EDNS_PADDING, padding) + bytes(padding)


def parse_reply(wire: bytes, question: Question, identifier: int) -> Reply:
    """Raises ParseError where the bytes are no reply to exactly this question."""
    try:
        return _parse(wire, question, identifier)
    except (dns.exception.DNSException, struct.error) as error:
        raise ParseError(f"the reply to {question} is malformed: {type(error).__name__}") from None


def _parse(wire: bytes, question: Question, identifier: int) -> Reply:
    got, flags, questions, answers, authorities, additionals = _HEADER.unpack_from(wire)
    if got != identifier or not flags & _FLAG_QR or flags & 0x7800:
        raise ParseError(f"no reply to {question}")
    truncated = bool(flags & _FLAG_TC)
    if questions != 1:
        raise ParseError(f"the reply to {question} repeats {questions} questions")
    names: dict[int, dns.name.Name] = {}
    position = _HEADER.size + len(question.wire)
    if wire[_HEADER.size : position] == question.wire:  # byte for byte, as nearly always
        names[_HEADER.size] = question.name
    else:
        name, position = _name_at(wire, _HEADER.size, names)
        if name != question.name:
            raise ParseError(f"the reply to {question} answers another question")
    if _TYPE_CLASS.unpack_from(wire, position) != (question.type, _IN):
        raise ParseError(f"the reply to {question} answers another question")
    if truncated:  # what is left of it counts for nothing: the question is asked again over TCP
        return Reply(question, flags & 0xF, (), (), truncated=True)
    if answers + authorities + additionals > MAX_RECORDS:
        raise ParseError(f"the reply to {question} has more than {MAX_RECORDS} records")
    reader = _RecordReader(wire, position + _TYPE_CLASS.size, names, question)
    answer = _group(reader.pull(answers))
    authority = _group(reader.pull(authorities))
    rcode = (flags & 0xF) | reader.extended_rcode(additionals)
    effort = reader.effort + additionals
    return Reply(question, rcode, answer, authority, notes=tuple(reader.notes), effort=effort)


def _name_at(wire: bytes, start: int, names: dict[int, dns.name.Name]) -> tuple[dns.name.Name, int]:
    """The name at an offset and the offset behind it (RFC 1035 §4.1.4). Pointers lead backwards only, often to a
    name that was read already: `names` keeps those by their offset. Raises ParseError."""
    labels: list[bytes] = []
    position = lowest = start
    after = length = 0
    while True:
        if position >= len(wire):
            raise ParseError("a name goes beyond the message")
        size = wire[position]
        if size < 64:
            end = position + 1 + size
            length += 1 + size
            if end > len(wire) or length > MAX_NAME:
                raise ParseError("a name is too long, or goes beyond the message")
            labels.append(wire[position + 1 : end])
            position = end
            if not size:
                break
        elif size < 192 or position + 1 >= len(wire):
            raise ParseError("a name has a label of an unknown kind")
        else:
            after = after or position + 2
            position = (size & 0x3F) << 8 | wire[position + 1]
            if position >= lowest:
                raise ParseError("a name points forward")
            lowest = position
            if position in names:
                if not labels:
                    return names[position], after
                labels += names[position].labels
                break
    name = names[start] = dns.name.Name(labels)
    return name, after or position


class _RecordReader:
    def __init__(
        self, wire: bytes, position: int, names: dict[int, dns.name.Name], question: Question
    ) -> None:
        self._wire, self._position, self._names = wire, position, names
        self._question = question
        self._named = 0
        self.notes: list[str] = []
        self.effort = 0

    def pull(self, count: int) -> Iterator[_Record]:
        wire = self._wire
        for _ in range(count):
            known = len(self._names)
            name, position = _name_at(wire, self._position, self._names)
            self.effort += 1 + (len(name.labels) // 4 if len(self._names) > known else 0)
            rdtype, rdclass, ttl, length = _RECORD.unpack_from(wire, position)
            start = position + _RECORD.size
            self._position = end = start + length
            if end > len(wire):
                raise ParseError(f"a record of the reply to {self._question} goes beyond it")
            if rdclass != _IN or rdtype == _OPT:
                continue
            if ttl >= 1 << 31:  # RFC 2181 §8
                ttl = 0
            if rdtype == _RRSIG:
                signature = self._signature(start, end)
                if signature is None:
                    self.notes.append(f"{name}: a malformed RRSIG record is ignored")
                    continue
                yield name, ttl, signature, wire[start:end]
            else:
                yield name, ttl, *self._rdata(rdtype, start, end)
            if self.effort > MAX_EFFORT:
                raise ParseError(f"the reply to {self._question} has too many long names in it")

    def extended_rcode(self, count: int) -> int:
        """Of the additional section, of which nothing else is looked at."""
        rcode = 0
        for _ in range(count):
            position = self._position
            if self._wire[position : position + 1] == b"\0":
                position += 1
            else:
                _, position = _name_at(self._wire, position, self._names)
            rdtype, _payload, extended, _version, _flags, length = _OPT_RECORD.unpack_from(
                self._wire, position
            )
            self._position = position + _OPT_RECORD.size + length
            if self._position > len(self._wire):
                raise ParseError(f"a record of the reply to {self._question} goes beyond it")
            rcode |= extended << 4 if rdtype == _OPT else 0
        return rcode

    def _count(self, *names: dns.name.Name) -> None:
        self.effort += sum(len(name.labels) // 2 for name in names)

    def _signature(self, start: int, end: int) -> Signature | None:
        """RFC 4034 §3.1; None where it cannot be read."""
        if end - start <= SIGNATURE_HEAD:
            return None
        try:
            signer, after = _name_at(self._wire, start + SIGNATURE_HEAD, self._names)
        except ParseError:
            return None
        if after > end:
            return None
        self._count(signer)
        head = self._wire[start : start + SIGNATURE_HEAD]
        return Signature.parse(head, signer, self._wire[after:end])

    def _identity(self, rdata: dns.rdata.Rdata, raw: bytes) -> Hashable:
        """The library's own comparison costs a millisecond for each long name."""
        names = [getattr(rdata, field) for field in _NAME_FIELDS.get(rdata.rdtype, ())]
        if not names:
            return rdata.to_digestable()
        self._count(*names)
        rest = raw[-20:] if rdata.rdtype == _T.SOA else getattr(rdata, "windows", ())
        return (*map(name_key, names), rest)

    def _rdata(self, rdtype: int, start: int, end: int) -> tuple[dns.rdata.Rdata, Hashable]:
        """The data, generic where nobody looks into it or the library cannot read it, and what tells duplicates."""
        raw = self._wire[start:end]
        kind = _kind(rdtype)
        if (rdtype in _READ or rdtype == self._question.type) and rdtype != _T.IPSECKEY:
            if rdtype not in _NAMELESS:
                self._named += 1
                if self._named > MAX_NAMED:
                    raise ParseError(f"the reply has more than {MAX_NAMED} records with names in them")
            try:
                rdata = dns.rdata.from_wire(_IN, kind, self._wire, start, end - start)
            except (dns.exception.DNSException, ValueError, OverflowError):
                pass
            else:
                if rdtype in _NAMELESS or isinstance(rdata, dns.rdata.GenericRdata):
                    return rdata, raw
                return rdata, self._identity(rdata, raw)
        return dns.rdata.GenericRdata(_IN, kind, raw), raw


# What anybody here looks into; the rest is kept unread, unless it was asked for.
_T = dns.rdatatype.RdataType
_NAMELESS = frozenset({_T.A, _T.AAAA, _T.TXT, _T.DS, _T.DNSKEY, _T.NSEC3, _T.RRSIG})
_NAME_FIELDS = {_T.CNAME: ("target",), _T.DNAME: ("target",), _T.NSEC: ("next",), _T.SOA: ("mname", "rname")}
_kind = functools.cache(dns.rdatatype.RdataType.make)
_READ: frozenset[int] = _NAMELESS | {_T.CNAME, _T.DNAME, _T.SOA, _T.NSEC}


def _group(records: Iterable[_Record]) -> tuple[RRset, ...]:
    """RRsets in order of appearance, without duplicates; the TTL of a set is its smallest (RFC 2181 §5).
    Duplicates are found by what tells them apart, since the library's hash of a record with names is slow."""
    owners: dict[NameKey, dns.name.Name] = {}
    data: dict[_RecordKey, dict[Hashable, dns.rdata.Rdata]] = {}
    ttls: dict[_RecordKey, int] = {}
    signatures: dict[_RecordKey, dict[Hashable, Signature]] = {}
    for name, ttl, rdata, raw in records:
        owner = name_key(name)
        owners.setdefault(owner, name)
        if isinstance(rdata, Signature):
            signatures.setdefault((owner, rdata.type_covered), {})[raw] = rdata
            continue
        key = (owner, int(rdata.rdtype))
        data.setdefault(key, {})[raw] = rdata
        ttls[key] = min(ttl, ttls.get(key, ttl))
    return tuple(
        RRset(
            *(owners[key[0]], key[1], ttls[key], tuple(rdatas.values())),
            tuple(signatures.get(key, {}).values()),
            key[0],
        )
        for key, rdatas in data.items()
    )
