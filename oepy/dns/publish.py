"""What must change in a zone so that it holds the key records we want, and nothing else changes: the pure core.

A record is oepy's where the key in it is one of the given keys (this host's, or the inventory's for that host):
only such records are ever removed. A key record with another key is somebody else's and stops the change of
its name, unless the caller says `replace`. TXT that is not RFC 4322's is never touched.

Each change carries the prerequisites of RFC 2136 §2.4: every RRset that it touches is still exactly as it was
found, and the name is no alias. So an update that comes too late changes nothing, and is planned anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dns.exception
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype

from oepy.dns.inventory import Host
from oepy.dns.message import NameKey, name_key
from oepy.dns.records import is_oe_text, parse_ipseckey, parse_oe_text
from oepy.dns.zonefile import host_records
from oepy.dns.zonemap import ZoneMap
from oepy.errors import ParseError
from oepy.model import KeyAlgorithm, PublicKey

IPSECKEY = int(dns.rdatatype.IPSECKEY)
TXT = int(dns.rdatatype.TXT)
CNAME = int(dns.rdatatype.CNAME)
KINDS = (IPSECKEY, TXT)
MAX_BATCH_BYTES = 32_000  # of the 65,535 that a message over TCP may have, the rest for TSIG and its header
MAX_BATCH_CHANGES = 200
_RECORD_HEAD = 10  # type, class, TTL and length

Name = dns.name.Name


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """Type and rdata in wire form."""

    type: int
    data: bytes

    def to_text(self) -> str:
        """Presentation form; RFC 3597's where the library cannot read it."""
        kind = dns.rdatatype.RdataType.make(self.type)
        try:
            rdata = dns.rdata.from_wire(dns.rdataclass.IN, kind, self.data, 0, len(self.data))
        except (dns.exception.DNSException, ValueError):
            rdata = dns.rdata.GenericRdata(dns.rdataclass.IN, kind, self.data)
        return f"{dns.rdatatype.to_text(kind)} {rdata.to_text()}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The key records that a name of `zone` should have, and the keys by which oepy knows its own there."""

    zone: Name
    owner: Name
    ttl: int
    records: frozenset[KeyRecord]
    own_keys: frozenset[PublicKey]


@dataclass(frozen=True, slots=True)
class FoundSet:
    """An RRset as a server has it: TTL in seconds and rdata in wire form."""

    ttl: int
    data: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class Found:
    """What a server has at a name. `alias` is where a CNAME leads; `unreadable` says why it could not be read."""

    sets: Mapping[int, FoundSet] = field(default_factory=dict)
    alias: Name | None = None
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class SetChange:
    """The change of one RRset: `before` is the whole set as found, None where there was none."""

    type: int
    ttl: int
    before: FoundSet | None
    removed: tuple[bytes, ...]
    added: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """All that changes at one name."""

    zone: Name
    owner: Name
    sets: tuple[SetChange, ...]

    @property
    def size(self) -> int:
        """An upper bound of its bytes in an update message, prerequisites included."""
        head = len(self.owner.to_wire() or b"") + _RECORD_HEAD
        total = head  # that there is no CNAME
        for change in self.sets:
            before = change.before.data if change.before else frozenset((b"",))
            for data in (*before, *change.removed, *change.added):
                total += head + len(data)
        return total

    def lines(self) -> Iterator[str]:
        """The difference as `-` and `+` lines in master-file form."""
        for change in self.sets:
            old_ttl = change.before.ttl if change.before else change.ttl
            for sign, ttl, datas in (("-", old_ttl, change.removed), ("+", change.ttl, change.added)):
                for data in datas:
                    yield f"{sign} {self.owner} {ttl} IN {KeyRecord(change.type, data).to_text()}"

    def old_ttl(self, negative_ttl: int) -> int:
        """Seconds for which a cache may still hold what was before."""
        return max(change.before.ttl if change.before else negative_ttl for change in self.sets)


@dataclass(frozen=True, slots=True)
class Conflict:
    """A name that is left as it is, and why."""

    owner: Name
    reason: str
    mend: str

    def __str__(self) -> str:
        return f"{self.owner}: {self.reason}: {self.mend}"


def wanted_of(
    hosts: Iterable[Host],
    zones: ZoneMap,
    ttl: int,
    more_keys: Iterable[PublicKey] = (),
    *,
    withdraw: bool = False,
) -> list[Wanted]:
    """The names of these hosts in these zones, in order; hosts that share a name are taken together.
    `more_keys` are oepy's too (those of a roll-over)."""
    records: dict[NameKey, set[KeyRecord]] = {}
    keys: dict[NameKey, set[PublicKey]] = {}
    places: dict[NameKey, tuple[Name, Name]] = {}
    extra = frozenset(more_keys)
    for host in hosts:
        for record in host_records(host, zones):
            if record.type not in ("IPSECKEY", "TXT"):
                continue
            at = name_key(record.owner)
            places.setdefault(at, (record.zone, record.owner))
            keys.setdefault(at, set(extra)).update(host.keys)
            rdata = dns.rdata.from_text(dns.rdataclass.IN, record.type, record.rdata)
            records.setdefault(at, set()).add(KeyRecord(int(rdata.rdtype), rdata.to_wire() or b""))
    return [
        Wanted(zone, owner, ttl, frozenset(() if withdraw else records[at]), frozenset(keys[at]))
        for at, (zone, owner) in places.items()
    ]


def key_of(record: KeyRecord) -> PublicKey | None:
    """The key in it, where it is one that oepy could have written. Never raises."""
    try:
        if record.type == IPSECKEY:
            parsed = parse_ipseckey(record.data)
            return PublicKey(KeyAlgorithm(parsed.algorithm), parsed.key)
        return parse_oe_text(text_strings(record.data)).key
    except (ParseError, ValueError):
        return None


def text_strings(data: bytes) -> tuple[bytes, ...]:
    """The strings of TXT rdata (RFC 1035 §3.3.14); a string that is cut short ends with the data."""
    strings, at = [], 0
    while at < len(data):
        strings.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    return tuple(strings)


def is_key_record(record: KeyRecord) -> bool:
    """Whether oepy has an opinion about it: every IPSECKEY, and TXT that claims to be RFC 4322's."""
    return record.type == IPSECKEY or is_oe_text(b"".join(text_strings(record.data)))


def plan(wanted: Wanted, found: Found, *, replace: bool = False) -> Change | Conflict | None:
    """What makes `found` into `wanted`; None where nothing needs to change."""
    adds = bool(wanted.records)
    if found.unreadable:
        return Conflict(
            wanted.owner, found.unreadable, "look at the name with dig, and remove what is broken"
        )
    if found.alias is not None:
        if not adds:
            return None
        return Conflict(
            wanted.owner,
            f"the name is an alias of {found.alias}",
            f"list the zone of {found.alias} in the inventory, or remove the CNAME",
        )
    changes = []
    for kind in KINDS:
        before = found.sets.get(kind)
        target = frozenset(record.data for record in wanted.records if record.type == kind)
        have = before.data if before else frozenset()
        looked_at = {data for data in have if is_key_record(KeyRecord(kind, data))}
        own = {data for data in looked_at if key_of(KeyRecord(kind, data)) in wanted.own_keys}
        foreign = looked_at - own - target
        if foreign and adds and not replace:
            shown = KeyRecord(kind, min(foreign)).to_text()
            return Conflict(
                wanted.owner,
                f"there is a key record that oepy did not make ({shown})",
                "remove it, add its key to the host's `keys`, or give --replace",
            )
        gone = (looked_at if replace and adds else own) - target
        change = _set_change(kind, wanted.ttl, before, frozenset(gone), target)
        if change is not None:
            changes.append(change)
    return Change(wanted.zone, wanted.owner, tuple(changes)) if changes else None


def _set_change(
    kind: int, ttl: int, before: FoundSet | None, gone: frozenset[bytes], target: frozenset[bytes]
) -> SetChange | None:
    have = before.data if before else frozenset()
    if before is not None and have - gone - target:
        ttl = before.ttl  # an RRset has one TTL (RFC 2181 §5.2): that of the records that are not ours stays
    new = target - have
    if before is not None and before.ttl != ttl and target:
        new = target  # adding a record that is there gives it the new TTL (RFC 2136 §3.4.2.2)
        gone = gone | (target & have)
    if not gone and not new:
        return None
    return SetChange(kind, ttl, before, tuple(sorted(gone)), tuple(sorted(new)))


def ancestors(owners: Iterable[Name], zone: Name) -> list[Name]:
    """The names between these and the apex of their zone, each once: a delegation at one of them would mean that
    the names below are not in this zone."""
    seen: dict[NameKey, Name] = {}
    for owner in owners:
        name = owner.parent() if owner != zone else zone
        while len(name.labels) > len(zone.labels) and name_key(name) not in seen:
            seen[name_key(name)] = name
            name = name.parent()
    return list(seen.values())


def batches(
    changes: Sequence[Change], max_bytes: int = MAX_BATCH_BYTES, max_changes: int = MAX_BATCH_CHANGES
) -> Iterator[list[Change]]:
    """The changes in order, each list of one zone and small enough for one message."""
    batch: list[Change] = []
    size = 0
    for change in changes:
        needed = change.size
        if batch and (size + needed > max_bytes or len(batch) >= max_changes or batch[0].zone != change.zone):
            yield batch
            batch, size = [], 0
        batch.append(change)
        size += needed
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Difference:
    """How a server or the validator differs from what is wanted: counts of key records of one name."""

    missing: tuple[KeyRecord, ...]
    extra: tuple[KeyRecord, ...]
    wrong_ttl: int | None = None

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra)

    def __str__(self) -> str:
        parts = [f"missing {record.to_text()}" for record in self.missing]
        parts += [f"not wanted {record.to_text()}" for record in self.extra]
        return "; ".join(parts)


def compare(wanted: Wanted, found: Found) -> Difference:
    """The key records that a name lacks, and those too many. Order and TTL do not count; other TXT neither."""
    have = {
        record
        for kind, rrset in found.sets.items()
        for data in rrset.data
        if is_key_record(record := KeyRecord(kind, data))
    }
    if not wanted.records:  # withdrawn: other keys may stay
        have = {record for record in have if key_of(record) in wanted.own_keys}
    missing = sorted(wanted.records - have, key=KeyRecord.to_text)
    extra = sorted(have - wanted.records, key=KeyRecord.to_text)
    return Difference(tuple(missing), tuple(extra))
