"""DNS questions and replies on the wire (RFC 1035, RFC 6891), as far as a validating stub needs them.

The reply parser is ours and not that of `dns.message` for two reasons: one odd record must not cost the whole
reply, and an RRset must keep every record byte for byte, or its signature no longer fits. So each record that
the library cannot read, and every IPSECKEY, stays as generic rdata (RFC 3597), which verifies as well.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import dns.exception
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.RRSIG
import dns.rdtypes.ANY.SOA
import dns.wire

from oepy.errors import ParseError
from oepy.wire import Writer

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

NameKey = tuple[bytes, ...]
_RecordKey = tuple[NameKey, int]  # owner and type
_Record = tuple[dns.name.Name, int, dns.rdata.Rdata, Hashable]  # owner, TTL, data, and what tells duplicates


def name_key(name: dns.name.Name) -> NameKey:
    """A key for dictionaries: the hash of the library's names costs a loop over every byte each time."""
    return tuple(map(bytes.lower, name.labels))


@dataclass(frozen=True, slots=True)
class Question:
    name: dns.name.Name
    type: int
    key: NameKey = field(default=(), init=False, repr=False, compare=False)
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", name_key(self.name))
        object.__setattr__(self, "_hash", hash((self.key, self.type)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Question) and self.type == other.type and self.key == other.key

    def __str__(self) -> str:
        return f"{self.name} {dns.rdatatype.to_text(dns.rdatatype.RdataType.make(self.type))}"


@dataclass(frozen=True, slots=True)
class RRset:
    """All records of one owner and type in one section, with the signatures that cover them."""

    name: dns.name.Name
    type: int
    ttl: int
    rdatas: tuple[dns.rdata.Rdata, ...]
    signatures: tuple[dns.rdtypes.ANY.RRSIG.RRSIG, ...] = ()

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
        return next((r for r in self.answer if r.type == rdtype and r.name == name), None)

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


def rcode_text(rcode: int) -> str:
    return dns.rcode.to_text(dns.rcode.Rcode.make(rcode))


def build_query(question: Question, identifier: int, *, padded: bool = False) -> bytes:
    """RD, CD and DO set; AD clear, since nobody's word but ours counts. `padded` fills it up to a multiple of 128
    bytes (RFC 7830, RFC 8467 §4.1), so that its length in a TLS record tells nothing of the name."""
    writer = Writer()
    for word in (identifier, _FLAG_RD | _FLAG_CD, 1, 0, 0, 1):
        writer.push_u16(word)
    writer.push_bytes(question.name.to_wire() or b"\0")
    writer.push_u16(question.type)
    writer.push_u16(_IN)
    writer.push_u8(0)  # the OPT record's owner is the root
    writer.push_u16(dns.rdatatype.OPT)
    writer.push_u16(EDNS_PAYLOAD)
    writer.push_u32(_EDNS_DO)  # extended rcode 0, version 0, flags
    if not padded:
        writer.push_u16(0)
        return writer.finish()
    query = writer.finish()
    padding = -(len(query) + 6) % PADDED_TO
    return query + struct.pack("!HHH", padding + 4, _EDNS_PADDING, padding) + bytes(padding)


def parse_reply(wire: bytes, question: Question, identifier: int) -> Reply:
    """Raises ParseError where the bytes are no reply to exactly this question."""
    try:
        return _parse(dns.wire.Parser(wire), question, identifier)
    except dns.exception.DNSException as error:
        raise ParseError(f"the reply to {question} is malformed: {type(error).__name__}") from None


def _parse(parser: dns.wire.Parser, question: Question, identifier: int) -> Reply:
    got, flags, questions, answers, authorities, additionals = parser.get_struct("!HHHHHH")
    if got != identifier or not flags & _FLAG_QR or flags & 0x7800:
        raise ParseError(f"no reply to {question}")
    truncated = bool(flags & _FLAG_TC)
    if questions != 1:
        raise ParseError(f"the reply to {question} repeats {questions} questions")
    names: dict[int, dns.name.Name] = {}
    name = _pull_name(parser, names)
    rdtype, rdclass = parser.get_struct("!HH")
    if name != question.name or rdtype != question.type or rdclass != _IN:
        raise ParseError(f"the reply to {question} answers another question")
    if truncated:  # what is left of it counts for nothing: the question is asked again over TCP
        return Reply(question, flags & 0xF, (), (), truncated=True)
    if answers + authorities + additionals > MAX_RECORDS:
        raise ParseError(f"the reply to {question} has more than {MAX_RECORDS} records")
    notes: list[str] = []
    reader = _RecordReader(parser, names, notes, question)
    answer = _group(reader.pull(answers))
    authority = _group(reader.pull(authorities))
    rcode = flags & 0xF
    for _ in range(additionals):
        rcode |= _extended_rcode(parser)
    return Reply(question, rcode, answer, authority, notes=tuple(notes), effort=reader.effort + additionals)


def _extended_rcode(parser: dns.wire.Parser) -> int:
    dns.name.from_wire_parser(parser)
    rdtype, _payload, extended, _version, _flags, length = parser.get_struct("!HHBBHH")
    parser.get_bytes(length)
    return int(extended) << 4 if rdtype == dns.rdatatype.OPT else 0


def _pull_name(parser: dns.wire.Parser, names: dict[int, dns.name.Name]) -> dns.name.Name:
    """An owner name. Most are pointers to one that was read already: `names` keeps those by their offset."""
    start = parser.current
    if parser.remaining() >= 2 and parser.wire[start] >= 0xC0:
        start = int.from_bytes(parser.wire[start : start + 2], "big") & 0x3FFF
        if start in names:
            parser.get_bytes(2)
            return names[start]
    name = names[start] = dns.name.from_wire_parser(parser)
    return name


class _RecordReader:
    def __init__(
        self, parser: dns.wire.Parser, names: dict[int, dns.name.Name], notes: list[str], question: Question
    ) -> None:
        self._parser, self._names, self._notes = parser, names, notes
        self._question = question
        self._read = _READ | {question.type}
        self._named = 0
        self.effort = 0

    def pull(self, count: int) -> Iterator[_Record]:
        parser = self._parser
        for _ in range(count):
            known = len(self._names)
            name = _pull_name(parser, self._names)
            self.effort += 1 + (len(name.labels) // 4 if len(self._names) > known else 0)
            rdtype, rdclass, ttl, length = parser.get_struct("!HHIH")
            start = parser.current
            raw = parser.get_bytes(length)
            if rdclass != _IN or rdtype == dns.rdatatype.OPT:
                continue
            rdata = self._rdata(rdtype, start, raw)
            if isinstance(rdata, dns.rdata.GenericRdata) and rdtype in _SIGNALS:
                self._notes.append(f"{name}: a malformed {dns.rdatatype.to_text(rdtype)} record is ignored")
                continue
            if isinstance(rdata, dns.rdtypes.ANY.RRSIG.RRSIG):
                self._count(rdata.signer)
            # RFC 2181 §8: a TTL with the top bit set is 0.
            generic = rdtype in _NAMELESS or isinstance(rdata, dns.rdata.GenericRdata)
            yield name, ttl if ttl < 1 << 31 else 0, rdata, raw if generic else self._identity(rdata, raw)
            if self.effort > MAX_EFFORT:
                raise ParseError(f"the reply to {self._question} has too many long names in it")

    def _count(self, *names: dns.name.Name) -> None:
        self.effort += sum(len(name.labels) // 2 for name in names)

    def _identity(self, rdata: dns.rdata.Rdata, raw: bytes) -> Hashable:
        """The library's own comparison costs a millisecond for each long name."""
        names = [getattr(rdata, field) for field in _NAME_FIELDS.get(rdata.rdtype, ())]
        if not names:
            return rdata.to_digestable()
        self._count(*names)
        rest = raw[-20:] if rdata.rdtype == _T.SOA else getattr(rdata, "windows", ())
        return (*map(name_key, names), rest)

    def _rdata(self, rdtype: int, start: int, raw: bytes) -> dns.rdata.Rdata:
        kind = dns.rdatatype.RdataType.make(rdtype)
        if rdtype in self._read and kind != dns.rdatatype.IPSECKEY:
            if rdtype not in _NAMELESS:
                self._named += 1
                if self._named > MAX_NAMED:
                    raise ParseError(f"the reply has more than {MAX_NAMED} records with names in them")
            try:
                return dns.rdata.from_wire(_IN, kind, self._parser.wire, start, len(raw))
            except (dns.exception.DNSException, ValueError, OverflowError):
                pass
        return dns.rdata.GenericRdata(_IN, kind, raw)


# Signatures and denials are worth nothing when they cannot be read, and nothing signs over an RRSIG.
_SIGNALS = frozenset({dns.rdatatype.RRSIG})


# What anybody here looks into; the rest is kept unread, unless it was asked for.
_T = dns.rdatatype.RdataType
_NAMELESS = frozenset({_T.A, _T.AAAA, _T.TXT, _T.DS, _T.DNSKEY, _T.NSEC3, _T.RRSIG})
_NAME_FIELDS = {_T.CNAME: ("target",), _T.DNAME: ("target",), _T.NSEC: ("next",), _T.SOA: ("mname", "rname")}
_READ: frozenset[int] = _NAMELESS | {_T.CNAME, _T.DNAME, _T.SOA, _T.NSEC}


def _group(records: Iterable[_Record]) -> tuple[RRset, ...]:
    """RRsets in order of appearance, without duplicates; the TTL of a set is its smallest (RFC 2181 §5).
    Duplicates are found by what tells them apart, since the library's hash of a record with names is slow."""
    owners: dict[NameKey, dns.name.Name] = {}
    data: dict[_RecordKey, dict[Hashable, dns.rdata.Rdata]] = {}
    ttls: dict[_RecordKey, int] = {}
    signatures: dict[_RecordKey, dict[Hashable, dns.rdtypes.ANY.RRSIG.RRSIG]] = {}
    for name, ttl, rdata, raw in records:
        owner = name_key(name)
        owners.setdefault(owner, name)
        if isinstance(rdata, dns.rdtypes.ANY.RRSIG.RRSIG):
            signatures.setdefault((owner, int(rdata.type_covered)), {})[raw] = rdata
            continue
        key = (owner, int(rdata.rdtype))
        data.setdefault(key, {})[raw] = rdata
        ttls[key] = min(ttl, ttls.get(key, ttl))
    return tuple(
        RRset(
            owners[key[0]], key[1], ttls[key], tuple(rdatas.values()), tuple(signatures.get(key, {}).values())
        )
        for key, rdatas in data.items()
    )
